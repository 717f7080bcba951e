"""Environments: seeds, spaces, fresh first observations, experts."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from vlm_reward.envs import FINGERS, MetaWorldTask, behaviour, expert_policy, make_env
from vlm_reward.tasks import all_tasks


@pytest.mark.filterwarnings("ignore:.*(minimum|maximum) value is -?infinity.*")
def test_passes_gymnasiums_checker():
    env = make_env("drawer-open-v3", seed=0)
    check_env(env.unwrapped, skip_render_check=True)
    env.close()


@pytest.mark.parametrize("task", all_tasks())
def test_every_task_resets_to_what_the_seed_says_and_shows_its_goal(task):
    env = make_env(task, random_hand_start=True)
    first, _ = env.reset(seed=3)
    for _ in range(3):
        env.step(env.action_space.sample())
    other, _ = env.reset(seed=4)
    again, _ = env.reset(seed=3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert env.observation_space.contains(first)
    assert first.shape == (39,)
    assert np.abs(first[36:]).max() > 0  # the goal
    assert np.array_equal(first[:18], first[18:36])  # no earlier step
    env.close()


@pytest.mark.parametrize("task", ["drawer-open-v3", "door-open-v3", "coffee-button-v3", "window-close-v3"])
def test_first_observation_is_where_the_object_is(task):
    """The raw reset is wrong by up to 20 cm here; a step of doing nothing must hardly move the object."""
    env = make_env(task)
    for seed in range(3):
        before, _ = env.reset(seed=seed)
        after, *_ = env.step(np.zeros(4, np.float32))
        assert np.linalg.norm(before[4:7] - after[4:7]) < 0.01
    env.close()


def test_successive_resets_differ_but_the_sequence_is_the_seeds():
    def starts() -> list[np.ndarray]:
        env = make_env("push-v3", seed=7)
        found = [env.reset()[0] for _ in range(3)]
        env.close()
        return found

    first, second = starts(), starts()
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0], first[1])


def test_random_hand_start_moves_the_hand_by_up_to_ten_centimetres():
    env = make_env("reach-v3", random_hand_start=True)
    hands = np.array([env.reset(seed=seed)[0][:3] for seed in range(8)])
    assert 0.03 < (hands.max(0) - hands.min(0)).max() < 0.25
    env.close()


@pytest.mark.parametrize(
    "task", ["drawer-close-v3", "window-open-v3", "button-press-v3", "door-open-v3", "reach-v3"]
)
def test_experts_succeed_and_reward_rises(task):
    env, act = make_env(task, max_episode_steps=200), expert_policy(task)
    observation, info = env.reset(seed=0)
    assert info["success"] is False
    rewards = []
    for _ in range(200):
        observation, reward, terminated, _, info = env.step(act(observation))
        rewards.append(reward)
        assert not terminated
        assert 0 <= reward <= 10
        if info["success"]:
            break
    assert info["success"] is True
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5])
    env.close()


@pytest.mark.parametrize("task", all_tasks())
def test_every_expert_succeeds(task):
    env, act = make_env(task, max_episode_steps=500, terminate_on_success=True), expert_policy(task)
    for seed in range(6):
        observation, _ = env.reset(seed=seed)
        done = info = None
        while not done:
            observation, _, terminated, truncated, info = env.step(act(observation))
            done = terminated or truncated
        if info and info["success"]:
            break
    else:
        pytest.fail("the expert failed six times")
    env.close()


def test_limits_and_ends():
    env = make_env("drawer-close-v3", seed=1, max_episode_steps=3)
    env.reset()
    ends = [env.step(np.zeros(4, np.float32))[3] for _ in range(3)]
    assert ends == [False, False, True]
    env.close()
    env, act = make_env("drawer-close-v3", terminate_on_success=True), expert_policy("drawer-close-v3")
    observation, _ = env.reset(seed=0)
    terminated = False
    while not terminated:
        observation, _, terminated, truncated, info = env.step(act(observation))
        assert not truncated
        assert terminated == info["success"]
    env.close()
    with pytest.raises(ValueError, match=r"max_episode_steps must be in \[1, 500\], got 501"):
        make_env("drawer-close-v3", max_episode_steps=501)


def test_a_snapshot_shows_the_moment_again():
    env = make_env("drawer-close-v3", seed=0)
    env.reset()
    task = env.unwrapped
    assert isinstance(task, MetaWorldTask)
    before, there = task.snapshot(), task.metaworld.tcp_center.copy()
    for _ in range(10):
        env.step(np.ones(4, np.float32))
    assert np.linalg.norm(task.metaworld.tcp_center - there) > 0.02
    task.restore(before)
    assert np.allclose(task.metaworld.tcp_center, there, atol=1e-9)
    env.close()


def test_observing_a_state_says_what_the_step_there_said():
    env = make_env("drawer-close-v3", seed=3).unwrapped
    first, _ = env.reset(seed=3)
    np.testing.assert_array_equal(env.observe()[0], first)
    for _ in range(40):
        observation, _, _, _, info = env.step(expert_policy("drawer-close-v3")(first))
        first = observation
    seen, reward, there = env.observe()
    np.testing.assert_allclose(seen[:18], observation[:18], atol=1e-9)
    np.testing.assert_allclose(seen[18:36], seen[:18])  # as if the step before had shown the same
    assert there["success"] == info["success"]
    assert 0 <= reward <= 10


def test_bad_actions_are_errors_and_large_ones_are_clipped():
    env = make_env("reach-v3", seed=0)
    env.reset(seed=0)
    one, *_ = env.step(np.ones(4, np.float32))
    env.reset(seed=0)
    ten, *_ = env.step(np.full(4, 10, np.float32))
    assert np.allclose(one, ten)
    with pytest.raises(ValueError, match="the action must be finite"):
        env.step(np.array([np.nan, 0, 0, 0], np.float32))
    env.close()


def test_wrapped_by_gymnasium_record_episode_statistics():
    env = gym.wrappers.RecordEpisodeStatistics(make_env("reach-v3", seed=0, max_episode_steps=5))
    env.reset()
    for _ in range(5):
        *_, info = env.step(np.zeros(4, np.float32))
    assert info["episode"]["l"] == 5
    env.close()


def test_behaviours_do_what_they_are_called():
    env = make_env("drawer-close-v3")
    observation, _ = env.reset(seed=0)
    expert = behaviour("drawer-close-v3", "expert", np.random.default_rng(0))(0, observation)
    noisy = behaviour("drawer-close-v3", "noisy", np.random.default_rng(0))(0, observation)
    assert np.abs(expert - noisy).max() > 0
    random = behaviour("drawer-close-v3", "random", np.random.default_rng(0))
    held = [random(step, observation) for step in range(10)]
    assert np.array_equal(held[0], held[4])
    assert not np.array_equal(held[4], held[5])
    mixed = behaviour("drawer-close-v3", "mixed", np.random.default_rng(0))
    assert np.array_equal(mixed(0, observation), expert)
    assert not np.array_equal(mixed(70, observation), expert)
    env.close()


def test_a_wandering_hand_begins_as_the_expert_and_goes_anywhere():
    env = make_env("drawer-close-v3")
    observation, _ = env.reset(seed=0)
    wander = behaviour("drawer-close-v3", "wander", np.random.default_rng(0))
    expert = behaviour("drawer-close-v3", "expert", np.random.default_rng(0))
    assert np.array_equal(wander(0, observation), expert(0, observation))
    hands = []
    for step in range(60 + 6 * 40):
        observation, *_ = env.step(wander(step, observation))
        hands.append(observation[:3])
    reach = np.ptp(hands[60:], axis=0)
    assert (reach > (0.4, 0.2, 0.15)).all()  # metres, of a box of 1 x 0.6 x 0.45
    env.close()


def test_a_hand_sent_to_the_goal_gets_there_without_the_object():
    env = make_env("push-v3")
    observation, _ = env.reset(seed=0)
    act = behaviour("push-v3", "goal", np.random.default_rng(0))
    object_was, away = observation[4:7], []
    for step in range(100):
        observation, *_ = env.step(act(step, observation))
        away.append(np.linalg.norm(observation[:3] + FINGERS - observation[36:39]))
    env.close()
    assert np.median(away[50:]) < 0.06  # metres
    assert np.linalg.norm(observation[4:7] - object_was) < 0.02


def test_who_misses_moves_like_the_expert_and_leaves_the_window_as_it_was():
    moved = {}
    for kind in ("expert", "miss"):
        env = make_env("window-open-v3")
        observation, _ = env.reset(seed=0)
        act = behaviour("window-open-v3", kind, np.random.default_rng(1))
        hand, window = observation[:3], observation[4:7]
        for step in range(100):
            observation, *_ = env.step(act(step, observation))
        env.close()
        moved[kind] = [np.linalg.norm(observation[:3] - hand), np.linalg.norm(observation[4:7] - window)]
    assert moved["expert"][1] > 0.1  # metres
    assert moved["miss"][1] < 0.02
    assert moved["miss"][0] > 0.05
