"""LeRobotDataset v3.0, read with pyarrow and PyAV (the `lerobot` package pins older libraries than ours).

    meta/info.json                                  version, fps, features, where the files are
    meta/episodes/chunk-000/file-000.parquet        of each episode: length, sentence, its files, its time in them
    data/chunk-000/file-000.parquet                 a row for each frame; images, where they are not video
    videos/{camera}/chunk-000/file-000.mp4          many episodes in a row

Source: https://huggingface.co/docs/lerobot/lerobot-dataset-v3
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vlm_reward.cameras import CameraSpec
from vlm_reward.recording import CHUNK, Chunk, EpisodeInfo, Recording, digest, in_rows, one_size

EPISODE_COLUMNS = ("episode_index", "length", "tasks", "data/chunk_index", "data/file_index")
VIDEO_COLUMNS = ("chunk_index", "file_index", "from_timestamp")
REWARDS, SUCCESSES = ("next.reward", "reward"), ("next.success", "success")


class LeRobotRecording(Recording):
    """A LeRobotDataset v3.0 folder; all cameras, of video or images, are views.

    An episode's sentence is its task. Rewards and success are those of the columns `next.reward` and
    `next.success` (of the step after a frame) or `reward` and `success` (of the frame), where there are any.

    Args:
        folder: which holds `meta`, `data` and `videos`.
        cameras: features to take as views, in order; all images and videos when not given.
        instruction: the sentence of all episodes, in place of their own.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another version; a table that lacks a column or is damaged; an episode without a sentence or
            with several; cameras of different sizes.
    """

    def __init__(self, folder: Path, cameras: Sequence[str] = (), instruction: str | None = None) -> None:
        self.folder, self.id = folder, folder.resolve().name
        self._chosen = [*cameras, instruction or ""]
        file = folder / "meta" / "info.json"
        try:
            self.info = json.loads(file.read_text())
            version, features = str(self.info["codebase_version"]), dict(self.info["features"])
            self.fps = float(self.info["fps"])
            self._paths = {kind: self.info.get(f"{kind}_path") for kind in ("data", "video")}
            sizes = {
                key: _size(feature)
                for key, feature in features.items()
                if feature["dtype"] in ("video", "image") and not _is_depth(feature)
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is damaged or no LeRobot dataset's ({error!r})") from error
        if not version.startswith("v3."):
            raise ValueError(
                f"{file} says version {version}, only v3 is read; convert it with LeRobot's "
                "convert_dataset_v21_to_v30"
            )
        if not self.fps > 0 or self.fps == float("inf"):
            raise ValueError(f"{file}: fps must be positive, got {self.fps}")
        if not sizes:
            raise ValueError(f"{file} names no camera: no feature is a video or an image")
        views = tuple(cameras) or (*sizes,)
        if unknown := [key for key in views if key not in sizes]:
            raise ValueError(
                f"dataset {folder} has no camera {', '.join(unknown)}; it has {', '.join(sizes)}"
            )
        size = one_size(str(folder), {key: sizes[key] for key in views})
        self.camera_spec = CameraSpec(views, *size, "recorded")
        self._videos = [key for key in views if features[key]["dtype"] == "video"]
        self._rows = self._read_episodes()
        self.episodes = in_rows(self.id, (self._episode(row, instruction) for row in self._rows))

    def _read_episodes(self) -> list[dict[str, Any]]:
        files = sorted((self.folder / "meta" / "episodes").glob("*/*.parquet"))
        if not files:
            raise FileNotFoundError(f"{self.folder / 'meta' / 'episodes'} has no chunk-*/file-*.parquet")
        columns = [
            *EPISODE_COLUMNS,
            *(f"videos/{key}/{name}" for key in self._videos for name in VIDEO_COLUMNS),
        ]
        rows: list[dict[str, Any]] = []
        for file in files:
            table = _read(file, columns)
            for name in columns:
                kind, column = table.schema.field(name).type, table[name]
                number = pa.types.is_integer(kind) or (
                    name.endswith("timestamp") and pa.types.is_floating(kind)
                )
                if name != "tasks" and (column.null_count or not number):
                    raise ValueError(
                        f"{file}: column {name!r} must hold a number for each episode, got {kind}"
                    )
            rows += table.to_pylist()
        rows.sort(key=lambda row: row["episode_index"])
        numbers = [row["episode_index"] for row in rows]
        if numbers != list(range(len(rows))):
            raise ValueError(
                f"{files[0].parent.parent}: episode_index must count from 0 without gaps, got {numbers[:5]}..."
            )
        return rows

    def _episode(self, row: Mapping[str, Any], sentence: str | None) -> EpisodeInfo:
        number, where = row["episode_index"], self.folder / "meta" / "episodes"
        length = row["length"]
        if length < 1:
            raise ValueError(f"{where}: episode {number} has length {length}, it must be at least 1")
        said = row["tasks"] if isinstance(row["tasks"], list) else [row["tasks"]]
        said = [each.strip() for each in said if isinstance(each, str) and each.strip()]
        if not sentence and len(said) != 1:
            what = "no sentence" if not said else f"{len(said)} sentences"
            raise ValueError(
                f"{where}: episode {number} has {what} in its `tasks`; give one for all episodes (--instruction)"
            )
        said = sentence or said[0]
        return EpisodeInfo(0, length, said, said, "expert", number, True)

    def chunks(self, first: int = 0, last: int | None = None) -> Iterator[Chunk]:
        spec = self.camera_spec
        videos = {camera: _Video(self.fps, (spec.height, spec.width)) for camera in self._videos}
        opened, table = None, pa.table({})
        try:
            for number in range(len(self.episodes))[first:last]:
                episode, row = self.episodes[number], self._rows[number]
                data = self._file("data", row, "data/")
                if data != opened:
                    opened, table = data, self._read_outcomes(data)
                rewards, success = self._outcome(data, table, number, episode.length)
                views = [
                    videos[camera].frames(
                        self._file("video", row, f"videos/{camera}/", video_key=camera),
                        float(row[f"videos/{camera}/from_timestamp"]),
                        episode.length,
                    )
                    if camera in videos
                    else self._images(data, camera, number, episode.length)
                    for camera in spec.cameras
                ]
                for start in range(0, episode.length, CHUNK):
                    count = min(CHUNK, episode.length - start)
                    frames = np.stack([np.stack(list(islice(view, count))) for view in views], axis=1)
                    part = slice(start, start + count)
                    yield Chunk(number, start, frames, rewards[part], success[part])
        finally:
            for video in videos.values():
                video.close()

    def _file(self, kind: str, row: Mapping[str, Any], prefix: str, **more: str) -> Path:
        """The file that a template of info.json names; inside the folder, and there."""
        try:
            indices = {name: int(row[prefix + name]) for name in ("chunk_index", "file_index")}
            path = self.folder / self._paths[kind].format(**indices, **more)
            inside = path.resolve().is_relative_to(self.folder.resolve())
        except (AttributeError, KeyError, IndexError, ValueError, TypeError) as error:
            raise ValueError(
                f"{self.folder / 'meta' / 'info.json'}: {kind}_path {self._paths[kind]!r} does not give a file of "
                f"episode {row['episode_index']} ({error!r})"
            ) from error
        if not inside:
            raise ValueError(f"{self.folder}: {kind}_path leads out of the dataset, to {path}")
        if not path.is_file():
            raise FileNotFoundError(
                f"episode {row['episode_index']} of {self.folder} needs {path}: no such file"
            )
        return path

    def _read_outcomes(self, file: Path) -> pa.Table:
        """Whose row each is, and what it says of reward and success, of a file of many episodes."""
        names = _columns(file)
        found = [next((name for name in kind if name in names), None) for kind in (REWARDS, SUCCESSES)]
        return _read(file, ["episode_index", *filter(None, found)])

    def _outcome(
        self, file: Path, table: pa.Table, number: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rewards float32 and success bool, [length], at the frame that a step led to."""
        table = table.take(np.flatnonzero(np.asarray(table["episode_index"]) == number))
        if len(table) != length:
            raise ValueError(
                f"{file} has {len(table)} rows of episode {number}, its table in meta/episodes says {length}"
            )
        out = []
        for kind in (REWARDS, SUCCESSES):
            values = np.zeros(length, np.float32)
            if name := next((name for name in kind if name in table.column_names), None):
                try:
                    stored = np.array(table[name].to_pylist(), np.float32).reshape(length)
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{file}: column {name!r} must hold one number a row") from error
                if name.startswith("next."):
                    values[1:] = stored[:-1]
                    if name == SUCCESSES[0]:  # the frame after the last step is not stored
                        values[-1] = max(values[-1], stored[-1])
                else:
                    values = stored
            out.append(values)
        return out[0], out[1] > 0

    def _images(self, file: Path, camera: str, number: int, length: int) -> Iterator[np.ndarray]:
        size = (self.camera_spec.height, self.camera_spec.width)
        stored = _read(file, [camera], episode=number)[camera]
        for row in range(length):
            try:
                frame = np.asarray(Image.open(io.BytesIO(stored[row].as_py()["bytes"])).convert("RGB"))
            except (OSError, TypeError, KeyError, ValueError) as error:
                raise ValueError(
                    f"{file}: {camera!r} of frame {row}, episode {number}, is no image ({error})"
                ) from error
            yield _sized(frame, size, file)

    def fingerprint(self) -> str:
        files = [
            f for part in ("meta", "data", "videos") for f in (self.folder / part).rglob("*") if f.is_file()
        ]
        return digest(sorted(files), self.folder, self._chosen)


