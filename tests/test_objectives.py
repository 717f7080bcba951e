"""The six objectives: golden values by hand, gradients, degenerate batches, draws of frames in time."""

import math
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from training.objectives import OBJECTIVES, find_objective
from training.objectives.contrastive import (
    info_nce,
    negative_mask,
    r3m_language,
    similarity_matrix,
    similarity_rows,
    tcn,
    tcn_text,
)
from training.objectives.ranking import triplet
from training.objectives.value import vip

NAMES = tuple(OBJECTIVES)
PRESETS = ("paper", "official")
each_objective = pytest.mark.parametrize("name", NAMES)
each_preset = pytest.mark.parametrize("preset", PRESETS)


def rows(*vectors):
    return torch.tensor(vectors, dtype=torch.float64)


def embeddings(batch, seed, dim=5):
    values = torch.randn(batch, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(values, dim=-1).requires_grad_()


def make_batch(name, batch, dim=5):
    """Random unit-norm frames and text of a batch in which pairs of samples share an instruction."""
    frames = {frame: embeddings(batch, seed, dim) for seed, frame in enumerate(OBJECTIVES[name].frames)}
    return frames, embeddings(batch, 99, dim), torch.arange(batch) // 2


def is_close(value, expected):
    return value.ndim == 0 and value.item() == pytest.approx(expected, abs=1e-6)


# Golden values. Vectors of unit norm in the plane: (0.8, 0.6) has cosine 0.8 with (1, 0) and 0.6 with (0, 1).
TEXT = rows((1, 0), (0, 1))
EARLY = rows((0.6, 0.8), (1, 0))
LATE = rows((0.8, 0.6), (0, 1))


def test_similarities():
    a, b = rows((3, 4)), rows((0, 1))
    assert is_close(similarity_rows(a, b)[0], 0.8)  # (3, 4) / 5 . (0, 1)
    assert is_close(
        similarity_rows(a, b, "negative_l2")[0], -math.sqrt(18)
    )  # 3^2 + 3^2; not normalised first
    for kind in ("cosine", "negative_l2"):
        matrix = similarity_matrix(EARLY, LATE, kind)
        torch.testing.assert_close(matrix.diagonal(), similarity_rows(EARLY, LATE, kind))
        torch.testing.assert_close(matrix[0, 1], similarity_rows(EARLY[:1], LATE[1:], kind)[0])
    with pytest.raises(ValueError, match="similarity must be one of cosine, negative_l2, got 'dot'"):
        similarity_rows(a, b, "dot")


def test_triplet_golden():
    # Sample 0: 0.3 - 0.8 + 0.6 = 0.1. Sample 1: 0.3 - 1 + 0 < 0, so 0.
    assert is_close(triplet(TEXT, EARLY, LATE), 0.1)
    assert is_close(triplet(TEXT, EARLY, LATE, reduction="mean"), 0.05)
    # Margins of their own: 0.2 - 0.2 = 0 and 1.5 - 1 = 0.5.
    assert is_close(triplet(TEXT, EARLY, LATE, margin=torch.tensor([0.2, 1.5])), 0.5)
    # Distances of sample 0: sqrt(0.04 + 0.36) = 0.632456 and sqrt(0.16 + 0.64) = 0.894427;
    # 0.3 + 0.632456 - 0.894427 = 0.038028. Sample 1: 0.3 + 0 - sqrt(2) < 0.
    assert is_close(triplet(TEXT, EARLY, LATE, similarity="negative_l2"), 0.0380283)


def test_tcn_text_golden():
    # Sample 0: late 0.8, early 0.6, the other's late 0: log(1 + e^-0.2 + e^-0.8) = log 2.268060 = 0.818925.
    # Sample 1: late 1, early 0, the other's late 0.6: log(1 + e^-1 + e^-0.4) = log 2.038200 = 0.712067.
    assert is_close(tcn_text(TEXT, EARLY, LATE), (0.818925 + 0.712067) / 2)
    # Without other samples: log(1 + e^-0.2) = 0.598139, log(1 + e^-1) = 0.313262.
    assert is_close(tcn_text(TEXT, EARLY, LATE, num_negatives=0), (0.598139 + 0.313262) / 2)
    # Temperature 0.5 doubles the logits: log(1 + e^-0.4 + e^-1.6) and log(1 + e^-2 + e^-0.8).
    assert is_close(
        tcn_text(TEXT, EARLY, LATE, temperature=0.5),
        (math.log(1 + 0.670320 + 0.201897) + math.log(1 + 0.135335 + 0.449329)) / 2,
    )


def test_tcn_golden():
    early, middle, late = rows((1, 0), (0, 1)), rows((0.8, 0.6), (0, 1)), rows((0, 1), (1, 0))
    # From early (middle, late, other): (0.8, 0, 0), log(1 + 2 e^-0.8) = 0.641147; (1, 0, 0),
    # log(1 + 2 e^-1) = 0.551445.
    from_early = (0.641147 + 0.551445) / 2
    assert is_close(tcn(early, middle, late), from_early)
    # From late: (0.6, 0, 0): log(1 + 2 e^-0.6) = 0.740805; (0, 0, 0): log 3 = 1.098612.
    assert is_close(tcn(early, middle, late, symmetric=True), (from_early + (0.740805 + 1.098612) / 2) / 2)


def test_r3m_language_averages_its_pairs():
    early, middle, late = embeddings(4, 0), embeddings(4, 1), embeddings(4, 2)
    text = embeddings(4, 3)
    pairs = [tcn_text(text, a, b) for a, b in ((early, middle), (middle, late), (early, late))]
    assert is_close(r3m_language(text, early, middle, late), pairs[0].item())
    assert is_close(r3m_language(text, early, middle, late, all_pairs=True), sum(pairs).item() / 3)


def test_info_nce_golden():
    # Logits, texts as rows: [[0.8, 0], [0.6, 1]]. Positive left out: 0 - 0.8 and 0.6 - 1, mean -0.6.
    assert is_close(info_nce(LATE, TEXT), -0.6)
    # Images as anchors, by columns: 0.6 - 0.8 and 0 - 1, mean -0.6; both ways -0.6.
    assert is_close(info_nce(LATE, TEXT, symmetric=True), -0.6)
    # Positive put in: log(1 + e^-0.8) = 0.371101, log(1 + e^-0.4) = 0.513015.
    assert is_close(info_nce(LATE, TEXT, include_positive=True), (0.371101 + 0.513015) / 2)


def test_official_info_nce_is_symmetric_cross_entropy():
    goal, text, target = embeddings(6, 0), embeddings(6, 1), torch.arange(6)
    loss = info_nce(goal, text, num_candidates=None, include_positive=True, symmetric=True, temperature=0.1)
    logits = goal @ text.T / 0.1
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(loss, expected)


def test_vip_golden():
    initial, current = rows((0, 1), (0.6, 0.8)), rows((0.6, 0.8), (0.8, 0.6))
    following, goal = rows((0.8, 0.6), (1, 0)), rows((1, 0), (1, 0))
    call = partial(vip, initial, current, following, goal, gamma=0.5)
    # V0 = 0, 0.6; steps 1 + 0.6 - 0.5 * 0.8 = 1.2 and 1 + 0.8 - 0.5 * 1 = 1.3;
    # log((e^1.2 + e^1.3) / 2) = 1.2 + log((1 + e^0.1) / 2) = 1.251249;
    # 0.5 * -0.3 + 0.5 * 1.251249 = 0.475625.
    assert is_close(call(num_negatives=0), 0.475625)
    assert is_close(call(num_negatives=0, weight_log_term=False), 1.101249)  # -0.15 + 1.251249
    # Both goals are one, so each other's transition gives 1.3 and 1.2 again: 0.475625 + 0.5 * 1.251249.
    assert is_close(call(num_negatives=1), 1.101249)
    # Scale 1 / (1 - 0.5) = 2: V0 = 0, 1.2; steps 1 + 1.2 - 0.8 = 1.4 and 1 + 1.6 - 1 = 1.6;
    # -0.5 * 0.6 + 1.4 + log((1 + e^0.2) / 2) = -0.3 + 1.4 + 0.104992.
    assert is_close(call(num_negatives=0, value_scale=None, weight_log_term=False), 1.204992)


def test_vip_does_not_overflow():
    # Values go from 50 to -50 in one step: exp(1 + 50 + 49) is infinite in float32.
    a = torch.tensor([[1.0, 0.0]], requires_grad=True)
    loss = vip(a, a, -a, a.detach(), value_scale=None, weight_log_term=False)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-1 + 100, abs=1e-3)  # 0.02 * -50 + (1 + 50 + 0.98 * 50)


