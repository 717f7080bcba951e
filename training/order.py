"""Which of two images of a scene is nearer to what a sentence says, by what the simulator knows of both.

The shards of `training.scenes` in memory, sentences that order their images, and the loss that makes scores
follow: the third stage of `training.pretrain`, and `training.train --scenes`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.captions import (
    ASKS,
    WORDS,
    Ranking,
    Thing,
    present,
    rankings,
    rankings_of,
    sentences,
    spoken_of,
)
from training.language import is_held_out
from training.scenes import POINTS, STATE
from vlm_reward.cameras import WORKSPACE, Crop
from vlm_reward.frame_cache import FrameCache
from vlm_reward.recording import EpisodeInfo

GAPS = {"reward": 0.002, "fraction": 0.08, "hand_object": 0.15, "object_goal": 0.15}
GAPS |= {"asked fraction": 0.03, "asked object_goal": 0.03}
"""Numbers that differ by less are not ordered (0.02 of reward; 3 cm)."""
WAY = 1.5
"""Over how long a way (30 cm) who asks for a state wants the hand to come: rollouts begin that far off."""
WORLD = "world-"
"""How the names of scenes begin that belong to no task."""
WORLDS_SHARE = 0.5
"""Of the groups of images, those of scenes that belong to no task, where there are any."""
REWARD_GAP = 0.005
"""The same of a rollout's reward, which is not scaled; where the hand is far, some centimetres are worth 0.01."""


def shards_of(folders: Sequence[Path], tasks: Sequence[str]) -> list[Path]:
    """The files of `training.scenes` that show these tasks, and all of `training.worlds`.

    Raises:
        FileNotFoundError: a task has none, or there are none at all.
    """
    where = ", ".join(map(str, folders))
    shards = [file for folder in folders for file in sorted(folder.glob("*.npz"))]
    shown = {file: file.stem.partition("-")[2] for file in shards}
    files = [file for file, of in shown.items() if of in tasks or of.startswith(WORLD)]
    if missing := set(tasks) - set(shown.values()):
        raise FileNotFoundError(
            f"{where} has no scenes of {', '.join(sorted(missing))}; run python -m training.scenes"
        )
    if not files:
        raise FileNotFoundError(f"{where} has no scenes; run python -m training.scenes or training.worlds")
    return files


