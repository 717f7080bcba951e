"""Score checkpoints on the paper's two benchmarks, on controls, and on whether they listen.

    python -m eval.benchmark --zero-shot siglip2-tiny --checkpoint siglip2-tiny/triplet siglip2-tiny/r3m

Each image is embedded once a checkpoint; every sentence is then one matrix product. What is measured, per
view ("1", "2", ...) and for the mean of the views ("multi"), all in per cent:

    consistency    pairs of timesteps of random and sub-optimal rollouts ordered as the true reward has them
    voc            rank correlation of score and time over expert trajectories (a constant score gives 0)
    voc_reversed   the same with time reversed: a control, the negative of voc
    voc_wrong      the same under nine sentences of other tasks, which a reward that listens should not follow
    right_of_10    how often the right sentence has the highest score of these ten at the last frame
    success_auc    how often a trajectory that ends in success has a higher last score than one that does not
    voc_right, voc_opposite
                   for training tasks that share a scene with their opposite, over trajectories that were not
                   trained on: voc under the right and under the opposite sentence
    told_at_start  of these, how often the opposite sentence, which is so already in the first frame, has the
                   higher cosine with that frame alone (chance 50): does the model, or its judge, see what state
                   a scene is in?
    voc_contrast, consistency_contrast
                   where a training task undoes what is asked: the same of the score less that under its
                   sentence, which is how `goal-baseline` of strength 1 orders frames (vlm_reward.transforms).
                   Under the other sentence, against this one, VOC is its negative

The result is one JSON file with tidy `rows` and, beside them, `provenance`, one entry a checkpoint. It is
saved after each checkpoint; a second run skips those that are done, unless they, the data or the settings
changed. With `--ray local` (or an address) checkpoints are scored side by side; the rows are the same.
"""

import hashlib
import json
import os
import platform
import shlex
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from vlm_reward._jobs import BAR_SECONDS, replacing
from vlm_reward._parallel import run_jobs
from vlm_reward.datasets import open_dataset
from vlm_reward.encoder import locate, portable_name, weights_digest
from vlm_reward.ensemble import Ensemble
from vlm_reward.frame_cache import FrameCache, cached
from vlm_reward.metrics import (
    Estimate,
    average_estimate,
    bootstrap_weights,
    consistency_estimate,
    consistency_pairs,
    mean_estimate,
    multi_view,
    top1_of_k,
    voc,
)
from vlm_reward.reward_model import JUDGE, METADATA, RewardModel, auto_device, members_of
from vlm_reward.tasks import HELD_OUT, all_tasks, contrary, instruction, opposite

Estimates = dict[tuple[str, str, str], Estimate]
"""(task, view, metric) -> what was measured, as a fraction."""

CONTROLS = ("random", "constant", "oracle")
CHUNK = 128  # timesteps read and embedded at once


