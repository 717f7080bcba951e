"""Gymnasium wrappers that replace an environment's reward by the score of its camera frames by a sentence.

`CaptureFrames` renders next to the environment, right after each step and reset; `VLMRewardWrapper` (one
environment) and `VLMVectorRewardWrapper` (many, in processes) score what it captured.
"""
# Worker processes import this module: nothing here may import torch.

import contextlib
import functools
import multiprocessing
import os
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.vector.utils import CloudpickleWrapper

from vlm_reward.cameras import CameraRig, CameraSpec
from vlm_reward.similarity import OverViews, multi_view
from vlm_reward.tasks import INSTRUCTIONS, all_tasks
from vlm_reward.transforms import Shaping, Transition, raw

Instruction = str | Callable[[gym.Env], str]
"""A sentence, or a function of the environment that is called after each reset (goal-conditioned tasks)."""
FramesFn = Callable[[gym.Env], np.ndarray]
"""An environment to its frames, uint8 [H, W, 3] or [V, H, W, 3], upright."""
Between = Literal["hold", "interpolate"]


class Scorer(Protocol):
    """What the wrappers need of a model: `RewardModel` and `GoalBaseline` have it."""

    @property
    def camera_spec(self) -> CameraSpec | None: ...
    @property
    def start_weight(self) -> float: ...
    def check_camera_spec(self, spec: CameraSpec) -> None: ...
    def embed(self, frames: np.ndarray) -> np.ndarray: ...
    def embed_start(self, frames: np.ndarray) -> np.ndarray: ...
    def score(
        self, frames: np.ndarray, text: str | Sequence[str], *, start: np.ndarray | None = None
    ) -> np.ndarray: ...
    def embed_text(self, texts: Sequence[str]) -> np.ndarray: ...


@dataclass(frozen=True)
class CaptureSettings:
    """What `CaptureFrames` is told by the wrapper that scores; see `VLMRewardWrapper` for the fields."""

    instruction: Instruction | None
    cameras: CameraSpec | None
    default_cameras: CameraSpec
    frames_fn: FramesFn | None
    score_every: int


# The environment's side

AFTER_STEP, AFTER_RESET = 0, 1  # the two frames of a record: an auto-reset gives both in one step
STEPS, STEP_FRAMES, RESETS, FAULTS = range(4)  # its counts: what has happened since the last look


def record_dtype(shape: Sequence[int]) -> np.dtype:
    """One environment's record for frames of `shape` [V, H, W, 3]; lies in shared memory for workers."""
    return np.dtype([("counts", np.int64, 4), ("frames", np.uint8, (2, *shape))], align=True)