class Scenes:
    """All shards of some tasks, in memory, with one table of facts.

    `crops` are those of the images, by camera, or None; `known[i, f]` is +1 where fact f holds in image i,
    -1 where it does not, 0 where nobody can tell; `partner[i]` is the image of the same moment and view with the
    state elsewhere, -1 where there is none; `rows` are those of each task, `of_view` the same by camera. Behind
    the tasks come the worlds of `training.worlds`, as tasks of their own that have several things: `things_of` has
    their names, `things[i, t]` is the state vector of image i with thing t as the object, `spots[i, t]` where in
    the image that is.
    """

    def __init__(self, folders: Sequence[Path], tasks: Sequence[str]) -> None:
        files = shards_of(folders, tasks)
        names = [*tasks]
        self.things_of: dict[str, tuple[Thing, ...]] = {}
        things: list[np.ndarray] = []
        spots: list[np.ndarray] = []
        cropped, sizes = set[bool](), set[int]()
        index: dict[str, int] = {}
        parts: dict[str, list[np.ndarray]] = {key: [] for key in ("state", "points", "view")}
        partners: list[np.ndarray] = []
        rows: list[tuple[int, np.ndarray, np.ndarray]] = []
        task_facts: dict[str, set[int]] = {}
        tasks_of: list[np.ndarray] = []
        for file in files:
            with np.load(file) as shard:
                header = json.loads(str(shard["header"]))
                cropped.add(header.get("crop", False))
                sizes.add(header["size"])
                ids = np.array([index.setdefault(fact, len(index)) for fact in header["facts"]] + [-1])
                true, false = ids[shard["true"]], ids[shard["false"]]
                for key, part in parts.items():
                    part.append(shard[key])
                first = sum(len(each) for each in partners)
                partner = shard["partner"] if "partner" in shard else np.full(len(true), -1)
                partners.append(np.where(partner < 0, -1, partner + first))
                rows.append((len(true), true, false))
                seen = set(np.unique(true)) | set(np.unique(false)) - {-1}
                if "things" in header:
                    name = f"{header['task']}-of-{header['seed'][0]}"
                    names.append(name)
                    self.things_of[name] = tuple(Thing(**thing) for thing in header["things"])
                    things.append(shard["things"])
                    unknown = np.full((*shard["things"].shape[:2], 2), np.nan, np.float32)
                    spots.append(shard.get("spots", unknown))
                else:
                    name = header["task"]
                    things.append(shard["state"][:, None])
                    spots.append(shard["points"][:, POINTS.index("object")][:, None])
                task_facts.setdefault(name, set()).update(int(f) for f in seen if f >= 0)
                tasks_of.append(np.full(len(true), names.index(name)))
        if len(cropped) > 1:
            raise ValueError(
                f"some scenes in {', '.join(map(str, folders))} show whole images, some parts of them"
            )
        self.crops = WORKSPACE if cropped == {True} else None
        self.tasks = tuple(names)
        self.facts = list(index)
        self.task = np.concatenate(tasks_of)
        self.frames = _frames(files, [len(each) for each in partners], sizes)
        self.partner = np.concatenate(partners)
        self.state, self.points = np.concatenate(parts["state"]), np.concatenate(parts["points"])
        self.things, self.spots = _padded(things), _padded(spots)
        # What is said of other scenes only is false here; but not what may be there by another name.
        words = [present(self._words(task)) for task in names]
        spoken = [spoken_of(fact) for fact in self.facts]
        may = np.array([[not nouns.isdisjoint(there) for nouns in spoken] for there in words])
        self.known = np.where(may, 0, -1).astype(np.int8)[self.task]
        named = np.array([fact.startswith("scene:") for fact in self.facts])
        for t, task in enumerate(names):
            columns = [f for f in task_facts[task] if not named[f]]
            self.known[np.ix_(self.task == t, columns)] = 0
        start = 0
        for count, true, false in rows:
            for ids, value in ((false, -1), (true, 1)):
                row, column = np.nonzero(ids >= 0)
                self.known[start + row, ids[row, column]] = value
            start += count
        self.known[(self.known < 0) & (may & named)[self.task]] = (
            0  # nor is it said that there is no such thing
        )

        self._doubt_what_is_said_twice()
        view = np.concatenate(parts["view"])
        self.rows = [np.flatnonzero(self.task == t) for t in range(len(names))]
        self.of_view = [[rows[view[rows] == v] for v in np.unique(view[rows])] for rows in self.rows]
        self._sometimes = {t: (self.known[self.task == t] > 0).any(0) for t in range(len(names))}

    def nouns(self, task: str) -> list[tuple[str, ...]]:
        """What each thing of a task or a world is called."""
        if task in self.things_of:
            return [(thing.noun,) for thing in self.things_of[task]]
        return [WORDS[task].noun]

    def _words(self, task: str) -> list[str]:
        """The same, and what else the sentences of a task speak of."""
        said = [noun for nouns in self.nouns(task) for noun in nouns]
        if task in self.things_of:
            return said
        words = WORDS[task]
        return [*said, words.goal, *words.start[1:], *words.end[1:]]

    def _doubt_what_is_said_twice(self) -> None:
        """No sentence is false of an image where another fact with the same sentence holds, or may.

        "The window is open" is one of the task window-open's and one of a world's with a window.
        """
        facts_of: dict[str, list[int]] = {}
        for number, fact in enumerate(self.facts):
            for sentence in set(sentences(fact)):
                facts_of.setdefault(sentence, []).append(number)
        alike = {tuple(numbers) for numbers in facts_of.values() if len(numbers) > 1}
        said = {number: self.known[:, number].copy() for numbers in alike for number in numbers}
        for numbers in alike:
            for number in numbers:
                may = np.logical_or.reduce([said[other] >= 0 for other in numbers if other != number])
                self.known[may & (said[number] < 0), number] = 0

    def __len__(self) -> int:
        return len(self.frames)

    def check_crop(self, crops: dict[str, Crop] | None) -> None:
        """ValueError when a model that looks at these `crops` would see something else than the scenes show."""
        if self.crops != crops:
            which = "whole images", "the part of each image where hands and objects are (--crop)"
            raise ValueError(
                f"the scenes show {which[self.crops is not None]}, the model looks at {which[crops is not None]}: "
                "render them again with python -m training.scenes"
            )

    def rankings(self) -> list[list[tuple[int, tuple[Ranking, ...]]]]:
        """Of each task, sentences that order its images, in groups, each with the number of its thing."""
        return [
            [(0, kind) for kind in rankings(task)]
            if task not in self.things_of
            else [(t, kind) for t, thing in enumerate(self.things_of[task]) for kind in rankings_of(thing)]
            for task in self.tasks
        ]

    def own_false(self, row: int) -> np.ndarray:
        """Facts that hold in other images of the same task, but not in this one."""
        return np.flatnonzero((self.known[row] < 0) & self._sometimes[int(self.task[row])])


