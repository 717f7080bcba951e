"""Give an adapter a judge: a model that tells from an episode's first frame whether what is asked is so already.

    python -m training.collect train-rollouts --dataset vlm-reward/train-starts-v0 --horizon 1 --episodes 10
    python -m training.judge --adapter siglip2-tiny/triplet+order+start --output runs/judged

"close the window" of a closed one: nothing is left to do, and a frame scores the lower, the further the scene has
come from there (vlm_reward.similarity.keep). What the finetuned adapters see of that is chance, so the judge is an
adapter of its own, with the pooling attention. These frames teach it:

    where an episode begins   what its task asks is not so; what the opposite task asks is, if the scenes differ
                              (vlm_reward.tasks.OPPOSITES, all pairs but `ALIKE`); what other scenes ask is not
    where a demonstration ends   the other way round; of other scenes' sentences nobody knows
    anywhere in a rollout     (`--rollouts`) what its task asks is so from success on, wherever the hand may be;
                              what the opposite asks is not so then, and before it nobody knows

The output is the adapter with the judge in its folder. Ctrl-C stops after the step; `--resume` goes on.
"""

import math
import shlex
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from training.order import shifted
from training.train import (
    Progress,
    check_tasks,
    encode_frames,
    learning_rate,
    load_state,
    read_state,
    save_state,
    until_success,
)
from vlm_reward._jobs import BAR_SECONDS, changes, keep_freed_memory, stop_on_interrupt
from vlm_reward.datasets import open_dataset
from vlm_reward.encoder import ADAPTER_CONFIG, DualEncoder
from vlm_reward.frame_cache import FrameCache, cached
from vlm_reward.recording import EpisodeInfo
from vlm_reward.reward_model import RewardModel, auto_device
from vlm_reward.similarity import REACHED_AT, REACHED_SCALE
from vlm_reward.tasks import opposite, train_tasks

ALIKE = ("faucet-open-v3", "faucet-close-v3")
"""The pair whose scenes begin alike, with the handle in the middle: neither is so."""
SHARES = (0.4, 0.12, 0.12, 0.18, 0.18)
"""Of a batch: beginnings of tasks with an opposite, of others, ends; of rollouts moments of success, others. Where
there are none of a kind, the rest has its share."""
OTHERS_WEIGHT = 0.3
"""Of what is asked of other scenes."""
HELD_BACK = 10
"""Each so manieth episode of a task in `starts` and `rollouts` is kept for validation."""
STRIDE = 25
"""Each so manieth frame of such a rollout is looked at."""
PAIRED, ALONE, END, SUCCESS, UNDECIDED = range(5)
"""Kinds of frames, as `SHARES` has them."""
Episodes = tuple[FrameCache, Sequence[int]]
"""A cache and the numbers of some of its episodes."""
REACH = 3
"""Pixels that a training frame is moved by at most."""


