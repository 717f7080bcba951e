"""Ask several reward models at once: the mean of their scores, brought to one scale.

    python -m training.ensemble siglip2-tiny/triplet+order+lesson+wrong+start \\
        siglip2-tiny-168/triplet+order+lesson+wrong+start --output runs/ensemble

The score is the mean of theirs, each divided by its spread over rollouts of the training tasks, for a model whose
scores differ by more is not for that the better one. `training.average` averages weights instead, of adapters of
one backbone, and costs no more than one; an ensemble costs what its members cost together, and they may differ
in everything but the cameras. The folder holds the members' names, not their weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from training.train import check_tasks
from vlm_reward.datasets import open_dataset
from vlm_reward.ensemble import Ensemble
from vlm_reward.frame_cache import cached
from vlm_reward.reward_model import METADATA, RewardModel, auto_device

STRIDE = 10
"""Of the timesteps of a rollout, each so many-th is scored."""


@dataclass(frozen=True)
class EnsembleConfig:
    """Make an ensemble of reward models."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Two or more, of the same cameras: names under checkpoints/, folders or Hub ids."""
    output: Path
    """Folder of the ensemble."""
    rollouts: str = "vlm-reward/train-few-v0"
    """Rollouts of training tasks, over which the spread of the scores is measured; python -m training.collect
    train-rollouts --episodes 1 --dataset vlm-reward/train-few-v0 records these."""
    cache: Path | None = None
    """Folder of the frame caches; $VLM_REWARD_CACHE or ~/.cache/vlm-reward when not given."""
    approach_weight: float | None = None
    """How much it counts, with each of them, that the hand is at what the sentence names
    (vlm_reward.instructions); each one's own when not given."""
    overwrite: bool = False
    """Replace an ensemble in `output`."""


def spread(model: RewardModel, rollouts: str, cache: Path | None = None) -> float:
    """Standard deviation of the scores of a task's rollouts in one view, mean over views and tasks."""
    of: Any = {"expect": model.camera_spec, "resample": model.encoder.resample, "crops": model.crops}
    data = cached(open_dataset(rollouts), model.image_size, cache, **of)
    check_tasks(data, "paper")
    model = model.with_small_frames()
    scores_of: dict[str, list[np.ndarray]] = {}
    for episode in data.episodes:
        frames = data.frames[episode.start : episode.start + episode.length]
        scores = model.score(frames[1::STRIDE], episode.instruction, start=frames[0])
        scores_of.setdefault(episode.task, []).append(scores)
    return float(np.mean([np.concatenate(scores).std(axis=0).mean() for scores in scores_of.values()]))


def ensemble(
    members: Sequence[RewardModel],
    names: Sequence[str],
    spreads: Sequence[float],
    approach_weight: float | None = None,
) -> Ensemble:
    """Models, which have these names, each by the inverse of its spread; as `Ensemble` with the rest."""
    tasks = sorted({task for member in members for task in member.metadata.get("train_tasks", [])})
    facts = {"objective": "ensemble", "preset": "", "seed": None, "train_tasks": tasks}
    facts["spreads"] = dict(zip(names, [round(value, 4) for value in spreads], strict=True))
    shares = [1 / value for value in spreads]
    return Ensemble(members, shares, approach_weight=approach_weight, names=names, metadata=facts)


def main(config: EnsembleConfig) -> None:
    """Measure, write, and say who counts how much."""
    if (config.output / METADATA).exists() and not config.overwrite:
        raise FileExistsError(f"{config.output} holds a model already; --overwrite replaces it")
    models = [RewardModel.from_pretrained(name, device=auto_device("auto")) for name in config.models]
    weight = config.approach_weight
    asked = Ensemble(models, [1.0] * len(models), approach_weight=weight, names=config.models)  # or refused
    spreads = [spread(model, config.rollouts, config.cache) for model in asked.members]
    made = ensemble(models, config.models, spreads, weight)
    made.save_pretrained(config.output)
    for name, weight in zip(made.names, made.weights, strict=True):
        print(f"{weight:.3f}  {name}")
    print(f"wrote {config.output}; next: python -m eval.benchmark --checkpoint {config.output}")


if __name__ == "__main__":
    try:
        main(tyro.cli(EnsembleConfig, prog="python -m training.ensemble", description=__doc__))
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
