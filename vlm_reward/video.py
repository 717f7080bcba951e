"""Score the frames of a video by a sentence: what `vlm-reward score` does."""

import contextlib
import csv
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image, ImageOps
from tqdm import tqdm

from vlm_reward._jobs import BAR_SECONDS, replacing
from vlm_reward.curves import blocks, frames_over_curves
from vlm_reward.metrics import multi_view, voc
from vlm_reward.reward_model import RewardModel, auto_device

CHUNK = 64  # moments a forward: memory is that of so many frames at the model's size, however long the video
STRIP = 6  # frames above the curve
THUMBNAIL = 320  # pixels, their longer side

Frame = tuple[float | None, np.ndarray]
"""Seconds since the start, where known, and uint8 [H, W, 3], upright."""


@dataclass(frozen=True)
class Clip:
    """A video file or a folder of images, to be read frame by frame. Make one with `open_clip`.

    Args:
        path: the file or folder.
        length: its number of frames, or None where the file does not say.
        images: the files of a folder, in order; empty for a video.
    """

    path: Path
    length: int | None
    images: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """What its results are called."""
        return self.path.resolve().name if self.images else self.path.stem

    def frames(self) -> Iterator[Frame]:
        """Decode one frame after the other. Raises ValueError, with the file's name, where that fails."""
        return _read(self.images) if self.images else _decode(self.path)