class _Video:
    """Frames of a camera, file after file. The next episode mostly goes on where the last one ended."""

    def __init__(self, fps: float, size: tuple[int, int]) -> None:
        self.fps, self.size = fps, size
        self.path: Path | None = None
        self.container: Any = None
        self.at = 0.0  # seconds: where the next decoded frame is expected

    def frames(self, path: Path, start: float, count: int) -> Iterator[np.ndarray]:
        """`count` frames uint8 [H, W, 3] from `start` seconds on."""
        if not 0 <= start < float("inf"):
            raise ValueError(f"{path}: an episode cannot start at {start} s")
        try:
            self._go_to(path, start)
            half = 0.5 / self.fps
            done = 0
            for frame in self.decoded:
                time = float(frame.time if frame.time is not None else self.at)
                self.at = time + 2 * half
                wanted = start + done / self.fps
                if time < wanted - half:
                    continue
                if time > wanted + half:
                    break  # a hole
                yield _sized(frame.to_ndarray(format="rgb24"), self.size, path)
                done += 1
                if done == count:
                    return
        except av.error.FFmpegError as error:
            self.close()
            raise ValueError(f"{path} cannot be decoded ({error}); copy it again") from error
        self.close()
        raise ValueError(
            f"{path} is shorter than its table: of an episode of {count} frames from {start:.2f} s on it has "
            f"{done}"
        )

    def _go_to(self, path: Path, start: float) -> None:
        if (
            self.path == path and 0 <= start - self.at + 0.5 / self.fps < 2
        ):  # near enough to decode up to there
            return
        self.close()
        self.container, self.path = av.open(str(path)), path
        if not self.container.streams.video:
            raise ValueError(f"{path} has no video stream")
        stream = self.container.streams.video[0]
        stream.thread_type = "AUTO"
        if start > 0:
            self.container.seek(int(start / stream.time_base), stream=stream)
        self.decoded, self.at = self.container.decode(stream), start

    def close(self) -> None:
        if self.container is not None:
            self.container.close()
        self.container = self.path = None


