"""Teach a backbone's patches to tell how near the hand is to what a sentence names (vlm_reward.reach).

    python -m training.scenes --output out/hands --rounds 1 --episodes 12 --apart --visits 0.7 --goals 0.15 \\
        --far 0.5 --plain 0.5 --crop --seed 3
    python -m training.worlds --output out/single --worlds 160 --episodes 3 --crop --seed 2 --fewest 1 --far 0.4
    python -m training.reach --backbone siglip2-tiny-soup --scenes out/hands out/single --output runs/reach

The backbone stays as it is: its patches are computed once for each image as it is, and once with the image moved,
relit and with rectangles over what is neither hand nor thing, and kept in the output folder until the head has
learned from them where both are and how far apart. Each tenth world and the tasks of `--stand-ins` are not learned
from: of them, too, it says at the end how often the nearer of two hands is told.

Ctrl-C stops; the same command with `--resume` goes on.
"""

import math
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from training.order import Scenes, covered, relit, shifted
from training.scenes import STATE, inside
from training.train import Progress, learning_rate, load_state, save_state
from vlm_reward._jobs import BAR_SECONDS, keep_freed_memory, keep_settings, stop_on_interrupt
from vlm_reward.cameras import CameraSpec, Crop, projections
from vlm_reward.encoder import DualEncoder, locate
from vlm_reward.envs import make_env
from vlm_reward.reach import NEAREST, ReachHead, ReachModel
from vlm_reward.reward_model import METADATA, REACH, auto_device, read_crops
from vlm_reward.tasks import train_tasks

BATCH_OF_IMAGES = 32
"""Images whose patches are computed at once."""
COVERED = 0.7
"""Share of the changed images with rectangles over them."""
HELD_BACK = 10
"""Each so manieth world is kept for the figures at the end."""
WORLDS_SHARE = 0.5
"""Of a batch, where there are worlds."""
GAP = 0.03
"""Metres: hands whose distances differ by less are not compared."""
WEIGHTS = {"distance": 1.0, "hand": 3.0, "thing": 3.0, "where": 0.3}
"""Of the losses."""
FREE = ("resume", "overwrite", "threads", "device", "save_every", "start_weight")
"""Settings that may change when a run goes on."""