@dataclass(frozen=True)
class JudgeConfig:
    """Train a judge for an adapter that scores against the first frame."""

    adapter: str
    """Whose judge it is to be: a name under checkpoints/, a folder or a Hub id, with a start_weight."""
    output: Path
    """Folder of the adapter with its judge."""
    dataset: str = "vlm-reward/demos-paper-v0"
    """Demonstrations, of which the first and the last frame are taken."""
    starts: tuple[str, ...] = ("vlm-reward/train-starts-v0",)
    """Minari ids or folders of other episodes of training tasks, of which the first frames are taken."""
    rollouts: tuple[str, ...] = ()
    """Minari ids or folders of rollouts of training tasks, of which all frames are taken: what is so then, too?"""
    weight: float = 0.0
    """How much counts what the judge sees in each frame, not in the first alone
    (vlm_reward.similarity.confirmed): the judge_weight that the adapter is saved with."""
    leave_out: tuple[str, ...] = ()
    """Tasks that are not learned from, to stand in for unseen ones."""
    split: Literal["paper", "strict"] = "paper"
    """Tasks that these may hold."""
    steps: int = 1200
    """Batches."""
    batch_size: int = 64
    """Frames in a batch."""
    learning_rate: float = 1e-3
    """Peak of AdamW; falls to a hundredth of it as a cosine."""
    lora_rank: int = 16
    """Of LoRA, on both towers; its scale is twice that."""
    seed: int = 0
    """Of LoRA's start and of each draw."""
    validate_every: int = 100
    """Validate and save the state every so many steps."""
    resume: bool = False
    """Go on where the run in `output` stopped, to the same weights as if it had not."""
    overwrite: bool = False
    """Replace what is in `output`."""
    cache: Path | None = None
    """Folder of the frame caches; $VLM_REWARD_CACHE or ~/.cache/vlm-reward when not given."""
    threads: int | None = None
    """CPU threads of PyTorch; its own choice when not given."""
    device: Literal["auto", "cpu"] = "auto"
    """cpu: do not use an accelerator that is there."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lora_rank", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.weight < 0:
            raise ValueError(f"weight must be at least 0, got {self.weight}")

    def protocol(self) -> dict[str, Any]:
        """JSON-ready settings that decide the result."""
        apart = ("output", "resume", "overwrite", "cache", "threads", "device", "validate_every")
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
            if key not in apart
        }


class Moments:
    """Frames, and which sentences are so in them.

    Args:
        tasks: task -> its sentence; what other tasks ask is left out.
        begins: caches and the episodes of which the first frame is taken, V views of it.
        ends: caches of demonstrations, of which the last is, too.
        rollouts: caches and the episodes of which every `stride`th frame but the first is taken.
        stride: of rollouts' frames.
    """

    def __init__(
        self,
        tasks: dict[str, str],
        begins: Sequence[Episodes],
        ends: Sequence[FrameCache] = (),
        rollouts: Sequence[Episodes] = (),
        stride: int = 1,
    ) -> None:
        self.sentences = list(dict.fromkeys(tasks.values()))
        self.caches: list[FrameCache] = []
        at: list[tuple[int, int]] = []
        told: list[np.ndarray] = []
        asked: list[np.ndarray] = []
        kinds: list[int] = []
        of: list[str] = []

        def add(cache: FrameCache, row: int, task: str, kind: int) -> None:
            other, begins = opposite(task), kind < END
            truth = np.full(len(self.sentences), 0 if begins else np.nan, np.float32)
            truth[place := self.sentences.index(tasks[task])] = kind in (END, SUCCESS)
            own = np.arange(len(self.sentences)) == place
            if other in tasks:
                then = np.nan if kind == UNDECIDED else begins and task not in ALIKE
                truth[place := self.sentences.index(tasks[other])] = then
                own[place] = kind != UNDECIDED
            if not any(cache is known for known in self.caches):
                self.caches.append(cache)
            at.append((next(i for i, known in enumerate(self.caches) if known is cache), row))
            told.append(truth)
            asked.append(own)
            kinds.append(kind)
            of.append(task)

        for cache, episode in _chosen(begins, tasks):
            add(cache, episode.start, episode.task, PAIRED if opposite(episode.task) in tasks else ALONE)
        for cache, episode in _chosen([(cache, range(len(cache.episodes))) for cache in ends], tasks):
            if cache.success[episode.rows].any():
                last = until_success(episode, cache.success[episode.rows])
                add(cache, last.start + last.length - 1, episode.task, END)
        for cache, episode in _chosen(rollouts, tasks):
            for row in range(episode.start + stride, episode.start + episode.length, stride):
                add(cache, row, episode.task, SUCCESS if cache.success[row] else UNDECIDED)
        self.at = np.array(at)  # int64 [F, 2]: cache, row
        self.told = np.stack(told)  # float32 [F, K]: 1 so, 0 not so, NaN unknown
        self.asked = np.stack(asked)  # bool [F, K]: of the task and of its opposite
        self.of_kind = [np.flatnonzero(np.array(kinds) == kind) for kind in range(len(SHARES))]
        task = np.array(of)
        self._often = [  # rollouts of a task succeed seldom or long: each task as often as any other
            None if kind < SUCCESS else _alike(task[rows]) for kind, rows in enumerate(self.of_kind)
        ]

    def frames(self, chosen: np.ndarray) -> np.ndarray:
        """Frames by their numbers [M], all views: uint8 [M, V, S, S, 3]."""
        return np.stack([self.caches[cache].frames[row] for cache, row in self.at[chosen]])

    def draw(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of about `count` frames by `SHARES`, and a view of each: int64 [M], uint8 [M, S, S, 3]."""
        shares = np.array([share * bool(len(of)) for share, of in zip(SHARES, self.of_kind, strict=True)])
        counts = [max(1, round(count * share)) for share in shares / shares.sum()]
        drawn = zip(self.of_kind, counts, self._often, strict=True)
        chosen = np.concatenate([rng.choice(of, n, p=often) for of, n, often in drawn if len(of)])
        frames = self.frames(chosen)
        views = rng.integers(frames.shape[1], size=len(chosen))
        return chosen, shifted(frames[np.arange(len(chosen)), views], rng, REACH)