SIMILARITIES = ("cosine", "negative_l2")
FUNCTIONS = {
    "triplet": (triplet, 3, {"margin": 0.5}),
    "tcn_text": (tcn_text, 3, {}),
    "tcn_text masked": (tcn_text, 3, {"mask_same_text": True, "num_negatives": None}),
    "tcn": (tcn, 3, {}),
    "tcn symmetric": (tcn, 3, {"symmetric": True, "temperature": 0.2}),
    "r3m_language": (r3m_language, 4, {"all_pairs": True}),
    "info_nce paper": (info_nce, 2, {}),
    "info_nce official": (info_nce, 2, {"num_candidates": None, "include_positive": True, "symmetric": True}),
    "vip paper": (vip, 4, {}),
    "vip official": (vip, 4, {"value_scale": None, "weight_log_term": False, "num_negatives": 0}),
}


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("case", FUNCTIONS)
def test_gradients_are_those_of_finite_differences(case, similarity):
    function, count, hyper = FUNCTIONS[case]
    if function is not triplet:
        hyper = hyper | {"text_id": torch.tensor([0, 0, 1, 2])}
    inputs = tuple(embeddings(4, seed, dim=3) for seed in range(count))
    assert torch.autograd.gradcheck(partial(function, similarity=similarity, **hyper), inputs)


