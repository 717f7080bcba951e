"""What a dataset is to us: episodes with a sentence each, in rows, and their frames in chunks."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vlm_reward.cameras import CameraSpec

KINDS: tuple[str, ...] = ("expert", "random", "noisy", "mixed", "wander", "miss", "goal", "agent")
CHUNK = 64  # timesteps


@dataclass(frozen=True)
class EpisodeInfo:
    """One trajectory: rows `start : start + length` of the dataset.

    Args:
        start: row of its first frame.
        length: number of frames; steps + 1 where the last observation is stored.
        task: Meta-World task, e.g. `drawer-close-v3`; of another dataset, its sentence.
        instruction: the sentence, e.g. `close the green drawer`.
        kind: who acted: `expert`, `random`, `noisy`, `mixed`, `wander`, `miss` or `agent`.
        seed: seed of the environment; of another dataset, the number of the episode.
        success: whether any step succeeded; True where the dataset does not say.
    """

    start: int
    length: int
    task: str
    instruction: str
    kind: str
    seed: int
    success: bool

    @property
    def rows(self) -> slice:
        """Its rows."""
        return slice(self.start, self.start + self.length)


@dataclass(frozen=True)
class Chunk:
    """Some timesteps of one episode.

    Args:
        episode: its place among the dataset's episodes.
        start: the first of these timesteps, counted within the episode.
        frames: uint8 [n, V, H, W, 3], upright.
        rewards: float32 [n], of the step that led to the frame; 0 where there is none.
        success: bool [n].
    """

    episode: int
    start: int
    frames: np.ndarray
    rewards: np.ndarray
    success: np.ndarray


class Recording(ABC):
    """A dataset opened for reading.

    Attributes:
        id: what it is called.
        camera_spec: its views, and the size of its frames.
        episodes: in the order of their rows.
        folder: where it lies.
    """

    id: str
    camera_spec: CameraSpec
    episodes: tuple[EpisodeInfo, ...]
    folder: Path

    @property
    def ours(self) -> bool:
        """Whether `training.collect` wrote it: Meta-World's tasks, cameras of `vlm_reward.cameras`."""
        return self.camera_spec.profile != "recorded"

    @abstractmethod
    def chunks(self, first: int = 0, last: int | None = None) -> Iterator[Chunk]:
        """All timesteps of the episodes `first` to `last` (exclusive), in order, a few at a time.

        Raises:
            ValueError: frames that cannot be decoded, or are not what the dataset's tables say.
            FileNotFoundError: a file of it is missing.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest of the files (names, sizes, times of change) and of what was chosen from them."""


def in_rows(name: str, episodes: Iterable[EpisodeInfo]) -> tuple[EpisodeInfo, ...]:
    """Episodes with their `start` set to follow each other; ValueError when there is none."""
    placed, start = [], 0
    for episode in episodes:
        placed.append(replace(episode, start=start))
        start += episode.length
    if not placed:
        raise ValueError(f"dataset {name} has no episodes")
    return tuple(placed)


def one_size(name: str, sizes: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """The height and width that all cameras share; ValueError when they differ."""
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{camera} {height} x {width}" for camera, (height, width) in sizes.items())
        raise ValueError(
            f"the cameras of {name} differ in size ({listed}), but views are one array; choose some of one size"
        )
    return next(iter(sizes.values()))


def digest(files: Sequence[Path], root: Path, also: Sequence[str]) -> str:
    """Hex digest of files' names, sizes and times of change, and of some strings."""
    hashed = hashlib.sha256("\0".join(also).encode())
    for file in files:
        stat = file.stat()
        hashed.update(f"{file.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return hashed.hexdigest()
