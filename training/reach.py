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
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from training.heads import HeadConfig, Things, fit, how_to_resume, where_loss
from training.order import Scenes, relit
from training.scenes import inside
from vlm_reward._jobs import BAR_SECONDS, stop_on_interrupt
from vlm_reward.cameras import CameraSpec, Crop, projections
from vlm_reward.encoder import DualEncoder, locate
from vlm_reward.envs import make_env
from vlm_reward.reach import NEAREST, ReachHead, ReachModel
from vlm_reward.reward_model import REACH, auto_device, read_crops
from vlm_reward.tasks import train_tasks

BATCH_OF_IMAGES = 32
"""Images whose patches are computed at once."""
GAP = 0.03
"""Metres: hands whose distances differ by less are not compared."""
WEIGHTS = {"distance": 1.0, "hand": 3.0, "thing": 3.0, "where": 0.3}
"""Of the losses."""


@dataclass(frozen=True, kw_only=True)
class ReachConfig(HeadConfig):
    """Train a head that tells how near the hand is to what a sentence names."""

    backbone: str = "siglip2-tiny-soup"
    """A SigLIP of fixed resolution: a name under checkpoints/, a folder or a Hub id."""
    layers: int = 0
    """Of a transformer through which the patches go first (vlm_reward.reach.ReachHead)."""


def patches_of(
    encoder: DualEncoder, things: Things, file: Path, seed: int, stop: Any = lambda: False
) -> np.ndarray | None:
    """Patches of all images as they are and, behind them, changed: a record of 2 N of them in `file`.

    What is in the file already is kept: a stopped run goes on there. None when it was stopped.
    """
    sizes = (encoder.patches, encoder.patch_width)
    record = np.dtype([("patches", np.float16, sizes), ("moved", np.float32, 2)])
    count = len(things.scenes)
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
                frames, moved = things.scenes.frames[rows], np.zeros((len(rows), 2), np.float32)
                rng = np.random.default_rng((seed, start))
                if changed:
                    frames, moved = things.changed(rows, rng)
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
    return losses | {"where": where_loss(logits, thing, head.centres)}


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
    patches_file = config.output / "patches.f16"
    config.check_output(patches_file)
    device = "cpu" if config.device == "cpu" else auto_device("auto")
    encoder = DualEncoder.from_pretrained(config.backbone).requires_grad_(False).to(device).eval()
    crops = read_crops(locate(config.backbone))
    head = _new_head(encoder, config).to(device)
    scenes = Scenes(config.scenes, train_tasks())
    scenes.check_crop(crops)
    things = Things(scenes, encoder, config.stand_ins)
    config.begin()
    with stop_on_interrupt() as stop:
        patches = patches_of(encoder, things, patches_file, config.seed, stop)
        if patches is None:
            return {}
        some = patches["patches"][:: max(1, len(patches) // 2000)]
        sample = torch.from_numpy(some.copy()).to(device).float()
        head.mean.copy_(sample.mean((0, 1)))
        head.std.copy_(sample.std((0, 1)))

        def losses(rng: np.random.Generator) -> dict[str, Tensor]:
            rows = things.draw(config.batch_size, rng)
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
            return {name: WEIGHTS[name] * value for name, value in parts.items()}

        if not fit(config, dict(head.named_parameters()), losses, stop, "reach"):
            return {}
    head.eval()
    right = {name: told_right(head, things, patches, of) for name, of in things.kinds().items()}
    facts = {"objective": "reach", "preset": "", "seed": config.seed}
    facts |= {"train_tasks": things.learned_tasks, "trained_steps": config.steps}
    facts |= {"protocol": config.protocol(), "validation": right}
    spec = CameraSpec()
    facts |= {"projections": what_cameras_see(spec, crops)}
    model = ReachModel(encoder, head, camera_spec=spec, crops=crops, metadata=facts)
    model.save_pretrained(config.output)
    for file in (config.state, patches_file, config.output / "settings.json"):
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
        print(how_to_resume("training.reach"))
        raise SystemExit(130)
    print(", ".join(f"{name} {value:.1%}" for name, value in right.items()) + " of nearer hands told")
    print(f"wrote {config.output}; next: python -m training.find --reach {config.output}")


if __name__ == "__main__":
    main()
