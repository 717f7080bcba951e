"""Finetune a dual encoder into a reward model, by the protocol of the paper (arXiv 2512.20675).

    python -m training.train --objective triplet
    python -m training.train --objective triplet --sampler grouped --seed 1     # what a CPU can afford
    python -m training.train --objective triplet --sampler grouped --scenes out/scenes   # and it listens
    python -m training.train --dataset ~/data/my_lerobot_dataset --sampler grouped       # your own demonstrations
    accelerate launch --multi_gpu --num_processes 2 -m training.train --objective liv  # or CPU processes

The adapter with the best validation score is in the folder printed at the end (runs/<backbone>/...);
RewardModel.from_pretrained(folder) loads it. Ctrl-C stops after the step and says how to go on.

Demonstrations -> frame cache -> batches of frames and sentences -> both towers, each unique frame and
sentence once -> the objective -> LoRA. Every draw is a function of (seed, epoch, batch), so a run that was
stopped goes on to the same weights, and several processes agree on a batch without talking.
"""

import json
import math
import os
import platform
import shlex
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from accelerate import Accelerator, PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.config import TrainConfig
from training.language import Lesson, lessons
from training.objectives import Objective, find_objective
from training.order import (
    REWARD_GAP,
    Orders,
    Rollouts,
    Scenes,
    forwards,
    moved,
    order_loss,
    ranked_loss,
    shards_of,
    shifted,
    without_first,
    wrong_loss,
)
from training.samplers import Batch, GroupedSampler, PaperSampler, Sampler
from vlm_reward._jobs import BAR_SECONDS, changes, keep_freed_memory, replacing, stop_on_interrupt
from vlm_reward.cameras import Crop
from vlm_reward.datasets import open_dataset
from vlm_reward.encoder import DualEncoder, locate, read_adapter_config
from vlm_reward.frame_cache import FrameCache, cached
from vlm_reward.metrics import top1_of_k, voc
from vlm_reward.recording import EpisodeInfo
from vlm_reward.reward_model import RewardModel, auto_dtype, read_crops
from vlm_reward.similarity import cosine, multi_view, toward
from vlm_reward.tasks import instruction, opposite, train_tasks

