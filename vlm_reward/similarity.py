"""Embeddings to scores. Pure functions of tensors that broadcast over leading axes."""

from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch

Scores = TypeVar("Scores", np.ndarray, torch.Tensor)
OverViews = Literal["mean", "median"]


def cosine(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    r"""Cosine similarity, $S = x \cdot y / (\|x\| \|y\|)$.

    Args:
        images: [..., D], of any norm; a zero vector scores 0.
        texts: [..., D], broadcast against `images`: [D] for one sentence, [N, 1, D] for one a timestep.

    Returns:
        [...] in [-1, 1] (up to rounding).
    """
    _check(images, texts)
    return torch.nn.functional.cosine_similarity(images, texts, dim=-1)


def negative_l2(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    r"""Negative Euclidean distance, $S = -\|x - y\|_2$, not squared: the similarity of R3M and VIP.

    Args:
        images: [..., D].
        texts: [..., D], broadcast against `images`.

    Returns:
        [...] at most 0, and at least -2 for unit vectors. Its gradient is 0 where the two are equal.
    """
    _check(images, texts)
    return -torch.linalg.vector_norm(images - texts, dim=-1)


def toward(texts: torch.Tensor, starts: torch.Tensor, weight: float) -> torch.Tensor:
    r"""The direction from where an episode began to what a sentence asks: $(y - w x_0) / \|y - w x_0\|$.

    The cosine with it is high for an image that is like the sentence and unlike the episode's first one: what a
    scene looks like anyway cancels, what changed in it counts. `weight` 0 is the sentence alone.

    Args:
        texts: [..., D], unit norm.
        starts: [..., D], unit norm, broadcast against `texts`: embeddings of first frames, each of its view.
        weight: w, at least 0.

    Returns:
        [..., D], unit norm.

    Reference: the first frame in the place of the baseline sentence of Rocamonde et al., "Vision-Language Models
    are Zero-Shot Reward Models for Reinforcement Learning", ICLR 2024; at weight 1 its order of frames at full
    strength.
    """
    _check(starts, texts)
    return torch.nn.functional.normalize(texts - weight * starts, dim=-1)


def keep(scores: torch.Tensor, reached: torch.Tensor) -> torch.Tensor:
    r"""Scores that ask to keep what is so already where an episode begins: $(1 - 2 p) S$.

    Nothing changes where p is 0. Where it is 1 a frame scores the lower, the further it has come from the first
    one, as what was asked can only be lost there. At one half nobody knows, and all frames score alike.

    Args:
        scores: [...], S.
        reached: [...] in [0, 1], broadcast against `scores`: p, how surely what the sentence asks is so in the
            episode's first frame.

    Returns:
        [...].
    """
    return (1 - 2 * reached) * scores


REACHED_SCALE, REACHED_AT = 10.0, 0.3


def reached(cosines: torch.Tensor) -> torch.Tensor:
    r"""How surely what a sentence asks is so in a frame, $\sigma(10 (x \cdot y - 0.3))$.

    It means something for a model that was trained to say it (`training.judge`), and for no other.

    Args:
        cosines: [...], of frames and sentences, or their mean over views.

    Returns:
        [...] in (0, 1).
    """
    return torch.sigmoid(REACHED_SCALE * (cosines - REACHED_AT))


def multi_view(scores: Scores, over_views: OverViews = "mean") -> Scores:
    """Mean or median over views.

    One camera that is fooled lifts a median of three no higher than what another one says; of two it is the mean.

    Args:
        scores: [N, V], array or tensor.
        over_views: which.

    Returns:
        [N].

    Raises:
        ValueError: not two axes, or no view; another name.
    """
    if over_views not in get_args(OverViews):
        raise ValueError(f"over_views must be one of {get_args(OverViews)}, got {over_views!r}")
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(f"scores must be [N, V] with at least one view, got shape {tuple(scores.shape)}")
    if over_views == "mean":
        folded: Any = scores.mean(1)
    else:
        folded = np.median(scores, 1) if isinstance(scores, np.ndarray) else scores.quantile(0.5, 1)
    return folded


def _check(images: torch.Tensor, texts: torch.Tensor) -> None:
    if images.ndim == 0 or texts.ndim == 0 or images.shape[-1] != texts.shape[-1]:
        raise ValueError(
            "images and texts need the same last axis D, "
            f"got shapes {tuple(images.shape)} and {tuple(texts.shape)}"
        )
