"""The learned reward for Stable-Baselines3: one forward for all environments' views, frames from workers."""

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper

from vlm_reward.cameras import CameraSpec
from vlm_reward.similarity import OverViews
from vlm_reward.transforms import Shaping, raw
from vlm_reward.wrappers import (
    Between,
    CaptureChannel,
    CaptureFrames,
    FramesFn,
    Instruction,
    RewardStream,
    Scorer,
    capture_settings,
    captured,
    dead_workers_raise,
)


class VLMRewardVecEnv(VecEnvWrapper):
    """`VLMRewardWrapper` for a `DummyVecEnv` or `SubprocVecEnv`: all environments' views in one forward.

    Every environment inside must be wrapped in `CaptureFrames`; `from_env_fns` does it. Frames are rendered
    in the workers before the auto-reset, so an episode's last reward is that of `terminal_observation`; they
    come through shared memory and stay out of the infos, unless `keep_frames` asks for them. `infos` has
    `env_reward`, `score` and `reward_per_view` of the step made, `reset_infos` the first frame's. Put
    `VecMonitor` outside.

    Arguments and errors are those of `VLMRewardWrapper`, and RuntimeError when a worker dies.

    Example:
        >>> fns = [functools.partial(make_env, "drawer-open-v3", seed) for seed in range(8)]
        >>> venv = VLMRewardVecEnv.from_env_fns(fns, model, "open the green drawer")
        >>> SAC("MlpPolicy", VecMonitor(venv)).learn(10_000)
    """

    def __init__(
        self,
        venv: VecEnv,
        model: Scorer,
        instruction: Instruction | None = None,
        *,
        cameras: CameraSpec | Sequence[str] | None = None,
        frames_fn: FramesFn | None = None,
        transform: Shaping = raw,
        score_every: int = 1,
        between: Between = "hold",
        over_views: OverViews = "mean",
        keep_frames: bool = False,
    ) -> None:
        super().__init__(venv)
        settings = capture_settings(model, instruction, cameras, frames_fn, score_every)
        self._stream = RewardStream(
            model,
            self.num_envs,
            transform=transform,
            score_every=score_every,
            between=between,
            over_views=over_views,
            keep_frames=keep_frames,
        )
        self._base: Any = venv.unwrapped
        with dead_workers_raise(self._base):
            if not all(venv.env_is_wrapped(CaptureFrames)):
                raise TypeError(
                    "each environment must be wrapped in CaptureFrames: use VLMRewardVecEnv.from_env_fns"
                )
            self._channel = CaptureChannel(venv.env_method, settings)

    @classmethod
    def from_env_fns(
        cls,
        env_fns: Sequence[Callable[[], gym.Env]],
        model: Scorer,
        instruction: Instruction | None = None,
        *,
        processes: bool = True,
        **options: Any,
    ) -> "VLMRewardVecEnv":
        """Make the environments, in spawned processes or (`processes=False`) in this one."""
        if processes:
            try:
                venv: VecEnv = SubprocVecEnv(captured(env_fns), start_method="spawn")
            except (EOFError, ConnectionError) as error:
                raise RuntimeError(
                    "a worker died making its environment; its error is printed above"
                ) from error
        else:
            venv = DummyVecEnv(captured(env_fns))
        try:
            return cls(venv, model, instruction, **options)
        except BaseException:
            venv.close()
            raise

    def reset(self) -> Any:
        with dead_workers_raise(self._base):
            observations = self.venv.reset()
            self._read()
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        with dead_workers_raise(self._base):
            self.venv.step_async(actions)

    def step_wait(self) -> Any:
        with dead_workers_raise(self._base):
            observations, env_reward, dones, infos = self.venv.step_wait()
        truncated = np.array([info.get("TimeLimit.truncated", False) for info in infos])
        reward, steps = self._read(env_reward, dones & ~truncated, truncated)
        infos = [{**info, **step} for info, step in zip(infos, steps, strict=True)]
        return observations, reward.astype(np.float32), dones, infos

    def _read(self, *outcome: np.ndarray) -> tuple[np.ndarray, list[dict[str, Any]]]:
        reset_infos = self._base.reset_infos
        texts = [info.get("instruction") for info in reset_infos]
        reward, steps, resets = self._stream.read(self._channel.records, texts, *outcome)
        for i, first in enumerate(resets):
            if first:
                self.reset_infos[i] = {**reset_infos[i], **first}
        return reward, steps
