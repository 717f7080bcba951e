"""The metrics of the benchmark, in NumPy alone.

Every metric is a fraction or a correlation, never a percentage; whoever prints it multiplies by 100. Of
scores only the order counts. Intervals resample whole trajectories, because the frames of one trajectory
resemble each other and would make any interval too narrow.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, float64 [T]; ties share the mean of their places. ValueError for NaN or no values."""
    values = _vector(values, "values")
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two vectors [T], in [-1, 1]; 0.0 where either is constant.

    A constant vector orders nothing, so its correlation is undefined; 0.0 says that it tells nothing.
    """
    ranks_a, ranks_b = ranks(a), ranks(b)
    if len(ranks_a) != len(ranks_b):
        raise ValueError(f"two vectors of one length are needed, got {len(ranks_a)} and {len(ranks_b)}")
    ranks_a -= ranks_a.mean()
    ranks_b -= ranks_b.mean()
    norm = np.sqrt((ranks_a**2).sum() * (ranks_b**2).sum())
    return float(np.clip(ranks_a @ ranks_b / norm, -1, 1)) if norm else 0.0


def voc(scores: np.ndarray) -> float:
    """Value-order correlation of one trajectory: Spearman's rho between its scores [T] and time, in [-1, 1].

    1 when the score rises at every step, -1 when it falls at every step, 0.0 when it is constant.

    Reference: Ma et al., "Vision Language Models are In-Context Value Learners", 2024.
    """
    return spearman(scores, np.arange(len(scores)))


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """How often a positive score [P] exceeds a negative one [N], ties one half: the area under the ROC."""
    positive, negative = _vector(positive, "positive"), _vector(negative, "negative")
    n_positive, n_negative = len(positive), len(negative)
    rank_sum = ranks(np.concatenate([positive, negative]))[:n_positive].sum()
    return float((rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def top1_of_k(scores: np.ndarray, right: int = 0) -> np.ndarray:
    """For scores [N, K] of K candidates each: the chance [N] that the best-scored one is column `right`.

    1 or 0 but for ties: the m best share the credit, 1/m each, so that a constant score gets 1/K.
    """
    scores = np.asarray(scores)
    if scores.ndim != 2 or not 0 <= right < scores.shape[1]:
        raise ValueError(f"scores must be [N, K] with K > right={right}, got {scores.shape}")
    best = scores == scores.max(axis=1, keepdims=True)
    return best[:, right] / best.sum(axis=1)


def consistency_pairs(rewards: np.ndarray, *, n_pairs: int = 10_000, seed: int | Sequence[int]) -> np.ndarray:
    """Pairs of timesteps, each labelled by the higher true reward: int64 [n_pairs, 2], the better one first.

    `rewards` [T] are those of the pooled timesteps of a task's random and sub-optimal rollouts. A pair is a
    uniform draw among all pairs of timesteps with different rewards, within or across trajectories.
    Raises ValueError when every reward is the same, for then no pair has a label.
    """
    rewards = _vector(rewards, "rewards")
    order = np.argsort(rewards, kind="stable")
    ordered = rewards[order]
    tied_from = np.searchsorted(ordered, ordered, side="left")
    tied = np.searchsorted(ordered, ordered, side="right") - tied_from
    partners = len(rewards) - tied
    if not partners.any():
        raise ValueError(f"all {len(rewards)} rewards are {rewards[0]}: no pair of timesteps can be labelled")
    rng = np.random.default_rng(seed)
    first = rng.choice(len(rewards), size=n_pairs, p=partners / partners.sum())
    second = rng.integers(partners[first])
    second += np.where(second >= tied_from[first], tied[first], 0)  # step over the ties of the first
    return order[np.stack([np.maximum(first, second), np.minimum(first, second)], axis=1)]


def consistency(scores: np.ndarray, pairs: np.ndarray) -> float:
    """Share of pairs [P, 2] whose better timestep has the higher of the scores [T]; a tie counts one half."""
    return float(_credits(scores, pairs).mean())


def multi_view(scores: np.ndarray) -> np.ndarray:
    """Scores [N, V, ...] of each view -> [N, V + 1, ...]: the multi-view score, their mean, comes last."""
    return np.concatenate([scores, scores.mean(axis=1, keepdims=True)], axis=1)


@dataclass(frozen=True)
class Estimate:
    """A metric's mean over `n` units, its standard deviation over trajectories, and its bootstrap."""

    mean: float
    std: float
    n: int
    replicates: np.ndarray  # [B], the mean of each resample of the trajectories

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The percentile interval (low, high)."""
        tail = (1 - level) / 2
        low, high = np.nanquantile(self.replicates, [tail, 1 - tail])
        return float(low), float(high)


def bootstrap_weights(n_groups: int, *, seed: int | Sequence[int], n: int = 1000) -> np.ndarray:
    """How often each of `n_groups` trajectories is drawn in each of `n` resamples: int64 [n, n_groups]."""
    if n_groups < 1:
        raise ValueError(f"there must be a trajectory to resample, got {n_groups}")
    return np.random.default_rng(seed).multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n)


def bootstrap_interval(
    values: np.ndarray, *, seed: int, n: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` [E], one per trajectory (or per training seed)."""
    return mean_estimate(values, bootstrap_weights(len(values), seed=seed, n=n)).interval(level)


