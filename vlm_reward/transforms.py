"""Scores to rewards: small pieces that compose, each on N environments at once. NumPy alone.

The first piece of a chain shapes a reward from scores, the others change it:

    >>> transform = chain(potential(gamma=0.99), clip(-1.0, 1.0), mix(env_weight=1.0))
    >>> reward = transform(transition)  # float64 [N]

`goal_baseline` works a stage earlier, on embeddings: wrap the model in `GoalBaseline` and score with that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Transition:
    """One step of N environments, as a transform sees it.

    Args:
        score: float64 [N], the multi-view score of the frame after the step.
        previous: float64 [N], that of the frame before it, of the same episode.
        env_reward: float64 [N], the environment's own reward.
        terminated: bool [N], the episode ended in a state without a future.
        truncated: bool [N], the episode was cut; its last state has a future.
    """

    score: np.ndarray
    previous: np.ndarray
    env_reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


Shaping = Callable[[Transition], np.ndarray]
"""A transition to a reward, float64 [N]. Any function of this kind can be a wrapper's `transform`."""
Piece = Callable[[np.ndarray, Transition], np.ndarray]
"""A reward [N] and its transition to another reward [N]."""


def chain(shaping: Shaping, *pieces: Piece) -> Shaping:
    """Apply `shaping`, then each of `pieces` in turn."""

    def chained(transition: Transition) -> np.ndarray:
        reward = shaping(transition)
        for piece in pieces:
            reward = piece(reward, transition)
        return reward

    return chained


# Shapings: scores to a reward


def raw(transition: Transition) -> np.ndarray:
    r"""The score itself, $r_t = S(o_{t+1})$.

    Reference: Rocamonde et al., "Vision-Language Models are Zero-Shot Reward Models for Reinforcement
    Learning", ICLR 2024.
    """
    return transition.score.copy()


def difference(transition: Transition) -> np.ndarray:
    r"""Progress, $r_t = S(o_{t+1}) - S(o_t)$: standing still earns nothing, whatever the score.

    Reference: Ma et al., "VIP: Towards Universal Visual Reward and Representation via Value-Implicit
    Pre-Training", ICLR 2023.
    """
    return transition.score - transition.previous


def potential(gamma: float) -> Shaping:
    r"""Potential-based shaping, $F_t = \gamma \Phi(s_{t+1}) - \Phi(s_t)$ with the score as potential $\Phi$.

    Added to the environment's reward (`chain(potential(gamma), mix(env_weight=1.0))`), it leaves the optimal
    policy as it was. Alone it prefers no policy: its discounted sum to the end is $-\Phi(s_0)$, whatever is
    done. The potential of a terminal state counts as 0, that of a truncated episode's last state stays.

    Args:
        gamma: the discount of the agent, in [0, 1]; another one voids the guarantee.

    Reference: Ng, Harada and Russell, "Policy invariance under reward transformations", ICML 1999; for the
    terminal state Grzes, "Reward Shaping in Episodic Reinforcement Learning", AAMAS 2017.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")

    def shaped(transition: Transition) -> np.ndarray:
        following = np.where(transition.terminated, 0.0, transition.score)
        return gamma * following - transition.previous

    return shaped


# Pieces: a reward to a reward


def clip(low: float, high: float) -> Piece:
    r"""$\min(\max(r, \mathrm{low}), \mathrm{high})$.

    Reference: Mnih et al., "Human-level control through deep reinforcement learning", Nature 2015.
    """
    if not low < high:
        raise ValueError(f"clip needs low < high, got {low} and {high}")
    return lambda reward, transition: np.clip(reward, low, high)


def mix(env_weight: float, weight: float = 1.0) -> Piece:
    r"""$w\, r + w_\mathrm{env}\, r_\mathrm{env}$: add the environment's own reward, sparse or dense.

    Without it the learned reward replaces the environment's. `weight=0` is the environment's alone.

    Reference: Fu et al., "FuRL: Visual-Language Models as Fuzzy Rewards for Reinforcement Learning",
    ICML 2024.
    """
    if not np.isfinite([env_weight, weight]).all():
        raise ValueError(f"weights must be finite, got env_weight={env_weight}, weight={weight}")
    return lambda reward, transition: weight * reward + env_weight * transition.env_reward


@dataclass(frozen=True)
class RunningStats:
    """Count, mean and (population) variance of all values so far."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def update(self, values: np.ndarray) -> "RunningStats":
        """The statistics with `values` [N] included, as if computed over all at once.

        Reference: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
        variances", 1979.
        """
        if len(values) == 0:
            return self
        count = self.count + len(values)
        delta = float(np.mean(values)) - self.mean
        mean = self.mean + delta * len(values) / count
        squares = self.variance * self.count + float(np.var(values)) * len(values)
        return RunningStats(count, mean, (squares + delta**2 * self.count * len(values) / count) / count)