def _frames(files: Sequence[Path], counts: Sequence[int], sizes: set[int]) -> np.ndarray:
    """The frames of all shards, uint8 [N, S, S, 3], of which no second copy is ever in memory.

    Raises:
        ValueError: `sizes`, those that they were rendered at, are several.
    """
    if len(sizes) > 1:
        raise ValueError(
            f"some scenes have frames of another size than others, {sorted(sizes)} pixels: render anew"
        )
    (size,) = sizes
    frames = np.empty((sum(counts), size, size, 3), np.uint8)
    for file, part in zip(files, np.split(frames, np.cumsum(counts)[:-1]), strict=True):
        with np.load(file) as shard:
            part[:] = shard["frames"]
    return frames


def _padded(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays [N, T, D] one after the other, [sum of N, most T, D]; NaN past the things of each."""
    most = max(each.shape[1] for each in parts)
    gaps = [((0, 0), (0, most - each.shape[1]), (0, 0)) for each in parts]
    return np.concatenate(
        [np.pad(each, gap, constant_values=np.nan) for each, gap in zip(parts, gaps, strict=True)]
    )


def split_sentences(fact: str) -> tuple[list[str], list[str]]:
    """The paraphrases of a fact to train on, and those kept for tests (each fifth)."""
    said = list(sentences(fact))
    if fact.startswith(("state:", "thing:")):
        return said, []  # few and wanted
    return [s for i, s in enumerate(said) if i % 5 != 4], [s for i, s in enumerate(said) if i % 5 == 4]


def shifted(frames: np.ndarray, rng: np.random.Generator, reach: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Each frame [N, S, S, 3] moved by up to `reach` pixels; its border repeats.

    Returns:
        The frames, and by how much what they show has moved: float32 [N, 2], of an image from -1 to 1 (right, up).
    """
    moves = rng.integers(-reach, reach + 1, (len(frames), 2))
    shown = np.stack([moved(frame, up, left) for frame, (up, left) in zip(frames, moves, strict=True)])
    return shown, (moves[:, ::-1] * np.array((-2, 2)) / frames.shape[1]).astype(np.float32)


def relit(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Preprocessed images [N, 3, S, S], each of another contrast and brightness."""
    contrast, light = (
        torch.tensor(rng.uniform(low, high, (len(pixels), 3, 1, 1)), dtype=torch.float32).to(pixels.device)
        for low, high in ((0.8, 1.2), (-0.15, 0.15))
    )
    return pixels * contrast + light


def covered(frames: np.ndarray, points: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Frames [N, S, S, 3], some with up to three rectangles over them, of one colour or cut from another frame.

    So that what stands in a scene beside hand and thing says nothing (Zhong et al., "Random Erasing Data
    Augmentation", AAAI 2020; Ghiasi et al., "Simple Copy-Paste", CVPR 2021). None covers a point, and none is cut
    from where a point of the other frame is.

    Args:
        frames: of at least two scenes.
        points: float [N, P, 2] in [-1, 1] (right, up), NaN where there is none.
        share: of the frames that are covered, in [0, 1].
        rng: of all draws.
    """
    count, size = frames.shape[:2]
    columns = (points * np.array((0.5, -0.5)) + 0.5) * size
    shown = frames.copy()

    def hits(frame: int, top: int, left: int, high: int, wide: int) -> bool:
        away = size // 16
        near = columns[frame] - np.array((left, top))
        return bool(((near > -away) & (near < np.array((wide, high)) + away)).all(-1).any())

    for frame in np.flatnonzero(rng.random(count) < share).tolist():
        for _ in range(rng.integers(1, 4)):
            high, wide = rng.integers(size // 10, size // 3, 2)
            top, left, from_top, from_left = (rng.integers(0, size - side) for side in (high, wide) * 2)
            other, cut = int(rng.integers(count)), rng.random() < 0.5
            if hits(frame, top, left, high, wide) or (cut and hits(other, from_top, from_left, high, wide)):
                continue
            here = shown[frame, top : top + high, left : left + wide]
            here[...] = (
                frames[other, from_top : from_top + high, from_left : from_left + wide]
                if cut
                else rng.integers(0, 256, 3)
            )
    return shown


def moved(frame: np.ndarray, up: int, left: int) -> np.ndarray:
    """A frame [S, S, 3] moved by so many pixels; its border repeats."""
    base, last = np.arange(len(frame)), len(frame) - 1
    return frame[np.clip(base + up, 0, last)][:, np.clip(base + left, 0, last)]


@dataclass(frozen=True)
class Ranked:
    """A sentence and how true it is of each image of its group.

    Args:
        group: which group of the batch.
        sentence: what is said.
        values: [G], higher is truer; NaN where nobody knows.
        gap: values nearer than this count as equal.
        spots: [G, 2], where in each image the thing is that it orders by, in [-1, 1] (right, up); NaN where that
            is not in it, or the sentence has no name for it.
        pairs: bool [G, G], which two may be compared; None for any.
        against: what is said of the contrary, whose score is to be subtracted; None for nothing.
    """

    group: int
    sentence: str
    values: np.ndarray
    gap: float
    spots: np.ndarray
    pairs: np.ndarray | None = None
    against: str | None = None


class Orders:
    """Groups of images of one scene, and sentences that order them.

    Args:
        scenes: the images.
        unasked: training tasks that stand in for the unseen: nobody asks for their goals, as nobody asks for a
            held-out task's; statements remain.
        contrast: order each group by the difference of a sentence and one that says the contrary, too.

    Raises:
        ValueError: a sentence says what a held-out task asks for.
    """

    def __init__(self, scenes: Scenes, unasked: Sequence[str] = (), contrast: bool = False) -> None:
        self.scenes, self.contrast = scenes, contrast
        kinds = scenes.rankings()
        facts = [*scenes.facts, *(fact for each in kinds for _, kind in each for fact, *_ in kind)]
        self.said = {fact: split_sentences(fact)[0] for fact in dict.fromkeys(facts)}
        asked = {WORDS[task].end[0] for task in scenes.tasks if task in WORDS}
        goals = {WORDS[task].end[0] for task in unasked} - asked
        for goal in goals:
            if f"state:{goal}" in self.said:
                stated = [s for s in self.said[f"state:{goal}"] if s.startswith(("the ", "a ", "an "))]
                self.said[f"state:{goal}"] = stated
                self.said.pop(f"ask:{goal}", None)
            for fact in self._same_wishes(goal):
                self.said.pop(fact, None)
        self.kinds = [
            tuple(
                (thing, kept)
                for thing, kind in each
                if (kept := tuple(one for one in kind if one[0] in self.said))
            )
            for each in kinds
        ]
        self.nouns = [scenes.nouns(task) for task in scenes.tasks]
        worlds = np.array([task in scenes.things_of for task in scenes.tasks])
        self._often = None
        if worlds.any():
            share = np.where(
                worlds, WORLDS_SHARE / worlds.sum(), (1 - WORLDS_SHARE) / max((~worlds).sum(), 1)
            )
            self._often = share / share.sum()
        if held := [s for each in self.said.values() for s in each if is_held_out(s)]:
            raise ValueError(f"training text says what a held-out task asks for: {held}")

    def _same_wishes(self, goal: str) -> list[str]:
        """Facts `want:...` of things in worlds that ask for what a task's goal does, and for the contrary."""
        outcome, _, nouns = ASKS.get(goal, ("", False, ()))
        return [
            fact
            for fact in self.said
            if fact.startswith(f"want:{outcome}|") and fact.rpartition("|")[2].split()[-1] in nouns
        ]

    def draw(self, groups: int, size: int, rng: np.random.Generator) -> tuple[np.ndarray, list[Ranked]]:
        """Rows of `groups` x `size` images, int64, and a sentence of each of `rankings` for each group and thing.

        All images of a group are of one view.
        Half of a group are partners of the other half, where there are any. Statements of a state then order
        partners, and those whose state was put elsewhere: there the hand tells nothing of it.
        """
        rows_of, choose = self.scenes.of_view, rng.choice

        def said(fact: str) -> str:
            return str(choose(self.said[fact]))

        tasks = choose(len(rows_of), groups, replace=groups > len(rows_of), p=self._often)
        seen = [rows_of[task][rng.integers(len(rows_of[task]))] for task in tasks]
        rows = [choose(each, size, replace=size > len(each)) for each in seen]
        for each in rows:
            partners = self.scenes.partner[each[: size // 2]]
            each[size - len(partners) :] = np.where(partners < 0, each[size - len(partners) :], partners)
        apart = [_state_apart(self.scenes.partner[each], each) for each in rows]
        ranked = []
        for group, task in enumerate(tasks):
            for thing, kind in self.kinds[task]:
                state = self.scenes.things[rows[group], thing]
                fact, name, sign = kind[rng.integers(len(kind))]
                values = measured(state, name, sign)
                stated = fact.startswith(("state:", "object:", "thing:")) and apart[group].any()
                pairs = apart[group] if stated else None
                sentence = said(fact)
                spots = self.scenes.spots[rows[group], thing]
                if not any(f" {noun} " in f" {sentence} " for noun in self.nouns[task][thing]):
                    spots = np.full_like(spots, np.nan)
                ranked.append(Ranked(group, sentence, values, GAPS[name], spots, pairs))
                contrary = [one for one in kind if one[2] == -sign]
                if self.contrast and contrary:
                    against, name, _ = contrary[rng.integers(len(contrary))]
                    values = ranked[-1].values - measured(state, name, -sign)
                    ranked.append(
                        Ranked(
                            group, ranked[-1].sentence, values, 2 * GAPS[name], spots, pairs, said(against)
                        )
                    )
        return np.concatenate(rows), ranked


def _state_apart(partners: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Of which two images the hand cannot tell which state is which: bool [N, N].

    Those are partners, and any two whose state was put elsewhere (the second of two partners).
    """
    moved = (partners >= 0) & (partners < rows)
    return (moved[:, None] & moved) | (partners[:, None] == rows)


def without_first(one: Ranked) -> np.ndarray:
    """Its pairs but those with the first image of the group, against which the others are scored: bool [G, G]."""
    pairs = np.ones((len(one.values),) * 2, bool) if one.pairs is None else one.pairs.copy()
    pairs[0] = pairs[:, 0] = False
    return pairs


def ranked_loss(images: Tensor, texts: Tensor, ranked: Sequence[Ranked]) -> Tensor:
    """`order_loss` of what `Orders.draw` drew.

    Args:
        images: [groups * size, D], unit norm, in the order of the rows.
        texts: [R, D], unit norm, of the R sentences; less those that say the contrary, where there are.
        ranked: the R of them.
    """
    size = len(ranked[0].values)
    own = images.reshape(-1, size, images.shape[1])[[one.group for one in ranked]]  # [R, G, D]
    values = torch.from_numpy(np.stack([one.values for one in ranked])).to(images.device)
    gaps = torch.tensor([one.gap for one in ranked], device=images.device)
    any_two = np.ones((size, size), bool)
    pairs = torch.from_numpy(np.stack([any_two if one.pairs is None else one.pairs for one in ranked]))
    return order_loss((own @ texts[..., None])[..., 0], values, gaps, pairs.to(images.device))


@dataclass(frozen=True)
class RolloutBatch:
    """R groups of G frames, each group of one task in one view, and the first frames of their episodes.

    Args:
        rows: int64 [U], as `Rollouts.frames` takes them; views: int64 [U], which camera.
        frames: int64 [R, G], index into the U images; starts: the same, of each frame's episode.
        sentences: R of them.
        values: float64 [R, G], the true reward of each frame.
    """

    rows: np.ndarray
    views: np.ndarray
    frames: np.ndarray
    starts: np.ndarray
    sentences: tuple[str, ...]
    values: np.ndarray


class Rollouts:
    """Episodes of training tasks, whatever came of them, whose frames the simulator's reward orders.

    Args:
        caches: of random and sub-optimal rollouts and of those of agents, at least two frames each, of the same
            views. Rows count through them one after the other.
        tasks: those to draw from, as often as they have episodes; the caches must have one of each.
    """

    def __init__(self, caches: Sequence[FrameCache], tasks: Sequence[str]) -> None:
        self.caches, self.views = tuple(caches), caches[0].views
        self.firsts = np.cumsum([0, *(len(cache.frames) for cache in caches)])
        self.rewards = np.concatenate([cache.rewards for cache in caches])
        joined = [
            replace(episode, start=episode.start + int(first))
            for cache, first in zip(caches, self.firsts, strict=False)
            for episode in cache.episodes
        ]
        self.of = {task: [one for one in joined if one.task == task] for task in tasks}
        if missing := [task for task, episodes in self.of.items() if not episodes]:
            names = ", ".join(cache.dataset_id for cache in caches)
            raise ValueError(f"dataset {names} has no rollouts of {', '.join(missing)}")
        counts = np.array([len(episodes) for episodes in self.of.values()])
        self.often = counts / counts.sum()

    def frames(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """uint8 [U, S, S, 3] of rows and views int64 [U]."""
        place = np.searchsorted(self.firsts, rows, side="right") - 1
        size = self.caches[0].size
        frames = np.empty((len(rows), size, size, 3), np.uint8)
        for number, cache in enumerate(self.caches):
            here = place == number
            frames[here] = cache.frames[rows[here] - self.firsts[number], views[here]]
        return frames

    def draw(self, groups: int, episodes: int, frames: int, rng: np.random.Generator) -> RolloutBatch:
        """`groups` tasks, `episodes` of each, and of each of those `frames` after its first."""
        chosen = rng.choice(list(self.of), groups, replace=groups > len(self.of), p=self.often).tolist()
        rows, starts = [], []
        for task in chosen:
            of = self.of[task]
            for number in rng.choice(len(of), episodes, replace=episodes > len(of)):
                rows.append(of[number].start + rng.integers(1, of[number].length, frames))
                starts.append(np.full(frames, of[number].start))
        views = np.repeat(rng.integers(self.views, size=groups), episodes * frames)
        shape = (groups, episodes * frames)
        rows, starts = (np.concatenate(each) for each in (rows, starts))
        keys, index = np.unique(
            np.concatenate([rows, starts]) * self.views + np.tile(views, 2), return_inverse=True
        )
        of_frames, of_starts = index.reshape(2, *shape)
        sentences = tuple(self.of[task][0].instruction for task in chosen)
        values = self.rewards[rows].astype(np.float64).reshape(shape)
        return RolloutBatch(keys // self.views, keys % self.views, of_frames, of_starts, sentences, values)


def forwards(rows: np.ndarray, episodes: Sequence[EpisodeInfo]) -> np.ndarray:
    """How far some frames are in their demonstrations.

    Args:
        rows: int64 [U], of the frame cache.
        episodes: R demonstrations.

    Returns:
        float64 [R, U] in [0, 1), as `order_loss` takes them; NaN where a frame belongs to another one.
    """
    start = np.array([episode.start for episode in episodes])[:, None]
    length = np.array([episode.length for episode in episodes])[:, None]
    passed = (rows - start) / length
    return np.where((passed >= 0) & (passed < 1), passed, np.nan)


def wrong_loss(scores: Tensor, rows: np.ndarray, own: Tensor, trajectory: np.ndarray) -> Tensor:
    """Under another trajectory's sentence, a later frame of a demonstration may not score higher.

    Args:
        scores: [U, L], of U frames under L sentences.
        rows: int64 [U], which grow with time within a trajectory.
        own: int64 [U], the sentence of each frame's trajectory.
        trajectory: int64 [U], equal where the trajectories are.

    Returns:
        Mean of max(0, later - earlier) over all pairs of a trajectory and all sentences not its own; 0 for none.
    """
    together = torch.from_numpy((trajectory[:, None] == trajectory) & (rows[:, None] > rows)).to(
        scores.device
    )
    others = own[:, None] != torch.arange(scores.shape[1], device=scores.device)  # [U, L]
    counted = together[..., None] & others[:, None]  # [later, earlier, L]
    rise = (scores[:, None] - scores[None]).clamp(min=0)
    return (rise * counted).sum() / counted.sum().clamp(min=1)


def measured(state: np.ndarray, name: str, sign: int) -> np.ndarray:
    """How true a sentence of `training.captions.rankings` is of some states [N, len(STATE)]: [N].

    Who asks for a state wants the hand to be there too, as long as the state is not reached: at first half as
    much as the state itself.
    """
    base = state[:, STATE.index(name.removeprefix("asked "))]
    if not name.startswith("asked "):
        return sign * base
    whole = 1.0 if name == "asked fraction" else 1.5  # of a mechanism; 30 cm for an object
    share = np.clip(base / whole, 0, 1)
    reached = share if sign > 0 else 1 - share
    return reached + (1 - reached) * 0.5 * np.exp(-state[:, STATE.index("hand_object")] / WAY)


def order_loss(
    scores: Tensor,
    values: Tensor,
    gaps: Tensor,
    pairs: Tensor | None = None,
    *,
    scale: float = 5.0,
    margin: float = 0.0,
) -> Tensor:
    """Bradley-Terry: of two images, the one with the higher value has the higher score.

    A fixed, small scale: a growing one would be content with ever smaller differences of the cosine.

    Args:
        scores: [R, G], cosines of R sentences and the G images each orders.
        values: [R, G], how true each is; NaN where nobody knows.
        gaps: [R], values nearer than this count as equal.
        pairs: bool [R, G, G], which two may be compared; None for any.
        scale: of the scores.
        margin: how much higher the score should be for each unit of value; with 0 all pairs count alike, with
            more those that differ most.

    Returns:
        Mean of log(1 + exp(-scale * (better - worse - margin * their difference in value))) over the pairs of a
        sentence that differ, then over the sentences that have any; 0 where none has.
    """
    more = values[:, :, None] - values[:, None, :]
    better = more > gaps[:, None, None]
    if pairs is not None:
        better &= pairs
    wanted = torch.where(better, margin * more, 0).to(scores.dtype)  # NaN where nobody knows
    each = F.softplus(scale * (wanted - scores[:, :, None] + scores[:, None, :]))
    counts = better.sum((1, 2))
    return ((each * better).sum((1, 2)) / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)