@dataclass(frozen=True)
class BenchmarkConfig:
    """Consistency, VOC and listening of checkpoints on held-out tasks."""

    checkpoint: tuple[str, ...] = ()
    """Adapters or backbones: a folder, a name under checkpoints/, or a Hub id."""
    zero_shot: tuple[str, ...] = ()
    """Bare backbones, scored as they are."""
    start_weight: float | None = None
    """Score all of them with this weight of the episode's first frame (vlm_reward.similarity.toward) in the place
    of their own; their rows are then called `NAME, start WEIGHT`."""
    approach_weight: float | None = None
    """The same of the weight of "the hand is there" (vlm_reward.instructions): `NAME, approach WEIGHT`."""
    tasks: tuple[str, ...] = HELD_OUT
    """Tasks to score; the held-out ones unless changed."""
    expert: str = "vlm-reward/eval-expert-v0"
    """Minari id of the expert trajectories that VOC reads."""
    rollouts: str = "vlm-reward/eval-rollouts-v0"
    """Minari id of the random and sub-optimal rollouts that the pairs are drawn from."""
    demos: str | None = "vlm-reward/eval-opposites-v0"
    """Minari id of training tasks' demonstrations, for the opposites; None leaves them out."""
    data_root: Path | None = None
    """Folder of the Minari datasets; $MINARI_DATASETS_PATH or Minari's own when not given."""
    cache: Path | None = None
    """Folder of the frame caches; $VLM_REWARD_CACHE or ~/.cache/vlm-reward when not given."""
    out: Path = Path("out/benchmark.json")
    """The result."""
    n_expert: int = 50
    """Expert trajectories a task."""
    n_pairs: int = 10_000
    """Pairs of timesteps a task."""
    n_bootstrap: int = 1000
    """Resamples of the trajectories for the intervals."""
    seed: int = 0
    """Of the pairs, the wrong sentences, the random control and the intervals."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
    ray: str | None = None
    """Score checkpoints side by side on a Ray cluster: local, or the address of one that shares these folders."""
    workers: int = os.cpu_count() or 1
    """CPUs of a local Ray cluster."""
    overwrite: bool = False
    """Score the named checkpoints again although they are done."""

    def __post_init__(self) -> None:
        if not self.checkpoint and not self.zero_shot:
            raise ValueError("nothing to score: name a --checkpoint or a --zero-shot backbone")
        for name in ("n_expert", "n_pairs", "n_bootstrap"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def main(cfg: BenchmarkConfig) -> dict[str, list[dict[str, Any]]]:
    """Run the benchmark; returns what it wrote to `cfg.out`: {"provenance": [...], "rows": [...]}."""
    if cfg.data_root is not None:
        os.environ["MINARI_DATASETS_PATH"] = str(cfg.data_root.resolve())
    datasets = _datasets(cfg)
    settings = {
        "tasks": list(cfg.tasks),
        "data": {
            key: f"{d.id}: {len(d.episodes)} episodes, {sum(e.length for e in d.episodes)} frames"
            for key, d in datasets.items()
        },
        **{name: getattr(cfg, name) for name in ("n_expert", "n_pairs", "n_bootstrap", "seed")},
    }
    names = {name: _label(cfg, name) for name in (*cfg.zero_shot, *cfg.checkpoint)}
    fingerprints = {name: _fingerprint(name) for name in names}  # all before any: a typo shows at once
    result = _read(cfg.out)
    done = [entry for entry in result["provenance"] if entry["settings"] == settings]
    done = {(entry["checkpoint"], entry["fingerprint"]) for entry in done if not cfg.overwrite}
    todo: list[Job] = []
    for name, label in names.items():
        if (label, fingerprints[name]) in done:
            print(f"{label}: done before, skipped (--overwrite scores it again)")
        else:
            controls = not todo and ("control", "") not in done
            todo.append(Job(cfg, name, fingerprints[name], settings, controls))

    def gather() -> None:
        for job in todo:
            if job.part.exists():
                for entry, rows in json.loads(job.part.read_text()):
                    _add(result, cfg.out, entry, rows)
                    _print_summary(entry, rows)
                job.part.unlink()

    left = [job for job in todo if not job.part.exists()]  # the others are of a run that was killed
    try:
        if cfg.ray:
            gpu, kept = cfg.device != "cpu", len(todo) - len(left)
            run_jobs(score, left, workers=cfg.workers, unit="checkpoint", done=kept, ray=cfg.ray, gpu=gpu)
            if absent := [job.name for job in left if not job.part.exists()]:
                raise FileNotFoundError(
                    f"{', '.join(absent)} were scored, but what came of it is not at {cfg.out.parent}: is it "
                    "shared with the Ray cluster?"
                )
        for job in () if cfg.ray else left:
            score(job)
            gather()
    except KeyboardInterrupt:
        print("\ninterrupted; the finished checkpoints are kept, the same command does the rest")
        raise SystemExit(130) from None
    finally:
        gather()
    print(f"wrote {cfg.out}; next: python -m eval.tables --results {cfg.out}")
    return result


@dataclass(frozen=True)
class Job:
    """A checkpoint to score, the first of them with the controls."""

    cfg: BenchmarkConfig
    name: str
    fingerprint: str
    settings: dict[str, Any]
    controls: bool

    @property
    def part(self) -> Path:
        """What came of it, until it is in the result: JSON, a list of [provenance entry, rows]."""
        what = json.dumps([_label(self.cfg, self.name), self.fingerprint, self.settings, self.controls])
        digest = hashlib.sha256(what.encode()).hexdigest()[:16]
        return self.cfg.out.with_name(f".{self.cfg.out.name}.{digest}.part")


def score(job: Job) -> None:
    """Measure a checkpoint; writes `job.part`."""
    cfg, start = job.cfg, time.monotonic()
    model = RewardModel.from_pretrained(job.name, device=auto_device(cfg.device))
    if job.name in cfg.zero_shot and model.is_part:
        raise ValueError(f"{job.name} is an adapter, not a bare backbone: give it as --checkpoint")
    if cfg.start_weight is not None:
        model = model.with_start_weight(cfg.start_weight)
    if cfg.approach_weight is not None:
        model = model.with_approach_weight(cfg.approach_weight)
    label = _label(cfg, job.name)
    size, expect = model.image_size, model.camera_spec  # refused before a cache is built
    datasets = _datasets(cfg)
    caches = {key: cached(data, size, cfg.cache, expect, crops=model.crops) for key, data in datasets.items()}
    data = _task_data(cfg, caches)
    estimates, notes = _score_model(cfg, label, model.with_small_frames(), caches, data)
    entry = {"checkpoint": label, "fingerprint": job.fingerprint, "settings": job.settings, "notes": notes}
    identity = _identity(model)
    identity["objective"] += label.removeprefix(job.name)
    rows = _rows(estimates, checkpoint=label, **identity)
    parts = [(entry | _circumstances(start), rows)]
    if job.controls:
        start, rows = time.monotonic(), []
        for control in CONTROLS:
            estimates = _score_control(cfg, control, caches, data)
            identity = {"backbone": "none", "objective": control, "preset": "", "seed": cfg.seed}
            rows += _rows(estimates, checkpoint=f"control/{control}", **identity)
        entry = {"checkpoint": "control", "fingerprint": "", "settings": job.settings, "notes": []}
        parts.append((entry | _circumstances(start), rows))
    job.part.parent.mkdir(parents=True, exist_ok=True)
    with replacing(job.part) as fresh:
        fresh.write_text(json.dumps(parts))


def _datasets(cfg: BenchmarkConfig) -> dict[str, Any]:
    ids = {"expert": cfg.expert, "rollouts": cfg.rollouts} | ({"demos": cfg.demos} if cfg.demos else {})
    return {name: open_dataset(dataset) for name, dataset in ids.items()}


@dataclass(frozen=True)
class Trajectories:
    """E trajectories of a cache: their `rows` [N] in it, `groups` [N], each row's trajectory from 0, and `starts`
    [E], the row of each one's first frame.
    """

    rows: np.ndarray
    groups: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, cache: FrameCache, episodes: Sequence[int]) -> "Trajectories":
        """All rows of these episodes, in their order."""
        infos = [cache.episodes[i] for i in episodes]
        rows = [np.arange(info.start, info.start + info.length) for info in infos]
        groups = np.repeat(np.arange(len(infos)), [info.length for info in infos])
        return cls(np.concatenate(rows), groups, np.array([info.start for info in infos]))

    @property
    def count(self) -> int:
        return int(self.groups[-1]) + 1

    @property
    def last(self) -> np.ndarray:
        """Positions in `rows` of each trajectory's last row."""
        return np.append(np.flatnonzero(np.diff(self.groups)), len(self.groups) - 1)

    def map(self, metric: Callable[[np.ndarray], float], scores: np.ndarray) -> np.ndarray:
        """A metric of each trajectory and column: scores [N, ...] -> [E, ...]."""
        parts = np.split(scores, self.last[:-1] + 1)
        return np.stack([np.apply_along_axis(metric, 0, part) for part in parts])


