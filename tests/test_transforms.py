"""Transforms: hand-computed values, and what each leaves alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_reward.reward_model import RewardModel
from vlm_reward.transforms import (
    GoalBaseline,
    RunningNorm,
    RunningStats,
    Transition,
    chain,
    clip,
    difference,
    goal_baseline,
    mix,
    potential,
    raw,
)


def transition(score, previous=None, env_reward=None, terminated=None, truncated=None) -> Transition:
    score = np.asarray(score, float)
    zeros = np.zeros_like(score)
    return Transition(
        score,
        zeros if previous is None else np.asarray(previous, float),
        zeros if env_reward is None else np.asarray(env_reward, float),
        zeros > 0 if terminated is None else np.asarray(terminated, bool),
        zeros > 0 if truncated is None else np.asarray(truncated, bool),
    )


# Shapings


def test_raw_is_the_score_and_difference_its_change():
    step = transition([0.5, 0.2], previous=[0.25, 0.3])
    np.testing.assert_array_equal(raw(step), [0.5, 0.2])
    np.testing.assert_allclose(difference(step), [0.25, -0.1])
    assert raw(step) is not step.score


def test_potential_counts_a_terminal_state_as_zero_and_a_truncated_one_as_it_is():
    step = transition(
        [0.5, 0.5, 0.5, 0.5],
        previous=[0.25] * 4,
        terminated=[False, True, False, True],
        truncated=[False, False, True, True],
    )
    np.testing.assert_allclose(potential(0.9)(step), [0.2, -0.25, 0.2, -0.25])


scores = st.lists(st.floats(-1, 1), min_size=2, max_size=12)


@given(scores, st.floats(0, 1))
def test_the_discounted_sum_of_potentials_telescopes(values, gamma):
    """gamma^T Phi(s_T) - Phi(s_0) when cut, -Phi(s_0) when ended: alone, it prefers no path."""
    phi = np.array(values)
    steps = len(phi) - 1
    last = np.arange(steps) == steps - 1
    discount = gamma ** np.arange(steps)
    cut = potential(gamma)(transition(phi[1:], phi[:-1], truncated=last))
    ended = potential(gamma)(transition(phi[1:], phi[:-1], terminated=last))
    assert discount @ cut == pytest.approx(gamma**steps * phi[-1] - phi[0], abs=1e-9)
    assert discount @ ended == pytest.approx(-phi[0], abs=1e-9)


class RandomMDP:
    """Eight states, three actions, deterministic; a third of the moves end the episode."""

    gamma = 0.9

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.following = rng.integers(0, 8, (8, 3))
        self.ends = rng.random((8, 3)) < 1 / 3
        self.reward = rng.normal(size=(8, 3))
        self.phi = rng.normal(scale=3, size=8)

    def transitions(self, ends: np.ndarray) -> Transition:
        """Every state and action at once, as if they were parallel environments."""
        before = np.repeat(self.phi, 3)
        after = self.phi[self.following].ravel()
        return transition(after, before, self.reward.ravel(), terminated=ends.ravel())

    def q(self, reward: np.ndarray) -> np.ndarray:
        q = np.zeros((8, 3))
        for _ in range(400):
            q = reward.reshape(8, 3) + self.gamma * ~self.ends * q.max(1)[self.following]
        return q


@pytest.mark.parametrize("seed", range(5))
def test_potential_shaping_leaves_the_optimal_policy_of_an_mdp(seed):
    """Q' = Q - Phi exactly, so the same action is best in every state."""
    mdp = RandomMDP(seed)
    shaping = chain(potential(mdp.gamma), mix(env_weight=1.0))
    plain, shaped = mdp.q(mdp.reward), mdp.q(shaping(mdp.transitions(mdp.ends)))
    np.testing.assert_allclose(shaped, plain - mdp.phi[:, None], atol=1e-9)
    np.testing.assert_array_equal(shaped.argmax(1), plain.argmax(1))


@pytest.mark.parametrize(
    "shaping", [raw, difference, potential(0.5)], ids=["raw", "difference", "potential with another gamma"]
)
def test_other_shapings_change_an_optimal_policy(shaping):
    changed = 0
    for seed in range(5):
        mdp = RandomMDP(seed)
        shaped = mdp.q(chain(shaping, mix(env_weight=1.0))(mdp.transitions(mdp.ends)))
        changed += (shaped.argmax(1) != mdp.q(mdp.reward).argmax(1)).any()
    assert changed


def test_a_terminal_state_with_a_potential_changes_an_optimal_policy():
    changed = 0
    for seed in range(5):
        mdp = RandomMDP(seed)
        shaping = chain(potential(mdp.gamma), mix(env_weight=1.0))
        shaped = mdp.q(shaping(mdp.transitions(np.zeros_like(mdp.ends))))
        changed += (shaped.argmax(1) != mdp.q(mdp.reward).argmax(1)).any()
    assert changed


def test_shaping_at_a_truncation_agrees_with_a_bootstrapped_target():
    """r + F + gamma (V - Phi)(s') = r + gamma V(s') - Phi(s): what SB3's timeout handling computes."""
    reward, value, gamma = 0.3, 2.0, 0.9
    step = transition([0.5], previous=[0.2], env_reward=[reward], truncated=[True])
    shaped = chain(potential(gamma), mix(env_weight=1.0))(step)
    assert shaped[0] + gamma * (value - 0.5) == pytest.approx(reward + gamma * value - 0.2)


