"""Teach a reach model where the thing is that a sentence names, to a fraction of a patch.

    python -m training.find --reach siglip2-tiny-soup/reach --scenes out/hands out/wide --output runs/reach+finder

Takes what `training.reach` made and scenes as it learned from, and writes a model that looks for the thing in an
episode's first frame, by all views together, and for the hand in each. Backbone and head stay as they are; the
finder (vlm_reward.reach.Finder) learns from both what the backbone gives of an image and its pixels, half of the
images moved, relit and with rectangles over what is neither hand nor thing. Each tenth world is not learned from:
of it, too, it says at the end how many things are found. `training.nearness` then measures metres.

Ctrl-C stops; the same command with `--resume` goes on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from torch import Tensor

from training.heads import HeadConfig, Things, fit, how_to_resume, where_loss
from training.order import Scenes, relit
from training.reach import what_cameras_see
from training.scenes import inside
from vlm_reward._jobs import stop_on_interrupt
from vlm_reward.cameras import CameraSpec
from vlm_reward.reach import Finder, ReachModel
from vlm_reward.reward_model import FINDER, RewardModel, auto_device
from vlm_reward.tasks import train_tasks

SPREAD = 0.85
"""Cells: standard deviation of where a thing is to be found."""
CHANGED = 0.5
"""Share of the images that are changed."""
FOUND = 0.1
"""Of an image's half width: a thing whose likeliest cell is no further off is found; some 4 cm of the table."""
PER_SCENE = 32
"""Images of each task or world for the figures at the end."""


@dataclass(frozen=True, kw_only=True)
class FindConfig(HeadConfig):
    """Train a finder for a reach model."""

    reach: str = "siglip2-tiny-soup/reach"
    """What training.reach made: a name under checkpoints/, a folder or a Hub id."""
    steps: int = 2000
    """Batches."""
    batch_size: int = 64
    """Images in a batch."""
    learning_rate: float = 1e-3
    """Peak of AdamW; falls to a hundredth of it as a cosine."""
    save_every: int = 100
    """Steps between saved states."""


@torch.no_grad()
def found(model: ReachModel, finder: Finder, things: Things, tasks: Sequence[int]) -> float:
    """How many of the things in sight are found, in some images of each task; mean over tasks."""
    right, scenes = [], things.scenes
    for task in tasks:
        rows = scenes.rows[task][:: math.ceil(len(scenes.rows[task]) / PER_SCENE)]
        looked = _looked(model, finder, model.encoder.preprocess(scenes.frames[rows]))
        for thing, names in enumerate(things.called[task]):
            likely = finder(looked, things.texts[names[0]].to(looked.device)).argmax(-1)
            away = np.linalg.norm(
                finder.centres[likely].cpu().numpy() - inside(scenes.spots[rows, thing]), axis=1
            )
            if (seen := ~np.isnan(away)).any():
                right.append((away[seen] <= FOUND).mean())
    return float(np.mean(right)) if right else math.nan


def _looked(model: ReachModel, finder: Finder, pixels: Tensor) -> Tensor:
    """What a finder sees in preprocessed images, of which the backbone's part is not trained."""
    with torch.no_grad():
        patches = model.encoder.encode_patches(pixels)[1]
    return finder.look(pixels.contiguous(memory_format=torch.channels_last), patches)


def find(config: FindConfig) -> dict[str, float]:
    """Train, write, and return how many things are found, by what was and was not learned from.

    Raises:
        ValueError: no reach model, scenes that show another part of the images than it looks at, settings unlike
            those of the run to resume, unknown stand-ins.
        FileNotFoundError: no such model or scenes; nothing to resume.
        FileExistsError: there is something in the output folder already.
        FloatingPointError: the loss is not finite; what was saved is kept.
    """
    config.check_output()
    device = "cpu" if config.device == "cpu" else auto_device("auto")
    model = RewardModel.from_pretrained(config.reach, device=device, dtype=torch.float32)
    if not isinstance(model, ReachModel):
        raise ValueError(f"{config.reach} is no reach model: make one with python -m training.reach")
    scenes = Scenes(config.scenes, train_tasks())
    scenes.check_crop(model.crops)
    encoder, head = model.encoder, model.head
    things = Things(scenes, encoder, config.stand_ins)
    torch.manual_seed(config.seed)
    finder = Finder(encoder.image_size, encoder.patches, encoder.patch_width, encoder.embedding_dim)
    finder.mean.copy_(head.mean)
    finder.std.copy_(head.std)
    finder = finder.to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    config.begin()

    def losses(rng: np.random.Generator) -> dict[str, Tensor]:
        rows = things.draw(config.batch_size, rng)
        plain, rest = np.split(rows[rng.permutation(len(rows))], [round(len(rows) * (1 - CHANGED))])
        changed, moved = things.changed(rest, rng)
        pixels = [encoder.preprocess(scenes.frames[plain]), relit(encoder.preprocess(changed), rng)]
        spots = np.concatenate([scenes.spots[plain], scenes.spots[rest] + moved[:, None]])
        texts = things.asked(np.concatenate([plain, rest]), rng).to(device)
        logits = finder(_looked(model, finder, torch.cat(pixels))[:, None], texts)
        return {
            "where": where_loss(logits, torch.from_numpy(inside(spots)).to(device), finder.centres, SPREAD)
        }

    with stop_on_interrupt() as stop:
        if not fit(config, dict(finder.named_parameters()), losses, stop, "find"):
            return {}
    finder.eval()
    right = {name: found(model, finder, things, of) for name, of in things.kinds().items()}
    facts = {"objective": "reach+finder", "preset": "", "seed": config.seed}
    facts |= {"train_tasks": things.learned_tasks, "trained_steps": config.steps}
    facts |= {"protocol": config.protocol(), "validation": right}
    facts |= {"head": {key: model.metadata.get(key) for key in ("trained_steps", "protocol", "validation")}}
    spec = model.camera_spec or CameraSpec()
    facts |= {"projections": what_cameras_see(spec, model.crops)}
    ReachModel(
        encoder, head, finder, camera_spec=spec, crops=model.crops, start_weight=1, metadata=facts
    ).save_pretrained(config.output)
    for file in (config.state, config.output / "settings.json"):
        file.unlink(missing_ok=True)
    return right


def main() -> None:
    """Read the command line, train, and say what came of it."""
    try:
        config = tyro.cli(FindConfig, prog="python -m training.find", description=__doc__)
        right = find(config)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
    if not (config.output / FINDER).exists():
        print(how_to_resume("training.find"))
        raise SystemExit(130)
    print(", ".join(f"{name} {value:.1%}" for name, value in right.items()) + " of things found")
    print(f"wrote {config.output}; next: python -m training.nearness --checkpoint {config.output}")


if __name__ == "__main__":
    main()
