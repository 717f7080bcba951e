"""Frames of a dataset at the model's resolution, memory-mapped, so that training never decodes.

frames.npy   uint8   [T, V, S, S, 3]   upright, views in the order of the recorded cameras
rewards.npy  float32 [T]               ground truth: reward of the step that led to the frame
success.npy  bool    [T]
meta.json    episodes, camera spec, crops, dataset id, fingerprint
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import minari
import numpy as np
from tqdm import tqdm

from vlm_reward._jobs import BAR_SECONDS
from vlm_reward.cameras import CameraSpec, Crop, cut
from vlm_reward.datasets import open_dataset
from vlm_reward.preprocess import Resample, resize
from vlm_reward.recording import EpisodeInfo, Recording

FORMAT_VERSION = 1


@dataclass(frozen=True)
class FrameCache:
    """A cache opened for reading. Nothing is loaded until a row is read.

    Args:
        frames: uint8 [T, V, S, S, 3], a read-only memory map.
        rewards: float32 [T], the true reward of the step that led to the frame; 0 at the first of an episode.
        reward_valid: bool [T], False at the first frame of an episode, which no step led to.
        success: bool [T].
        episodes: in the order of the rows.
        camera_spec: as recorded, before cropping and resizing.
        dataset_id: the Minari id, or the name of its folder.
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
    dataset: minari.MinariDataset | Recording | str | Path,
    size: int,
    root: str | Path | None = None,
    expect: CameraSpec | None = None,
    resample: Resample = "bilinear",
    crops: Mapping[str, Crop] | None = None,
) -> FrameCache:
    """Open the cache of a dataset at `size` pixels, built first where there is none.

    The folder's name holds the dataset id, the size and a fingerprint of the dataset's files, so a dataset
    that changed gets a new cache. Processes that ask for the same cache at once wait for the one that builds.

    Args:
        dataset: what `open_dataset` takes or gives.
        size: S, the side of a frame in pixels.
        root: folder of the caches; `$VLM_REWARD_CACHE`, else `~/.cache/vlm-reward`.
        expect: refuse, before building, a dataset recorded with another camera spec.
        resample: how the model that reads the frames resizes.
        crops: the part of each camera's image to keep, `RewardModel.crops`; `model.with_small_frames()` takes the
            frames then. None for whole images.

    Raises:
        FileNotFoundError: no such dataset, or a file of it is missing.
        ValueError: damaged, or recorded with another camera spec.
        OSError: the disk has no room for the cache.
    """
    data = open_dataset(dataset)
    if expect is not None:
        check_camera_spec(data.camera_spec, expect, data.id)
    folder = Path(root or os.environ.get("VLM_REWARD_CACHE") or Path.home() / ".cache" / "vlm-reward")
    part = "-" + hashlib.sha256(json.dumps(crops, sort_keys=True).encode()).hexdigest()[:6] if crops else ""
    name = f"{data.id.replace('/', '--')}-{size}px{part}-{resample}-{data.fingerprint()[:12]}"
    out = folder.expanduser() / name
    return FrameCache.open(out) if out.is_dir() else build_cache(data, size, out, resample, crops)


def build_cache(
    dataset: minari.MinariDataset | Recording | str | Path,
    size: int,
    out: str | Path,
    resample: Resample = "bilinear",
    crops: Mapping[str, Crop] | None = None,
) -> FrameCache:
    """Write the cache of a dataset to the folder `out`, at most one episode in memory at a time, and open it.

    It is written beside `out` and renamed when complete: a build that is killed leaves no half cache, and
    one that another process finished first is taken as it is. Arguments and errors as in `cached`.
    """
    data, out = open_dataset(dataset), Path(out)
    if size <= 0:
        raise ValueError(f"size must be a positive number of pixels, got {size}")
    rows = sum(episode.length for episode in data.episodes)
    shape = (rows, len(data.camera_spec.cameras), size, size, 3)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _locked(out.with_name(out.name + ".lock")):
        if out.is_dir():
            return FrameCache.open(out)
        partial = out.with_name(out.name + ".partial")  # ours alone: we hold the lock
        shutil.rmtree(partial, ignore_errors=True)
        free, needed = shutil.disk_usage(out.parent).free, int(np.prod(shape))
        if free < needed:
            raise OSError(
                f"the frame cache of {data.id} needs {needed / 1e9:.1f} GB, {out.parent} has "
                f"{free / 1e9:.1f} GB free; make room or set VLM_REWARD_CACHE to a folder on another disk"
            )
        partial.mkdir()
        try:
            _write(data, shape, resample, crops, partial)
            os.replace(partial, out)
        except BaseException:  # a full disk, Ctrl-C: leave nothing behind
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return FrameCache.open(out)


def _write(
    data: Recording,
    shape: tuple[int, ...],
    resample: Resample,
    crops: Mapping[str, Crop] | None,
    folder: Path,
) -> None:
    parts = [crops[camera] for camera in data.camera_spec.cameras] if crops else []
    rewards, success = np.zeros(shape[0], np.float32), np.zeros(shape[0], bool)
    # Plain writes, not a writable memory map: on a full disk these raise OSError, a map kills the process.
    title = f"frame cache {data.id} at {shape[2]} px"
    with (
        open(folder / "frames.npy", "wb") as file,
        tqdm(total=shape[0], desc=title, unit="timestep", mininterval=BAR_SECONDS) as bar,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in data.chunks():
            frames = cut(chunk.frames, parts) if parts else chunk.frames
            file.write(np.ascontiguousarray(resize(frames, shape[2], resample=resample)).data)
            start = data.episodes[chunk.episode].start + chunk.start
            rows = slice(start, start + len(chunk.frames))
            rewards[rows], success[rows] = chunk.rewards, chunk.success
            bar.update(len(chunk.frames))
        _sync(file)
    for name, array in (("rewards", rewards), ("success", success)):
        with open(folder / f"{name}.npy", "wb") as file:
            np.save(file, array, allow_pickle=False)
            _sync(file)
    meta = {
        "format_version": FORMAT_VERSION,
        "dataset_id": data.id,
        "fingerprint": data.fingerprint(),
        "size": shape[2],
        "resample": resample,
        "camera_spec": data.camera_spec.to_dict(),
        "crops": crops,
        "episodes": [asdict(episode) for episode in data.episodes],
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