@each_preset
@each_objective
def test_each_name_runs_in_each_preset(name, preset):
    frames, text, text_id = make_batch(name, 8)
    objective = OBJECTIVES[name]
    hyper = objective.preset(preset)
    assert set(hyper) == set(objective.hyper)  # nothing is left to a default
    loss = objective(frames, text, text_id, generator=torch.Generator().manual_seed(0), **hyper)
    assert loss.ndim == 0
    assert loss.isfinite()
    loss.backward()
    for tensor in (*frames.values(), text):  # every input that is asked for matters
        assert tensor.grad.abs().sum() > 0


def test_the_sums():
    frames, text, text_id = make_batch("liv", 6)
    loss = {name: OBJECTIVES[name](frames, text, text_id) for name in ("vip_text", "vip_text+vip", "liv")}
    transition = [frames[name] for name in ("initial", "current", "next")]
    torch.testing.assert_close(loss["vip_text"], vip(*transition, text))
    torch.testing.assert_close(loss["vip_text+vip"] - loss["vip_text"], vip(*transition, frames["goal"]))
    torch.testing.assert_close(loss["liv"] - loss["vip_text+vip"], info_nce(frames["goal"], text))


def test_bare_calls_are_the_papers():
    for name in NAMES:
        batch = make_batch(name, 6)
        torch.testing.assert_close(
            OBJECTIVES[name](*batch), OBJECTIVES[name](*batch, **OBJECTIVES[name].paper)
        )