class RunningNorm:
    r"""$(r - \mu) / \sqrt{\sigma^2 + \epsilon}$ with the mean and variance of all rewards so far.

    The one piece with a memory: `stats` (save it with the agent, set it to resume), frozen while `training`
    is False. Subtracting the mean changes what ending an episode early is worth; `center=False` only scales.

    Reference: Engstrom et al., "Implementation Matters in Deep Policy Gradients", ICLR 2020.
    """

    def __init__(self, *, center: bool = True, epsilon: float = 1e-8) -> None:
        if not epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {epsilon}")
        self.center, self.epsilon = center, epsilon
        self.stats = RunningStats()
        self.training = True

    def __call__(self, reward: np.ndarray, transition: Transition) -> np.ndarray:
        if self.training:
            self.stats = self.stats.update(reward)
        offset = self.stats.mean if self.center else 0.0
        return (reward - offset) / np.sqrt(self.stats.variance + self.epsilon)


# Goal-baseline regularisation: embeddings to scores


def goal_baseline(images: np.ndarray, goal: np.ndarray, baseline: np.ndarray, alpha: float) -> np.ndarray:
    r"""$S = 1 - \frac{1}{2} \|\alpha\, \mathrm{proj}_L\, x + (1 - \alpha)\, x - g\|^2$.

    $L$ is the line through the baseline $b$ and the goal $g$: projecting onto it removes from an image $x$
    what neither sentence speaks of. For unit vectors, `alpha` 0 is the cosine.

    Args:
        images: [..., D], unit norm.
        goal: [..., D], unit norm, broadcast against `images`: what to reach.
        baseline: [D], unit norm: the scene without the goal, "a robot arm at a table".
        alpha: regularisation strength, in [0, 1].

    Returns:
        [...] in [-1, 1] (up to rounding).

    Reference: Rocamonde et al., ICLR 2024, definition 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    direction = goal - baseline
    length = (direction**2).sum(-1, keepdims=True)
    if (length < 1e-10).any():
        raise ValueError("goal and baseline have the same embedding, and span no line: use another baseline")
    away = images - goal
    along = (away * direction).sum(-1, keepdims=True) / length * direction
    return 1 - ((alpha * along + (1 - alpha) * away) ** 2).sum(-1) / 2


class GoalBaseline:
    """A reward model that scores by `goal_baseline` instead of the cosine; pass it where a model is wanted.

    Args:
        model: a `RewardModel`.
        baseline: a sentence for the scene without the goal.
        alpha: regularisation strength, in [0, 1].

    Raises:
        ValueError: alpha out of range, an ensemble or a reach model, or the model scores against the first frame
            already (`start_weight`).
    """

    start_weight = 0.0

    def __init__(self, model: Any, baseline: str, alpha: float = 0.5) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha}")
        if not getattr(model, "one_space", True):
            raise ValueError(
                "a baseline sentence is in one space with goal and frames, which neither an ensemble nor a reach "
                "model has: take one of the other models"
            )
        if model.start_weight:
            raise ValueError(
                "the model scores against the episode's first frame, which leaves no room for a baseline "
                "sentence: take model.with_start_weight(0) (agents: --start-weight 0)"
            )
        self.model, self.baseline, self.alpha = model, baseline, alpha
        self.camera_spec, self.check_camera_spec = model.camera_spec, model.check_camera_spec
        self.embed, self.embed_start, self.embed_text = model.embed, model.embed_start, model.embed_text
        self._baseline = model.embed_text([baseline])[0]

    def with_small_frames(self) -> "GoalBaseline":
        """The same of `RewardModel.with_small_frames`."""
        return GoalBaseline(self.model.with_small_frames(), self.baseline, self.alpha)

    def score(
        self, frames: np.ndarray, text: str | Sequence[str], *, start: np.ndarray | None = None
    ) -> np.ndarray:
        """As `RewardModel.score`: uint8 [N, V, H, W, 3] and one or N sentences to float32 [N, V]."""
        if not isinstance(text, str) and len(text) != len(frames):
            raise ValueError(f"give one text or one a timestep, got {len(text)} for {len(frames)} timesteps")
        goals = self.model.embed_text([text] if isinstance(text, str) else text)[:, None]
        return goal_baseline(self.model.embed(frames), goals, self._baseline, self.alpha)
