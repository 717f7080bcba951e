"""LeRobotDataset v3.0 folders made up for measurements and tests, in the layout of the `lerobot` package."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FPS = 10
CAMERAS = ("observation.images.front", "observation.images.wrist")


def level(episode: int, frame: int, view: int) -> int:
    """The grey of a frame, so that a frame read can be told from all its neighbours."""
    return 20 + 9 * (frame % 14) + 4 * view + 40 * (episode % 3)


def grey(episode: int, frame: int, view: int, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] of one grey, its left upper corner white."""
    picture = np.full((*size, 3), level(episode, frame, view), np.uint8)
    picture[: size[0] // 4, : size[1] // 4] = 255
    return picture


def write_lerobot(
    folder: Path,
    *,
    lengths: Sequence[int] = (12, 9, 14, 8, 12),
    tasks: Sequence[str] = ("close the green drawer", "turn on faucet"),
    cameras: Sequence[str] = CAMERAS,
    size: tuple[int, int] = (32, 48),
    per_file: int = 2,
    files_per_chunk: int = 2,
    images: bool = False,
    codec: str = "libx264",
    outcome: bool = True,
    draw: Callable[[int, int, int, tuple[int, int]], np.ndarray] = grey,
) -> Path:
    """Episodes of these lengths, `per_file` in a file, `files_per_chunk` files in a chunk's folder."""
    feature = {
        "dtype": "image" if images else "video",
        "shape": [*size, 3],
        "names": ["height", "width", "channels"],
    }
    features: dict[str, Any] = dict.fromkeys(cameras, feature)
    features["action"] = {"dtype": "float32", "shape": [2], "names": None}
    info = {
        "codebase_version": "v3.0",
        "fps": FPS,
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "features": features,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    rows = []
    for number in range(0, len(lengths), per_file):
        file = number // per_file
        place = {"chunk_index": file // files_per_chunk, "file_index": file % files_per_chunk}
        episodes = range(number, min(number + per_file, len(lengths)))
        data: dict[str, list[Any]] = {
            name: [] for name in ("episode_index", "frame_index", "index", "timestamp")
        }
        extra: dict[str, list[Any]] = {"action": []}
        if outcome:
            extra |= {"next.reward": [], "next.success": []}
        if images:
            extra |= {camera: [] for camera in cameras}
        since = 0
        for episode in episodes:
            row = {
                "episode_index": episode,
                "tasks": [tasks[episode % len(tasks)]],
                "length": lengths[episode],
                "dataset_from_index": starts[episode],
                "dataset_to_index": starts[episode + 1],
                **{f"data/{name}": value for name, value in place.items()},
            }
            for camera in () if images else cameras:
                row |= {f"videos/{camera}/{name}": value for name, value in place.items()}
                row[f"videos/{camera}/from_timestamp"] = since / FPS
                row[f"videos/{camera}/to_timestamp"] = (since + lengths[episode]) / FPS
            rows.append(row)
            for frame in range(lengths[episode]):
                data["episode_index"].append(episode)
                data["frame_index"].append(frame)
                data["index"].append(starts[episode] + frame)
                data["timestamp"].append(frame / FPS)
                extra["action"].append([0.0, 0.0])
                if outcome:
                    extra["next.reward"].append(float(frame))
                    extra["next.success"].append(frame >= lengths[episode] - 3)
                for view, camera in enumerate(cameras if images else ()):
                    stream = io.BytesIO()
                    Image.fromarray(draw(episode, frame, view, size)).save(stream, "PNG")
                    extra[camera].append({"bytes": stream.getvalue(), "path": None})
            since += lengths[episode]
        _write(folder / info["data_path"].format(**place), data | extra)
        for view, camera in enumerate(() if images else cameras):
            path = folder / info["video_path"].format(video_key=camera, **place)
            pictures = (draw(e, f, view, size) for e in episodes for f in range(lengths[e]))
            write_video(path, pictures, size, codec)
    _write(
        folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet",
        {name: [row[name] for row in rows] for name in rows[0]},
    )
    return folder


def write_video(path: Path, pictures: Any, size: tuple[int, int], codec: str = "libx264") -> None:
    """An MP4 at FPS; AV1 with the settings of `lerobot`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=FPS)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = 2 if codec == "libsvtav1" else 6
        if codec == "libsvtav1":
            stream.options = {"crf": "30", "preset": "12"}
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


def edit(file: Path, change: Callable[[dict[str, list[Any]]], None]) -> None:
    """Rewrite a parquet file after `change` has changed its columns."""
    columns = pq.read_table(file).to_pydict()
    change(columns)
    pq.write_table(pa.table(columns), file)


def _write(file: Path, columns: dict[str, list[Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)