def mean_estimate(values: np.ndarray, weights: np.ndarray) -> Estimate:
    """The mean of one value [E] per trajectory; `weights` [B, E] as `bootstrap_weights` draws them."""
    values = _vector(values, "values")
    return Estimate(float(values.mean()), _std(values), len(values), weights @ values / weights.sum(axis=1))


def consistency_estimate(
    scores: np.ndarray, pairs: np.ndarray, groups: np.ndarray, weights: np.ndarray
) -> Estimate:
    """Consistency of scores [T] on pairs [P, 2]; `groups` [T] numbers each timestep's trajectory from 0.

    The standard deviation is that of the trajectories' own accuracies (over all pairs that touch one). In a
    resample, a pair across two trajectories counts the product of how often each is drawn, a pair within one
    as often as that one.
    """
    n = weights.shape[1]
    cells = groups[pairs[:, 0]] * n + groups[pairs[:, 1]]
    total = np.bincount(cells, minlength=n * n).reshape(n, n).astype(float)
    right = np.bincount(cells, weights=_credits(scores, pairs), minlength=n * n).reshape(n, n)

    def resampled(counts: np.ndarray) -> np.ndarray:
        within = np.diag(counts)
        return ((weights @ (counts - np.diag(within))) * weights).sum(axis=1) + weights @ within

    touched, touched_right = (c.sum(axis=0) + c.sum(axis=1) - np.diag(c) for c in (total, right))
    own = touched_right[touched > 0] / touched[touched > 0]
    pairs_drawn, pairs_right = resampled(total), resampled(right)
    replicates = np.divide(pairs_right, pairs_drawn, out=np.full(len(weights), np.nan), where=pairs_drawn > 0)
    return Estimate(float(right.sum() / total.sum()), _std(own), len(pairs), replicates)


def average_estimate(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of means and mean of standard deviations, as the paper's last row; `n` says of how many."""
    return Estimate(
        mean=float(np.mean([e.mean for e in estimates])),
        std=float(np.mean([e.std for e in estimates])),
        n=len(estimates),
        replicates=np.mean([e.replicates for e in estimates], axis=0),
    )


def _credits(scores: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    scores = _vector(scores, "scores")
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
        raise ValueError(f"pairs must be [P, 2] with P > 0, got {pairs.shape}")
    better, worse = scores[pairs[:, 0]], scores[pairs[:, 1]]
    return (better > worse) + 0.5 * (better == worse)


def _std(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _vector(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name} must be a vector with at least one value, got shape {values.shape}")
    if np.isnan(values).any():
        raise ValueError(f"{name} has {int(np.isnan(values).sum())} NaN of {len(values)} values")
    return values
