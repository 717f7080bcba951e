"""Give an adapter a judge: a model that tells from an episode's first frame whether what is asked is so already.

    python -m training.collect train-rollouts --dataset vlm-reward/train-starts-v0 --horizon 1 --episodes 10
    python -m training.judge --adapter siglip2-tiny/triplet+order+start --output runs/judged

"close the window" of a closed one: nothing is left to do, and a frame scores the lower, the further the scene has
come from there (vlm_reward.similarity.keep). What the finetuned adapters see of that is chance, so the judge is an
adapter of its own, with the pooling attention. Two kinds of frames teach it:

    where an episode begins   what its task asks is not so; what the opposite task asks is, if the scenes differ
                              (vlm_reward.tasks.OPPOSITES, all pairs but `ALIKE`); what other scenes ask is not
    where a demonstration ends   the other way round; of other scenes' sentences nobody knows

The output is the adapter with the judge in its folder. Ctrl-C stops after the step; `--resume` goes on.
"""

import math
import shlex
import sys
from collections.abc import Sequence
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
from vlm_reward.ensemble import Ensemble
from vlm_reward.frame_cache import FrameCache, cached
from vlm_reward.reward_model import RewardModel, auto_device
from vlm_reward.similarity import REACHED_AT, REACHED_SCALE
from vlm_reward.tasks import opposite, train_tasks

ALIKE = ("faucet-open-v3", "faucet-close-v3")
"""The pair whose scenes begin alike, with the handle in the middle: neither is so."""
SHARES = (0.625, 0.1875, 0.1875)
"""Of a batch: beginnings of tasks with an opposite, of others, ends."""
OTHERS_WEIGHT = 0.3
"""Of what is asked of other scenes."""
HELD_BACK = 10
"""Each so manieth episode of a task in `starts` is kept for validation."""
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
        begins: caches of which each episode's first frame is taken, V views of it.
        ends: caches of demonstrations, of which the last is, too.
        sentences: K of them, of `tasks`; what other tasks ask is left out.
        tasks: task -> its sentence.
    """

    def __init__(
        self,
        begins: Sequence[tuple[FrameCache, Sequence[int]]],
        ends: Sequence[FrameCache],
        tasks: dict[str, str],
    ) -> None:
        self.sentences = list(dict.fromkeys(tasks.values()))
        frames: list[np.ndarray] = []
        told: list[np.ndarray] = []
        asked: list[np.ndarray] = []
        kinds: list[int] = []

        def add(views: np.ndarray, task: str, is_end: bool) -> None:
            other = opposite(task)
            truth = np.full(len(self.sentences), np.nan if is_end else 0, np.float32)
            truth[place := self.sentences.index(tasks[task])] = is_end
            own = np.arange(len(self.sentences)) == place
            if other in tasks:
                truth[place := self.sentences.index(tasks[other])] = not is_end and task not in ALIKE
                own[place] = True
            frames.append(views)
            told.append(truth)
            asked.append(own)
            kinds.append(2 if is_end else int(other not in tasks))

        for cache, numbers in begins:
            for episode in (cache.episodes[number] for number in numbers):
                if episode.task in tasks:
                    add(cache.frames[episode.start], episode.task, False)
        for cache in ends:
            for episode in cache.episodes:
                if episode.task in tasks and cache.success[episode.rows].any():
                    last = until_success(episode, cache.success[episode.rows])
                    add(cache.frames[last.start + last.length - 1], episode.task, True)
        self.frames = np.stack(frames)  # uint8 [F, V, S, S, 3]
        self.told = np.stack(told)  # float32 [F, K]: 1 so, 0 not so, NaN unknown
        self.asked = np.stack(asked)  # bool [F, K]: of the task and of its opposite
        self.of_kind = [np.flatnonzero(np.array(kinds) == kind) for kind in range(3)]

    def draw(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of about `count` frames by `SHARES`, and a view of each: int64 [M], uint8 [M, S, S, 3]."""
        kinds = [(of, max(1, round(count * share))) for share, of in zip(SHARES, self.of_kind, strict=True)]
        chosen = np.concatenate([rng.choice(of, number) for of, number in kinds if len(of)])
        views = rng.integers(self.frames.shape[1], size=len(chosen))
        return chosen, shifted(self.frames[chosen, views], rng, REACH)[0]


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
    """How often all views of a beginning together say what is so: of tasks' sentences, and of opposites' ones."""
    with torch.no_grad():
        texts = encoder.encode_text(moments.sentences)
        images = torch.cat([encode_frames(encoder, views) for views in moments.frames])
        logits = logits_of(images, texts).unflatten(0, moments.frames.shape[:2]).mean(1).cpu().numpy()
    said, begin = logits > 0, np.isin(np.arange(len(logits)), np.concatenate(moments.of_kind[:2]))[:, None]
    kinds = {"not so": moments.asked & (moments.told == 0), "so": moments.asked & (moments.told == 1)}
    return {name: float((said == (moments.told == 1))[kind & begin].mean()) for name, kind in kinds.items()}


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
    if isinstance(scores, Ensemble):  # which would refuse the judge only when it is trained
        raise ValueError(f"{config.adapter} is an ensemble: train a judge for one of its members")
    if not scores.start_weight:
        raise ValueError(f"{config.adapter} does not score against the first frame, so it needs no judge")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    encoder = DualEncoder.from_pretrained(scores.encoder.name, device=device)
    encoder.add_lora(config.lora_rank, 2 * config.lora_rank, seed=config.seed, head=True)

    def opened(name: str) -> FrameCache:
        data = open_dataset(name)
        spec, crops = scores.camera_spec, scores.crops
        cache = cached(data, encoder.image_size, config.cache, spec, encoder.resample, crops)
        check_tasks(cache, config.split)
        return cache

    demos, starts = opened(config.dataset), [opened(name) for name in config.starts]
    tasks = {e.task: e.instruction for cache in (demos, *starts) for e in cache.episodes}
    tasks = {task: tasks[task] for task in train_tasks(config.split) if task in tasks}
    back, kept = [], []
    for cache in starts:
        held = {i for task in tasks for i in _of(cache, task)[::HELD_BACK]}
        back.append((cache, sorted(held)))
        kept.append((cache, [i for i in range(len(cache.episodes)) if i not in held]))
    training = Moments([(demos, range(len(demos.episodes))), *kept], [demos], tasks)
    unseen = Moments(back, [], tasks) if any(numbers for _, numbers in back) else None

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
    own = RewardModel(encoder, camera_spec=scores.camera_spec, crops=scores.crops, metadata=facts)
    scores.with_judge(own).save_pretrained(config.output)
    state.unlink()
    return found


def _of(cache: FrameCache, task: str) -> list[int]:
    return [number for number, episode in enumerate(cache.episodes) if episode.task == task]


def main() -> None:
    """Read the command line, train, and say what came of it."""
    config = tyro.cli(JudgeConfig, prog="python -m training.judge", description=__doc__)
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