@dataclass(frozen=True)
class TaskData:
    """What a task is scored on; the same for all checkpoints.

    Args:
        task: its name.
        sentences: ten, the right one first.
        expert: the trajectories of VOC.
        rollouts: the rows of the rollouts that are scored: those in a pair, and each trajectory's last.
        pairs: [P, 2] positions in `rollouts.rows`, the better one first.
        succeeded: [E + R] bool, whether success holds at the last row of each expert trajectory and rollout.
    """

    task: str
    sentences: tuple[str, ...]
    expert: Trajectories
    rollouts: Trajectories
    pairs: np.ndarray
    succeeded: np.ndarray


def _task_data(cfg: BenchmarkConfig, caches: dict[str, FrameCache]) -> list[TaskData]:
    expert_cache, rollout_cache = caches["expert"], caches["rollouts"]
    found = []
    for task in cfg.tasks:
        experts = _episodes(expert_cache, task, lambda kind: kind == "expert", "expert trajectories")
        others = _episodes(rollout_cache, task, lambda kind: kind != "expert", "random or noisy rollouts")
        expert = Trajectories.of(expert_cache, experts[: cfg.n_expert])
        pool = Trajectories.of(rollout_cache, others)
        valid = np.flatnonzero(rollout_cache.reward_valid[pool.rows])
        rewards = rollout_cache.rewards[pool.rows[valid]]
        drawn = valid[consistency_pairs(rewards, n_pairs=cfg.n_pairs, seed=_seed(cfg, task))]
        needed = np.unique(np.concatenate([drawn.ravel(), pool.last]))
        found.append(
            TaskData(
                task=task,
                sentences=ten_sentences(expert_cache.episodes[experts[0]].instruction, cfg.seed),
                expert=expert,
                rollouts=Trajectories(pool.rows[needed], pool.groups[needed], pool.starts),
                pairs=np.searchsorted(needed, drawn),
                succeeded=np.append(
                    expert_cache.success[expert.rows[expert.last]],
                    rollout_cache.success[pool.rows[pool.last]],
                ),
            )
        )
    return found


