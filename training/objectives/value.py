"""Value objective: similarity to the goal as the value function of a task that costs 1 per step (VIP)."""

import math

import torch
from torch import Tensor

from training.objectives.contrastive import negative_mask, similarity_matrix, similarity_rows


def vip(
    initial: Tensor,
    current: Tensor,
    next: Tensor,
    goal: Tensor,
    *,
    text_id: Tensor | None = None,
    similarity: str = "cosine",
    gamma: float = 0.98,
    value_scale: float | None = 1.0,
    weight_log_term: bool = True,
    num_negatives: int | None = 3,
    mask_same_text: bool = False,
    include_self: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Value-implicit pretraining: the dual of goal-conditioned RL with reward -1 per step.

    L = (1 - gamma) * mean_b -V(initial_b; g_b)
        + w * log mean_b exp(V(current_b; g_b) + 1 - gamma V(next_b; g_b))
    V(o; g) = value_scale * S(o, g),  w = 1 - gamma where `weight_log_term`, else 1

    With negatives, w * log mean exp(V(current_n; g_b) + 1 - gamma V(next_n; g_b)) over the transitions n of
    other samples is added. logsumexp keeps it from overflowing, and makes the original's epsilon needless.

    Args:
      initial: embeddings of the first frames, float [B, D].
      current: embeddings of the frames o_t, float [B, D].
      next: embeddings of the frames o_{t+1}, float [B, D].
      goal: embeddings of the goals, float [B, D]: last frames (VIP), or instructions (VIP-text).
      text_id: int64 [B], equal where the instructions are; needed by `mask_same_text`.
      similarity: `cosine` or `negative_l2`.
      gamma: discount, in (0, 1).
      value_scale: factor from similarity to value; None for LIV's 1 / (1 - gamma), the range that values
        have when every step costs 1.
      weight_log_term: in the paper's equation the whole loss carries (1 - gamma), in the code of VIP and LIV
        only its first term.
      num_negatives: transitions of other samples for each goal; 0 for none, None for the whole batch.
      mask_same_text: take no negatives with the same instruction.
      include_self: a sample may be drawn as its own negative, as the original's shuffles do.
      generator: draws the negatives; see `negative_mask`.

    Returns:
      Loss, scalar.

    Reference:
      Ma et al., VIP: Towards Universal Visual Reward and Representation via Value-Implicit Pre-Training, 2022
      (arXiv 2210.00030); LIV (arXiv 2306.00958) for text goals and the scale. arXiv 2512.20675.
    """
    if not 0 < gamma < 1:
        raise ValueError(f"gamma must be in (0, 1), got {gamma}")
    scale = 1 / (1 - gamma) if value_scale is None else value_scale
    weight = 1 - gamma if weight_log_term else 1.0

    start = scale * similarity_rows(initial, goal, similarity)
    step = 1 + scale * (
        similarity_rows(current, goal, similarity) - gamma * similarity_rows(next, goal, similarity)
    )
    loss = (1 - gamma) * -start.mean() + weight * _log_mean_exp(step)
    if num_negatives == 0:
        return loss

    mask = negative_mask(
        len(goal),
        num_negatives,
        text_id=text_id,
        mask_same_text=mask_same_text,
        include_self=include_self,
        generator=generator,
        device=goal.device,
    )
    if not mask.any():
        return loss
    others = 1 + scale * (
        similarity_matrix(goal, current, similarity) - gamma * similarity_matrix(goal, next, similarity)
    )
    return loss + weight * _log_mean_exp(others[mask])


def _log_mean_exp(x: Tensor) -> Tensor:
    return x.logsumexp(0) - math.log(len(x))
