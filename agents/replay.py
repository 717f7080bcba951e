"""Transitions that remember what they need to be rewarded again: the task's own reward, success, and frames."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer

from vlm_reward.cameras import CameraSpec, Crop, named_crops
from vlm_reward.reward_model import RewardModel

_FIELDS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
_TRACED = ("env_rewards", "success", "before", "after")


class TracedReplayBuffer(ReplayBuffer):
    """Stable-Baselines3's buffer with, for each transition, what the agent does not see.

    All [capacity, envs]: `env_rewards` float32, `success` bool, and int64 `before` and `after`, the rows of its
    two frames in a `FrameStore`, -1 without one.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        shape = (self.buffer_size, self.n_envs)
        self.env_rewards, self.success = np.zeros(shape, np.float32), np.zeros(shape, bool)
        self.before, self.after = np.full(shape, -1), np.full(shape, -1)

    def add(
        self,
        obs: np.ndarray,
        next_obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        self.env_rewards[self.pos] = [info["env_reward"] for info in infos]
        self.success[self.pos] = [info["success"] for info in infos]
        self.before[self.pos], self.after[self.pos] = zip(
            *(info.get("frame_rows", (-1, -1)) for info in infos), strict=True
        )
        super().add(obs, next_obs, action, reward, done, infos)

    def save(self, file: Path) -> None:
        """Write the transitions, the oldest first, as plain arrays: each field [T * envs, ...]."""
        order = np.r_[self.pos : self.buffer_size, : self.pos] if self.full else np.arange(self.pos)
        arrays = {}
        for name in (*_FIELDS, *_TRACED):
            values = getattr(self, name)[order]
            arrays[name] = values.reshape(-1, *values.shape[2:])
        np.savez(file, **arrays)

    def load(self, file: Path) -> None:
        """Take the transitions of a file that `save` or `agents.relabel` wrote; the newest if there are too many.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another kind of file, or transitions of another shape.
        """
        arrays = load_transitions(file)
        count = min(len(arrays["rewards"]) // self.n_envs, self.buffer_size)
        for name, values in arrays.items():
            mine = getattr(self, name)
            if values.shape[1:] != mine.shape[2:]:
                raise ValueError(
                    f"{file}: {name} has shape {values.shape[1:]} a transition, not {mine.shape[2:]}"
                )
            kept = values[len(values) - count * self.n_envs :]
            mine[:count] = kept.reshape(count, self.n_envs, *values.shape[1:])
        self.pos, self.full = count % self.buffer_size, count == self.buffer_size


def load_transitions(file: Path) -> dict[str, np.ndarray]:
    """All fields of a file of transitions; errors as in `TracedReplayBuffer.load`."""
    if not file.is_file():
        raise FileNotFoundError(f"no transitions at {file}")
    try:
        with np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in (*_FIELDS, *_TRACED)}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{file} is damaged, or holds no transitions ({error})") from error


class FrameStore:
    """Frames in the order they come, as the model looks at them: raw uint8 [rows, V, S, S, 3] in `frames.u8`.

    Written plainly, not through a memory map: on a full disk a map kills the process, a write raises OSError.

    Args:
        folder: where `frames.u8` and `frames.json` (the cameras, S, the kind of resizing, the crops) go.
        model: with a `camera_spec`; its `look` is what is kept.
        rows: how many to keep of those that are there, when a run goes on.

    Raises:
        ValueError: there are fewer.
    """

    def __init__(self, folder: Path, model: RewardModel, rows: int = 0) -> None:
        self.rows, self._look = rows, model.look
        spec, size = model.camera_spec, model.image_size
        assert spec is not None
        self.row_bytes = len(spec.cameras) * size * size * 3
        facts = {"camera_spec": spec.to_dict(), "size": size, "resample": model.encoder.resample}
        facts["crops"] = model.crops
        (folder / "frames.json").write_text(json.dumps(facts))
        self._file = open(folder / "frames.u8", "r+b" if rows else "wb")  # noqa: SIM115 (closed by `close`)
        if os.fstat(self._file.fileno()).st_size < rows * self.row_bytes:
            self._file.close()
            raise ValueError(f"{folder / 'frames.u8'} is truncated: it has not the {rows} frames of the run")
        self._file.truncate(rows * self.row_bytes)
        self._file.seek(0, os.SEEK_END)

    def append(self, frames: np.ndarray) -> int:
        """Keep uint8 [V, H, W, 3]; returns its row."""
        self._file.write(self._look(frames).tobytes())
        self.rows += 1
        return self.rows - 1

    def flush(self) -> None:
        """Hand what was kept to the file system."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_frames(folder: Path) -> tuple[np.ndarray, CameraSpec, dict[str, Crop] | None]:
    """The frames that a run kept, memory-mapped: uint8 [rows, V, S, S, 3], their cameras, and the part of each
    camera's image that they are.

    Raises:
        FileNotFoundError: it kept none.
    """
    if not (folder / "frames.json").is_file():
        raise FileNotFoundError(f"{folder} has no frames: it was not run with --keep-frames")
    facts = json.loads((folder / "frames.json").read_text())
    spec, size = CameraSpec.from_dict(facts["camera_spec"]), facts["size"]
    frames = np.memmap(folder / "frames.u8", np.uint8, "r")
    return frames.reshape(-1, len(spec.cameras), size, size, 3), spec, named_crops(facts.get("crops"))