def _episodes(cache: FrameCache, task: str, kind: Callable[[str], bool], what: str) -> list[int]:
    episodes = [i for i, info in enumerate(cache.episodes) if info.task == task and kind(info.kind)]
    if not episodes:
        tasks = ", ".join(sorted({info.task for info in cache.episodes}))
        raise ValueError(f"{cache.dataset_id} has no {what} of {task!r}; its tasks are {tasks}")
    return episodes


def ten_sentences(right: str, seed: int) -> tuple[str, ...]:
    """The right sentence, then nine of other tasks: a fixed draw among the instructions with another text."""
    wrong = sorted({instruction(task) for task in all_tasks()} - {right})
    rng = np.random.default_rng([seed, zlib.crc32(right.encode())])
    return right, *rng.choice(wrong, size=9, replace=False).tolist()


def _score_model(
    cfg: BenchmarkConfig, name: str, model: RewardModel, caches: dict[str, FrameCache], data: list[TaskData]
) -> tuple[Estimates, list[str]]:
    """Everything measured of one checkpoint, and what a reader of its rows must know."""
    for cache in caches.values():
        model.check_camera_spec(cache.camera_spec)

    def embed(cache: FrameCache, rows: np.ndarray, what: str) -> np.ndarray:
        parts = []
        bar = tqdm(total=len(rows), desc=f"{name}: {what}", unit="step", leave=False, mininterval=BAR_SECONDS)
        with bar:
            for start in range(0, len(rows), CHUNK):
                parts.append(model.embed(cache.frames[rows[start : start + CHUNK]]))
                bar.update(len(parts[-1]))
        return np.concatenate(parts)

    def scores_of(cache: FrameCache, chosen: Trajectories, texts: list[str], what: str) -> np.ndarray:
        """[N, V, K] under K sentences, each trajectory against its first frame if the model is of that kind."""
        embedded = embed(cache, chosen.rows, what)
        if not model.start_weight:
            return model.compare(embedded, texts)
        starts = model.embed_start(cache.frames[chosen.starts])
        parts = zip(np.split(embedded, chosen.last[:-1] + 1), starts, strict=True)
        return np.concatenate([model.compare(own, texts, start) for own, start in parts])

    estimates, notes = {}, []
    for item in data:
        against = contrary(item.task)
        texts = [*item.sentences, *([instruction(against)] if against else [])]
        expert = scores_of(caches["expert"], item.expert, texts, f"{item.task}, expert")
        rollouts = scores_of(caches["rollouts"], item.rollouts, texts, f"{item.task}, rollouts")
        estimates |= _measure(cfg, item, expert[..., :10], rollouts[..., 0])
        if against:
            less = (multi_view(scores[..., 0] - scores[..., 10]) for scores in (expert, rollouts))
            told = _benchmarks(cfg, item, *less)
            estimates |= {
                (item.task, view, f"{metric}_contrast"): told[metric, view] for metric, view in told
            }
        if item.task in model.metadata.get("train_tasks", ()):
            notes.append(f"{item.task} is one of its training tasks")
    estimates |= _averages(estimates, "average")
    if "demos" in caches:
        cache, eye = caches["demos"], model.judge or model.with_start_weight(0)
        episodes, note = _unseen(cache, model.metadata)
        notes += note
        listening = {}
        for task in sorted({cache.episodes[i].task for i in episodes} - set(cfg.tasks)):
            chosen = Trajectories.of(cache, [i for i in episodes if cache.episodes[i].task == task])
            right = next(cache.episodes[i].instruction for i in episodes if cache.episodes[i].task == task)
            other = opposite(task)
            texts = [*ten_sentences(right, cfg.seed), *([instruction(other)] if other else [])]
            begins = eye.compare(eye.embed(cache.frames[chosen.starts]), texts)
            scores = scores_of(cache, chosen, texts, task)
            listening |= _measure_opposites(cfg, task, chosen, scores, begins)
        estimates |= listening | _averages(listening, "average_training")
    return estimates, notes


