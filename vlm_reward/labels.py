"""Rewards of every frame of a stored dataset, as a parquet file that its own loader can join.

    vlm-reward label ~/data/aloha_pour --model runs/siglip2-tiny/triplet/paper-seed0

The file has the columns `index` (row in the dataset), `episode_index`, `frame_index`, `reward` (mean score of the
views) and, on request, `reward.<camera>` for each view. Frames are decoded while earlier ones are scored. Blocks
of episodes are scored one by one: a run that was stopped goes on after the last whole block, and blocks can be
spread over processes or machines.
"""

import functools
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from vlm_reward._jobs import BAR_SECONDS, replacing
from vlm_reward._parallel import run_jobs
from vlm_reward.curves import frames_over_curves
from vlm_reward.datasets import open_dataset
from vlm_reward.encoder import locate
from vlm_reward.ensemble import Ensemble
from vlm_reward.recording import Chunk, Recording, digest
from vlm_reward.reward_model import RewardModel, auto_device, members_of

T = TypeVar("T")
BLOCK = 4096  # frames in a block, at least one episode
BATCH = 256  # timesteps scored at once
AHEAD = 8  # chunks decoded ahead


@dataclass(frozen=True)
class Job:
    """What is scored with what; the arguments of `label` of the same names."""

    dataset: str
    model: str
    views: tuple[str, ...] = ()
    instruction: str | None = None
    per_view: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class Block:
    """Episodes `first` to `last` (exclusive) of a job, and the file of their rewards."""

    job: Job
    first: int
    last: int
    path: Path