@pytest.mark.parametrize("mask_same_text", [False, True])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@each_preset
@each_objective
def test_finite_on_degenerate_batches(name, preset, similarity, mask_same_text):
    objective = OBJECTIVES[name]
    hyper = objective.preset(preset) | {"similarity": similarity}
    if name != "triplet":
        hyper["mask_same_text"] = mask_same_text
    point = F.normalize(torch.ones(4), dim=0)
    batches = {
        "one sample": embeddings(1, 0, 4).detach().float(),
        "one sample twice": point.repeat(2, 1),
        "all embeddings equal": point.repeat(5, 1),
        "opposite": torch.stack([point, -point] * 3),
    }
    for what, values in batches.items():
        for text_id in (torch.zeros(len(values), dtype=torch.long), torch.arange(len(values))):
            frames = {frame: values.clone().requires_grad_() for frame in objective.frames}
            text = values.clone().requires_grad_()
            loss = objective(frames, text, text_id, **hyper)
            loss.backward()
            assert loss.isfinite(), what
            for tensor in (*frames.values(), text):
                assert tensor.grad.isfinite().all(), what


@each_preset
@each_objective
def test_order_of_the_batch_does_not_matter_with_all_negatives(name, preset):
    objective = OBJECTIVES[name]
    frames, text, text_id = make_batch(name, 6)
    hyper = objective.preset(preset)
    hyper |= {key: None for key in ("num_negatives", "num_candidates") if key in hyper}
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = {key: value[order] for key, value in frames.items()}
    torch.testing.assert_close(
        objective(frames, text, text_id, **hyper), objective(shuffled, text[order], text_id[order], **hyper)
    )


@each_objective
def test_half_precision_is_computed_in_float32(name):
    frames, text, text_id = make_batch(name, 4)
    frames = {key: value.detach().bfloat16() for key, value in frames.items()}
    loss = OBJECTIVES[name](frames, text.detach().bfloat16(), text_id)
    assert loss.dtype == torch.float32
    rounded = {key: value.float() for key, value in frames.items()}
    torch.testing.assert_close(loss, OBJECTIVES[name](rounded, text.detach().bfloat16().float(), text_id))


@settings(deadline=None, max_examples=60)
@given(
    ids=st.lists(st.integers(0, 3), min_size=1, max_size=9),
    count=st.none() | st.integers(0, 10),
    seed=st.none() | st.integers(0, 99),
    same=st.booleans(),
    include_self=st.booleans(),
)
def test_negative_mask(ids, count, seed, same, include_self):
    text_id = torch.tensor(ids)
    mask = negative_mask(
        len(ids),
        count,
        text_id=text_id,
        mask_same_text=same,
        include_self=include_self,
        generator=None if seed is None else torch.Generator().manual_seed(seed),
    )
    for b, row in enumerate(mask.tolist()):
        allowed = {n for n in range(len(ids)) if n != b and not (same and ids[n] == ids[b])}
        allowed |= {b} if include_self else set()
        chosen = {n for n, taken in enumerate(row) if taken}
        assert chosen <= allowed
        assert len(chosen) == len(allowed) if count is None else len(chosen) == min(count, len(allowed))


