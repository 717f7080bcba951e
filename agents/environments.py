"""The environments of a run: Meta-World, a learned reward if asked for, and each episode's outcome."""

import functools
import multiprocessing
import signal
from contextlib import closing
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper

from agents.config import AgentConfig
from agents.replay import FrameStore
from agents.rewards import agent_reward, shaping
from vlm_reward.cameras import CameraRig
from vlm_reward.envs import make_env
from vlm_reward.sb3 import VLMRewardVecEnv
from vlm_reward.wrappers import Scorer


def make_task_env(task: str, horizon: int) -> gym.Env:
    """A Meta-World task with float32 observations [39], truncated after `horizon` steps."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which saves first
    env = make_env(task, max_episode_steps=horizon)
    wide: Any = env.observation_space
    space = Box(wide.low.astype(np.float32), wide.high.astype(np.float32), dtype=np.float32)
    return gym.wrappers.TransformObservation(env, lambda observation: observation.astype(np.float32), space)


class AgentReward(VecEnvWrapper):
    """Gives the agent its reward, and the info of an episode's last step its `outcome`.

    `outcome` has `learned_return` (the sum of the learned reward, unscaled; None without a model), `env_return`
    (the sum of the task's own reward), `success` (at any step) and `length`. Each step's info has `is_success`
    (any step so far) and `env_reward`.

    Args:
        venv: a `VLMRewardVecEnv` if `scored`.
        config: which reward the agent sees.
        scored: whether the reward of `venv` is the learned one.
        frames: keeps the frames, which `venv` then must put into its infos.
    """

    def __init__(self, venv: VecEnv, config: AgentConfig, scored: bool, frames: FrameStore | None) -> None:
        super().__init__(venv)
        self.config, self.scored, self.frames = config, scored, frames
        self._before = np.full(self.num_envs, -1)  # row of each environment's latest frame
        self._clear(np.ones(self.num_envs, bool))

    def reset(self) -> Any:
        observations = self.venv.reset()
        self._clear(np.ones(self.num_envs, bool))
        self._keep_first(range(self.num_envs))
        return observations

    def step_wait(self) -> Any:
        observations, reward, dones, infos = self.venv.step_wait()
        for info, own in zip(infos, reward, strict=True):
            info.setdefault("env_reward", float(own))
        env_reward = np.array([info["env_reward"] for info in infos])
        success = np.array([info["success"] for info in infos], bool)
        self._success |= success
        self._env_return += env_reward
        self._learned_return += reward if self.scored else 0.0
        self._length += 1
        for i, info in enumerate(infos):
            info["is_success"] = bool(self._success[i])
            if self.frames:
                after = self.frames.append(info.pop("frames"))
                info["frame_rows"] = (self._before[i], after)
                self._before[i] = after
            if dones[i]:
                info["outcome"] = {
                    "learned_return": float(self._learned_return[i]) if self.scored else None,
                    "env_return": float(self._env_return[i]),
                    "success": bool(self._success[i]),
                    "length": int(self._length[i]),
                }
        self._clear(dones)
        self._keep_first(np.flatnonzero(dones))
        learned = reward if self.scored else None
        return observations, agent_reward(self.config, learned, env_reward, success), dones, infos

    def _clear(self, which: np.ndarray) -> None:
        if which.all():
            self._env_return, self._learned_return = np.zeros(self.num_envs), np.zeros(self.num_envs)
            self._success, self._length = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, int)
        for values in (self._env_return, self._learned_return, self._success, self._length):
            values[which] = 0

    def _keep_first(self, which: Any) -> None:
        if self.frames:
            for i in which:
                self._before[i] = self.frames.append(self.venv.reset_infos[i].pop("frames"))


def check_cameras(config: AgentConfig, scorer: Scorer) -> None:
    """Refuse what would only show once the environments are made, when an earlier run is gone already.

    Raises:
        ValueError: the task has no such camera.
        RuntimeError: no renderer works.
    """
    with closing(make_env(config.task)) as env, CameraRig(env, scorer.camera_spec):
        pass


def make_training_env(config: AgentConfig, scorer: Scorer | None, frames: FrameStore | None) -> AgentReward:
    """All environments of a run. Without a scorer nothing is rendered.

    Raises:
        RuntimeError: no renderer works, or a worker died.
    """
    count = config.setting("envs")
    make = [functools.partial(make_task_env, config.task, config.horizon)] * count
    processes = config.processes
    if processes is None:
        processes = count > 1 and scorer is not None
    if scorer is None:
        venv: VecEnv = SubprocVecEnv(make, start_method="spawn") if processes else DummyVecEnv(make)
    else:
        venv = VLMRewardVecEnv.from_env_fns(
            make,
            scorer,
            config.sentence,
            processes=processes,
            transform=shaping(config),
            score_every=config.score_every,
            over_views=config.over_views,
            keep_frames=frames is not None,
        )
    return AgentReward(venv, config, scorer is not None, frames)
