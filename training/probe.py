"""What the embedded backbone knows of images and language that it never saw.

    python -m training.scenes --output out/probe-scenes --rounds 1 --episodes 4 --seed 1
    python -m training.probe --checkpoint siglip2-tiny --scenes out/probe-scenes

Retrieval: each image of fresh scenes against ten captions of its own scene, one true and nine false, in
paraphrases that pretraining left out; chance is 10 %. Language: Spearman correlation between the student's and
the teacher's similarities over pairs of sentences that neither of them was trained on here. Lessons: how
often an instruction about a thing that no lesson spoke of lies nearer to its outcome than to the contrary;
chance is 50 %. Demonstrations: multi-view VOC under a task's own sentence and under its opposite's, and how
often the right sentence of ten scores highest at the end; chance is 10 %. Sight, of scenes: of two images of
one task and camera, how often the one where the hand is nearer to the object, or its state further on, scores
higher under the sentence that says so; chance is 50 %, and with scenes of `--apart --visits 0.6` the one tells
nothing of the other; with `--worlds` also of things that it never saw, several in each image. `--checkpoint` may
be an adapter.

    python -m training.worlds --output out/probe-worlds --worlds 24 --episodes 3 --seed 1 --plain 0.7 --crop
    python -m training.probe --checkpoint siglip2-tiny-worlds --worlds out/probe-worlds
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.nn import functional as F

from training.captions import sentences
from training.language import UNTAUGHT, Teacher, instructions, lessons
from training.order import GAPS, Scenes, split_sentences
from training.pretrain import facts_of
from training.scenes import STATE
from vlm_reward.ensemble import Ensemble
from vlm_reward.frame_cache import cached
from vlm_reward.metrics import spearman, top1_of_k, voc
from vlm_reward.reward_model import RewardModel
from vlm_reward.similarity import toward
from vlm_reward.tasks import instruction, opposite, train_tasks


@dataclass(frozen=True)
class Config:
    """Probe a backbone on unseen captions, images and sentences."""

    checkpoint: str = "siglip2-tiny"
    """A backbone or an adapter: a folder or a name under checkpoints/."""
    dataset: str = "vlm-reward/demos-paper-v0"
    """Minari id of demonstrations of the training tasks."""
    stand_ins: tuple[str, ...] | None = None
    """Tasks to report apart; those left out of pretraining when not given."""
    scenes: Path | None = None
    """Shards rendered with another seed than the training ones, for the retrieval and the sight."""
    worlds: Path | None = None
    """The same of training.worlds: what it sees of things that it has not seen."""
    candidates: int = 10
    """Captions an image is compared with."""
    pairs: int = 2000
    """Pairs of sentences."""
    seed: int = 0
    """Seed of the draws."""


def seen(model: RewardModel, folder: Path, tasks: list[str]) -> tuple[Scenes, np.ndarray]:
    """The scenes of a folder, and their N images embedded: float32 [N, D]."""
    scenes = Scenes((folder,), tasks)
    scenes.check_crop(model.crops)
    return scenes, model.with_any_views().embed(scenes.frames[:, None])[:, 0]


def retrieval(
    model: RewardModel, scenes: Scenes, images: np.ndarray, candidates: int, seed: int
) -> np.ndarray:
    """Whether the true caption of each image outscores the false ones: bool [N], of images that have enough."""
    rng = np.random.default_rng(seed)
    kept = [split_sentences(fact)[1] or list(sentences(fact)) for fact in scenes.facts]
    said = sorted({sentence for each in kept for sentence in each})
    place = {sentence: i for i, sentence in enumerate(said)}
    scores = images @ model.embed_text(said).T
    right = np.zeros(len(scenes), bool)
    for row in range(len(scenes)):
        true = int(rng.choice(np.flatnonzero(scenes.known[row] > 0)))
        false = np.flatnonzero(scenes.known[row] < 0)
        own = scenes.own_false(row)
        others = rng.permutation(np.setdiff1d(false, own))
        drawn = np.concatenate([rng.permutation(own), others])[: candidates - 1]
        captions = [place[str(rng.choice(kept[fact]))] for fact in (true, *drawn)]
        right[row] = scores[row, captions[0]] > scores[row, captions[1:]].max()
    return right


def sight(model: RewardModel, scenes: Scenes, images: np.ndarray) -> dict[str, float]:
    """How often sentences order two images of a task and camera as the simulator does: means over both.

    A model that scores a frame against the first of its episode scores them against the first of them.

    Returns:
        `near`: "the gripper is near the door", by the distance; `state`: "the door is closed", by how far it is.
        Per cent; pairs that differ by less than `training.order.GAPS` are left out.
    """
    kinds = {"hand:": "near", "state:": "state", "thing:": "state"}
    found: dict[str, list[float]] = {kind: [] for kind in kinds.values()}
    for ranked, views in zip(scenes.rankings(), scenes.of_view, strict=True):
        for thing, ((fact, name, sign), *_) in ranked:
            kind = next((kinds[start] for start in kinds if fact.startswith(start)), None)
            if kind is None:
                continue
            text = torch.from_numpy(model.embed_text(list(sentences(fact))).mean(0))
            for rows in views:
                first = torch.from_numpy(images[rows[0]])
                goal = toward(F.normalize(text, dim=0), first, model.start_weight)
                values, scores = (
                    sign * scenes.things[rows, thing, STATE.index(name)],
                    images[rows] @ goal.numpy(),
                )
                better = values[:, None] - values > GAPS[name]
                if model.start_weight:
                    better[0] = better[:, 0] = False
                if better.any():
                    found[kind].append(float((scores[:, None] > scores)[better].mean()))
    return {kind: 100 * float(np.mean(shares)) for kind, shares in found.items()}


def language(model: RewardModel, pairs: int, seed: int) -> float:
    """Spearman correlation of the student's and the teacher's cosine over random pairs of new sentences."""
    said = sorted(set(instructions(2 * pairs, seed + 10**6)))
    index = np.random.default_rng(seed).integers(0, len(said), (pairs, 2))
    student, teacher = model.embed_text(said), Teacher().embed(said).numpy()
    return spearman(*((e[index[:, 0]] * e[index[:, 1]]).sum(1) for e in (student, teacher)))


def lesson_accuracy(model: RewardModel, count: int, seed: int) -> float:
    """Share of lessons about untaught nouns whose outcome is nearer than its contrary."""
    asked, done, undone, _ = (
        model.embed_text(list(each)) for each in zip(*lessons(count, seed + 1, UNTAUGHT), strict=True)
    )
    return float(((asked * done).sum(1) > (asked * undone).sum(1)).mean())


def demonstrations(model: RewardModel, dataset: str, tasks: list[str], seed: int) -> dict[str, float]:
    """Means over the expert trajectories of `tasks`: VOC, VOC under the opposite sentence, right of ten."""
    cache = cached(dataset, model.image_size, expect=model.camera_spec, crops=model.crops)
    model = model.with_small_frames()
    found: dict[str, list[float]] = {"VOC": [], "opposites: VOC": [], "opposites: VOC, opposite": []}
    last, rng = [], np.random.default_rng(seed)
    everything = sorted({instruction(task) for task in train_tasks()})
    for episode in cache.episodes:
        if episode.task not in tasks or episode.kind != "expert":
            continue
        other = opposite(episode.task)
        wrong = rng.choice([s for s in everything if s != episode.instruction], 9, replace=False)
        said = [episode.instruction, *wrong, *([instruction(other)] if other else [])]
        frames = cache.frames[episode.rows]
        start = model.embed_start(frames[:1])[0] if model.start_weight else None
        scores = model.compare(model.embed(frames), said, start).mean(1)  # [T, 10 or 11]
        found["VOC"].append(voc(scores[:, 0]))
        last.append(scores[-1, :10])
        if other:
            found["opposites: VOC"].append(voc(scores[:, 0]))
            found["opposites: VOC, opposite"].append(voc(scores[:, 10]))
    means = {name: 100 * float(np.mean(values)) for name, values in found.items() if values}
    return means | {"right of 10": 100 * float(top1_of_k(np.array(last)).mean())}


def main(config: Config) -> None:
    """Print the figures as one JSON object."""
    model = RewardModel.from_pretrained(config.checkpoint)
    if isinstance(model, Ensemble):
        raise ValueError("an ensemble has no embedding of its own to probe: probe its members")
    unseen = config.stand_ins
    if unseen is None:
        unseen = facts_of(Path(model.encoder.name))["stand_ins"]
    figures: dict[str, float] = {}
    for name, tasks in (
        ("seen tasks", [t for t in train_tasks() if t not in unseen]),
        ("stand-ins", list(unseen)),
    ):
        if not tasks:
            continue
        for what, value in demonstrations(model, config.dataset, tasks, config.seed).items():
            figures[f"{what}, {name}, %"] = round(value, 1)
        if config.scenes is not None:
            scenes, images = seen(model, config.scenes, tasks)
            right = retrieval(model, scenes, images, config.candidates, config.seed)
            for what, value in sight(model, scenes, images).items():
                figures[f"sight: {what}, {name}, %"] = round(value, 1)
            figures[f"retrieval, {name}, %"] = round(100 * float(right.mean()), 1)
            figures[f"images, {name}"] = len(right)
    if config.worlds is not None:
        for what, value in sight(model, *seen(model, config.worlds, [])).items():
            figures[f"sight: {what}, worlds, %"] = round(value, 1)
    figures["lessons, untaught things, %"] = round(100 * lesson_accuracy(model, 1000, config.seed), 1)
    figures["chance, %"] = 100 / config.candidates
    figures["similarity to the teacher's, spearman"] = round(language(model, config.pairs, config.seed), 3)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, prog="python -m training.probe", description=__doc__))
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
