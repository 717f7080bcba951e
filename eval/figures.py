"""Reward curves as in the paper's Figures 2-4: an expert, a failed and a random trajectory of each task.

    python -m eval.figures --checkpoint siglip2-tiny siglip2-tiny/triplet

One picture a task: a row for each checkpoint, a column for each view and one for their mean. In each panel
scores are normalised to [0, 1] by the least and the greatest score of its three trajectories.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from matplotlib.figure import Figure

from vlm_reward.curves import STYLES, draw, save
from vlm_reward.datasets import open_dataset
from vlm_reward.frame_cache import FrameCache, cached
from vlm_reward.metrics import multi_view, voc
from vlm_reward.reward_model import RewardModel, auto_device
from vlm_reward.tasks import HELD_OUT


@dataclass(frozen=True)
class FiguresConfig:
    """Pictures of reward curves."""

    checkpoint: tuple[str, ...] = ("siglip2-tiny",)
    """Adapters or backbones, a row each: a folder, a name under checkpoints/, or a Hub id."""
    tasks: tuple[str, ...] = HELD_OUT
    """A picture for each."""
    expert: str = "vlm-reward/eval-expert-v0"
    """Minari id of expert trajectories."""
    rollouts: str = "vlm-reward/eval-rollouts-v0"
    """Minari id of random and sub-optimal rollouts."""
    data_root: Path | None = None
    """Folder of the Minari datasets; $MINARI_DATASETS_PATH or Minari's own when not given."""
    cache: Path | None = None
    """Folder of the frame caches; $VLM_REWARD_CACHE or ~/.cache/vlm-reward when not given."""
    out: Path = Path("out/figures")
    """Folder of the pictures."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""


def main(cfg: FiguresConfig) -> list[Path]:
    """Draw the pictures; returns their paths."""
    if cfg.data_root is not None:
        os.environ["MINARI_DATASETS_PATH"] = str(cfg.data_root.resolve())
    datasets = open_dataset(cfg.expert), open_dataset(cfg.rollouts)
    device = auto_device(cfg.device)
    scores: dict[str, dict[str, dict[str, np.ndarray]]] = {task: {} for task in cfg.tasks}
    cameras: Sequence[str] = ()
    for name in cfg.checkpoint:
        model = RewardModel.from_pretrained(name, device=device)
        expert, rollouts = (
            cached(data, model.image_size, cfg.cache, model.camera_spec, crops=model.crops)
            for data in datasets
        )
        model = model.with_small_frames()
        cameras = expert.camera_spec.cameras
        for task in cfg.tasks:
            scores[task][name] = {
                label: multi_view(
                    model.score(cache.frames[info.rows], info.instruction, start=cache.frames[info.start])
                )
                for label, cache, info in trajectories(expert, rollouts, task)
            }
    written = []
    for task in cfg.tasks:
        written.append(cfg.out / f"reward_curves_{task}.png")
        reward_curves(scores[task], cameras, written[-1], title=task)
        print(f"wrote {written[-1]}")
    return written


def trajectories(expert: FrameCache, rollouts: FrameCache, task: str) -> list[tuple[str, FrameCache, Any]]:
    """The first expert, failed (noisy or mixed, no success) and random trajectory of a task, with labels."""
    wanted = (
        ("expert", expert, lambda info: info.kind == "expert"),
        ("failed", rollouts, lambda info: info.kind in ("noisy", "mixed") and not info.success),
        ("random", rollouts, lambda info: info.kind == "random"),
    )
    found = []
    for label, cache, fits in wanted:
        info = next((info for info in cache.episodes if info.task == task and fits(info)), None)
        if info is None:
            raise ValueError(f"{cache.dataset_id} has no {label} trajectory of {task!r}")
        found.append((label, cache, info))
    return found


def normalise(curves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Min-max over all the curves [T] together: 0 is their least value, 1 their greatest, so they compare."""
    values = np.concatenate(list(curves.values()))
    low, span = values.min(), np.ptp(values)
    return {label: (curve - low) / (span or 1) for label, curve in curves.items()}


def reward_curves(
    scores: Mapping[str, Mapping[str, np.ndarray]], cameras: Sequence[str], path: Path, *, title: str
) -> None:
    """Draw normalised scores over time.

    Args:
        scores: checkpoint -> label of the trajectory -> scores [T, V + 1], the multi-view score last.
        cameras: names of the V views.
        path: the PNG to write.
        title: of the picture.
    """
    n_rows, n_columns = len(scores), len(cameras) + 1
    figure = Figure(figsize=(2.6 * n_columns, 2.0 * n_rows + 0.9), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, sharey=True, squeeze=False)
    for row, (name, trajectories) in enumerate(scores.items()):
        for column in range(n_columns):
            ax = axes[row, column]
            curves = normalise({label: values[:, column] for label, values in trajectories.items()})
            draw(ax, curves)
            first = next(iter(trajectories.values()))[:, column]
            ax.set_title(f"VOC {100 * voc(first):.0f}", loc="right", fontsize=8, color=STYLES[0]["color"])
            if row == 0:
                ax.set_title(
                    f"view {column + 1}: {cameras[column]}" if column < len(cameras) else "multi-view",
                    loc="left",
                )
            if row == n_rows - 1:
                ax.set_xlabel("step")
        axes[row, 0].set_ylabel(f"{Path(*Path(name).parts[-2:])}\nnormalised reward")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    save(figure, path)


if __name__ == "__main__":
    try:
        main(tyro.cli(FiguresConfig, prog="python -m eval.figures", description=__doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"eval.figures: {error}") from error