def _score_control(
    cfg: BenchmarkConfig, control: str, caches: dict[str, FrameCache], data: list[TaskData]
) -> Estimates:
    """What the benchmark gives for scores that need no model."""

    def scores(cache: FrameCache, rows: np.ndarray, seed: list[int]) -> np.ndarray:
        if control == "random":
            return np.random.default_rng(seed).random((len(rows), cache.views))
        if control == "constant":
            return np.zeros((len(rows), cache.views))
        known = np.where(cache.reward_valid[rows], rows, rows + 1)  # the first frame: as the one after it
        return np.repeat(cache.rewards[known, None], cache.views, axis=1)

    estimates = {}
    for item in data:
        expert = scores(caches["expert"], item.expert.rows, _seed(cfg, item.task, 1))
        rollouts = scores(caches["rollouts"], item.rollouts.rows, _seed(cfg, item.task, 2))
        estimates |= _measure(cfg, item, expert[..., None], rollouts)
    return estimates | _averages(estimates, "average")


def _benchmarks(
    cfg: BenchmarkConfig, item: TaskData, expert: np.ndarray, rollouts: np.ndarray
) -> dict[tuple[str, str], Estimate]:
    """The paper's two, (metric, view) ->, from scores of expert rows [N, V + 1] and of rollout rows [F, V + 1]."""
    e_weights = bootstrap_weights(item.expert.count, seed=_seed(cfg, item.task, 3), n=cfg.n_bootstrap)
    r_weights = bootstrap_weights(item.rollouts.count, seed=_seed(cfg, item.task, 4), n=cfg.n_bootstrap)
    correlations = item.expert.map(voc, expert)
    found = {}
    for v, view in enumerate(_views(expert)):
        found["consistency", view] = consistency_estimate(
            rollouts[:, v], item.pairs, item.rollouts.groups, r_weights
        )
        found["voc", view] = mean_estimate(correlations[:, v], e_weights)
    return found