def open_clip(path: Path) -> Clip:
    """Look at a video, or at each image of a folder, without decoding it.

    Args:
        path: a file with a video stream, or a folder whose images, sorted by the numbers in their names, are
            the frames. Other files in the folder are left alone.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: no video, a truncated one, no images, an unreadable one, or images of different sizes.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video stream")
            stream = container.streams.video[0]
            # Of an MP4 that was cut off, the table of contents can be whole and the frames gone.
            mp4 = "mp4" in container.format.name
            end = max((entry.pos + entry.size for entry in stream.index_entries), default=0) if mp4 else 0
            length = stream.frames or None
    except FFmpegError as error:
        raise ValueError(f"{path} is no video, or a truncated one ({error.strerror})") from error
    size = path.stat().st_size
    if end > size:
        raise ValueError(f"{path} is truncated: it has {size:,} bytes of {end:,}; copy it again")
    return Clip(path, length)


def _open_folder(folder: Path) -> Clip:
    known = Image.registered_extensions()
    readable = {suffix for suffix, kind in known.items() if kind in Image.OPEN}
    images = sorted(
        (file for file in folder.iterdir() if file.suffix.lower() in readable and file.is_file()),
        key=lambda file: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)],
    )
    if not images:
        raise ValueError(f"{folder} has no images; give a video, or a folder of PNG or JPEG files")
    first = None
    for file in images:
        with _naming(file), Image.open(file) as image:
            size, mode = image.size, image.mode
        if mode.startswith(("I", "F")):
            raise ValueError(f"{file} has more than 8 bits a channel (mode {mode}): convert it to 8 bits")
        first = first or size
        if size != first:
            raise ValueError(
                f"{file} has {size[0]} x {size[1]} pixels, {images[0].name} has {first[0]} x {first[1]}: "
                "the images of a folder must have one size"
            )
    return Clip(folder, len(images), tuple(images))


def _read(images: Sequence[Path]) -> Iterator[Frame]:
    for file in images:
        with _naming(file), Image.open(file) as image:
            frame = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        yield None, frame


def _decode(path: Path) -> Iterator[Frame]:
    count = 0
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                pixels = frame.to_ndarray(format="rgb24")
                yield frame.time, np.rot90(pixels, round(frame.rotation / 90))  # as telephones hold it
                count += 1
    except FFmpegError as error:
        raise ValueError(f"{path} is damaged after {count} frames ({error.strerror})") from error
    if not count:
        raise ValueError(f"{path} has a video stream without a frame")


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Errors of Pillow become a ValueError that names the file."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is no image, or a damaged one ({error})") from error


class Strip:
    """A few frames of a stream, evenly spaced though nobody knows its length, and its last."""

    def __init__(self) -> None:
        self._kept: dict[int, np.ndarray] = {}
        self._stride = 1
        self._last: tuple[int, np.ndarray] | None = None
        self._size: tuple[int, int] | None = None  # of the first, for all

    def add(self, step: int, frame: np.ndarray) -> None:
        """Show it the next frame: uint8 [H, W, 3]."""
        self._last = step, frame
        if step % self._stride == 0:
            self._kept[step] = self._small(frame)
        if len(self._kept) > 2 * STRIP:
            self._stride *= 2
            self._kept = {step: frame for step, frame in self._kept.items() if step % self._stride == 0}

    def frames(self) -> tuple[np.ndarray, list[int]]:
        """At most `STRIP` thumbnails, uint8 [K, H, W, 3], and their steps."""
        assert self._last is not None
        step, frame = self._last
        kept = self._kept | {step: self._small(frame)}
        steps = sorted(kept)
        chosen = np.linspace(0, len(steps) - 1, min(STRIP, len(steps))).round().astype(int)
        return np.stack([kept[steps[i]] for i in chosen]), [steps[i] for i in chosen]

    def _small(self, frame: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(np.ascontiguousarray(frame))
        if self._size is None:
            scale = min(1.0, THUMBNAIL / max(picture.size))
            self._size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        return np.array(picture.resize(self._size))


def score(
    videos: Sequence[Path], sentence: str, *, model: str, out: Path, every: int = 1, device: str = "cpu"
) -> tuple[Path, Path]:
    """Score each frame, and write a table and a picture of the scores.

    Memory does not grow with the length: frames are decoded, scored and forgotten `CHUNK` at a time.

    Args:
        videos: the views V of the same moments, each a video file or a folder of images. Each is scored by
            itself, whatever cameras the model was trained with (but one that looks at parts of their images takes
            one of each, in its order); the score is their mean.
        sentence: what the robot should do.
        model: adapter or backbone: a folder, an embedded name, or a Hub id.
        out: folder of the results.
        every: score each so many-th frame.
        device: where the model runs; `auto` is a GPU where there is one.

    Returns:
        The CSV (`frame`, counted from 0; `time` in seconds, empty where unknown; `score` in [-1, 1]; with
        several views also `score_1`, `score_2`, ... in their order), and the PNG.

    Raises:
        FileNotFoundError: no such video or model.
        ValueError: a bad video (see `open_clip`), views of different lengths, a sentence that is empty or too
            long, `every` below 1.
        OSError: a result could not be written; one of before is as it was.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    if not sentence.strip():
        raise ValueError("the sentence is empty: say what the robot should do")
    clips = [open_clip(video) for video in videos]
    lengths = {clip.length for clip in clips if clip.length}
    if len(lengths) > 1:
        told = ", ".join(f"{clip.path} has {clip.length or 'unknown'}" for clip in clips)
        raise ValueError(f"views must show the same moments, but their numbers of frames differ: {told}")

    trained = RewardModel.from_pretrained(model, device=auto_device(device))
    scorer = trained.with_any_views()
    eyes = [scorer] * len(clips)
    if trained.sees_parts and trained.camera_spec:
        cameras = trained.camera_spec.cameras
        if len(clips) != len(cameras):
            raise ValueError(
                f"{model} looks at parts of its cameras' images: give one view of each of {', '.join(cameras)}, "
                "in this order (--views has those after the first), or take another model"
            )
        eyes, scorer = [trained.with_cameras((camera,)) for camera in cameras], trained.with_small_frames()
    scorer.embed_text([sentence])  # refuses what is too long before anything is decoded
    out.mkdir(parents=True, exist_ok=True)
    table, picture = out / f"{clips[0].name}.csv", out / f"{clips[0].name}.png"
    strip, parts = Strip(), []
    total = -(-lengths.pop() // every) if lengths else None
    names = [f"score_{view}" for view in range(1, len(clips) + 1)] if len(clips) > 1 else []
    with (
        replacing(table) as fresh,
        fresh.open("w", newline="") as file,
        tqdm(total=total, unit="frame", mininterval=BAR_SECONDS) as bar,
    ):
        rows = csv.writer(file)
        rows.writerow(["frame", "time", "score", *names])
        moments = _moments(clips, every, strip, eyes)
        first = None
        for batch in iter(lambda: list(itertools.islice(moments, CHUNK)), []):
            frames = np.stack([views for _, _, views in batch])
            first = frames[0] if first is None else first
            scores = scorer.score(frames, sentence, start=first)
            parts.append(scores)
            for (number, time, _), values in zip(batch, scores, strict=True):
                seconds = "" if time is None else f"{time:.3f}"
                columns = [values.mean(), *(values if names else ())]
                rows.writerow([number, seconds, *(f"{value:.6f}" for value in columns)])
            bar.update(len(batch))

    every_view = multi_view(np.concatenate(parts))  # [T, V + 1], the mean last
    mean = every_view[:, -1]
    curves = {"score": mean}
    if len(clips) > 1:
        curves = {"mean": mean} | {f"view {v + 1}": every_view[:, v] for v in range(len(clips))}
    thumbnails, steps = strip.frames()
    frames_over_curves(
        thumbnails, steps, curves, picture, title=f'"{sentence}"', ylabel="score", xlabel="frame", every=every
    )
    print(f'{model} scores {len(mean)} frames of {clips[0].path} with "{sentence}"\n')
    print(f"  {blocks(mean, mean.min(), mean.max())}")
    print(f"  from {mean.min():+.3f} to {mean.max():+.3f}; order in time (VOC) {100 * voc(mean):+.0f} of 100")
    if trained.camera_spec:
        known = ", ".join(trained.camera_spec.cameras)
        print(f"  this model has seen the cameras {known} alone; of others a bare backbone knows more")
    print(f"\ntable    {table}\npicture  {picture}")
    return table, picture


def _moments(
    clips: Sequence[Clip], every: int, strip: Strip, eyes: Sequence[RewardModel]
) -> Iterator[tuple[int, float | None, np.ndarray]]:
    """The frame's number, its time in the first view, and uint8 [V, S, S, 3]; shows the strip the first view."""
    for number, views in enumerate(itertools.zip_longest(*(clip.frames() for clip in clips))):
        if any(view is None for view in views):
            ended = next(clip.path for clip, view in zip(clips, views, strict=True) if view is None)
            raise ValueError(f"{ended} ends after {number} frames, another view goes on")
        if number % every == 0:
            strip.add(number // every, views[0][1])
            yield (
                number,
                views[0][0],
                np.stack([eye.look(frame[None])[0] for eye, (_, frame) in zip(eyes, views, strict=True)]),
            )