def label(
    dataset: str | Path,
    model: str | Path,
    output: Path | None = None,
    *,
    views: Sequence[str] = (),
    instruction: str | None = None,
    per_view: bool = False,
    device: str = "cpu",
    workers: int = 1,
    ray: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Score every frame of a dataset.

    Args:
        dataset: a LeRobotDataset v3.0 folder, a Minari id or the folder of a Minari dataset.
        model: adapter or backbone: a folder, a name under `checkpoints/`, or a Hub id.
        output: the parquet file; `rewards-<model>.parquet` in the dataset's folder when not given.
        views: cameras to score, in the order of the model's; all of them when not given.
        instruction: the sentence of all episodes, in place of their own.
        per_view: write a column for each view, too.
        device: where the model runs; `auto` is a GPU where there is one.
        workers: processes, each with a model of its own; 1 scores in this one.
        ray: spread the blocks with Ray, see `vlm_reward._parallel.run_jobs`.
        overwrite: replace an output that is there.

    Returns:
        The parquet file.

    Raises:
        FileNotFoundError: no such dataset or model.
        FileExistsError: the output is there.
        ValueError: a damaged dataset, one recorded with another camera spec than the model's, or a sentence that
            the model cannot read.
    """
    device = auto_device(device)
    job = Job(str(dataset), str(model), tuple(views), instruction, per_view, device)
    scorer, data = opened(job)
    name = job.model.strip("./").replace("/", "-")
    output = output or data.folder / f"rewards-{name}.parquet"
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} is there already; --overwrite replaces it")
    output.parent.mkdir(parents=True, exist_ok=True)
    parts = output.with_name(f".{output.stem}-{_fingerprint(job, scorer, data)[:12]}")
    parts.mkdir(exist_ok=True)
    blocks = list(blocks_of(job, data, parts))
    left = [block for block in blocks if not block.path.exists()]
    if workers > 1 or ray:
        done = len(blocks) - len(left)
        run_jobs(label_block, left, workers=workers, unit="block", done=done, ray=ray, gpu=device != "cpu")
    else:
        write_blocks(left, scorer, data)
    with replacing(output) as fresh, pq.ParquetWriter(fresh, schema(job, data)) as writer:
        for block in blocks:
            writer.write_table(pq.read_table(block.path))
    for block in blocks:
        block.path.unlink()
    parts.rmdir()
    return output


def opened(job: Job) -> tuple[RewardModel, Recording]:
    """The model and the dataset, once it is clear that the one can score the other."""
    model = RewardModel.from_pretrained(job.model, device=job.device)
    data = open_dataset(job.dataset, job.views, job.instruction)
    try:
        model.check_camera_spec(data.camera_spec)
    except ValueError as error:
        raise ValueError(
            f"{error}. For {job.dataset}: give --views in the model's order, train an adapter on it (python -m "
            "training.train --dataset ...), or take a bare backbone (--model siglip2-tiny)"
        ) from error
    model.embed_text(sorted({episode.instruction for episode in data.episodes}))
    return model, data


def blocks_of(job: Job, data: Recording, folder: Path) -> Iterator[Block]:
    """Episodes in blocks of about BLOCK frames."""
    first = frames = 0
    for number, episode in enumerate(data.episodes, start=1):
        frames += episode.length
        if frames >= BLOCK or number == len(data.episodes):
            yield Block(job, first, number, folder / f"{first:09d}.parquet")
            first, frames = number, 0


@functools.lru_cache(maxsize=1)
def _opened(job: Job) -> tuple[RewardModel, Recording]:
    return opened(job)


def label_block(block: Block) -> None:
    """Score one block in a process that keeps model and dataset for the next one."""
    write_blocks([block], *_opened(block.job), quiet=True)


def write_blocks(
    blocks: Iterable[Block], model: RewardModel, data: Recording, *, quiet: bool = False
) -> None:
    """Score blocks one after the other, each written when it is whole; decoding runs ahead of scoring."""
    blocks = list(blocks)
    look, model = model.look, model.with_small_frames()

    def small() -> Iterator[tuple[Block, Chunk | None]]:
        for block in blocks:
            for chunk in data.chunks(block.first, block.last):
                yield block, replace(chunk, frames=look(chunk.frames))
            yield block, None

    total = sum(episode.length for block in blocks for episode in data.episodes[block.first : block.last])
    waiting: list[Chunk] = []
    scores: list[np.ndarray] = []
    start: dict[int, np.ndarray] = {}  # of the last episode that began: its first frame, embedded
    with tqdm(total=total, unit="timestep", mininterval=BAR_SECONDS, disable=quiet) as bar:
        for block, chunk in ahead(small(), AHEAD):
            if chunk is not None:
                waiting.append(chunk)
                if model.start_weight and chunk.start == 0:
                    start[chunk.episode] = model.embed_start(chunk.frames[:1])
            if waiting and (chunk is None or sum(len(each.frames) for each in waiting) >= BATCH):
                said = [data.episodes[each.episode].instruction for each in waiting for _ in each.frames]
                frames = np.concatenate([each.frames for each in waiting])
                began = (
                    np.concatenate([start[each.episode].repeat(len(each.frames), axis=0) for each in waiting])
                    if model.start_weight
                    else None
                )
                scores.append(model.score(frames, said, start=began))
                bar.update(len(said))
                start = {number: start[number] for number in start if number == waiting[-1].episode}
                waiting.clear()
            if chunk is None:
                with replacing(block.path) as fresh:
                    pq.write_table(rewards_table(block, data, np.concatenate(scores)), fresh)
                scores.clear()


def draw_curves(
    file: Path,
    dataset: str | Path,
    folder: Path,
    *,
    views: Sequence[str] = (),
    instruction: str | None = None,
) -> None:
    """A picture of each episode, `folder`/episode_000000.png ...: frames of its first view over its rewards.

    Args:
        file: what `label` wrote.
        dataset, views, instruction: as given to `label`.
        folder: of the pictures.
    """
    data = open_dataset(dataset, views, instruction)
    rewards = pq.read_table(file, columns=["reward"])["reward"].to_numpy()
    for number, episode in enumerate(data.episodes):
        times = np.unique(np.linspace(0, episode.length - 1, 6).round().astype(int)).tolist()
        strip = [
            chunk.frames[time - chunk.start, 0]
            for chunk in data.chunks(number, number + 1)
            for time in times
            if chunk.start <= time < chunk.start + len(chunk.frames)
        ]
        frames_over_curves(
            np.stack(strip),
            times,
            {"reward": rewards[episode.rows]},
            folder / f"episode_{number:06d}.png",
            title=f'episode {number}: "{episode.instruction}"',
            xlabel="frame",
        )


def schema(job: Job, data: Recording) -> pa.Schema:
    """The columns of the file."""
    views = [f"reward.{camera}" for camera in data.camera_spec.cameras] if job.per_view else []
    places = [(name, pa.int64()) for name in ("index", "episode_index", "frame_index")]
    return pa.schema([*places, *((name, pa.float32()) for name in ("reward", *views))])


def rewards_table(block: Block, data: Recording, scores: np.ndarray) -> pa.Table:
    """Scores [T, V] of all frames of a block as rows of the file."""
    episodes = data.episodes[block.first : block.last]
    lengths = [episode.length for episode in episodes]
    columns: list[Any] = [
        episodes[0].start + np.arange(sum(lengths)),
        np.repeat(np.arange(block.first, block.last), lengths),
        np.concatenate([np.arange(length) for length in lengths]),
        scores.mean(1),
    ]
    if block.job.per_view:
        columns += list(scores.T)
    wanted = schema(block.job, data)
    return pa.table(
        [pa.array(column, kind) for column, kind in zip(columns, wanted.types, strict=True)], wanted
    )


def ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """The same items, made by a thread that is up to `count` of them ahead; its error is raised here."""
    made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(count)
    stopped = threading.Event()

    def put(item: tuple[T | None, BaseException | None]) -> None:
        while not stopped.is_set():
            try:
                return made.put(item, timeout=0.1)
            except queue.Full:
                continue

    def make() -> None:
        try:
            for item in items:
                put((item, None))
                if stopped.is_set():
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()


def _fingerprint(job: Job, model: RewardModel, data: Recording) -> str:
    """Of all that decides the rewards, so that blocks of another run are not taken for this one's."""
    also = [data.fingerprint(), str(job.per_view)]
    of = model.members if isinstance(model, Ensemble) else [model]
    backbones = [locate(one.encoder.name, revision=one.encoder.revision) for one in of]
    asked = locate(job.model)
    for folder in dict.fromkeys((asked, *map(locate, members_of(asked)), *backbones)):
        also.append(
            digest(sorted(file for file in folder.iterdir() if file.is_file()), folder, [str(folder)])
        )
    return digest([], data.folder, also)