def _measure(cfg: BenchmarkConfig, item: TaskData, expert: np.ndarray, rollouts: np.ndarray) -> Estimates:
    """Metrics of a task; scores of expert rows under K sentences [N, V, K], of rollout rows [F, V]."""
    expert, rollouts = multi_view(expert), multi_view(rollouts)
    e_weights = bootstrap_weights(item.expert.count, seed=_seed(cfg, item.task, 3), n=cfg.n_bootstrap)
    all_weights = bootstrap_weights(len(item.succeeded), seed=_seed(cfg, item.task, 5), n=cfg.n_bootstrap)
    wrong = item.expert.map(voc, expert[..., 1:]) if expert.shape[-1] > 1 else None  # [E, V + 1, K - 1]
    reversed_time = item.expert.map(lambda scores: voc(scores[::-1]), expert[..., 0])
    last_of_expert, last_of_rollouts = expert[item.expert.last], rollouts[item.rollouts.last]
    won, lost = np.flatnonzero(item.succeeded), np.flatnonzero(~item.succeeded)
    outcomes = np.stack(np.meshgrid(won, lost, indexing="ij"), axis=-1).reshape(-1, 2)
    found = _benchmarks(cfg, item, expert[..., 0], rollouts)
    for v, view in enumerate(_views(expert)):
        found["voc_reversed", view] = mean_estimate(reversed_time[:, v], e_weights)
        if len(outcomes):
            last = np.concatenate([last_of_expert[:, v, 0], last_of_rollouts[:, v]])
            found["success_auc", view] = consistency_estimate(
                last, outcomes, np.arange(len(last)), all_weights
            )
        if wrong is not None:
            found["voc_wrong", view] = mean_estimate(wrong[:, v].mean(axis=1), e_weights)
            found["right_of_10", view] = mean_estimate(top1_of_k(last_of_expert[:, v]), e_weights)
    return {(item.task, view, metric): estimate for (metric, view), estimate in found.items()}


def _measure_opposites(
    cfg: BenchmarkConfig, task: str, trajectories: Trajectories, scores: np.ndarray, begins: np.ndarray
) -> Estimates:
    """Listening on a training task from scores [N, V, 10 + opposites] and, where there is an opposite, from
    `begins` [E, V, 10 + opposites], cosines with the first frames.
    """
    scores, begins = multi_view(scores), multi_view(begins)
    weights = bootstrap_weights(trajectories.count, seed=_seed(cfg, task, 6), n=cfg.n_bootstrap)
    last = scores[trajectories.last]
    found = {}
    for v, view in enumerate(_views(scores)):
        found[task, view, "right_of_10"] = mean_estimate(top1_of_k(last[:, v, :10]), weights)
        if scores.shape[-1] > 10:
            right, opposite = trajectories.map(voc, scores[:, v, 0]), trajectories.map(voc, scores[:, v, 10:])
            found[task, view, "voc_right"] = mean_estimate(right, weights)
            found[task, view, "voc_opposite"] = mean_estimate(opposite.mean(axis=1), weights)
            state = top1_of_k(begins[:, v, [10, 0]])
            found[task, view, "told_at_start"] = mean_estimate(state, weights)
            told = trajectories.map(voc, scores[:, v, 0] - scores[:, v, 10])
            found[task, view, "voc_contrast"] = mean_estimate(told, weights)
    return found


def _unseen(cache: FrameCache, metadata: dict[str, Any]) -> tuple[list[int], list[str]]:
    """Expert episodes of `cache` that the model was not trained on, and a note where that cannot be told."""
    experts = [i for i, info in enumerate(cache.episodes) if info.kind == "expert"]
    if metadata.get("protocol", {}).get("dataset") != cache.dataset_id:
        return experts, []
    if "validation_episodes" not in metadata:
        return experts, [f"its training trajectories of {cache.dataset_id} are among those of the opposites"]
    return [i for i in experts if i in set(metadata["validation_episodes"])], []


def _averages(estimates: Estimates, name: str) -> Estimates:
    """Each metric over the tasks that have it: per view, and over tasks and views as the paper's last row."""
    pools: dict[tuple[str, str], list[Estimate]] = {}
    for (_, view, metric), estimate in estimates.items():
        pools.setdefault((view, metric), []).append(estimate)
        pools.setdefault(("average", metric), []).append(estimate)
    return {(name, view, metric): average_estimate(pool) for (view, metric), pool in pools.items()}


