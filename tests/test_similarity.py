import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vlm_reward.similarity import cosine, keep, multi_view, negative_l2, reached, toward

vectors = hnp.arrays(np.float64, (4, 3), elements=st.floats(-10, 10))


def test_cosine_of_a_right_angle_is_0_and_of_60_degrees_is_one_half():
    images = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [1.0, math.sqrt(3)]]])  # [N=1, V=3, D=2]
    scores = cosine(images, torch.tensor([5.0, 0.0]))
    torch.testing.assert_close(scores, torch.tensor([[1.0, 0.0, 0.5]]))


def test_cosine_takes_one_text_a_timestep():
    images = torch.eye(2).expand(2, 2, 2)  # both timesteps: view 0 along x, view 1 along y
    texts = torch.tensor([[[1.0, 0.0]], [[0.0, -1.0]]])  # [N, 1, D]
    assert cosine(images, texts).tolist() == [[1, 0], [0, -1]]


def test_negative_l2_of_a_3_4_5_triangle_is_minus_5():
    assert negative_l2(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])).item() == -5


def test_negative_l2_has_a_finite_gradient_where_the_embeddings_are_equal():
    images = torch.ones(3, requires_grad=True)
    negative_l2(images, torch.ones(3)).backward()
    assert images.grad is not None
    assert images.grad.tolist() == [0, 0, 0]


@given(vectors, vectors)
def test_unit_vectors_rank_alike_by_both_similarities(a, b):
    images, texts = (torch.nn.functional.normalize(torch.from_numpy(x) + 1e-3, dim=-1) for x in (a, b))
    similarity = cosine(images, texts)
    assert similarity.abs().max() <= 1 + 1e-9
    torch.testing.assert_close(
        negative_l2(images, texts), -(2 - 2 * similarity).clamp(min=0).sqrt(), atol=1e-6, rtol=0
    )


@given(vectors, st.floats(0.1, 100))
def test_cosine_ignores_the_length_of_a_vector(a, factor):
    images = torch.from_numpy(a) + 0.01
    text = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(cosine(images * factor, text), cosine(images, text), atol=1e-6, rtol=0)


def test_gradients_are_right():
    images = torch.randn(
        2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    text = torch.arange(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(cosine, (images, text))
    assert torch.autograd.gradcheck(negative_l2, (images, text))


def test_multi_view_is_the_mean_over_views_of_arrays_and_tensors():
    scores = np.array([[0.0, 0.5, 1.0], [-1.0, 0.0, 0.25]], np.float32)
    assert multi_view(scores).tolist() == [0.5, -0.25]
    assert multi_view(torch.from_numpy(scores)).tolist() == [0.5, -0.25]


def test_multi_view_as_the_median_takes_no_part_in_what_stands_alone():
    scores = np.array([[0.1, 0.9, 0.2], [-1.0, 0.0, 0.5]])
    assert multi_view(scores, "median").tolist() == [0.2, 0.0]
    assert multi_view(torch.from_numpy(scores), "median").tolist() == [0.2, 0.0]
    for two in (scores[:, :2], torch.from_numpy(scores[:, :2])):
        np.testing.assert_allclose(np.asarray(multi_view(two, "median")), [0.5, -0.5])
    with pytest.raises(ValueError, match=r"over_views must be one of .*, got 'max'"):
        multi_view(scores, "max")  # type: ignore[arg-type]


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(5,\)"):
        cosine(torch.ones(3, 4), torch.ones(5))
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(\)"):
        negative_l2(torch.ones(3, 4), torch.tensor(1.0))
    for wrong in (np.ones(3), np.ones((2, 0))):
        with pytest.raises(ValueError, match=r"scores must be \[N, V\]"):
            multi_view(wrong)


def test_toward_by_hand_is_the_unit_vector_from_the_start_to_the_sentence():
    text, start = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    direction = toward(text, start, 0.75)  # (-0.75, 1) over 1.25
    torch.testing.assert_close(direction, torch.tensor([-0.6, 0.8]))
    scores = cosine(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), direction)
    torch.testing.assert_close(scores, torch.tensor([-0.6, 0.8, 0.6]))  # the first frame is the worst of all


@given(vectors, vectors, vectors, st.floats(0, 3))
def test_toward_orders_an_episodes_frames_by_the_sentence_less_the_start(frames, texts, starts, weight):
    x, y, z = (
        torch.nn.functional.normalize(torch.from_numpy(v) + 0.01, dim=-1) for v in (frames, texts, starts)
    )
    length = (y - weight * z).norm(dim=-1)
    expected = (cosine(x, y) - weight * cosine(x, z))[length > 1e-3]
    scores = cosine(x, toward(y, z, weight))[length > 1e-3]
    torch.testing.assert_close(scores * length[length > 1e-3], expected, atol=1e-6, rtol=0)


def test_toward_of_weight_0_is_the_sentence_and_of_one_start_a_view_broadcasts():
    text, starts = torch.tensor([0.6, 0.8]), torch.eye(2)  # [D], [V, D]
    torch.testing.assert_close(toward(text, starts, 0.0), text.expand(2, 2))
    assert toward(text[None, None], starts[:, None], 1.0).shape == (2, 1, 2)


def test_what_is_so_already_turns_the_score_round():
    torch.testing.assert_close(reached(torch.tensor([0.3, 0.4])), torch.tensor([0.5, 1 / (1 + math.exp(-1))]))
    scores = keep(torch.tensor([0.8, -0.2]), torch.tensor([[0.0], [0.25], [0.5], [1.0]]))
    torch.testing.assert_close(scores, torch.tensor([[0.8, -0.2], [0.4, -0.1], [0.0, 0.0], [-0.8, 0.2]]))
