"""Frames of a demonstration dataset at the model's resolution, memory-mapped, so that training never decodes.

frames.npy   uint8   [T, V, S, S, 3]   upright, views in the order of the recorded cameras
rewards.npy  float32 [T]               ground truth: reward of the step that led to the frame
success.npy  bool    [T]
meta.json    episodes, camera spec, dataset id, fingerprint
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import minari
import numpy as np
from tqdm import tqdm

from vlm_reward._jobs import BAR_SECONDS
from vlm_reward.cameras import CameraSpec
from vlm_reward.preprocess import Resample, resize

FORMAT_VERSION = 1
KINDS: tuple[str, ...] = ("expert", "random", "noisy", "mixed")


@dataclass(frozen=True)
class EpisodeInfo:
    """One trajectory: rows `start : start + length` of the cache.

    Args:
        start: row of its first frame.
        length: number of frames, steps + 1.
        task: Meta-World task, e.g. `drawer-close-v3`.
        instruction: the sentence, e.g. `close the green drawer`.
        kind: who acted: `expert`, `random`, `noisy` or `mixed`.
        seed: seed of the environment.
        success: whether any step succeeded.
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
        """Its rows in the cache."""
        return slice(self.start, self.start + self.length)


@dataclass(frozen=True)
class FrameCache:
    """A cache opened for reading. Nothing is loaded until a row is read.

    Args:
        frames: uint8 [T, V, S, S, 3], a read-only memory map.
        rewards: float32 [T], the true reward of the step that led to the frame; 0 at the first of an episode.
        reward_valid: bool [T], False at the first frame of an episode, which no step led to.
        success: bool [T].
        episodes: in the order of the rows.
        camera_spec: as recorded, before resizing.
        dataset_id: the Minari id.
        path: its folder.
    """

    frames: np.ndarray
    rewards: np.ndarray
    reward_valid: np.ndarray
    success: np.ndarray
    episodes: tuple[EpisodeInfo, ...]
    camera_spec: CameraSpec
    dataset_id: str
    path: Path

    @property
    def size(self) -> int:
        """S, the side of a frame in pixels."""
        return self.frames.shape[2]

    @property
    def views(self) -> int:
        """V, the number of cameras."""
        return self.frames.shape[1]

    @classmethod
    def open(cls, path: str | Path, expect: CameraSpec | None = None) -> "FrameCache":
        """Open the cache in the folder `path`.

        Args:
            path: a folder that `build_cache` wrote.
            expect: refuse a dataset that was recorded with other cameras, size or render profile.

        Raises:
            FileNotFoundError: no cache there.
            ValueError: a truncated or foreign cache, or one recorded with another camera spec.
        """
        path = Path(path)
        if not (path / "meta.json").is_file():
            raise FileNotFoundError(f"no frame cache at {path}: it has no meta.json")
        try:
            meta = json.loads((path / "meta.json").read_text())
            if meta.get("format_version") != FORMAT_VERSION:
                raise ValueError(
                    f"its format is {meta.get('format_version')}, this version reads {FORMAT_VERSION}"
                )
            frames = np.load(path / "frames.npy", mmap_mode="r", allow_pickle=False)
            rewards = np.load(path / "rewards.npy", allow_pickle=False)
            success = np.load(path / "success.npy", allow_pickle=False)
            episodes = tuple(EpisodeInfo(**episode) for episode in meta["episodes"])
            camera_spec = CameraSpec.from_dict(meta["camera_spec"])
            rows = sum(episode.length for episode in episodes)
            wanted = (rows, len(camera_spec.cameras), meta["size"], meta["size"], 3)
            if frames.shape != wanted or rewards.shape != (rows,) or success.shape != (rows,):
                raise ValueError(f"frames should be {wanted}, got {frames.shape}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"the frame cache at {path} cannot be read ({error}); delete the folder"
            ) from error
        if expect is not None:
            check_camera_spec(camera_spec, expect, meta["dataset_id"])
        valid = np.ones(rows, bool)
        valid[[episode.start for episode in episodes]] = False
        return cls(frames, rewards, valid, success, episodes, camera_spec, meta["dataset_id"], path)


