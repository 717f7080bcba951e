"""What we build on and do not control: if an upgrade changes one of these, this is where it shows."""

import numpy as np
import pytest
import torch
from metaworld.env_dict import ALL_V3_ENVIRONMENTS


def _raw(task: str):
    env = ALL_V3_ENVIRONMENTS[task](reward_function_version="v2")
    env._set_task_called, env._freeze_rand_vec = True, False
    return env


def test_raw_metaworld_hides_the_goal():
    observation, _ = _raw("drawer-open-v3").reset()
    assert np.array_equal(observation[-3:], np.zeros(3))


def test_raw_metaworld_ignores_the_seed_of_reset():
    env = _raw("push-v3")
    first, _ = env.reset(seed=0)
    second, _ = env.reset(seed=0)
    assert not np.array_equal(first, second)


def test_raw_metaworld_shows_a_stale_first_observation():
    """Why our reset calls forward: without it the drawer is where it was before the draw."""
    env = _raw("drawer-open-v3")
    gaps = []
    for _ in range(5):
        observation, _ = env.reset()
        after, *_ = env.step(np.zeros(4))
        gaps.append(np.linalg.norm(observation[4:7] - after[4:7]))
    assert max(gaps) > 0.02


def test_raw_metaworld_clips_observations_to_its_space():
    space = _raw("reach-v3").sawyer_observation_space
    assert np.array_equal(space.low[-3:], np.zeros(3))
    assert np.array_equal(space.high[-3:], np.zeros(3))


def test_siglip_reads_the_last_position(tiny_encoder):
    """Padding is part of the text: the embedding is that of the last of all positions."""
    model = tiny_encoder.model.eval()
    ids = tiny_encoder.tokenize(["open the window"])["input_ids"]
    with torch.no_grad():
        out = model.text_model(input_ids=ids)
        by_hand = model.text_model.head(out.last_hidden_state[:, -1])
    assert torch.allclose(out.pooler_output, by_hand, atol=1e-6)


def test_siglip_embeddings_are_not_unit_norm(tiny_encoder):
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = tiny_encoder.model.eval().get_image_features(pixel_values=pixels)
    norms = getattr(features, "pooler_output", features).norm(dim=-1)
    assert (norms - 1).abs().max() > 0.01


def test_gymnasium_has_three_autoreset_modes():
    from gymnasium.vector import AutoresetMode

    assert {mode.name for mode in AutoresetMode} == {"NEXT_STEP", "SAME_STEP", "DISABLED"}


def test_stepping_metaworld_past_its_limit_raises():
    env = _raw("reach-v3")
    env.reset()
    env.curr_path_length = 500
    with pytest.raises(ValueError, match="You must reset the env manually"):
        env.step(np.zeros(4))