class CaptureFrames(gym.Wrapper):
    """Renders after each reset and scored step, in the environment's own process, before any auto-reset.

    Put it around each environment that you give to a vector environment, outside of any time limit. It does
    nothing until `VLMVectorRewardWrapper` or `VLMRewardVecEnv` tells it what to capture; frames then go
    through shared memory, and the sentence through `info["instruction"]` of `reset`.

    Example:
        >>> venv = SubprocVecEnv([lambda: CaptureFrames(make_env("reach-v3"))] * 4, start_method="spawn")
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self._record: np.ndarray | None = None
        self._settings: CaptureSettings | None = None
        self._free: Callable[[], None] | None = None
        self._time = 0
        self._name = uuid.uuid4().hex

    def open_capture(self, settings: CloudpickleWrapper) -> str | Exception:
        """Get ready to render; returns this environment's unique name.

        An error is returned, not raised: raised, it would kill a Stable-Baselines3 worker without a word.
        """
        try:
            _refuse_fork()
            self.close_capture()
            asked: Any = settings.fn  # the wrapper only makes any function picklable
            told = asked.instruction is not None
            self._instruction = asked.instruction if told else _task_instruction(self.env)
            self._render, self._free = _frame_source(self.env, asked)
            self._settings = asked
        except Exception as error:
            return error
        return self._name

    def frame_shape(self) -> tuple[int, ...]:
        """[V, H, W, 3] of the captured frames. Known after the first reset."""
        return self.captured["frames"].shape[2:]

    def attach(self, path: str, slots: dict[str, int]) -> None:
        """Move the record to its slot in a memory-mapped file, from now on shared with the main process."""
        slot = slots[self._name]
        everyone = np.memmap(path, record_dtype(self.frame_shape()), "r+", shape=(len(slots),))
        shared = everyone[slot : slot + 1]
        shared[:] = self.captured
        self._record = shared

    def close_capture(self) -> None:
        """Free the renderer. Safe to call twice."""
        if self._free is not None:
            self._free()
        self._free = self._settings = self._record = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._time = 0
        if self._settings is not None:
            text = self._instruction if isinstance(self._instruction, str) else self._instruction(self.env)
            if not isinstance(text, str):
                raise TypeError(f"the instruction function must return a string, got {text!r}")
            self._capture(AFTER_RESET)
            self.captured["counts"][0, RESETS] += 1
            self.captured["counts"][0, FAULTS] += _has_nan(observation)
            info = {**info, "instruction": text}
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._time += 1
        if self._settings is not None:
            counts = self.captured["counts"]
            counts[0, STEPS] += 1
            counts[0, FAULTS] += _has_nan(observation) or not np.isfinite(float(reward))
            if self._time % self._settings.score_every == 0 or terminated or truncated:
                self._capture(AFTER_STEP)
                counts[0, STEP_FRAMES] += 1
        return observation, reward, terminated, truncated, info

    def close(self) -> None:
        self.close_capture()
        super().close()

    @property
    def captured(self) -> np.ndarray:
        """[1] of `record_dtype`: the latest frames and the counts."""
        if self._record is None:
            raise gym.error.ResetNeeded("nothing is captured yet: call reset() first")
        return self._record

    def _capture(self, which: int) -> None:
        frames = self._render()
        if self._record is None:
            self._record = np.zeros(1, record_dtype(frames.shape))
        if frames.shape != self.frame_shape():
            raise ValueError(f"frames changed their shape from {self.frame_shape()} to {frames.shape}")
        self._record["frames"][0, which] = frames


def _refuse_fork() -> None:
    worker = multiprocessing.current_process()
    method = getattr(worker, "_start_method", None) or multiprocessing.get_start_method(allow_none=True)
    if multiprocessing.parent_process() is not None and method == "fork":
        raise RuntimeError(
            "this worker was forked, and rendering can hang in a forked process: use context='spawn' "
            "(AsyncVectorEnv), start_method='spawn' (SubprocVecEnv), or from_env_fns"
        )


def _task_instruction(env: gym.Env) -> str:
    task = getattr(env.unwrapped, "task", None)
    if not isinstance(task, str) or task not in INSTRUCTIONS:
        raise ValueError(f"{env} is not a Meta-World task with a known sentence: give an instruction")
    return INSTRUCTIONS[task]


def _frame_source(
    env: gym.Env, settings: CaptureSettings
) -> tuple[Callable[[], np.ndarray], Callable[[], None]]:
    """What renders [V, H, W, 3], and what frees it: `frames_fn`, MuJoCo's cameras, or without either
    `env.render()`."""
    frames_fn = settings.frames_fn
    if frames_fn is not None:
        return lambda: _as_views(frames_fn(env), "frames_fn"), lambda: None
    mujoco = hasattr(env.unwrapped, "model") and hasattr(env.unwrapped, "data")
    if settings.cameras or (mujoco and getattr(env.unwrapped.model, "ncam", 1)):  # pyright: ignore[reportAttributeAccessIssue]
        rig = CameraRig(env, settings.cameras or settings.default_cameras)
        return rig.render, rig.close
    if env.render_mode == "rgb_array":
        return lambda: _as_views(env.render(), "render()"), lambda: None
    raise ValueError(
        f"{env} gives no frames: make it with render_mode='rgb_array' (it is {env.render_mode!r}), or pass "
        "frames_fn"
    )


def _as_views(frames: Any, source: str) -> np.ndarray:
    frames = np.asarray(frames)
    if frames.ndim not in (3, 4) or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(
            f"{source} must give uint8 [H, W, 3] or [V, H, W, 3], got {frames.dtype} {frames.shape}"
        )
    return frames if frames.ndim == 4 else frames[None]


def _has_nan(value: Any) -> bool:
    if isinstance(value, dict | tuple | list):
        return any(map(_has_nan, value.values() if isinstance(value, dict) else value))
    array = np.asarray(value)
    return array.dtype.kind == "f" and bool(np.isnan(array).any())


# The model's side


class RewardStream:
    """The captured frames of N parallel environments to their rewards.

    Remembers each episode's last score and, for a model that asks for it, the embedding of its first frame.

    Knows nothing of auto-reset modes: the counts of a record say whether its environment made a step, began
    an episode, or both. Arguments as in `VLMRewardWrapper`, plus the number of environments.
    """

    def __init__(
        self,
        model: Scorer,
        num_envs: int,
        *,
        transform: Shaping,
        score_every: int,
        between: Between,
        over_views: OverViews,
        keep_frames: bool,
    ) -> None:
        if between not in get_args(Between):
            raise ValueError(f"between must be one of {get_args(Between)}, got {between!r}")
        self._model, self._transform = model, transform
        self._every, self._between, self._keep = score_every, between, keep_frames
        self._over_views: OverViews = over_views
        multi_view(np.zeros((1, 1)), over_views)  # or refused
        self._texts = [""] * num_envs
        self._seen = np.zeros((num_envs, 4), np.int64)
        self._shown, self._pace = np.zeros(num_envs), np.zeros(num_envs)  # score now, and its change a step
        self._per_view = np.zeros((num_envs, 0), np.float32)
        self._starts: np.ndarray | None = None  # [N, V, D]

    def read(
        self,
        records: np.ndarray,
        instructions: Sequence[str | None],
        env_reward: np.ndarray | None = None,
        terminated: np.ndarray | None = None,
        truncated: np.ndarray | None = None,
    ) -> tuple[np.ndarray, list[dict[str, Any]], list[dict[str, Any]]]:
        """Score all new frames in one forward.

        Args:
            records: [N] of `record_dtype`.
            instructions: N; the sentence of each episode that has begun since the last call, else ignored.
            env_reward: [N]; this and the next two are left out after a bare reset.
            terminated: bool [N].
            truncated: bool [N].

        Returns:
            reward float64 [N] (0 where no step was made); what to add to the info of each step made; what to
            add to the info of each reset made. The infos are empty where there was none.

        Raises:
            ValueError: NaN from an environment, frames unlike the checkpoint's, a bad instruction.
            FloatingPointError: the transform gave NaN or infinity.
        """
        counts = records["counts"].copy()
        moved, fresh, started, fault = (counts != self._seen).T
        self._seen = counts
        if fault.any():
            where = ", ".join(map(str, np.flatnonzero(fault)))
            raise ValueError(
                f"environment {where} gave NaN in its observation, or a reward that is not finite"
            )
        reward, never = np.zeros(len(records)), np.zeros(len(records), bool)
        env_reward = reward.copy() if env_reward is None else np.asarray(env_reward, np.float64)
        terminated, truncated = (
            never if end is None else np.asarray(end, bool) for end in (terminated, truncated)
        )
        frames = records["frames"]
        step_scores, first_scores = self._score(frames, fresh, started, instructions)
        if moved.any():
            previous = self._shown.copy()
            self._advance(step_scores, moved, fresh, terminated | truncated)
            reward[moved] = self._transform(
                Transition(
                    self._shown[moved],
                    previous[moved],
                    env_reward[moved],
                    terminated[moved],
                    truncated[moved],
                )
            )
            if not np.isfinite(reward).all():
                raise FloatingPointError(f"the reward transform gave NaN or infinity: {reward}")
        stepped = [
            {"env_reward": float(env_reward[i]), **self._info(frames, i, AFTER_STEP, fresh[i])}
            if moved[i]
            else {}
            for i in range(len(records))
        ]
        self._per_view[started] = first_scores
        self._shown[started] = multi_view(first_scores.astype(np.float64), self._over_views)
        self._pace[started] = 0
        reset = [self._info(frames, i, AFTER_RESET, True) if started[i] else {} for i in range(len(records))]
        return reward, stepped, reset

    def _score(
        self,
        frames: np.ndarray,
        fresh: np.ndarray,
        started: np.ndarray,
        instructions: Sequence[str | None],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores of the steps with a fresh frame, [F, V], and of the first frames of episodes, [R, V]."""
        if self._per_view.shape[1] == 0:
            self._check_shape(frames.shape[2:])
            self._per_view = np.zeros((len(frames), frames.shape[2]), np.float32)
        stepped, reset = np.flatnonzero(fresh).tolist(), np.flatnonzero(started).tolist()
        texts = [self._texts[i] for i in stepped]  # a finished episode's last frame keeps its own sentence
        for i in reset:
            self._texts[i] = str(instructions[i])
            texts.append(self._texts[i])
        if not texts:
            return self._per_view[:0], self._per_view[:0]
        which = np.repeat([AFTER_STEP, AFTER_RESET], [len(stepped), len(reset)])
        scores = self._model.score(
            frames[stepped + reset, which], texts, start=self._starts_of(frames, stepped, reset)
        )
        return scores[: len(stepped)], scores[len(stepped) :]

    def _starts_of(self, frames: np.ndarray, stepped: list[int], reset: list[int]) -> np.ndarray | None:
        """Embeddings of the first frames that those of `stepped`, then of `reset` belong to, [F + R, V, D]."""
        if not self._model.start_weight:
            return None
        fresh = self._model.embed_start(frames[reset, AFTER_RESET]) if reset else None
        if self._starts is None:
            assert fresh is not None  # an environment begins with a reset
            self._starts = np.zeros((len(frames), *fresh.shape[1:]), np.float32)
        before = self._starts[stepped]  # a finished episode's last frame keeps its own start
        if fresh is None:
            return before
        self._starts[reset] = fresh
        return np.concatenate([before, fresh])

    def _advance(
        self, step_scores: np.ndarray, moved: np.ndarray, fresh: np.ndarray, ended: np.ndarray
    ) -> None:
        """Bring the shown scores one step on."""
        self._per_view[fresh] = step_scores
        latest = multi_view(self._per_view.astype(np.float64), self._over_views)
        at_once = fresh if self._between == "hold" else fresh & ended
        if self._between == "interpolate":
            self._pace[fresh] = (latest - self._shown)[fresh] / self._every
            self._shown[moved] += self._pace[moved]
        self._shown[at_once] = latest[at_once]

    def _info(self, frames: np.ndarray, i: int, which: int, fresh: bool) -> dict[str, Any]:
        info: dict[str, Any] = {"score": float(self._shown[i]), "reward_per_view": self._per_view[i].copy()}
        if self._keep and fresh:
            info["frames"] = frames[i, which].copy()
        return info

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        spec = self._model.camera_spec
        if spec and shape != (expected := (len(spec.cameras), spec.height, spec.width, 3)):
            raise ValueError(
                f"the model was trained on frames {expected} [V, H, W, 3], the environment gives {shape}"
            )


