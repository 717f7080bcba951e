"""What `training.reach` and `training.find` share: their settings, scenes with what names each thing, the loop."""

import math
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from training.order import Scenes, covered, shifted
from training.scenes import STATE
from training.train import Progress, learning_rate, load_state, save_state
from vlm_reward._jobs import BAR_SECONDS, keep_freed_memory, keep_settings
from vlm_reward.encoder import DualEncoder
from vlm_reward.reward_model import METADATA
from vlm_reward.tasks import train_tasks

COVERED = 0.7
"""Share of the changed images with rectangles over them."""
HELD_BACK = 10
"""Each so manieth world is kept for the figures at the end."""
WORLDS_SHARE = 0.5
"""Of a batch, where there are worlds."""
FREE = ("resume", "overwrite", "threads", "device", "save_every")
"""Settings that may change when a run goes on."""
_OWN = (METADATA, "config.json")  # of what has been trained


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Settings of whatever is learned from scenes on top of a frozen backbone."""

    output: Path
    """Folder of the reach model."""
    scenes: tuple[Path, ...] = (Path("out/hands"), Path("out/single"))
    """Folders of shards of training.scenes and training.worlds; cropped ones where the backbone looks at crops."""
    stand_ins: tuple[str, ...] = ()
    """Training tasks to leave out, as substitutes for the unseen."""
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
        if foreign := set(self.stand_ins) - set(train_tasks()):
            raise ValueError(f"{', '.join(sorted(foreign))} is no training task, so it cannot be a stand-in")

    @property
    def state(self) -> Path:
        """File of weights and moments to go on from."""
        return self.output / "state.safetensors"

    def protocol(self) -> dict[str, Any]:
        """JSON-ready settings that decide the result."""
        settings = {key: value for key, value in asdict(self).items() if key not in ("output", *FREE)}
        return settings | {"scenes": [str(folder) for folder in self.scenes], "stand_ins": [*self.stand_ins]}

    def check_output(self, *begun: Path) -> None:
        """Refuse to resume what is not there, or to write over what is.

        Args:
            begun: files of a run that was stopped, beside `state`.

        Raises:
            FileNotFoundError: nothing to resume.
            FileExistsError: there is something in the output folder already.
        """
        begun = (self.state, *begun)
        if self.resume and not any(file.is_file() for file in begun):
            raise FileNotFoundError(f"nothing to resume in {self.output}; start without --resume")
        held = [file for file in (*begun, *(self.output / name for name in _OWN)) if file.exists()]
        if held and not (self.resume or self.overwrite):
            raise FileExistsError(
                f"{held[0]} is there already; --resume, --overwrite, or take another --output"
            )

    def begin(self) -> None:
        """Threads and memory; an output folder that is empty, or holds what was begun with these settings."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        keep_freed_memory()
        if not self.resume:
            shutil.rmtree(self.output, ignore_errors=True)
        keep_settings(self, *FREE, otherwise="was begun with other settings")


