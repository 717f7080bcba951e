"""Batches of frames and sentences, each unique one once.

Every draw is a function of (seed, epoch, batch) and of nothing else: a run that was stopped goes on exactly,
and the processes of a distributed run make the same joint batch without talking to each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from training.objectives import Objective
from vlm_reward.recording import EpisodeInfo

# The second number of a generator's seed: what is drawn. No two kinds of draws share a stream.
_TIMESTEPS, _ORDER, _VIEWS, _TRAJECTORIES = range(4)


@dataclass(frozen=True)
class Batch:
    """U unique images, L unique sentences, and the N samples made of them.

    Args:
        rows: int64 [U], rows of the frame cache.
        views: int64 [U], which camera.
        texts: the L sentences.
        frames: name of a frame in a sample -> int64 [N], index into the U images.
        text: int64 [N], index into the L sentences; equal where the sentences are.
        trajectory: int64 [N], equal where the trajectories are.
        seed: of what the objective draws, e.g. its negatives.
        starts: int64 [N], index into the U images of the first frame of the sample's trajectory, in the one view
            of its frames; None where nobody asked for it.
    """

    rows: np.ndarray
    views: np.ndarray
    texts: tuple[str, ...]
    frames: dict[str, torch.Tensor]
    text: torch.Tensor
    trajectory: torch.Tensor
    seed: int
    starts: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)


class Sampler(Protocol):
    """What the training loop asks of a sampler."""

    batches_per_epoch: int

    def batch(self, epoch: int, index: int) -> Batch:
        """Batch `index` in [0, batches_per_epoch) of `epoch`."""
        ...


class PaperSampler:
    """Samples that each draw the frames of their own from one trajectory.

    The timesteps of a sample are drawn once and stay; the order of the samples and the view of each frame are
    drawn anew in each epoch. An incomplete last batch is dropped, unless it is the only one.

    Args:
        objective: says which frames a sample has and how they lie in time.
        episodes: the trajectories, each at least 2 frames long.
        views: V, the number of cameras.
        samples: in an epoch, evenly over the trajectories.
        batch_size: samples in a batch.
        preset: whose rule draws the timesteps, `paper` or `official`.
        seed: of everything drawn.
        starts: add the first frame of each sample's trajectory, and see all frames of a sample in one view.
    """

    def __init__(
        self,
        objective: Objective,
        episodes: Sequence[EpisodeInfo],
        views: int,
        *,
        samples: int = 50_000,
        batch_size: int = 32,
        preset: str = "paper",
        seed: int = 0,
        starts: bool = False,
    ) -> None:
        _check(episodes, views)
        if samples < 1 or batch_size < 1:
            raise ValueError(f"samples and batch_size must be at least 1, got {samples} and {batch_size}")
        self.objective, self.episodes, self.views, self.seed = objective, tuple(episodes), views, seed
        self.starts = starts
        share, more = divmod(samples, len(episodes))
        counts = [share + (number < more) for number in range(len(episodes))]
        generator = np.random.default_rng([seed, _TIMESTEPS])
        self.timesteps = np.concatenate(
            [
                objective.draw_timesteps(episode.length, count, generator, preset=preset)
                for episode, count in zip(episodes, counts, strict=True)
            ]
        )
        self.trajectories = np.repeat(np.arange(len(episodes)), counts)
        self.batch_size = min(batch_size, samples)
        self.batches_per_epoch = samples // self.batch_size
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def batch(self, epoch: int, index: int) -> Batch:
        """Batch `index` in [0, batches_per_epoch) of `epoch`."""
        if self._order[0] != epoch:
            generator = np.random.default_rng([self.seed, _ORDER, epoch])
            self._order = (epoch, generator.permutation(len(self.timesteps)))
        chosen = self._order[1][index * self.batch_size : (index + 1) * self.batch_size]
        trajectories, timesteps = self.trajectories[chosen], self.timesteps[chosen]
        generator = np.random.default_rng([self.seed, _VIEWS, epoch, index])
        starts = np.array([self.episodes[number].start for number in trajectories])[:, None]
        views = generator.integers(self.views, size=starts.shape if self.starts else timesteps.shape)
        if self.starts:
            timesteps = np.hstack([timesteps, np.zeros_like(starts)])
        images, columns = np.unique((starts + timesteps) * self.views + views, return_inverse=True)
        return _batch(
            self.episodes,
            images // self.views,
            images % self.views,
            trajectories,
            self.objective.frames,
            columns.reshape(timesteps.shape).T,
            seed=int(generator.integers(2**62)),
        )


class GroupedSampler:
    """Few trajectories a batch, some frames of each encoded once, every sample that can be formed among them.

    Eight trajectories of eight frames are 64 images and 224 pairs; the paper's sampler encodes 448 images for
    as many.
    Trajectories come in shuffled passes over all of them. An epoch counts each frame as a sample, so that all
    objectives cost the same: samples / (trajectories * frames) batches.

    Args:
        objective: says which frames a sample has and how they lie in time.
        episodes: the trajectories, each at least 2 frames long.
        views: V, the number of cameras; each frame is seen by one, drawn at random.
        samples: sets the length of an epoch.
        trajectories: in a batch; fewer where there are fewer.
        frames: of each trajectory, at least as many as a sample has.
        preset: whose rule draws the timesteps, `paper` or `official`.
        seed: of everything drawn.
        starts: add the first frame of each trajectory, and see all of its frames in one view.
    """

    def __init__(
        self,
        objective: Objective,
        episodes: Sequence[EpisodeInfo],
        views: int,
        *,
        samples: int = 50_000,
        trajectories: int = 8,
        frames: int = 8,
        preset: str = "paper",
        seed: int = 0,
        starts: bool = False,
    ) -> None:
        _check(episodes, views)
        if samples < 1 or trajectories < 1 or frames < len(objective.draw.names):
            names = f"{len(objective.draw.names)} frames ({', '.join(objective.draw.names)})"
            raise ValueError(
                f"the grouped sampler of {objective.name} needs samples and trajectories of at least 1 and "
                f"at least {names}, got {samples}, {trajectories} and {frames}"
            )
        self.objective, self.episodes, self.views = objective, tuple(episodes), views
        self.preset, self.seed, self.starts = preset, seed, starts
        self.trajectories, self.frames = min(trajectories, len(episodes)), frames
        self.batches_per_epoch = max(1, samples // (self.trajectories * frames))

    def batch(self, epoch: int, index: int) -> Batch:
        """Batch `index` in [0, batches_per_epoch) of `epoch`."""
        batches_per_pass = len(self.episodes) // self.trajectories
        number, place = divmod(epoch * self.batches_per_epoch + index, batches_per_pass)
        order = np.random.default_rng([self.seed, _ORDER, number]).permutation(len(self.episodes))
        chosen = order[place * self.trajectories : (place + 1) * self.trajectories]
        episodes = [self.episodes[number] for number in chosen]
        generator = np.random.default_rng([self.seed, _TRAJECTORIES, epoch, index])
        timesteps = np.stack(
            [
                self.objective.draw_group(e.length, self.frames, generator, preset=self.preset)
                for e in episodes
            ]
        )
        views = generator.integers(self.views, size=(len(episodes), 1) if self.starts else timesteps.shape)
        formed = self.objective.group_samples(
            torch.from_numpy(timesteps),
            torch.tensor([episode.length for episode in episodes]),
            preset=self.preset,
        )
        starts = np.array([episode.start for episode in episodes])[:, None]
        trajectory = formed["trajectory"].numpy()
        keys = ((starts + timesteps) * self.views + views).reshape(-1)
        wanted = keys[np.stack([formed[name].numpy() for name in self.objective.frames])]  # [K, N]
        if self.starts:
            wanted = np.vstack([wanted, (starts * self.views + views)[trajectory, 0]])
        images, columns = np.unique(wanted, return_inverse=True)
        return _batch(
            self.episodes,
            images // self.views,
            images % self.views,
            chosen[trajectory],
            self.objective.frames,
            columns.reshape(wanted.shape),
            seed=int(generator.integers(2**62)),
        )


def _check(episodes: Sequence[EpisodeInfo], views: int) -> None:
    if not episodes:
        raise ValueError("there must be a trajectory to sample from, got none")
    if views < 1:
        raise ValueError(f"there must be a view to sample from, got {views}")


def _batch(
    episodes: Sequence[EpisodeInfo],
    rows: np.ndarray,
    views: np.ndarray,
    trajectories: np.ndarray,
    names: tuple[str, ...],
    columns: np.ndarray,
    seed: int,
) -> Batch:
    """`columns` int64 [K, N]: the images of each sample's K frames and, if it is one more, of its first."""
    indices = torch.from_numpy(np.ascontiguousarray(columns))
    texts = list(dict.fromkeys(episodes[number].instruction for number in trajectories))
    text = torch.tensor([texts.index(episodes[number].instruction) for number in trajectories])
    return Batch(
        rows=rows,
        views=views,
        texts=tuple(texts),
        frames=dict(zip(names, indices, strict=False)),
        text=text,
        trajectory=torch.from_numpy(trajectories),
        seed=seed,
        starts=indices[len(names)] if len(indices) > len(names) else None,
    )