def capture_settings(
    model: Scorer,
    instruction: Instruction | None,
    cameras: CameraSpec | Sequence[str] | None,
    frames_fn: FramesFn | None,
    score_every: int,
) -> CaptureSettings:
    """Validate what the user asked for against the model; ValueError says what is wrong."""
    if isinstance(model, str):
        raise TypeError(f"give a model, not its name: RewardModel.from_pretrained({model!r})")
    if not isinstance(score_every, int) or score_every < 1:
        raise ValueError(f"score_every must be an integer of at least 1, got {score_every!r}")
    default = model.camera_spec or CameraSpec()
    if cameras is not None:
        if frames_fn is not None:
            raise ValueError("give cameras or frames_fn, not both")
        if not isinstance(cameras, CameraSpec):
            names = (cameras,) if isinstance(cameras, str) else tuple(cameras)
            cameras = replace(default, cameras=names)
        model.check_camera_spec(cameras)
    if isinstance(instruction, str):
        model.embed_text([instruction])  # raises when it is empty or too long
    elif instruction is not None and not callable(instruction):
        raise TypeError(f"instruction must be a string or a function of the environment, got {instruction!r}")
    return CaptureSettings(instruction, cameras, default, frames_fn, score_every)


class VLMRewardWrapper(gym.Wrapper):
    """Replace the reward of one environment by the score of its frames by a sentence.

    Args:
        env: any MuJoCo environment, any other with `render_mode="rgb_array"`, or any with `frames_fn`.
        model: a `RewardModel`, or a `GoalBaseline` around one. If it scores against the first frame of an episode
            (`start_weight`), that is the one after each reset.
        instruction: the sentence, or a function of the environment called after each reset; None takes the
            sentence of the environment's Meta-World task.
        cameras: names of MuJoCo cameras or a whole `CameraSpec`; None takes what the model was trained on.
        frames_fn: makes the frames from the environment: uint8 [V, H, W, 3] or [H, W, 3].
        transform: scores to reward, see `vlm_reward.transforms`; the default is the score itself.
        score_every: render and score each k-th step of an episode, and its last (if `env` says that it is: a
            time limit belongs inside).
        between: between scored steps `hold` the last score, or `interpolate`: move to it in k equal parts,
            which is linear interpolation k - 1 steps late, since a reward cannot wait for the next frame.
        over_views: the `mean` of the views, or their `median` (vlm_reward.similarity.multi_view).
        keep_frames: put the frames of scored steps into `info["frames"]`.

    `info` has `env_reward` (steps only), `score` (the multi-view score, held or interpolated where none was
    taken), `reward_per_view` (float32 [V], of the last scored frame) and, after a reset, `instruction`.

    Raises:
        ValueError: no frames, an unknown camera, frames unlike the model's, an instruction that is missing,
            empty or too long; at a step: NaN from the environment.
        TypeError: `cameras` for an environment without MuJoCo.
        RuntimeError: no renderer works.

    Example:
        >>> model = RewardModel.from_pretrained("siglip2-tiny/triplet+order+wrong+start+judge")
        >>> env = VLMRewardWrapper(make_env("drawer-open-v3"), model, "open the green drawer")
        >>> observation, info = env.reset(seed=0)
        >>> observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
    """

    def __init__(
        self,
        env: gym.Env,
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
        settings = capture_settings(model, instruction, cameras, frames_fn, score_every)
        self._capture = CaptureFrames(env)
        super().__init__(self._capture)
        self._stream = RewardStream(
            model,
            1,
            transform=transform,
            score_every=score_every,
            between=between,
            over_views=over_views,
            keep_frames=keep_frames,
        )
        _raise_returned([self._capture.open_capture(CloudpickleWrapper(settings))])  # pyright: ignore[reportArgumentType]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        _, _, (first,) = self._stream.read(self._capture.captured, [info["instruction"]])
        return observation, {**info, **first}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, env_reward, terminated, truncated, info = self.env.step(action)
        ends = np.array([terminated]), np.array([truncated])
        reward, (step,), _ = self._stream.read(
            self._capture.captured, [None], np.array([float(env_reward)]), *ends
        )
        return observation, float(reward[0]), terminated, truncated, {**info, **step}


# Many environments


class CaptureChannel:
    """The main process' end of N `CaptureFrames`, wherever they run.

    Args:
        call: calls a method of every environment and returns their N results.
        settings: what to capture.
    """

    def __init__(self, call: Callable[..., Sequence[Any]], settings: CaptureSettings) -> None:
        self._call = call
        self._names = _raise_returned(call("open_capture", CloudpickleWrapper(settings)))  # pyright: ignore[reportArgumentType]
        self._records: np.ndarray | None = None

    @property
    def records(self) -> np.ndarray:
        """[N] of `record_dtype`, shared with the workers. Available after the first reset."""
        if self._records is None:
            self._records = self._share()
        return self._records

    def _share(self) -> np.ndarray:
        """Map one file into all processes, and delete it at once: no crash can leave it behind."""
        shapes = [tuple(shape) for shape in self._call("frame_shape")]
        if len(set(shapes)) > 1:
            raise ValueError(f"all environments need frames of one shape, got {shapes}")
        dtype, count = record_dtype(shapes[0]), len(shapes)
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
        file, path = tempfile.mkstemp(prefix="vlm-reward-", dir=memory)
        try:
            # Reserved now, too little room is an error here; later it would be a bus error in a worker.
            getattr(os, "posix_fallocate", lambda fd, _, size: os.truncate(fd, size))(
                file, 0, count * dtype.itemsize
            )
            os.close(file)
            records = np.memmap(path, dtype, "r+", shape=(count,))
            self._call("attach", path, {name: slot for slot, name in enumerate(self._names)})
        finally:
            os.unlink(path)
        return records.view(np.ndarray)


def _raise_returned(results: Sequence[Any]) -> list[Any]:
    for result in results:
        if isinstance(result, Exception):
            raise result
    return list(results)


@contextlib.contextmanager
def dead_workers_raise(env: Any) -> Iterator[None]:
    """Turn the broken pipe of a dead worker into a RuntimeError that names it; the others are stopped."""
    try:
        yield
    except (EOFError, ConnectionError) as error:
        processes = getattr(env, "processes", ())
        if not processes:
            raise
        patience = time.monotonic() + 5
        while all(process.exitcode is None for process in processes) and time.monotonic() < patience:
            time.sleep(0.01)
        dead = [f"{i} ({_cause(p.exitcode)})" for i, p in enumerate(processes) if p.exitcode is not None]
        for process in processes:
            process.terminate()
            process.join()
        env.closed = True
        raise RuntimeError(
            f"worker {', '.join(dead) or '(unknown)'} died, and the others were stopped; if it raised "
            "an error, its traceback was printed before this one"
        ) from error


def _cause(exitcode: int) -> str:
    return f"exit code {exitcode}" if exitcode >= 0 else f"killed by {signal.Signals(-exitcode).name}"


def captured(env_fns: Sequence[Callable[[], gym.Env]]) -> list[Callable[[], gym.Env]]:
    """The same environment factories, with `CaptureFrames` around what they make."""
    return [functools.partial(_make_captured, env_fn) for env_fn in env_fns]


def _make_captured(env_fn: Callable[[], gym.Env]) -> gym.Env:
    return CaptureFrames(env_fn())


class VLMVectorRewardWrapper(VectorWrapper):
    """`VLMRewardWrapper` for a Gymnasium vector environment: all environments' views in one forward.

    Every environment inside must be wrapped in `CaptureFrames`; `from_env_fns` does it. All three auto-reset
    modes work: the reward of an episode's last step is always scored from that step's own frame. In
    `infos`, `score`, `reward_per_view` and `frames` belong to the observation returned, `env_reward` to the
    step made; with SAME_STEP, `final_info` has those of a finished episode.

    Arguments and errors are those of `VLMRewardWrapper`, and RuntimeError when a worker dies.

    Example:
        >>> fns = [functools.partial(make_env, "drawer-open-v3", seed) for seed in range(8)]
        >>> envs = VLMVectorRewardWrapper.from_env_fns(fns, model, "open the green drawer")
    """

    def __init__(
        self,
        env: VectorEnv,
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
        super().__init__(env)
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
        base: Any = env.unwrapped
        try:
            with dead_workers_raise(base):
                self._channel = CaptureChannel(base.call, settings)
        except AttributeError as error:
            raise TypeError(
                "each environment must be wrapped in CaptureFrames: use VLMVectorRewardWrapper.from_env_fns"
            ) from error

    @classmethod
    def from_env_fns(
        cls,
        env_fns: Sequence[Callable[[], gym.Env]],
        model: Scorer,
        instruction: Instruction | None = None,
        *,
        processes: bool = True,
        autoreset_mode: AutoresetMode = AutoresetMode.NEXT_STEP,
        **options: Any,
    ) -> "VLMVectorRewardWrapper":
        """Make the environments, in spawned processes or (`processes=False`) in this one."""
        env: VectorEnv = (
            AsyncVectorEnv(captured(env_fns), context="spawn", autoreset_mode=autoreset_mode)
            if processes
            else SyncVectorEnv(captured(env_fns), autoreset_mode=autoreset_mode)
        )
        try:
            return cls(env, model, instruction, **options)
        except BaseException:
            env.close()
            raise

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        with dead_workers_raise(self.unwrapped):
            observations, infos = self.env.reset(seed=seed, options=options)
            _, _, resets = self._read(infos)
        for i, first in enumerate(resets):
            infos = self._add_info(infos, first, i)
        return observations, infos

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        with dead_workers_raise(self.unwrapped):
            observations, env_reward, terminated, truncated, infos = self.env.step(actions)
        reward, steps, resets = self._read(infos, env_reward, terminated, truncated)
        for i, (step, first) in enumerate(zip(steps, resets, strict=True)):
            if step and first:
                infos = self._add_info(infos, {"final_info": step}, i)
            infos = self._add_info(infos, {**step, **first}, i)
        return observations, reward, terminated, truncated, infos

    def _read(
        self, infos: dict[str, Any], *outcome: np.ndarray
    ) -> tuple[np.ndarray, list[dict[str, Any]], list[dict[str, Any]]]:
        texts = infos.get("instruction", [None] * self.num_envs)
        return self._stream.read(self._channel.records, texts, *outcome)


# Registration


def make_reward_env(
    task: str,
    model: "Scorer | str | Path" = "siglip2-tiny/triplet+order+wrong+start+judge",
    instruction: Instruction | None = None,
    *,
    device: str = "cpu",
    seed: int | None = None,
    random_hand_start: bool = False,
    terminate_on_success: bool = False,
    render_mode: str | None = "rgb_array",
    **options: Any,
) -> VLMRewardWrapper:
    """A Meta-World task with a learned reward: what `gym.make("vlm-reward/<task>")` calls.

    Args:
        task: one of `vlm_reward.tasks.all_tasks()`.
        model: a model, or the path, checkpoint name or Hub id of one.
        instruction: see `VLMRewardWrapper`, which takes `options` too.
        device: where to load the model, when it is a name.
        seed: as the other two, see `vlm_reward.envs.make_env`.
        random_hand_start: see there.
        terminate_on_success: see there.
        render_mode: `rgb_array` alone.
    """
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f"render_mode must be 'rgb_array', got {render_mode!r}")
    from vlm_reward.envs import make_env

    if isinstance(model, str | Path):
        from vlm_reward.reward_model import RewardModel

        model = RewardModel.from_pretrained(model, device=device)
    env = make_env(task, seed, random_hand_start=random_hand_start, terminate_on_success=terminate_on_success)
    return VLMRewardWrapper(env, model, instruction, **options)


# Importing this module makes `gym.make("vlm-reward/<task>", model=...)` work for all 50 tasks, so that
# `gym.make("vlm_reward.wrappers:vlm-reward/<task>")` needs no import.
for _task in all_tasks():
    if (_name := f"vlm-reward/{_task}") not in gym.registry:
        gym.register(_name, "vlm_reward.wrappers:make_reward_env", kwargs={"task": _task})
