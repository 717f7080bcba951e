"""Environments whose frames tell episode and step, and a scorer that reads them. Light: workers import it."""

import functools

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

from vlm_reward.wrappers import VLMRewardWrapper


class Clock(gym.Env):
    """Its observation and the first pixel of its frame say (which, episode, step); each episode is one longer."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 1}  # noqa: RUF012
    observation_space = Box(0, 255, (3,), np.float64)
    action_space = Box(-1, 1, (1,), np.float32)

    def __init__(self, which=0, length=3, *, terminates=False, render_mode="rgb_array", fault=None) -> None:
        self.which, self.length, self.terminates, self.fault = which, length, terminates, fault
        self.render_mode = render_mode
        self.episode, self.renders = -1, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.time = (0 if seed is not None else self.episode + 1), 0
        return self._observe(), {}

    def step(self, action):
        self.time += 1
        end = self.time == self.length + self.episode
        observation, reward = self._observe(), float(self.time * 10)
        if self.time == 2 and self.fault == "observation":
            observation[0] = np.nan
        if self.time == 2 and self.fault == "reward":
            reward = np.inf
        return observation, reward, end and self.terminates, end and not self.terminates, {}

    def render(self):
        self.renders += 1
        frame = np.zeros((4, 4, 3), np.uint8)
        frame[0, 0] = self._observe()
        return frame

    def _observe(self):
        return np.array([self.which, self.episode, self.time], np.float64)


class ClockReader:
    """Scores a frame `which + episode / 10 + step / 100`, plus the number that the sentence is.

    With a `start_weight` of 1, the same of the episode's first frame is subtracted: `step / 100` is left.
    """

    camera_spec = None

    def __init__(self, start_weight: float = 0.0) -> None:
        self.start_weight = start_weight
        self.batches: list[int] = []

    def check_camera_spec(self, spec):
        pass

    def embed_text(self, texts):
        if "" in texts:
            raise ValueError("the text is empty")
        return np.zeros((len(texts), 2), np.float32)

    def embed(self, frames):
        return frames[:, :, 0, 0].astype(np.float32)

    embed_start = embed

    def score(self, frames, text, *, start=None):
        assert frames.dtype == np.uint8
        assert len(text) == len(frames)
        self.batches.append(len(frames))
        pixel = self.embed(frames)
        if self.start_weight:
            pixel -= self.start_weight * start
        return pixel @ np.array([1, 0.1, 0.01], np.float32) + np.array(text, np.float32)[:, None]


def by_episode(env: gym.Env) -> str:
    """A goal of its own for each episode."""
    return str(4 * (env.unwrapped.episode + 1))


def clocks(count: int, **options) -> list:
    """Environments whose episodes differ in length and end, half by termination."""
    return [functools.partial(Clock, i, 2 + i, terminates=bool(i % 2), **options) for i in range(count)]


def singles(count: int, steps: int, **options) -> list[list[tuple]]:
    """For each environment alone: (reward of the step or None, info) along several episodes."""
    logs = []
    for make in clocks(count):
        env = VLMRewardWrapper(make(), ClockReader(), **options)
        _, info = env.reset()
        log = [(None, info)]
        while len(log) <= steps:
            _, reward, terminated, truncated, info = env.step(np.zeros(1, np.float32))
            log.append((reward, info))
            if terminated or truncated:
                _, info = env.reset()
                log.append((None, info))
        logs.append(log)
    return logs


def three_views(env):
    """The clock's frame three times, the second view 1 higher, the third far off."""
    frames = np.repeat(env.unwrapped.render()[None], 3, axis=0)
    frames[1:, 0, 0, 0] += np.array((1, 38), np.uint8)
    return frames