def check_camera_spec(recorded: CameraSpec, expect: CameraSpec, name: str) -> None:
    """ValueError when the dataset `name` was `recorded` otherwise than one should `expect`."""
    if differences := recorded.mismatch(expect):
        raise ValueError(
            f"dataset {name} was recorded with another camera spec than asked for (recorded against asked: "
            f"{differences}); collect it again with this spec, or ask for the recorded one"
        )


def cached(
    dataset: minari.MinariDataset | str,
    size: int,
    root: str | Path | None = None,
    expect: CameraSpec | None = None,
    resample: Resample = "bilinear",
) -> FrameCache:
    """Open the cache of a dataset at `size` pixels, built first where there is none.

    The folder's name holds the dataset id, the size and a fingerprint of the dataset's files, so a dataset
    that changed gets a new cache. Processes that ask for the same cache at once wait for the one that builds.

    Args:
        dataset: a Minari dataset written by `training.collect`, or its id.
        size: S, the side of a frame in pixels.
        root: folder of the caches; `$VLM_REWARD_CACHE`, else `~/.cache/vlm-reward`.
        expect: refuse, before building, a dataset recorded with another camera spec.
        resample: how the model that reads the frames resizes.

    Raises:
        FileNotFoundError: no such dataset.
        ValueError: not one of ours, or recorded with another camera spec.
        OSError: the disk has no room for the cache.
    """
    dataset = load_dataset(dataset)
    if expect is not None:
        check_camera_spec(_camera_spec(dataset), expect, dataset.id)
    folder = Path(root or os.environ.get("VLM_REWARD_CACHE") or Path.home() / ".cache" / "vlm-reward")
    out = (
        folder.expanduser()
        / f"{dataset.id.replace('/', '--')}-{size}px-{resample}-{fingerprint(dataset)[:12]}"
    )
    return FrameCache.open(out) if out.is_dir() else build_cache(dataset, size, out, resample)


def build_cache(
    dataset: minari.MinariDataset | str, size: int, out: str | Path, resample: Resample = "bilinear"
) -> FrameCache:
    """Write the cache of a dataset to the folder `out`, one episode in memory at a time, and open it.

    It is written beside `out` and renamed when complete: a build that is killed leaves no half cache, and
    one that another process finished first is taken as it is. Arguments and errors as in `cached`.
    """
    dataset, out = load_dataset(dataset), Path(out)
    if size <= 0:
        raise ValueError(f"size must be a positive number of pixels, got {size}")
    spec = _camera_spec(dataset)
    episodes = _episodes(dataset)
    rows = sum(episode.length for episode in episodes)
    shape = (rows, len(spec.cameras), size, size, 3)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _locked(out.with_name(out.name + ".lock")):
        if out.is_dir():
            return FrameCache.open(out)
        partial = out.with_name(out.name + ".partial")  # ours alone: we hold the lock
        shutil.rmtree(partial, ignore_errors=True)
        free, needed = shutil.disk_usage(out.parent).free, int(np.prod(shape))
        if free < needed:
            raise OSError(
                f"the frame cache of {dataset.id} needs {needed / 1e9:.1f} GB, {out.parent} has "
                f"{free / 1e9:.1f} GB free; make room or set VLM_REWARD_CACHE to a folder on another disk"
            )
        partial.mkdir()
        try:
            _write(dataset, spec, episodes, shape, resample, partial)
            os.replace(partial, out)
        except BaseException:  # a full disk, Ctrl-C: leave nothing behind
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return FrameCache.open(out)


def load_dataset(dataset: minari.MinariDataset | str) -> minari.MinariDataset:
    """The Minari dataset of this id; FileNotFoundError says which there are and how to collect one."""
    if isinstance(dataset, minari.MinariDataset):
        return dataset
    try:
        return minari.load_dataset(dataset)
    except FileNotFoundError:
        local = ", ".join(minari.list_local_datasets()) or "none"
        raise FileNotFoundError(
            f"no Minari dataset {dataset!r} on this machine (it has: {local}); collect it with "
            f"`python -m training.collect`, or point MINARI_DATASETS_PATH at the folder that holds it"
        ) from None