# Pieces


def test_clip_and_mix():
    step = transition([2.0, -3.0, 0.5], env_reward=[10.0, 0.0, 1.0])
    np.testing.assert_array_equal(chain(raw, clip(-1, 1))(step), [1, -1, 0.5])
    np.testing.assert_array_equal(chain(raw, mix(env_weight=0.5, weight=2))(step), [9, -6, 1.5])
    np.testing.assert_array_equal(chain(raw, mix(env_weight=1, weight=0))(step), [10, 0, 1])


def test_pieces_apply_in_order():
    step = transition([2.0], env_reward=[10.0])
    assert chain(raw, clip(-1, 1), mix(env_weight=1))(step) == 11
    assert chain(raw, mix(env_weight=1), clip(-1, 1))(step) == 1
    assert chain(raw)(step) == 2


@given(st.lists(st.lists(st.floats(-100, 100), max_size=5), min_size=1, max_size=6))
def test_running_stats_are_those_of_all_values_at_once(batches):
    stats = RunningStats()
    for batch in batches:
        stats = stats.update(np.array(batch))
    values = np.array([value for batch in batches for value in batch])
    assert stats.count == len(values)
    if len(values):
        assert stats.mean == pytest.approx(values.mean(), abs=1e-8)
        assert stats.variance == pytest.approx(values.var(), abs=1e-6)


def test_running_norm():
    norm = RunningNorm(epsilon=1e-12)
    np.testing.assert_allclose(chain(raw, norm)(transition([1.0, 3.0])), [-1, 1])  # mean 2, deviation 1
    np.testing.assert_allclose(chain(raw, norm)(transition([2.0, 6.0])), [-1 / 14**0.5 * 2, 3 * 2 / 14**0.5])
    assert norm.stats == RunningStats(4, 3.0, 3.5)
    norm.training = False
    chain(raw, norm)(transition([100.0]))
    assert norm.stats.count == 4
    scale = RunningNorm(center=False, epsilon=1e-12)
    np.testing.assert_allclose(chain(raw, scale)(transition([1.0, 3.0])), [1, 3])


def test_running_norm_of_a_constant_is_finite():
    norm = RunningNorm()
    for _ in range(3):
        assert chain(raw, norm)(transition([0.25]))[0] == 0


# Goal-baseline


def test_goal_baseline_by_hand():
    goal, baseline = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    away = np.array([[[-1.0, 0.0]], [[1.0, 0.0]]])  # [N=2, V=1, D=2]: opposite of the goal, and the goal
    # The projection of (-2, 0) on the line's direction (1, -1) is (-1, 1), of squared length 2.
    np.testing.assert_allclose(goal_baseline(away, goal, baseline, 0.0), [[-1], [1]], atol=1e-12)
    np.testing.assert_allclose(goal_baseline(away, goal, baseline, 0.5), [[-0.25], [1]], atol=1e-12)
    np.testing.assert_allclose(goal_baseline(away, goal, baseline, 1.0), [[0], [1]], atol=1e-12)


def test_goal_baseline_ignores_what_neither_sentence_speaks_of():
    goal, baseline = np.array([1.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0])
    images = np.array([[0.6, 0.0, 0.8], [0.6, 0.0, -0.8]])
    np.testing.assert_allclose(goal_baseline(images, goal, baseline, 1.0), [0.96, 0.96])


def test_a_goal_baseline_model_scores_each_sentence_against_the_baseline(tiny_adapter_dir, frames):
    import torch

    model = RewardModel.from_pretrained(tiny_adapter_dir, dtype=torch.float32)
    texts = ["press the button", "turn on faucet", "press the button"]
    np.testing.assert_allclose(
        GoalBaseline(model, "open the window", 0).score(frames, texts), model.score(frames, texts), atol=1e-5
    )
    regularised = GoalBaseline(model, "open the window", 0.7)
    scores = regularised.score(frames, texts)
    expected = goal_baseline(
        model.embed(frames),
        model.embed_text(texts)[:, None],
        model.embed_text(["open the window"])[0],
        0.7,
    )
    np.testing.assert_array_equal(scores, expected)
    np.testing.assert_array_equal(regularised.score(frames, texts[0])[[0, 2]], scores[[0, 2]])
    assert scores.dtype == np.float32
    assert np.abs(scores - model.score(frames, texts)).max() > 0.001


# Bad input


def test_bad_arguments_say_what_they_got():
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\], got 1.5"):
        potential(1.5)
    with pytest.raises(ValueError, match="clip needs low < high, got 1 and -1"):
        clip(1, -1)
    with pytest.raises(ValueError, match="weights must be finite, got env_weight=nan"):
        mix(env_weight=float("nan"))
    with pytest.raises(ValueError, match="epsilon must be positive, got 0"):
        RunningNorm(epsilon=0)
    one = np.array([1.0, 0.0])
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got -1"):
        goal_baseline(one, one, -one, -1)
    with pytest.raises(ValueError, match="span no line: use another baseline"):
        goal_baseline(one, one, one, 0.5)