VALIDATION_BATCHES = 8
CHUNK = 256  # images in one forward of the validation
LESSONS, LESSON_POOL = 32, 5_000  # in a batch; that they are drawn from
# Of rollouts in a batch: tasks, episodes of each task, frames of each episode.
ROLLOUT_GROUPS, ROLLOUT_EPISODES, ROLLOUT_FRAMES = 4, 4, 4


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Args:
        folder: the adapter with the best validation score, beside it train_log.json.
        steps: steps done, of `total_steps`.
        total_steps: steps of the whole run.
        best: of the kept adapter, its step, val_voc (mean multi-view VOC), val_listening (how often the right
            sentence of ten wins at the end, per view), val_contrast (VOC of the score less that under the
            opposite task's sentence; only with contrast_weight) and val_loss; empty without validation.
        history: the same after each validation; the first, at step 0, is the backbone's own.
        loss: of the last step.
        seconds: spent in training steps, validation apart.
        samples_per_second: samples trained on in these seconds.
        images_per_second: images encoded in these seconds.
        interrupted: stopped by Ctrl-C.
    """

    folder: Path
    steps: int
    total_steps: int
    best: dict[str, float]
    history: list[dict[str, float]]
    loss: float
    seconds: float
    samples_per_second: float
    images_per_second: float
    interrupted: bool


@dataclass
class Progress:
    """What must be known, beside weights and moments, to go on after a stop."""

    step: int = 0
    samples: int = 0
    images: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    best: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


def train(config: TrainConfig, on_step: Callable[[int], None] | None = None) -> TrainResult:
    """Train by `config`; `on_step(steps done)` is called after each step.

    Raises:
        ValueError: unknown objective or hyper-parameter, a dataset with other cameras or tasks than asked
            for, settings that contradict those of the run to resume.
        FileNotFoundError: no such backbone or dataset; nothing to resume.
        FileExistsError: there is a run in the output folder already.
        FloatingPointError: the loss or its gradient is not finite; what was saved is kept.
        OSError: the disk is full; what was saved is kept.
    """
    # Whatever can be refused is refused before anything is computed.
    adapter = locate(config.adapter) if config.adapter else None
    if adapter and read_adapter_config(adapter).modules_to_save:
        config = replace(config, head=True)  # what it holds is trained on
    objective = find_objective(config.objective)
    hyper = hyper_parameters(config, objective)
    folder, state_file = config.folder, config.folder / "state.safetensors"
    check_folder(config, state_file)
    if config.scenes:
        shards_of(config.scenes, scene_tasks(config))
    keep_freed_memory()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    # Without cpu=True, Accelerate lets processes on a machine without a GPU run side by side, each alone.
    accelerator = Accelerator(cpu=config.device == "cpu" or not torch.accelerator.is_available())
    dtype = forward_dtype(config, accelerator)
    encoder = DualEncoder.from_pretrained(config.backbone, device=accelerator.device)
    if accelerator.device.type == "cpu":  # torch's fused attention is slower there, in bfloat16
        encoder.model.set_attn_implementation("eager")
    data = open_dataset(config.dataset, config.views, config.instruction)
    expect = config.cameras if data.ours else None
    crops = read_crops(adapter or locate(config.backbone))
    if crops and not data.ours:
        raise ValueError(
            f"{config.adapter or config.backbone} looks at parts of the images of Meta-World's cameras: take a "
            "backbone of whole images (siglip2-tiny, or one of the Hub) for a dataset of your own"
        )
    cache = cached(data, encoder.image_size, config.cache, expect, encoder.resample, crops)
    if data.ours:
        check_tasks(cache, config.split)
    training, held_back = split_episodes(cache, config)
    sampler = make_sampler(config, objective, training, cache.views)
    rollouts = None
    if config.rollouts:
        rollouts = Rollouts(opened(config.rollouts, config, cache, crops), scene_tasks(config))
    contrast, orders = config.contrast_weight > 0, None
    if config.scenes:
        scenes = Scenes(config.scenes, scene_tasks(config))
        scenes.check_crop(crops)
        orders = Orders(scenes, config.leave_out, contrast)
    opposites = opposite_sentences(config, training) if contrast else {}
    taught = lessons(LESSON_POOL, config.seed) if config.lesson_weight else []
    held_back_batches: list[Batch] = []
    if held_back:
        validator = make_sampler(config, objective, held_back, cache.views)
        held_back_batches = [
            validator.batch(0, i) for i in range(min(VALIDATION_BATCHES, validator.batches_per_epoch))
        ]
    total = min(config.max_steps or sys.maxsize, config.epochs * sampler.batches_per_epoch)
    validate_every = config.validate_every or sampler.batches_per_epoch

    # The model: a frozen backbone, and LoRA that learns.
    if adapter:
        encoder.load_adapter(adapter, trainable=True, head=config.head)
    else:
        encoder.add_lora(
            config.lora_rank,
            config.lora_alpha,
            targets=config.lora_targets,
            seed=config.seed,
            head=config.head,
        )
    weights = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        weights.values(), config.peak_learning_rate, weight_decay=config.weight_decay, fused=True
    )
    model = RewardModel(
        encoder,
        camera_spec=cache.camera_spec,
        start_weight=config.start_weight,
        crops=crops,
        metadata=adapter_metadata(config, hyper, cache, training, held_back),
    )
    meant = meant_by(taught, model) if taught else torch.empty(0)  # before anything is learned
    progress = load_state(state_file, weights, optimizer) if config.resume else Progress()
    accelerator.wait_for_everyone()  # nobody writes before everybody has looked at the folder
    main = accelerator.is_main_process
    if main and not config.resume:
        remove_run(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def autocast() -> torch.autocast:
        return torch.autocast(accelerator.device.type, dtype, enabled=dtype != torch.float32)

    def texts_of(said: list[str]) -> Tensor:
        return joint(lambda share: encoder.encode_text([said[i] for i in share]), len(said), accelerator)

    def loss_of(batch: Batch, validating: bool = False) -> Tensor:
        def encode(share: np.ndarray) -> Tensor:
            frames = cache.frames[batch.rows[share], batch.views[share]]
            augment = config.augment and not validating
            return encode_frames(encoder, jitter(frames, batch.seed, share) if augment else frames)

        drawn = [] if validating else [training[i] for i in batch.trajectory.unique().tolist()]
        paired = [episode for episode in drawn if episode.task in opposites]
        said = list(dict.fromkeys([*batch.texts, *(opposites[episode.task] for episode in paired)]))
        with autocast():
            images = joint(encode, len(batch.rows), accelerator)  # [U, D]
            texts = texts_of(said)
        device = images.device
        frames = {name: images[index.to(device)] for name, index in batch.frames.items()}  # each [N, D]
        text = batch.text.to(device)
        goals = texts[text]
        if batch.starts is not None:
            goals = toward(goals, images[batch.starts.to(device)], config.start_weight)
        loss = objective(frames, goals, text, generator=torch.Generator().manual_seed(batch.seed), **hyper)
        if config.wrong_weight and not validating:
            loss = loss + config.wrong_weight * wrong_of(batch, images, texts)
        if paired:
            of = dict(zip(said, texts, strict=True))
            contrasts = torch.stack([of[one.instruction] - of[opposites[one.task]] for one in paired])
            values = torch.from_numpy(forwards(batch.rows, paired)).to(device)
            ordered = order_loss(contrasts @ images.T, values, values.new_zeros(len(paired)))
            loss = loss + config.contrast_weight * ordered
        return loss

    def wrong_of(batch: Batch, images: Tensor, texts: Tensor) -> Tensor:
        texts = texts[: len(batch.texts)]
        sample = np.zeros(len(batch.rows), np.int64)  # of each image, one whose trajectory it is of
        for index in (*batch.frames.values(), *([] if batch.starts is None else [batch.starts])):
            sample[index] = np.arange(len(batch))
        goals = texts[None]
        if batch.starts is not None:
            goals = toward(goals, images[batch.starts[sample], None], config.start_weight)
        own = batch.text[sample].to(images.device)
        return wrong_loss(cosine(images[:, None], goals), batch.rows, own, batch.trajectory[sample].numpy())

    def order_of(seed: int) -> Tensor:
        assert orders
        rng = np.random.default_rng([seed, 1])
        rows, ranked = orders.draw(config.order_groups, config.order_images, rng)
        frames, _ = shifted(orders.scenes.frames[rows], rng)
        both = [(one.sentence, one.against) for one in ranked]
        said = list(dict.fromkeys(sentence for pair in both for sentence in pair if sentence))
        with autocast():
            images = joint(lambda share: encode_frames(encoder, frames[share]), len(frames), accelerator)
            of = dict(zip(said, texts_of(said), strict=True))
        texts = torch.stack([of[said] - of[against] if against else of[said] for said, against in both])
        if config.scene_starts:
            first = [one.group * config.order_images for one in ranked]
            texts = toward(texts, images[first], config.start_weight)
            ranked = [replace(one, pairs=without_first(one)) for one in ranked]
        return ranked_loss(images, texts, ranked)

    def lesson_loss(seed: int) -> Tensor:
        drawn = np.random.default_rng([seed, 3]).integers(0, len(taught), LESSONS)
        with autocast():
            asked = texts_of([taught[i].asked for i in drawn])
        return 1 - cosine(asked, meant[drawn]).mean()

    def rollout_loss(seed: int) -> Tensor:
        assert rollouts
        drawn = rollouts.draw(
            ROLLOUT_GROUPS, ROLLOUT_EPISODES, ROLLOUT_FRAMES, np.random.default_rng([seed, 2])
        )
        frames = rollouts.frames(drawn.rows, drawn.views)
        with autocast():
            images = joint(lambda share: encode_frames(encoder, frames[share]), len(frames), accelerator)
            texts = texts_of(list(drawn.sentences))
        goals = toward(texts[:, None], images[drawn.starts], config.start_weight)
        values = torch.from_numpy(drawn.values).to(images.device)
        scores = cosine(images[drawn.frames], goals)
        gaps = values.new_full((len(values),), REWARD_GAP)
        return order_loss(scores, values, gaps, margin=config.rollout_margin)

    said = sorted({episode.instruction for episode in cache.episodes})
    tens = {episode.instruction: ten_of(said, episode.instruction) for episode in held_back}
    asked = sorted({sentence for ten in tens.values() for sentence in ten} | set(opposites.values()))

    def validate() -> dict[str, float]:
        vocs, heard, told = [], [], []
        with torch.no_grad():
            with autocast():
                text = dict(zip(asked, encoder.encode_text(asked), strict=True))
            for episode in held_back:
                frames = cache.frames[episode.rows].reshape(-1, cache.size, cache.size, 3)
                parts = []
                with autocast():
                    for chunk in np.array_split(frames, math.ceil(len(frames) / CHUNK)):
                        parts.append(
                            joint(
                                lambda share, c=chunk: encode_frames(encoder, c[share]),
                                len(chunk),
                                accelerator,
                            )
                        )
                images = torch.cat(parts)
                texts = torch.stack([text[sentence] for sentence in tens[episode.instruction]])
                images = images.reshape(-1, cache.views, images.shape[-1])  # [T, V, D]
                goals = toward(texts, images[0, :, None], config.start_weight)  # [V, 10, D]
                scores = cosine(images, goals[:, 0])
                if not scores.isfinite().all():
                    raise FloatingPointError(
                        diverged(config, hyper, progress.step, math.nan, math.nan, state_file)
                    )
                vocs.append(voc(multi_view(scores).cpu().numpy()))
                heard.append(top1_of_k(cosine(images[-1, :, None], goals).cpu().numpy()).mean())
                if other := opposites.get(episode.task):
                    scores = cosine(images, texts[0]) - cosine(images, text[other])
                    told.append(voc(multi_view(scores).cpu().numpy()))
            losses = [loss_of(batch, validating=True).item() for batch in held_back_batches]
        row = {
            "step": progress.step,
            "val_voc": float(np.mean(vocs)),
            "val_listening": float(np.mean(heard)),
            "val_loss": float(np.mean(losses)),
        }
        return row | ({"val_contrast": float(np.mean(told))} if told else {})

    def save_adapter() -> None:
        model.metadata["trained_steps"] = progress.step
        card, earlier = folder / "README.md", folder / ".README.md.earlier"
        if card.exists():  # save_pretrained would leave it as it is, with the figures of an earlier step
            os.replace(card, earlier)
        try:
            model.save_pretrained(folder)
        finally:
            if earlier.exists() and not card.exists():
                os.replace(earlier, card)
            earlier.unlink(missing_ok=True)

    def merit(row: dict[str, float]) -> tuple[float, float]:
        heard = row["val_listening"] + row.get("val_contrast", 0.0)
        return row["val_voc"] + heard * (config.select == "voc+listening"), -row["val_loss"]

    def keep(row: dict[str, float]) -> None:
        """Note a validation; keep the adapter if it is the best so far (step 0, the backbone, never is)."""
        progress.history.append(row)
        best = row["step"] and (not progress.best or merit(row) > merit(progress.best))
        if best:
            progress.best = row
        if main:
            voc_, right, loss = 100 * row["val_voc"], row["val_listening"], row["val_loss"]
            other = f"of contrasts {100 * row['val_contrast']:.1f}, " if "val_contrast" in row else ""
            tqdm.write(
                f"step {progress.step} of {total}: validation VOC {voc_:.1f}, {other}right sentence "
                f"{right:.0%}, loss {loss:.4f}"
            )
            if board:
                for name in row.keys() - {"step"}:
                    board.add_scalar(name.replace("val_", "validation/"), row[name], progress.step)
            if best:
                model.metadata["validation"] = row
                save_adapter()

    def save() -> None:
        if main:
            if not held_back:  # then the last is the best there is
                save_adapter()
            save_state(state_file, weights, optimizer, progress, config.protocol())
            write_log(folder, config, hyper, dtype, progress, total)

    logs = (
        SummaryWriter(str(folder / "tensorboard"), purge_step=progress.step)
        if main and config.tensorboard
        else None
    )
    steps = tqdm(
        total=total,
        initial=progress.step,
        desc=config.name,
        unit="step",
        disable=not main,
        mininterval=BAR_SECONDS,
    )
    with stop_on_interrupt() as stop, steps as bar, logs or nullcontext() as board:
        if held_back and not progress.history:
            keep(validate())
        while progress.step < total and not agreed(stop(), accelerator):
            began = time.perf_counter()
            batch = sampler.batch(*divmod(progress.step, sampler.batches_per_epoch))
            loss = loss_of(batch)
            if orders:
                loss = loss + config.order_weight * order_of(batch.seed)
            if taught:
                loss = loss + config.lesson_weight * lesson_loss(batch.seed)
            if rollouts:
                loss = loss + config.rollout_weight * rollout_loss(batch.seed)
            loss.backward()
            norm = combine_gradients(weights.values(), accelerator)
            if not math.isfinite(value := loss.item()) or not math.isfinite(norm):
                raise FloatingPointError(diverged(config, hyper, progress.step + 1, value, norm, state_file))
            rate = learning_rate(progress.step, total, config.peak_learning_rate, config.final_learning_rate)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()

            progress.step += 1
            progress.loss = value
            progress.samples += len(batch)
            progress.images += len(batch.rows) + (config.order_groups * config.order_images if orders else 0)
            progress.seconds += time.perf_counter() - began
            speed = f"{progress.samples / progress.seconds:.0f} samples/s"
            bar.set_postfix_str(f"loss {value:.4f}, {speed}", refresh=False)
            bar.update()
            if board:
                scalars = {"loss": value, "gradient_norm": norm, "learning_rate": rate}
                for name, scalar in scalars.items():
                    board.add_scalar(f"train/{name}", scalar, progress.step)
            ends = progress.step == total or progress.step % sampler.batches_per_epoch == 0
            if held_back and (ends or progress.step % validate_every == 0):
                keep(validate())
                save()
            elif ends or progress.step % config.save_every == 0:
                save()
            if on_step:
                on_step(progress.step)
        interrupted = progress.step < total
        if interrupted:
            save()
    accelerator.wait_for_everyone()
    return result(folder, progress, total, interrupted)


def hyper_parameters(config: TrainConfig, objective: Objective) -> dict[str, Any]:
    """The preset's, replaced by `config.hyper`.

    With the grouped sampler most of a batch's samples share their trajectory and sentence with others, which
    would then be false negatives: it leaves them out unless `mask_same_text` is given.
    """
    if unknown := [name for name in config.hyper if name not in objective.hyper]:
        raise ValueError(f"{objective.name} has no {', '.join(unknown)}; it has {', '.join(objective.hyper)}")
    hyper = objective.preset(config.preset)
    if config.sampler == "grouped" and "mask_same_text" in objective.hyper:
        hyper["mask_same_text"] = True
    return hyper | config.hyper


def check_folder(config: TrainConfig, state_file: Path) -> None:
    """Refuse to overwrite a run unasked, to resume what is not there, or to resume with other settings."""
    folder = config.folder
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder} holds a backbone; choose another --output for the adapter")
    if not config.resume:
        if not config.overwrite and (state_file.exists() or (folder / "adapter_config.json").exists()):
            raise FileExistsError(
                f"{folder} holds a run already; go on with --resume, replace it with --overwrite, or choose "
                "another --output"
            )
        return
    if not state_file.is_file():
        raise FileNotFoundError(f"nothing to resume: there is no {state_file}; start without --resume")
    then, now = read_state(state_file)["protocol"], json.loads(json.dumps(config.protocol()))
    if differ := changes(then, now):
        raise ValueError(f"cannot resume {folder} with other settings ({differ})")


def check_tasks(cache: FrameCache, split: str) -> None:
    """ValueError when the dataset holds a task that the split does not train on, such as a held-out one."""
    if split == "none":
        return
    if foreign := sorted({episode.task for episode in cache.episodes} - set(train_tasks(split))):
        raise ValueError(
            f"dataset {cache.dataset_id} holds {', '.join(foreign)}, which split {split!r} does not train "
            "on; take a dataset of training tasks (or --split none for data that is no part of the benchmark)"
        )


def split_episodes(cache: FrameCache, config: TrainConfig) -> tuple[list[EpisodeInfo], list[EpisodeInfo]]:
    """Trajectories to train on and those held back: whole ones, as the frames of one resemble each other."""
    if absent := set(config.leave_out) - {episode.task for episode in cache.episodes}:
        raise ValueError(f"dataset {cache.dataset_id} has no {', '.join(sorted(absent))} to leave out")
    episodes = [e for e in cache.episodes if e.kind in config.kinds and e.task not in config.leave_out]
    kinds = ", ".join(sorted({episode.kind for episode in cache.episodes}))
    held_back = math.ceil(config.validation_fraction * len(episodes))
    if len(episodes) - held_back < 1:
        raise ValueError(
            f"dataset {cache.dataset_id} has {len(episodes)} trajectories of kind {', '.join(config.kinds)} "
            f"(it has the kinds {kinds}), {held_back} of them for validation: none is left to train on"
        )
    episodes = [until_success(episode, cache.success[episode.rows]) for episode in episodes]
    order = np.random.default_rng(config.validation_seed).permutation(len(episodes))
    chosen = set(order[:held_back].tolist())
    training = [episode for number, episode in enumerate(episodes) if number not in chosen]
    return training, [episodes[number] for number in sorted(chosen)]


def until_success(episode: EpisodeInfo, success: np.ndarray) -> EpisodeInfo:
    """A trajectory cut after its first success, bool [T]; a whole one where there is none."""
    return replace(episode, length=int(success.argmax()) + 1) if success.any() else episode


def meant_by(taught: Sequence[Lesson], model: RewardModel) -> Tensor:
    """Where the instructions of lessons [K] belong: between their outcome and, twice as near, "the hand is there",
    as `model` has them now. float32 [K, D], not normalised.
    """
    outcome, there = (
        model.embed_text([getattr(one, part) for one in taught]) for part in ("outcome", "there")
    )
    return torch.from_numpy(outcome + 2 * there).to(model.encoder.device)


def scene_tasks(config: TrainConfig) -> list[str]:
    """Whose scenes are ordered: the split's training tasks that are not left out."""
    split = "paper" if config.split == "none" else config.split
    return [task for task in train_tasks(split) if task not in config.leave_out]


def opposite_sentences(config: TrainConfig, episodes: Sequence[EpisodeInfo]) -> dict[str, str]:
    """Task -> sentence of its opposite, for the pairs of which both tasks may be trained on.

    Raises:
        ValueError: no trajectory is of such a task.
    """
    paired = [task for task in dict.fromkeys(e.task for e in episodes) if task in train_tasks()]
    asked = scene_tasks(config)
    found = {task: instruction(other) for task in paired if (other := opposite(task)) in asked}
    if not found:
        raise ValueError(
            f"dataset {config.dataset} has no task with an opposite in vlm_reward.tasks.OPPOSITES; "
            "leave --contrast-weight out"
        )
    return found


def opened(
    names: Sequence[str], config: TrainConfig, like: FrameCache, crops: dict[str, Crop] | None
) -> list[FrameCache]:
    """Caches of rollouts of training tasks, at the size and by the cameras of the demonstrations'."""
    caches = [
        cached(open_dataset(name), like.size, config.cache, like.camera_spec, crops=crops) for name in names
    ]
    for cache in caches:
        check_tasks(cache, config.split)
    return caches


def make_sampler(
    config: TrainConfig, objective: Objective, episodes: Sequence[EpisodeInfo], views: int
) -> Sampler:
    """The sampler that `config` names, over these trajectories."""
    common: dict[str, Any] = {"samples": config.samples, "preset": config.preset, "seed": config.seed}
    common["starts"] = config.start_weight > 0
    if config.sampler == "paper":
        return PaperSampler(objective, episodes, views, batch_size=config.batch_size, **common)
    size = {"trajectories": config.group_trajectories, "frames": config.group_frames}
    return GroupedSampler(objective, episodes, views, **size, **common)


def ten_of(said: Sequence[str], right: str) -> list[str]:
    """The right sentence, then nine others of `said` (all, if there are fewer): always the same ones."""
    wrong = [sentence for sentence in said if sentence != right]
    rng = np.random.default_rng(zlib.crc32(right.encode()))
    return [right, *rng.permutation(wrong)[:9].tolist()]


def encode_frames(encoder: DualEncoder, frames: np.ndarray) -> Tensor:
    """uint8 [M, S, S, 3] -> float32 [M, D], unit norm, in one forward."""
    return encoder.encode_images(encoder.preprocess(frames))


def joint(encode: Callable[[np.ndarray], Tensor], count: int, accelerator: Accelerator) -> Tensor:
    """Embed items 0..count-1, each process its share of them; every process gets all of them: [count, D].

    Only the own share carries a gradient. All processes compute the same loss of the joint batch, so the
    *sum* of their gradients is the gradient that one process would have computed (`combine_gradients`).
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    if world == 1:
        return encode(np.arange(count))
    share = math.ceil(count / world)  # the last process may have less to do: it repeats the last item
    own = encode(np.minimum(np.arange(rank * share, (rank + 1) * share), count - 1))
    everyones: Any = accelerator.gather(own.detach())
    parts = list(everyones.split(share))
    parts[rank] = own
    return torch.cat(parts)[:count]


def combine_gradients(parameters: Iterable[Tensor], accelerator: Accelerator) -> float:
    """Sum the gradients over the processes, in place, and return their norm."""
    parameters = list(parameters)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    if accelerator.num_processes > 1:
        total: Any = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
        for parameter, gradient in zip(parameters, total.split([g.numel() for g in gradients]), strict=True):
            parameter.grad = gradient.view_as(parameter)
        gradients = [total]
    return torch.nn.utils.get_total_norm(gradients).item()


def agreed(stop: bool, accelerator: Accelerator) -> bool:
    """Whether any process wants to stop: then all must, after the same step."""
    if accelerator.num_processes == 1:
        return stop
    wishes: Any = accelerator.reduce(torch.tensor(float(stop), device=accelerator.device), "sum")
    return wishes.item() > 0


def learning_rate(step: int, total: int, peak: float, final: float) -> float:
    """Cosine decay: `peak` at step 0, `final` at the last one."""
    part = step / max(total - 1, 1)
    return final + (peak - final) * (1 + math.cos(math.pi * part)) / 2


def jitter(
    frames: np.ndarray, seed: int, places: np.ndarray, shift: float = 0.04, brightness: float = 0.15
) -> np.ndarray:
    """Shift each frame uint8 [M, S, S, 3] by up to `shift` of its side (edges repeat), scale its brightness.

    What is drawn for a frame depends on `seed` and on its place in the batch (`places` [M]) alone.
    """
    reach = round(shift * frames.shape[1])
    out = np.empty_like(frames)
    for frame, place, changed in zip(frames, places, out, strict=True):
        generator = np.random.default_rng([seed, int(place)])
        there = moved(frame, *generator.integers(-reach, reach + 1, 2))
        changed[:] = np.clip(there * generator.uniform(1 - brightness, 1 + brightness), 0, 255)
    return out


def forward_dtype(config: TrainConfig, accelerator: Accelerator) -> torch.dtype:
    """As asked; else bfloat16 if `accelerate launch --mixed_precision bf16` says so or the hardware gains."""
    if config.dtype != "auto":
        return torch.float32 if config.dtype == "float32" else torch.bfloat16
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else auto_dtype(accelerator.device)


def diverged(
    config: TrainConfig, hyper: dict[str, Any], step: int, loss: float, norm: float, state_file: Path
) -> str:
    """What to say, and to try, when a step is not finite."""
    tries = [f"a lower --learning-rate than {config.peak_learning_rate:g}"]
    if "temperature" in hyper:
        tries.append(f"a higher temperature than {hyper['temperature']} (--hyper temperature ...)")
    if "value_scale" in hyper:
        tries.append(f"a lower value_scale than {hyper['value_scale']} (--hyper value_scale ...)")
    if config.dtype != "float32":
        tries.append("--dtype float32")
    kept = f"the last good state is {state_file}" if state_file.exists() else "nothing had been saved yet"
    return (
        f"training diverged at step {step} of {config.objective} ({config.preset}): loss {loss}, gradient "
        f"norm {norm}; try {', '.join(tries)}; {kept}"
    )


def adapter_metadata(
    config: TrainConfig,
    hyper: dict[str, Any],
    cache: FrameCache,
    training: Sequence[EpisodeInfo],
    held_back: Sequence[EpisodeInfo],
) -> dict[str, Any]:
    """What vlm_reward.json says beside backbone and cameras."""
    place = {episode.start: number for number, episode in enumerate(cache.episodes)}
    return {
        "objective": config.name,
        "preset": config.preset,
        "seed": config.seed,
        "hyper": hyper,
        "train_tasks": sorted({episode.task for episode in training}),
        "validation_episodes": [place[episode.start] for episode in held_back],
        "protocol": config.protocol(),
    }


def save_state(
    file: Path,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    protocol: Mapping[str, Any],
) -> None:
    """Everything needed to go on, in one safetensors file that is replaced at once."""
    tensors = {}
    for name, weight in weights.items():
        tensors[f"weight/{name}"] = weight.detach()
        moments = optimizer.state[weight]
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}/{name}"] = moments[moment] if moments else torch.zeros_like(weight)
    meta = {"progress": json.dumps(asdict(progress)), "protocol": json.dumps(protocol)}
    with replacing(file) as fresh:
        save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, fresh, metadata=meta)


def read_state(file: Path) -> dict[str, Any]:
    """The progress and the protocol of a saved state; ValueError when the file is damaged."""
    try:
        with safe_open(file, framework="pt") as state:
            return {key: json.loads(text) for key, text in state.metadata().items()}
    except (SafetensorError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} is truncated or damaged ({error}); start again with --overwrite") from error


def load_state(file: Path, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Progress:
    """Put weights and moments back as `save_state` left them."""
    progress = Progress(**read_state(file)["progress"])
    with safe_open(file, framework="pt") as state, torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(state.get_tensor(f"weight/{name}"))
            optimizer.state[weight] = {
                "step": torch.tensor(float(progress.step), device=weight.device),
                "exp_avg": state.get_tensor(f"exp_avg/{name}").to(weight.device),
                "exp_avg_sq": state.get_tensor(f"exp_avg_sq/{name}").to(weight.device),
            }
    return progress


def remove_run(folder: Path) -> None:
    """Remove what an earlier run wrote to the folder, so that nothing of it is taken for this one's."""
    names = ("state.safetensors", "train_log.json", "vlm_reward.json", "adapter_config.json")
    for name in (*names, "adapter_model.safetensors", "README.md"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)


def write_log(
    folder: Path,
    config: TrainConfig,
    hyper: dict[str, Any],
    dtype: torch.dtype,
    progress: Progress,
    total: int,
) -> None:
    """train_log.json: settings, hardware, figures."""
    outcome = asdict(result(folder, progress, total, progress.step < total))
    log = {
        "result": outcome | {"folder": str(folder)},
        "hyper": hyper,
        "protocol": config.protocol(),
        "hardware": {
            "device": torch.cuda.get_device_name()
            if torch.cuda.is_available() and config.device == "auto"
            else "cpu",
            "machine": platform.machine(),
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
            "dtype": str(dtype).removeprefix("torch."),
            "torch": torch.__version__,
        },
    }
    with replacing(folder / "train_log.json") as fresh:
        fresh.write_text(json.dumps(log, indent=2) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def result(folder: Path, progress: Progress, total: int, interrupted: bool) -> TrainResult:
    """The result so far."""
    seconds = max(progress.seconds, 1e-9)
    return TrainResult(
        folder=folder,
        steps=progress.step,
        total_steps=total,
        best=progress.best,
        history=progress.history,
        loss=progress.loss,
        seconds=progress.seconds,
        samples_per_second=progress.samples / seconds,
        images_per_second=progress.images / seconds,
        interrupted=interrupted,
    )


def main() -> None:
    """Read the command line, train, and say what came of it and what to do next."""
    config = tyro.cli(TrainConfig, prog="python -m training.train", description=__doc__)
    alone = "MASTER_PORT" in os.environ and "RANK" not in os.environ  # several were asked for
    if alone and os.environ.get("ACCELERATE_USE_CPU") == "True":
        print("note: `accelerate launch --cpu` starts one process without MPI; use --multi_gpu in its place")
    try:
        done = train(config)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
    PartialState().destroy_process_group()
    if int(os.environ.get("RANK", "0")) > 0:
        return
    speed = f"{done.samples_per_second:.1f} samples/s ({done.images_per_second:.1f} images/s)"
    print(f"{done.steps} of {done.total_steps} steps in {done.seconds:.0f} s, {speed}")
    if done.interrupted:
        arguments = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--overwrite")]
        print(f"stopped; go on with: python -m training.train {shlex.join([*arguments, '--resume'])}")
        raise SystemExit(130)
    if done.best:
        print(f"best validation VOC {100 * done.best['val_voc']:.1f} at step {done.best['step']:.0f}")
        if done.best["val_voc"] < (before := done.history[0]["val_voc"]):
            print(
                f"warning: what it began with has {100 * before:.1f} on the held-back trajectories, this "
                "adapter less; try fewer steps, a lower --learning-rate, --validate-every, or more demonstrations"
            )
    print(f"adapter: {done.folder}")


if __name__ == "__main__":
    main()
