"""The Stable-Baselines3 wrapper: terminal frames, auto-resets, workers."""

import functools
import os
import signal

import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from tests.clock import Clock, ClockReader, by_episode, clocks, singles, three_views
from vlm_reward.sb3 import VLMRewardVecEnv
from vlm_reward.transforms import chain, difference, mix, potential, raw


def check(venv: VLMRewardVecEnv, steps: int, **options) -> None:
    """Every reward and info is that of the single wrapper; nothing of the next episode reaches the last step."""
    count = venv.num_envs
    expected = [iter(log) for log in singles(count, 2 * steps, **options)]
    venv.reset()
    for i in range(count):
        assert venv.reset_infos[i]["score"] == pytest.approx(next(expected[i])[1]["score"], abs=1e-5)
    ends = 0
    for _ in range(steps):
        _, rewards, dones, infos = venv.step(np.zeros((count, 1), np.float32))
        assert rewards.dtype == np.float32
        for i in range(count):
            reward, info = next(expected[i])
            assert rewards[i] == pytest.approx(reward, abs=1e-4)
            assert infos[i]["env_reward"] == info["env_reward"]
            assert infos[i]["score"] == pytest.approx(info["score"], abs=1e-4)
            assert "frames" not in infos[i]
            if dones[i]:
                ends += 1
                assert infos[i]["TimeLimit.truncated"] == (i % 2 == 0)
                assert venv.reset_infos[i]["score"] == pytest.approx(next(expected[i])[1]["score"], abs=1e-4)
    assert ends >= count


@pytest.mark.parametrize(
    "options",
    [
        {"transform": raw},
        {"transform": difference, "score_every": 2},
        {"transform": chain(potential(0.9), mix(env_weight=0.1)), "score_every": 3, "between": "interpolate"},
        {"transform": raw, "frames_fn": three_views, "over_views": "median"},
    ],
    ids=["raw", "difference held", "potential interpolated", "median of views"],
)
def test_rewards_are_those_of_single_environments(options):
    options = {"instruction": by_episode, **options}
    check(VLMRewardVecEnv.from_env_fns(clocks(3), ClockReader(), processes=False, **options), 12, **options)


def test_each_score_is_against_the_first_frame_of_its_own_episode():
    venv = VLMRewardVecEnv.from_env_fns(clocks(3), ClockReader(start_weight=1.0), "0", processes=False)
    venv.reset()
    ends = 0
    for _ in range(12):
        observations, rewards, dones, infos = venv.step(np.zeros((3, 1), np.float32))
        ends += dones.sum()
        for i in range(3):
            after = infos[i]["terminal_observation"] if dones[i] else observations[i]
            assert rewards[i] == pytest.approx(after[2] / 100, abs=1e-5)
            assert venv.reset_infos[i]["score"] == pytest.approx(0, abs=1e-6)
    assert ends > 3


def test_the_terminal_reward_is_that_of_the_terminal_observation():
    venv = VLMRewardVecEnv.from_env_fns([functools.partial(Clock, 0, 2)], ClockReader(), "0", processes=False)
    venv.reset()
    venv.step(np.zeros((1, 1), np.float32))
    observations, rewards, dones, infos = venv.step(np.zeros((1, 1), np.float32))
    assert dones[0]
    np.testing.assert_array_equal(infos[0]["terminal_observation"], [0, 0, 2])
    np.testing.assert_array_equal(observations[0], [0, 1, 0])
    assert rewards[0] == pytest.approx(0.02)  # the next episode's first frame would be 0.1
    assert venv.reset_infos[0]["score"] == pytest.approx(0.1)


def test_spawned_workers_give_the_same_and_their_death_is_an_error():
    options = {"instruction": by_episode, "transform": difference}
    venv = VLMRewardVecEnv.from_env_fns(clocks(2), ClockReader(), **options)
    check(venv, 8, **options)
    workers = venv.unwrapped.processes
    os.kill(workers[0].pid, signal.SIGKILL)
    workers[0].join()
    with pytest.raises(RuntimeError, match=r"worker 0 \(killed by SIGKILL\) died"):
        venv.step(np.zeros((2, 1), np.float32))
    assert not any(worker.is_alive() for worker in workers)
    venv.close()


def test_monitored_returns_are_learned_ones_and_frames_come_on_request():
    venv = VecMonitor(
        VLMRewardVecEnv.from_env_fns(clocks(1), ClockReader(), "0", processes=False, keep_frames=True)
    )
    venv.reset()
    venv.step(np.zeros((1, 1), np.float32))
    *_, infos = venv.step(np.zeros((1, 1), np.float32))
    assert infos[0]["episode"]["r"] == pytest.approx(0.01 + 0.02)
    np.testing.assert_array_equal(infos[0]["frames"][0, 0, 0], [0, 0, 2])


def test_environments_without_capture_are_refused():
    with pytest.raises(TypeError, match=r"must be wrapped in CaptureFrames: use .*from_env_fns"):
        VLMRewardVecEnv(DummyVecEnv([Clock]), ClockReader(), "0")


def test_errors_of_environments_reach_the_caller():
    with pytest.raises(ValueError, match="gives no frames"):
        VLMRewardVecEnv.from_env_fns(clocks(1, render_mode=None), ClockReader(), "0", processes=False)
    venv = VLMRewardVecEnv.from_env_fns(clocks(1, fault="reward"), ClockReader(), "0", processes=False)
    venv.reset()
    venv.step(np.zeros((1, 1), np.float32))
    with pytest.raises(ValueError, match="environment 0 gave NaN"):
        venv.step(np.zeros((1, 1), np.float32))