@dataclass(frozen=True)
class ReachConfig:
    """Train a head that tells how near the hand is to what a sentence names."""

    output: Path
    """Folder of the reach model."""
    backbone: str = "siglip2-tiny-soup"
    """A SigLIP of fixed resolution: a name under checkpoints/, a folder or a Hub id."""
    scenes: tuple[Path, ...] = (Path("out/hands"), Path("out/single"))
    """Folders of shards of training.scenes and training.worlds; cropped ones where the backbone looks at crops."""
    stand_ins: tuple[str, ...] = ()
    """Training tasks to leave out, as substitutes for the unseen."""
    layers: int = 0
    """Of a transformer through which the patches go first (vlm_reward.reach.ReachHead)."""
    start_weight: Literal[0, 1] = 0
    """What the model is saved with: 1 looks for the thing in an episode's first frame, by all views together."""
    steps: int = 3500
    """Batches."""
    batch_size: int = 256
    """Images in a batch."""
    learning_rate: float = 2e-3
    """Peak of AdamW; falls to a hundredth of it as a cosine."""
    weight_decay: float = 0.05
    """AdamW's."""
    seed: int = 0
    """Of the head's start, the changes of images and each draw."""
    save_every: int = 500
    """Steps between saved states."""
    resume: bool = False
    """Go on where the run in `output` stopped, to the same weights as if it had not."""
    overwrite: bool = False
    """Replace what is in `output`."""
    threads: int | None = None
    """CPU threads of PyTorch; its own choice when not given."""
    device: Literal["auto", "cpu"] = "auto"
    """cpu: do not use an accelerator that is there."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")

    def protocol(self) -> dict[str, Any]:
        """JSON-ready settings that decide the result."""
        settings = {key: value for key, value in asdict(self).items() if key not in ("output", *FREE)}
        return settings | {"scenes": [str(folder) for folder in self.scenes], "stand_ins": [*self.stand_ins]}


def patches_of(
    encoder: DualEncoder, scenes: Scenes, file: Path, seed: int, stop: Any = lambda: False
) -> np.ndarray | None:
    """Patches of all images as they are and, behind them, changed: a record of 2 N of them in `file`.

    What is in the file already is kept: a stopped run goes on there. None when it was stopped.
    """
    sizes = (encoder.patches, encoder.patch_width)
    record = np.dtype([("patches", np.float16, sizes), ("moved", np.float32, 2)])
    count = len(scenes)
    batches = [
        (changed, start, min(start + BATCH_OF_IMAGES, count))
        for changed in (False, True)
        for start in range(0, count, BATCH_OF_IMAGES)
    ]
    stored_already = file.stat().st_size // record.itemsize if file.exists() else 0
    left = [one for one in batches if one[0] * count + one[2] > stored_already]
    done = left[0][0] * count + left[0][1] if left else 2 * count
    with file.open("ab") as stored:
        stored.truncate(done * record.itemsize)
        bar = tqdm(total=2 * count, initial=done, desc="patches", unit="image", mininterval=BAR_SECONDS)
        with bar:
            for changed, start, end in left:
                if stop():
                    return None
                rows = np.arange(start, end)
                frames, moved = scenes.frames[rows], np.zeros((len(rows), 2), np.float32)
                rng = np.random.default_rng((seed, start))
                if changed:
                    points = np.concatenate([scenes.points[rows], scenes.spots[rows]], 1)
                    frames, moved = shifted(covered(frames, points, COVERED, rng), rng)
                pixels = encoder.preprocess(frames)
                if changed:
                    pixels = relit(pixels, rng)
                some = np.empty(len(rows), record)
                with torch.inference_mode():
                    some["patches"] = encoder.encode_patches(pixels)[1].float().cpu().numpy()
                some["moved"] = moved
                some.tofile(stored)
                bar.update(len(rows))
    return np.memmap(file, record, "r")


class Things:
    """Images of scenes and the things in them, with what is said of each and where it is.

    Args:
        scenes: N images.
        encoder: of the sentences.
    """

    def __init__(self, scenes: Scenes, encoder: DualEncoder) -> None:
        self.scenes = scenes
        called = [
            [tuple(f"touch the {noun}" for noun in nouns) for nouns in scenes.nouns(t)] for t in scenes.tasks
        ]
        said = sorted({one for task in called for names in task for one in names})
        with torch.inference_mode():
            parts = [encoder.encode_text(said[i : i + 256]) for i in range(0, len(said), 256)]
        self.texts = torch.cat(parts).float().clone()
        number = {one: i for i, one in enumerate(said)}
        self.called = [[[number[one] for one in names] for names in task] for task in called]
        worlds = [task for task, name in enumerate(scenes.tasks) if name in scenes.things_of]
        self.back = worlds[HELD_BACK - 1 :: HELD_BACK]
        self.worlds = [task for task in worlds if task not in self.back]
        self.distance = scenes.things[..., STATE.index("hand_object")] / 5  # metres [N, T]

    def asked(self, rows: np.ndarray, rng: np.random.Generator) -> Tensor:
        """A sentence that names each thing of each image, [M, T, D]; past the last thing it is any."""
        texts = np.zeros((len(rows), self.distance.shape[1]), np.int64)
        for image, row in enumerate(rows):
            for thing, names in enumerate(self.called[self.scenes.task[row]]):
                texts[image, thing] = names[rng.integers(len(names))]
        return self.texts[torch.from_numpy(texts)]


def huber(told: Tensor, wanted: Tensor) -> Tensor:
    """Smooth L1 of places [..., 2], mean over those that are not NaN."""
    there = ~wanted.isnan().any(-1)
    return F.smooth_l1_loss(told[there], wanted[there], beta=0.1) if there.any() else told.sum() * 0


def losses_of(
    head: ReachHead, looked: Tensor, texts: Tensor, hand: Tensor, thing: Tensor, far: Tensor
) -> dict[str, Tensor]:
    """The losses by the names of WEIGHTS.

    Args:
        head: the head.
        looked: [M, E], of `ReachHead.look`.
        texts: [M, T, D], what names each thing.
        hand: [M, 2] in [-1, 1] (right, up), where it is, NaN outside the image.
        thing: [M, T, 2], where each is, NaN outside the image and where there is none.
        far: [M, T], metres between hand and thing, NaN where nobody knows.
    """
    told, at_hand, at_thing, logits = head(looked[:, None], texts)
    known = ~far.isnan()
    losses = {
        "distance": F.smooth_l1_loss(told[known], far[known].clamp(min=NEAREST).log(), beta=0.2),
        "hand": huber(at_hand[:, 0], hand),
        "thing": huber(at_thing, thing),
    }
    there = ~thing.isnan().any(-1)
    away = (thing[there][:, None] - head.centres).square().sum(-1)
    wanted = (-away / (2 / logits.shape[-1])).softmax(-1)
    where = F.kl_div(logits[there].log_softmax(-1), wanted, reduction="none").sum(-1)
    return losses | {"where": where.mean() if there.any() else logits.sum() * 0}


@torch.no_grad()
def told_right(head: ReachHead, things: Things, patches: np.ndarray, tasks: Sequence[int]) -> float:
    """Of two images of a scene in one view, how often the nearer hand is told; mean over views, things, tasks."""
    found, scenes = [], things.scenes
    for task in tasks:
        for rows in scenes.of_view[task]:
            looked = head.look(torch.from_numpy(patches["patches"][rows]).to(head.mean.device))
            for thing, names in enumerate(things.called[task]):
                far = things.distance[rows, thing]
                seen = ~np.isnan(scenes.spots[rows, thing]).any(-1) & ~np.isnan(far)
                told = head(looked, things.texts[names[0]])[0].cpu().numpy()
                less = (far[:, None] - far < -GAP) & seen[:, None] & seen
                if less.any():
                    found.append((told[:, None] < told)[less].mean())
    return float(np.mean(found)) if found else math.nan


def reach(config: ReachConfig) -> dict[str, float]:
    """Train, write, and return how often the nearer hand is told, by what was and was not learned from.

    Raises:
        ValueError: scenes that show another part of the images than the backbone looks at, a backbone whose
            patches cannot be read, settings unlike those of the run to resume, unknown stand-ins.
        FileNotFoundError: no such backbone or scenes; nothing to resume.
        FileExistsError: there is something in the output folder already.
        FloatingPointError: the loss is not finite; what was saved is kept.
    """
    state, patches_file = config.output / "state.safetensors", config.output / "patches.f16"
    if config.resume and not (state.is_file() or patches_file.is_file()):
        raise FileNotFoundError(f"nothing to resume in {config.output}; start without --resume")
    held = (state, patches_file, config.output / METADATA, config.output / "config.json")
    if not (config.resume or config.overwrite) and (found := [file for file in held if file.exists()]):
        raise FileExistsError(f"{found[0]} is there already; --resume, --overwrite, or take another --output")
    if foreign := set(config.stand_ins) - set(train_tasks()):
        raise ValueError(f"{', '.join(sorted(foreign))} is no training task, so it cannot be a stand-in")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    device = "cpu" if config.device == "cpu" else auto_device("auto")
    encoder = DualEncoder.from_pretrained(config.backbone).requires_grad_(False).to(device).eval()
    crops = read_crops(locate(config.backbone))
    head = _new_head(encoder, config).to(device)
    scenes = Scenes(config.scenes, train_tasks())
    scenes.check_crop(crops)
    things = Things(scenes, encoder)
    if not config.resume:
        shutil.rmtree(config.output, ignore_errors=True)
    keep_settings(config, *FREE, otherwise="was begun with other settings")
    weights = dict(head.named_parameters())
    optimizer = torch.optim.AdamW(weights.values(), config.learning_rate, weight_decay=config.weight_decay)
    with stop_on_interrupt() as stop:
        patches = patches_of(encoder, scenes, patches_file, config.seed, stop)
        if patches is None:
            return {}
        sample = (
            torch.from_numpy(patches["patches"][:: max(1, len(patches) // 2000)].copy()).to(device).float()
        )
        head.mean.copy_(sample.mean((0, 1)))
        head.std.copy_(sample.std((0, 1)))
        progress = load_state(state, weights, optimizer) if state.is_file() else Progress()
        learned = [t for t in range(len(scenes.tasks)) if t not in (*things.worlds, *things.back)]
        unseen = [t for t in learned if scenes.tasks[t] in config.stand_ins]
        learned = [t for t in learned if t not in unseen]
        pools = [np.concatenate([scenes.rows[task] for task in of]) for of in (learned, things.worlds) if of]
        shares = [1 - WORLDS_SHARE, WORLDS_SHARE] if len(pools) == 2 else [1.0]
        bar = tqdm(
            total=config.steps, initial=progress.step, desc="reach", unit="step", mininterval=BAR_SECONDS
        )
        with bar:
            while progress.step < config.steps and not stop():
                rng = np.random.default_rng((config.seed, progress.step))
                rows = np.concatenate(
                    [
                        rng.choice(pool, round(config.batch_size * s))
                        for pool, s in zip(pools, shares, strict=True)
                    ]
                )
                places = rows + len(scenes) * rng.integers(2, size=len(rows))
                order = np.argsort(places)  # a file is read faster in its order
                rows, places = rows[order], places[order]
                some = patches[places]
                moved = some["moved"]
                hand = torch.from_numpy(inside(scenes.points[rows, 0] + moved)).to(device)
                thing = torch.from_numpy(inside(scenes.spots[rows] + moved[:, None])).to(device)
                far = torch.from_numpy(things.distance[rows]).to(device)
                looked = head.look(torch.from_numpy(some["patches"]).to(device))
                parts = losses_of(head, looked, things.asked(rows, rng).to(device), hand, thing, far)
                loss = torch.stack([WEIGHTS[name] * value for name, value in parts.items()]).sum()
                progress.loss = loss.item()
                if not math.isfinite(progress.loss):
                    raise FloatingPointError(f"the loss is {progress.loss}; try a lower --learning-rate")
                rate = learning_rate(
                    progress.step, config.steps, config.learning_rate, config.learning_rate / 100
                )
                optimizer.param_groups[0]["lr"] = rate
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
                optimizer.step()
                progress.step += 1
                bar.set_postfix({name: f"{value.item():.3f}" for name, value in parts.items()}, refresh=False)
                bar.update()
                if progress.step % config.save_every == 0:
                    save_state(state, weights, optimizer, progress, config.protocol())
        if progress.step < config.steps:
            save_state(state, weights, optimizer, progress, config.protocol())
            return {}
    head.eval()
    kinds = {"learned tasks": learned, "stand-ins": unseen, "unseen worlds": things.back}
    right = {name: told_right(head, things, patches, of) for name, of in kinds.items() if of}
    name = "reach+start" if config.start_weight else "reach"
    facts = {"objective": name, "preset": "", "seed": config.seed}
    facts |= {"train_tasks": sorted(scenes.tasks[task] for task in learned), "trained_steps": progress.step}
    facts |= {"protocol": config.protocol(), "validation": right}
    spec = CameraSpec()
    facts |= {"projections": what_cameras_see(spec, crops)}
    model = ReachModel(encoder, head, camera_spec=spec, crops=crops, metadata=facts)
    model.with_start_weight(config.start_weight).save_pretrained(config.output)
    for file in (state, patches_file, config.output / "settings.json"):
        file.unlink(missing_ok=True)
    return right


def what_cameras_see(spec: CameraSpec, crops: dict[str, Crop] | None) -> dict[str, list[list[float]]]:
    """`vlm_reward.cameras.projections` of Meta-World's cameras, which are the same in all tasks, by camera."""
    with closing(make_env("reach-v3")) as env:
        env.reset(seed=0)
        scene: Any = env.unwrapped
        matrices = projections(scene.model, scene.data, spec.cameras, crops)
    return dict(zip(spec.cameras, matrices.round(6).tolist(), strict=True))


def _new_head(encoder: DualEncoder, config: ReachConfig) -> ReachHead:
    torch.manual_seed(config.seed)
    return ReachHead(encoder.patches, encoder.patch_width, encoder.embedding_dim, layers=config.layers)


def main() -> None:
    """Read the command line, train, and say what came of it."""
    config = tyro.cli(ReachConfig, prog="python -m training.reach", description=__doc__)
    try:
        right = reach(config)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
    if not (config.output / REACH).exists() or (config.output / "patches.f16").exists():
        arguments = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--overwrite")]
        print(f"stopped; go on with: python -m training.reach {shlex.join([*arguments, '--resume'])}")
        raise SystemExit(130)
    print(", ".join(f"{name} {value:.1%}" for name, value in right.items()) + " of nearer hands told")
    print(f"wrote {config.output}; next: python -m training.ensemble ... {config.output}")


if __name__ == "__main__":
    main()