def test_negatives_are_drawn_evenly_and_reproducibly():
    generator = torch.Generator().manual_seed(0)
    total = sum(negative_mask(5, 2, generator=generator).float() for _ in range(2000)) / 2000
    expected = (1 - torch.eye(5)) * 2 / 4
    assert (total - expected).abs().max() < 0.05  # four standard deviations of 2,000 draws are 0.045
    twice = [negative_mask(9, 3, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*twice)
    assert negative_mask(4, 1).nonzero().tolist() == [
        [0, 1],
        [1, 2],
        [2, 3],
        [3, 0],
    ]  # no generator: the next


def test_masks_remove_false_negatives():
    text_id = torch.tensor([0, 0, 1])
    text, early, late = embeddings(3, 0), embeddings(3, 1), embeddings(3, 2)
    # The later frame of sample 1 has a gradient through sample 0's denominator unless the mask takes it out.
    for mask, reached in ((False, True), (True, False)):
        chosen = negative_mask(3, 3, text_id=text_id, mask_same_text=mask)
        assert chosen[0, 1].item() is reached
        logits = similarity_matrix(text, late)
        loss = tcn_text(text, early, late, text_id=text_id, mask_same_text=mask)
        rivals = [[1, 2], [0, 2], [0, 1]] if not mask else [[2], [2], [0, 1]]
        expected = [
            -math.log(
                (top := logits[b, b].exp().item())
                / (
                    top
                    + similarity_rows(text, early)[b].exp().item()
                    + sum(logits[b, n].exp().item() for n in other)
                )
            )
            for b, other in enumerate(rivals)
        ]
        assert is_close(loss, sum(expected) / 3)
    # One instruction for all: nothing to tell apart.
    same = torch.zeros(3, dtype=torch.long)
    goal_loss = partial(info_nce, late, text, text_id=same, mask_same_text=True)
    assert goal_loss(include_positive=True).item() == 0
    assert goal_loss(include_positive=False).item() == 0
    without = vip(text, early, late, text, text_id=same, num_negatives=0)
    torch.testing.assert_close(vip(text, early, late, text, text_id=same, mask_same_text=True), without)


def test_bad_input_says_what_was_wrong():
    frames, text, text_id = make_batch("triplet", 4)
    objective = OBJECTIVES["triplet"]
    with pytest.raises(ValueError, match="triplet needs frames early, late; missing late"):
        objective({"early": frames["early"]}, text, text_id)
    with pytest.raises(ValueError, match="triplet has no gamma; it has margin, similarity, reduction"):
        objective(frames, text, text_id, gamma=0.9)
    with pytest.raises(ValueError, match=r"late must be \(4, 5\) as text is, got \(3, 5\)"):
        objective(frames | {"late": frames["late"][:3]}, text, text_id)
    with pytest.raises(ValueError, match=r"text must be \[B, D\] with B at least 1, got \(0, 5\)"):
        objective(frames, text[:0], text_id)
    with pytest.raises(ValueError, match=r"text_id must be \[4\], got \(3,\)"):
        objective(frames, text, text_id[:3])
    with pytest.raises(ValueError, match="got 'tripet'; did you mean triplet"):
        find_objective("tripet")
    assert find_objective("liv") is OBJECTIVES["liv"]
    with pytest.raises(ValueError, match="preset must be one of paper, official, got 'papers'"):
        objective.preset("papers")
    with pytest.raises(ValueError, match="reduction must be sum or mean"):
        objective(frames, text, text_id, reduction="none")
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        tcn_text(TEXT, EARLY, LATE, temperature=0)
    with pytest.raises(ValueError, match=r"gamma must be in \(0, 1\), got 1"):
        vip(TEXT, TEXT, TEXT, TEXT, gamma=1)
    with pytest.raises(ValueError, match="num_negatives must be at least 0"):
        negative_mask(3, -1)
    with pytest.raises(ValueError, match=r"mask_same_text needs text_id of shape \(3,\), got None"):
        negative_mask(3, 1, mask_same_text=True)


# Frames in time.
def check_times(name, preset, length, times):
    """`times`: {frame: int array [n]}."""
    for values in times.values():
        assert (values >= 0).all()
        assert (values < length).all()
    if "early" in times:
        assert (times["early"] < times["late"]).all()
    if "middle" in times:
        assert (times["early"] < times["middle"]).all()
        assert (times["middle"] <= times["late"]).all()
        if preset == "paper" and length > 2:
            assert (times["middle"] < times["late"]).all()
    if "current" in times:
        assert (times["initial"] == 0).all()
        assert (times["next"] == times["current"] + 1).all()
        if preset == "paper" and length > 2:
            assert (times["current"] > 0).all()
    if "goal" in times:
        assert (times["goal"] == length - 1).all()


@settings(deadline=None, max_examples=150)
@given(
    name=st.sampled_from(NAMES),
    preset=st.sampled_from(PRESETS),
    length=st.integers(2, 120),
    n=st.integers(0, 20),
    seed=st.integers(0, 99),
)
def test_drawn_timesteps(name, preset, length, n, seed):
    objective = OBJECTIVES[name]
    drawn = objective.draw_timesteps(length, n, np.random.default_rng(seed), preset=preset)
    assert drawn.dtype == np.int64
    assert drawn.shape == (n, len(objective.frames))
    check_times(name, preset, length, dict(zip(objective.frames, drawn.T, strict=True)))
    again = objective.draw_timesteps(length, n, np.random.default_rng(seed), preset=preset)
    np.testing.assert_array_equal(drawn, again)


@pytest.mark.parametrize(("name", "size"), [("triplet", 2), ("r3m", 3)])
def test_papers_draw_is_uniform(name, size):
    drawn = OBJECTIVES[name].draw_timesteps(5, 20_000, np.random.default_rng(0))
    found, counts = np.unique(drawn, axis=0, return_counts=True)
    assert found.tolist() == [list(c) for c in combinations(range(5), size)]  # 10 of them either way
    assert np.abs(counts / 2000 - 1).max() < 0.09  # four standard deviations


def test_official_draws():
    # R3M: the middle is uniform in [1, 3) for four frames, early below it, late from it on.
    drawn = OBJECTIVES["r3m"].draw_timesteps(4, 4000, np.random.default_rng(0), preset="official")
    assert np.unique(drawn, axis=0).tolist() == [
        [0, 1, 1], [0, 1, 2], [0, 1, 3], [0, 2, 2], [0, 2, 3], [1, 2, 2], [1, 2, 3],
    ]  # fmt: skip
    assert (drawn[:, 1] == 1).mean() == pytest.approx(0.5, abs=0.03)
    # VIP: t may be the first frame; the paper has it after.
    for preset, first in (("official", 0), ("paper", 1)):
        drawn = OBJECTIVES["liv"].draw_timesteps(4, 300, np.random.default_rng(0), preset=preset)
        assert np.unique(drawn, axis=0).tolist() == [[0, t, t + 1, 3] for t in range(first, 3)]


@each_objective
def test_draws_refuse_what_cannot_be_drawn(name):
    objective, rng = OBJECTIVES[name], np.random.default_rng(0)
    with pytest.raises(ValueError, match="at least 2 frames to be ranked in time, got 1"):
        objective.draw_timesteps(1, 3, rng)
    with pytest.raises(ValueError, match="preset must be one of"):
        objective.draw_timesteps(9, 3, rng, preset="none")
    with pytest.raises(ValueError, match="n must be at least 0"):
        objective.draw_timesteps(9, -1, rng)
    with pytest.raises(ValueError, match="a group must have at least"):
        objective.draw_group(9, 1, rng)


@settings(deadline=None, max_examples=100)
@given(
    name=st.sampled_from(NAMES),
    preset=st.sampled_from(PRESETS),
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=4),
    count=st.integers(4, 10),
    seed=st.integers(0, 99),
)
def test_grouped_samples(name, preset, lengths, count, seed):
    objective, rng = OBJECTIVES[name], np.random.default_rng(seed)
    drawn = [objective.draw_group(length, count, rng, preset=preset) for length in lengths]
    for length, times in zip(lengths, drawn, strict=True):
        assert times.shape == (count,)
        assert len(set(times.tolist())) == min(length, count)
    timesteps = torch.from_numpy(np.stack(drawn))
    samples = objective.group_samples(timesteps, torch.tensor(lengths), preset=preset)
    assert set(samples) == {*objective.frames, "trajectory"}
    assert set(samples["trajectory"].tolist()) == set(range(len(lengths)))  # each gives at least one
    flat = timesteps.flatten()
    for g, length in enumerate(lengths):
        of_g = {frame: samples[frame][samples["trajectory"] == g] for frame in objective.frames}
        assert all((indices // count == g).all() for indices in of_g.values())
        check_times(name, preset, length, {frame: flat[indices].numpy() for frame, indices in of_g.items()})
        assert len({tuple(row) for row in torch.stack([flat[i] for i in of_g.values()], 1).tolist()}) == len(
            of_g[objective.frames[0]]
        )


def test_grouped_samples_by_hand():
    lengths = torch.tensor([9, 3])
    times = torch.tensor([[0, 2, 3, 8], [0, 1, 2, 2]])  # the second is too short and repeats its last frame
    pairs = OBJECTIVES["triplet"].group_samples(times, lengths)
    assert list(zip(pairs["early"].tolist(), pairs["late"].tolist(), strict=True)) == [
        (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3), (4, 5), (4, 6), (5, 6),
    ]  # fmt: skip
    assert pairs["trajectory"].tolist() == [0] * 6 + [1] * 3
    triples = OBJECTIVES["r3m"].group_samples(times, lengths)
    assert torch.stack([triples[f] for f in ("early", "middle", "late")], 1).tolist() == [
        [0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3], [4, 5, 6],
    ]  # fmt: skip
    assert (
        len(OBJECTIVES["r3m"].group_samples(times, lengths, preset="official")["late"]) == 5 + 9
    )  # and the pairs
    steps = OBJECTIVES["liv"].group_samples(times, lengths)  # 2 -> 3 of the first, 1 -> 2 of the second
    assert torch.stack([steps[f] for f in ("initial", "current", "next", "goal")], 1).tolist() == [
        [0, 1, 2, 3], [4, 5, 6, 7],
    ]  # fmt: skip
    assert OBJECTIVES["liv"].group_samples(times, lengths, preset="official")["current"].tolist() == [1, 4, 5]


def test_grouped_samples_are_capped():
    objective = OBJECTIVES["triplet"]
    times = torch.arange(8).repeat(8, 1)  # 8 trajectories of 28 pairs
    lengths = torch.full((8,), 8)
    assert len(objective.group_samples(times, lengths)["early"]) == 224
    for seed in (None, 0):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        capped = objective.group_samples(times, lengths, max_samples=50, generator=generator)
        pairs = set(zip(capped["early"].tolist(), capped["late"].tolist(), strict=True))
        assert len(pairs) == 50
        assert set(capped["trajectory"].tolist()) == set(range(8))


def test_grouped_samples_refuse_bad_groups():
    objective, lengths = OBJECTIVES["vip_text"], torch.tensor([9])
    with pytest.raises(ValueError, match="must hold the first and the last timestep"):
        objective.group_samples(torch.tensor([[1, 2, 3, 8]]), lengths)
    with pytest.raises(ValueError, match="no sample of initial, current, next, goal can be formed"):
        objective.group_samples(torch.tensor([[0, 2, 4, 8]]), lengths)
    with pytest.raises(ValueError, match="must ascend within"):
        objective.group_samples(torch.tensor([[0, 3, 2, 8]]), lengths)
    with pytest.raises(ValueError, match="must ascend within"):
        objective.group_samples(torch.tensor([[0, 3, 4, 9]]), lengths)
    with pytest.raises(
        ValueError, match=r"timesteps must be \[G, F\] and lengths \[G\], got \(4,\) and \(1,\)"
    ):
        objective.group_samples(torch.tensor([0, 1, 2, 8]), lengths)
    with pytest.raises(ValueError, match="max_samples must be at least 1, got 0"):
        objective.group_samples(torch.tensor([[0, 1, 2, 8]]), lengths, max_samples=0)


def test_grouped_loss_is_the_sum_over_all_pairs():
    times = torch.tensor([[0, 4, 5], [1, 2, 6]])
    samples = OBJECTIVES["triplet"].group_samples(times, torch.tensor([9, 9]))
    encoded, texts = embeddings(6, 0), embeddings(2, 1)
    frames = {frame: encoded[samples[frame]] for frame in ("early", "late")}
    loss = OBJECTIVES["triplet"](frames, texts[samples["trajectory"]], samples["trajectory"])
    scores = (encoded.view(2, 3, 5) * texts[:, None]).sum(-1).tolist()
    by_hand = sum(max(0, 0.3 - row[j] + row[i]) for row in scores for i, j in combinations(range(3), 2))
    assert is_close(loss, by_hand)
    assert by_hand > 0