def _chosen(parts: Sequence[Episodes], tasks: Collection[str]) -> Iterator[tuple[FrameCache, EpisodeInfo]]:
    for cache, numbers in parts:
        for episode in (cache.episodes[number] for number in numbers):
            if episode.task in tasks:
                yield cache, episode


def _alike(tasks: np.ndarray) -> np.ndarray:
    """Probabilities [N] of frames of these tasks [N], by which each task is as likely as another."""
    _, of, counts = np.unique(tasks, return_inverse=True, return_counts=True)
    return 1 / counts[of] / len(counts)


def told_loss(logits: Tensor, told: Tensor, asked: Tensor) -> Tensor:
    """Cross-entropy of what is so: the mean over `asked`, and `OTHERS_WEIGHT` times that over the rest.

    Args:
        logits: [M, K], of M frames and K sentences.
        told: [M, K]: 1, 0, or NaN, which does not count.
        asked: bool [M, K].
    """
    each = F.binary_cross_entropy_with_logits(logits, told.nan_to_num(), reduction="none")
    others = told.isfinite() & ~asked
    return each[asked].mean() + OTHERS_WEIGHT * (each * others).sum() / others.sum().clamp(min=1)


def logits_of(images: Tensor, texts: Tensor) -> Tensor:
    """Log-odds of `vlm_reward.similarity.reached`: [M, D] and [K, D], unit norm, to [M, K]."""
    return REACHED_SCALE * (images @ texts.T - REACHED_AT)


def right(encoder: DualEncoder, moments: Moments) -> dict[str, float]:
    """How often all views together say what is so: where an episode begins what its task asks (not so) and its
    opposite does (so); in rollouts what the task asks, before success (not reached) and from then on (reached).
    """
    with torch.no_grad():
        texts = encoder.encode_text(moments.sentences)
        numbers = np.arange(len(moments.at))
        images = torch.cat([encode_frames(encoder, moments.frames(numbers[i : i + 1])[0]) for i in numbers])
        logits = logits_of(images, texts).unflatten(0, (len(numbers), -1)).mean(1).cpu().numpy()
    said = (logits > 0) == (moments.told == 1)
    begin = np.isin(numbers, np.concatenate(moments.of_kind[:END]))[:, None]
    kinds = {"not so": (moments.told == 0) & begin, "so": (moments.told == 1) & begin}
    kinds |= {"not reached": (moments.told == 0) & ~begin, "reached": (moments.told == 1) & ~begin}
    asked = {name: kind & moments.asked for name, kind in kinds.items()}
    return {name: float(said[kind].mean()) for name, kind in asked.items() if kind.any()}


