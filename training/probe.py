"""What the embedded backbone knows of images and language that it never saw.

    python -m training.scenes --output out/probe-scenes --rounds 1 --episodes 4 --seed 1
    python -m training.probe --backbone siglip2-tiny --scenes out/probe-scenes

Retrieval: each image of fresh scenes against ten captions of its own scene, one true and nine false, in
paraphrases that pretraining left out; chance is 10 %. Language: Spearman correlation between the student's and
the teacher's similarities over pairs of sentences that neither of them was trained on here.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from eval.metrics import spearman
from training.captions import sentences
from training.language import Teacher, instructions
from training.pretrain import Scenes, split_sentences
from vlm_reward.reward_model import RewardModel
from vlm_reward.tasks import train_tasks


@dataclass(frozen=True)
class Config:
    """Probe a backbone on unseen captions, images and sentences."""

    backbone: str = "siglip2-tiny"
    """A folder or a name under checkpoints/."""
    scenes: Path = Path("out/probe-scenes")
    """Shards rendered with another seed than the training ones."""
    candidates: int = 10
    """Captions an image is compared with."""
    pairs: int = 2000
    """Pairs of sentences."""
    seed: int = 0
    """Seed of the draws."""


def retrieval(model: RewardModel, scenes: Scenes, candidates: int, seed: int) -> np.ndarray:
    """Whether the true caption of each image outscores the false ones: bool [N], of images that have enough."""
    rng = np.random.default_rng(seed)
    kept = [split_sentences(fact)[1] or list(sentences(fact)) for fact in scenes.facts]
    images = model.embed(scenes.frames[:, None])[:, 0]
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


def language(model: RewardModel, pairs: int, seed: int) -> float:
    """Spearman correlation of the student's and the teacher's cosine over random pairs of new sentences."""
    said = sorted(set(instructions(2 * pairs, seed + 10**6)))
    index = np.random.default_rng(seed).integers(0, len(said), (pairs, 2))
    student, teacher = model.embed_text(said), Teacher().embed(said).numpy()
    return spearman(*((e[index[:, 0]] * e[index[:, 1]]).sum(1) for e in (student, teacher)))


def main(config: Config) -> None:
    """Print the figures as one JSON object."""
    model = RewardModel.from_pretrained(config.backbone)
    unseen = json.loads((Path(model.encoder.name) / "pretraining.json").read_text())["stand_ins"]
    figures = {}
    for name, tasks in (
        ("seen tasks", [t for t in train_tasks() if t not in unseen]),
        ("stand-ins", list(unseen)),
    ):
        if tasks:
            right = retrieval(model, Scenes(config.scenes, tasks), config.candidates, config.seed)
            figures[f"retrieval, {name}, %"] = round(100 * float(right.mean()), 1)
            figures[f"images, {name}"] = len(right)
    figures["chance, %"] = 100 / config.candidates
    figures["similarity to the teacher's, spearman"] = round(language(model, config.pairs, config.seed), 3)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
