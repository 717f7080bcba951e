"""Memory stays flat over long runs and many environments. Slow: `pytest -m slow tests/test_memory.py`."""

import gc
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm_reward.envs import make_env
from vlm_reward.reward_model import RewardModel
from vlm_reward.wrappers import VLMRewardWrapper

MEGABYTE = 2**20


def resident() -> float:
    """Memory of this process, megabytes."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MEGABYTE


def growth(work: Callable[[], object], warm: int, count: int) -> float:
    """Megabytes that `count` calls add, after `warm` ones."""
    for _ in range(warm):
        work()
    before = resident()
    for _ in range(count):
        work()
    return resident() - before


def test_growth_sees_a_leak():
    # Pages of their own: the allocator may have freed ones left from earlier tests.
    kept: list[mmap.mmap] = []

    def leak() -> None:
        kept.append(mmap.mmap(-1, MEGABYTE))
        kept[-1].write(b"x" * MEGABYTE)

    assert growth(leak, 2, 30) > 25
    assert growth(lambda: bytearray(b"x" * MEGABYTE), 2, 30) < 5


@pytest.mark.slow
def test_a_hundred_thousand_wrapped_steps_leak_nothing(tiny_adapter_dir):
    model = RewardModel.from_pretrained(tiny_adapter_dir)
    env = VLMRewardWrapper(make_env("drawer-close-v3", max_episode_steps=100), model)
    env.action_space.seed(0)

    def episode() -> None:
        env.reset()
        while not any(env.step(env.action_space.sample())[2:4]):
            pass

    # A step that kept its frames (2 views of 32 pixels), or its infos, would keep 600 MB, or 100.
    assert growth(episode, 20, 980) < 30
    env.close()


@pytest.mark.slow
def test_two_hundred_environments_leak_nothing(tiny_adapter_dir):
    model = RewardModel.from_pretrained(tiny_adapter_dir)

    def rebuild() -> None:
        env = VLMRewardWrapper(make_env("drawer-close-v3"), model)
        env.reset(seed=0)
        env.step(env.action_space.sample())
        env.close()

    assert growth(rebuild, 20, 180) < 100  # each has a GL context of at least 130 MB