def judge(config: JudgeConfig) -> dict[str, float]:
    """Train, write, and return what the last validation gave: the parts that were told right.

    Raises:
        ValueError: an adapter without start_weight, datasets of other cameras or of tasks that are not trained on,
            settings unlike those of the run to resume.
        FileNotFoundError: no such adapter or dataset; nothing to resume.
        FileExistsError: there is something in the output folder already.
        FloatingPointError: the loss is not finite; what was saved is kept.
    """
    state = config.output / "state.safetensors"
    if config.resume and not state.is_file():
        raise FileNotFoundError(f"nothing to resume: there is no {state}; start without --resume")
    if not (config.resume or config.overwrite) and (
        state.exists() or (config.output / ADAPTER_CONFIG).exists()
    ):
        raise FileExistsError(
            f"{config.output} holds a run already; --resume it, --overwrite it, or take another"
        )
    if config.resume and (differ := changes(read_state(state)["protocol"], config.protocol())):
        raise ValueError(f"cannot resume {config.output} with other settings ({differ})")
    device = "cpu" if config.device == "cpu" else auto_device("auto")
    scores = RewardModel.from_pretrained(config.adapter, device=device)
    if not scores.start_weight:
        raise ValueError(f"{config.adapter} does not score against the first frame, so it needs no judge")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    encoder = DualEncoder.from_pretrained(scores.encoder.name, device=device)
    encoder.add_lora(config.lora_rank, 2 * config.lora_rank, seed=config.seed, head=True)

    def opened(name: str) -> FrameCache:
        data = open_dataset(name)
        cache = cached(data, encoder.image_size, config.cache, scores.camera_spec, encoder.resample)
        check_tasks(cache, config.split)
        return cache

    demos, starts = opened(config.dataset), [opened(name) for name in config.starts]
    rollouts = [opened(name) for name in config.rollouts]
    tasks = {e.task: e.instruction for cache in (demos, *starts) for e in cache.episodes}
    if absent := set(config.leave_out) - set(tasks):
        raise ValueError(f"the datasets have no {', '.join(sorted(absent))} to leave out")
    tasks = {task: tasks[task] for task in train_tasks(config.split) if task in tasks}
    tasks = {task: said for task, said in tasks.items() if task not in config.leave_out}
    (kept, back), (learned, tested) = (_held_back(caches, tasks) for caches in (starts, rollouts))
    training = Moments(tasks, [(demos, range(len(demos.episodes))), *kept], [demos], learned)
    unseen = Moments(tasks, back, (), tested, stride=STRIDE) if back or tested else None

    weights = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), config.learning_rate)
    progress = load_state(state, weights, optimizer) if config.resume else Progress()
    config.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, float] = {}
    bar = tqdm(total=config.steps, initial=progress.step, desc="judge", unit="step", mininterval=BAR_SECONDS)
    with stop_on_interrupt() as stop, bar:
        while progress.step < config.steps and not stop():
            rate = learning_rate(
                progress.step, config.steps, config.learning_rate, config.learning_rate / 100
            )
            optimizer.param_groups[0]["lr"] = rate
            chosen, frames = training.draw(
                config.batch_size, np.random.default_rng([config.seed, progress.step])
            )
            logits = logits_of(encode_frames(encoder, frames), encoder.encode_text(training.sentences))
            told, asked = (torch.from_numpy(of[chosen]).to(device) for of in (training.told, training.asked))
            loss = told_loss(logits, told, asked)
            progress.loss = loss.item()
            if not math.isfinite(progress.loss):
                raise FloatingPointError(f"the loss is {progress.loss}; try a lower --learning-rate")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            progress.step += 1
            bar.set_postfix_str(f"loss {progress.loss:.3f}", refresh=False)
            bar.update()
            if progress.step % config.validate_every == 0 or progress.step == config.steps:
                save_state(state, weights, optimizer, progress, config.protocol())
                if unseen:
                    found = right(encoder, unseen)
                    told_right = ", ".join(f"{name} {value:.1%}" for name, value in found.items())
                    tqdm.write(f"step {progress.step} of {config.steps}: told right of what is {told_right}")
        if progress.step < config.steps:
            save_state(state, weights, optimizer, progress, config.protocol())
            return {}
    facts = {"objective": "judge", "preset": "", "seed": config.seed, "train_tasks": sorted(tasks)}
    facts |= {"protocol": config.protocol(), "validation": found, "trained_steps": progress.step}
    own = RewardModel(encoder, camera_spec=scores.camera_spec, metadata=facts)
    scores.with_judge(own).with_judge_weight(config.weight).save_pretrained(config.output)
    state.unlink()
    return found


def _held_back(caches: Sequence[FrameCache], tasks: Collection[str]) -> tuple[list[Episodes], list[Episodes]]:
    """The episodes to learn from and those for validation, of each cache."""
    kept: list[Episodes] = []
    back: list[Episodes] = []
    for cache in caches:
        numbers = range(len(cache.episodes))
        of = [[i for i in numbers if cache.episodes[i].task == task] for task in tasks]
        held = {i for each in of for i in each[::HELD_BACK]}
        back.append((cache, sorted(held)))
        kept.append((cache, [i for i in numbers if i not in held]))
    return kept, back


def main() -> None:
    """Read the command line, train, and say what came of it."""
    config = tyro.cli(JudgeConfig, description=__doc__)
    try:
        judge(config)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
    if (config.output / "state.safetensors").exists():
        arguments = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--overwrite")]
        print(f"stopped; go on with: python -m training.judge {shlex.join([*arguments, '--resume'])}")
        raise SystemExit(130)
    print(f"adapter with its judge: {config.output}")


if __name__ == "__main__":
    main()