def _views(scores: np.ndarray) -> list[str]:
    return [str(v + 1) for v in range(scores.shape[1] - 1)] + ["multi"]


def _seed(cfg: BenchmarkConfig, task: str, purpose: int = 0) -> list[int]:
    return [cfg.seed, zlib.crc32(task.encode()), purpose]


def _rows(estimates: Estimates, **identity: Any) -> list[dict[str, Any]]:
    rows = []
    for (task, view, metric), estimate in estimates.items():
        low, high = estimate.interval()
        figures = {"mean": estimate.mean, "std": estimate.std, "low": low, "high": high}
        figures = {key: round(100 * value, 4) for key, value in figures.items()}
        rows.append(identity | {"task": task, "view": view, "metric": metric} | figures | {"n": estimate.n})
    return rows


def _identity(model: RewardModel) -> dict[str, Any]:
    if isinstance(model, Ensemble):
        backbones = dict.fromkeys(_identity(member)["backbone"] for member in model.members)
        return {"backbone": " + ".join(backbones), "objective": "ensemble", "preset": "", "seed": None}
    name = portable_name(model.encoder.name, Path())
    backbone = Path(name).name if Path(name).is_absolute() else name
    if not model.is_part:
        return {"backbone": backbone, "objective": "zero_shot", "preset": "", "seed": None}
    defaults = {"objective": "unknown", "preset": "", "seed": None}
    return {"backbone": backbone} | {key: model.metadata.get(key, value) for key, value in defaults.items()}


def _label(cfg: BenchmarkConfig, name: str) -> str:
    """What the rows call a checkpoint."""
    weights = {"start": cfg.start_weight, "approach": cfg.approach_weight}
    return ", ".join([name, *(f"{key} {weight:g}" for key, weight in weights.items() if weight is not None)])


def _fingerprint(name: str) -> str:
    """Digest of a checkpoint's weights, so that one that was trained again is scored again."""
    folder = locate(name)
    if members := members_of(folder):
        parts = [(folder / METADATA).read_text(), *(_fingerprint(member) for member in members)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]
    return weights_digest(folder, folder.parent, folder / JUDGE)[:16]  # an adapter's backbone is above it


def _circumstances(start: float) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": shlex.join(["python", "-m", "eval.benchmark", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - start, 1),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores" + (f", {gpu}" if gpu else ""),
        "torch": torch.__version__,
    }


def _read(out: Path) -> dict[str, list[dict[str, Any]]]:
    if not out.exists():
        return {"provenance": [], "rows": []}
    try:
        result = json.loads(out.read_text())
        return {"provenance": list(result["provenance"]), "rows": list(result["rows"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{out} is no result of this benchmark ({error!r}); move it away or set --out"
        ) from error


def _add(result: dict[str, list], out: Path, entry: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Put a checkpoint's rows in the place of its old ones, and save."""
    name = entry["checkpoint"]

    def other(checkpoint: str) -> bool:
        return checkpoint != name and not (name == "control" and checkpoint.startswith("control/"))

    result["provenance"] = [old for old in result["provenance"] if old["checkpoint"] != name] + [entry]
    result["rows"] = [old for old in result["rows"] if other(old["checkpoint"])] + rows
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = {key: ",\n".join(json.dumps(item) for item in result[key]) for key in ("provenance", "rows")}
    text = f'{{"provenance": [\n{lines["provenance"]}\n],\n"rows": [\n{lines["rows"]}\n]}}\n'
    with replacing(out) as fresh:
        fresh.write_text(text)


def _print_summary(entry: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    name = entry["checkpoint"]
    for note in entry["notes"]:
        print(f"{name}: {note}")
    shown = [
        row for row in rows if (row["checkpoint"], row["task"], row["view"]) == (name, *("average",) * 2)
    ]
    if shown:  # none of the controls
        print(f"{name}: " + ", ".join(f"{row['metric']} {row['mean']:.1f}" for row in shown))


if __name__ == "__main__":
    try:
        main(tyro.cli(BenchmarkConfig, prog="python -m eval.benchmark", description=__doc__))
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"eval.benchmark: {error}") from error