def fingerprint(dataset: minari.MinariDataset) -> str:
    """Hex digest of the dataset's files (names, sizes, times of change) and of the episodes it selects."""
    digest = hashlib.sha256(np.asarray(dataset.episode_indices, np.int64).tobytes())
    data = Path(dataset.storage.data_path)
    for file in sorted(data.rglob("*")):
        if file.is_file():
            stat = file.stat()
            digest.update(f"{file.relative_to(data)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _camera_spec(dataset: minari.MinariDataset) -> CameraSpec:
    stored = dataset.storage.metadata.get("camera_spec")
    if stored is None:
        raise ValueError(
            f"dataset {dataset.id} has no camera_spec in its metadata; it was not written by training.collect"
        )
    return CameraSpec.from_dict(json.loads(stored))


def _episodes(dataset: minari.MinariDataset) -> tuple[EpisodeInfo, ...]:
    episodes, start = [], 0
    for index, meta in zip(
        dataset.episode_indices, dataset.storage.get_episode_metadata(dataset.episode_indices), strict=True
    ):
        if missing := {"task", "instruction", "kind", "seed", "success", "total_steps"} - set(meta):
            raise ValueError(
                f"episode {index} of {dataset.id} lacks the metadata {', '.join(sorted(missing))}"
            )
        if meta["kind"] not in KINDS:
            raise ValueError(
                f"episode {index} of {dataset.id}: kind {meta['kind']!r} is none of {', '.join(KINDS)}"
            )
        length = int(meta["total_steps"]) + 1
        text, seed, success = str(meta["instruction"]), int(meta["seed"]), bool(meta["success"])
        episodes.append(EpisodeInfo(start, length, str(meta["task"]), text, str(meta["kind"]), seed, success))
        start += length
    if not episodes:
        raise ValueError(f"dataset {dataset.id} has no episodes")
    return tuple(episodes)


def _write(
    dataset: minari.MinariDataset,
    spec: CameraSpec,
    episodes: tuple[EpisodeInfo, ...],
    shape: tuple[int, ...],
    resample: Resample,
    folder: Path,
) -> None:
    rewards, success = np.zeros(shape[0], np.float32), np.zeros(shape[0], bool)
    # Plain writes, not a writable memory map: on a full disk these raise OSError, a map kills the process.
    with open(folder / "frames.npy", "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        progress = tqdm(
            episodes,
            desc=f"frame cache {dataset.id} at {shape[2]} px",
            unit="episode",
            mininterval=BAR_SECONDS,
        )
        for info, episode in zip(progress, dataset.iterate_episodes(), strict=True):
            observations: Any = episode.observations
            views = []
            for camera in spec.cameras:
                view = np.asarray(observations.get(camera))
                if view.dtype != np.uint8 or view.shape != (info.length, spec.height, spec.width, 3):
                    raise ValueError(
                        f"episode {episode.id} of {dataset.id}: frames of camera {camera!r} must be uint8 "
                        f"{[info.length, spec.height, spec.width, 3]}, got {view.dtype} {view.shape}"
                    )
                views.append(resize(view, shape[2], resample=resample))
            file.write(np.stack(views, axis=1).data)
            rewards[info.start + 1 : info.start + info.length] = episode.rewards
            flags = np.asarray((episode.infos or {}).get("success"), np.float32)
            if flags.shape != (info.length,):
                raise ValueError(
                    f"episode {episode.id} of {dataset.id}: infos need `success` [{info.length}]"
                )
            success[info.rows] = flags > 0
        _sync(file)
    for name, array in (("rewards", rewards), ("success", success)):
        with open(folder / f"{name}.npy", "wb") as file:
            np.save(file, array, allow_pickle=False)
            _sync(file)
    meta = {
        "format_version": FORMAT_VERSION,
        "dataset_id": dataset.id,
        "fingerprint": fingerprint(dataset),
        "size": shape[2],
        "resample": resample,
        "camera_spec": spec.to_dict(),
        "episodes": [asdict(episode) for episode in episodes],
    }
    with open(folder / "meta.json", "wb") as file:
        file.write(json.dumps(meta).encode())
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # freed by the kernel, also when the process is killed
        yield