def _sized(frame: np.ndarray, size: tuple[int, int], file: Path) -> np.ndarray:
    if frame.shape[:2] != size:
        raise ValueError(f"{file} has frames of {frame.shape[:2]}, meta/info.json says {size}")
    return frame


def _read(file: Path, columns: Sequence[str], episode: int | None = None) -> pa.Table:
    """Columns of a parquet file, of one episode's rows if asked; ValueError names the file and what is missing."""
    if missing := [name for name in columns if name not in _columns(file)]:
        raise ValueError(f"{file} has no column {', '.join(map(repr, missing))}")
    chosen = None if episode is None else [("episode_index", "=", episode)]
    try:
        # Without partitioning=None, pyarrow would take a folder called a=b for a column.
        return pq.read_table(file, columns=list(columns), filters=chosen, partitioning=None)  # pyright: ignore
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is truncated or damaged ({error}); copy it again") from error


def _columns(file: Path) -> list[str]:
    try:
        return pq.read_schema(file).names
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is truncated or no parquet file ({error}); copy it again") from error


def _size(feature: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of a camera feature, whose shape is [H, W, 3] or [3, H, W]."""
    shape = [int(side) for side in feature["shape"]]
    if len(shape) != 3 or 3 not in (shape[0], shape[2]) or min(shape) < 1:
        raise ValueError(f"a camera's shape must be [H, W, 3] or [3, H, W], got {shape}")
    return (shape[0], shape[1]) if shape[2] == 3 else (shape[1], shape[2])


def _is_depth(feature: Mapping[str, Any]) -> bool:
    info = feature.get("info") or {}
    return bool(info.get("is_depth_map") or info.get("video.is_depth_map"))