class Things:
    """Images of scenes and the things in them, with what is said of each and where it is.

    `learned` are the tasks to learn from, `unseen` those left out, `worlds` the worlds to learn from, `back` those
    kept for the figures at the end; `distance[i, t]` is from the hand to thing t in image i, metres.

    Args:
        scenes: N images.
        encoder: of the sentences.
        stand_ins: names of the tasks to leave out.
    """

    def __init__(self, scenes: Scenes, encoder: DualEncoder, stand_ins: Iterable[str] = ()) -> None:
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
        kinds: tuple[list[int], ...] = [], [], []
        for task, name in enumerate(scenes.tasks):
            kinds[2 if name in scenes.things_of else int(name in set(stand_ins))].append(task)
        self.learned, self.unseen, worlds = kinds
        self.back = worlds[HELD_BACK - 1 :: HELD_BACK]
        self.worlds = [task for task in worlds if task not in self.back]
        self.distance = scenes.things[..., STATE.index("hand_object")] / 5
        pools = [
            np.concatenate([scenes.rows[t] for t in tasks]) for tasks in (self.learned, self.worlds) if tasks
        ]
        shares = [1 - WORLDS_SHARE, WORLDS_SHARE] if len(pools) == 2 else [1.0]
        self._pools = list(zip(pools, shares, strict=True))

    @property
    def learned_tasks(self) -> list[str]:
        """Names of the tasks that are learned from."""
        return sorted(self.scenes.tasks[task] for task in self.learned)

    def kinds(self) -> dict[str, list[int]]:
        """Tasks and worlds for the figures at the end, by what was and was not learned from."""
        kinds = {"learned tasks": self.learned, "stand-ins": self.unseen, "unseen worlds": self.back}
        return {name: of for name, of in kinds.items() if of}

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Rows of about so many images of what is learned from."""
        return np.concatenate([rng.choice(pool, round(count * share)) for pool, share in self._pools])

    def asked(self, rows: np.ndarray, rng: np.random.Generator) -> Tensor:
        """A sentence that names each thing of each image, [M, T, D]; past the last thing it is any."""
        texts = np.zeros((len(rows), self.distance.shape[1]), np.int64)
        for image, row in enumerate(rows):
            for thing, names in enumerate(self.called[self.scenes.task[row]]):
                texts[image, thing] = names[rng.integers(len(names))]
        return self.texts[torch.from_numpy(texts)]

    def changed(self, rows: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Images moved, and with rectangles over what is neither hand nor thing; by how much is of `shifted`."""
        points = np.concatenate([self.scenes.points[rows], self.scenes.spots[rows]], 1)
        return shifted(covered(self.scenes.frames[rows], points, COVERED, rng), rng)


def where_loss(logits: Tensor, things: Tensor, centres: Tensor, spread: float = 0.5) -> Tensor:
    """Kullback-Leibler divergence of the softmax of logits from a Gaussian about where each thing is.

    Args:
        logits: [M, T, P], of a square grid.
        things: [M, T, 2] in [-1, 1], NaN where there is none.
        centres: [P, 2], of the cells.
        spread: standard deviation of the Gaussian, cells.
    """
    there = ~things.isnan().any(-1)
    if not there.any():
        return logits.sum() * 0
    away = (things[there][:, None] - centres).square().sum(-1)
    wanted = (-away * logits.shape[-1] / (8 * spread**2)).softmax(-1)  # a cell is 2 / sqrt(P) wide
    return F.kl_div(logits[there].log_softmax(-1), wanted, reduction="none").sum(-1).mean()


def fit(
    config: HeadConfig,
    weights: dict[str, Tensor],
    losses: Callable[[np.random.Generator], dict[str, Tensor]],
    stop: Callable[[], bool],
    label: str,
) -> bool:
    """Train until all steps are done or `stop` says so; what has been done is kept. Returns whether it is all.

    Args:
        config: how.
        weights: what is trained, by name.
        losses: of a batch that it draws, to be added up.
        stop: asked after each step.
        label: of the progress bar.

    Raises:
        FloatingPointError: the loss is not finite; what was saved is kept.
    """
    optimizer = torch.optim.AdamW(weights.values(), config.learning_rate, weight_decay=config.weight_decay)
    progress = load_state(config.state, weights, optimizer) if config.state.is_file() else Progress()
    bar = tqdm(total=config.steps, initial=progress.step, desc=label, unit="step", mininterval=BAR_SECONDS)
    with bar:
        while progress.step < config.steps and not stop():
            parts = losses(np.random.default_rng((config.seed, progress.step)))
            loss = torch.stack([*parts.values()]).sum()
            progress.loss = loss.item()
            if not math.isfinite(progress.loss):
                raise FloatingPointError(f"the loss is {progress.loss}; try a lower --learning-rate")
            peak = config.learning_rate
            optimizer.param_groups[0]["lr"] = learning_rate(progress.step, config.steps, peak, peak / 100)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimizer.step()
            progress.step += 1
            bar.set_postfix({name: f"{value.item():.3f}" for name, value in parts.items()}, refresh=False)
            bar.update()
            if progress.step % config.save_every == 0:
                save_state(config.state, weights, optimizer, progress, config.protocol())
    if progress.step < config.steps:
        save_state(config.state, weights, optimizer, progress, config.protocol())
    return progress.step == config.steps


def how_to_resume(module: str) -> str:
    """The command that goes on with the one that was stopped."""
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--overwrite")]
    return f"stopped; go on with: python -m {module} {shlex.join([*arguments, '--resume'])}"
