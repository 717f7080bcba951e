"""Ranking objective: of two frames of a trajectory the later one fits the instruction better."""

from torch import Tensor

from training.objectives.contrastive import similarity_rows


def triplet(
    text: Tensor,
    early: Tensor,
    late: Tensor,
    *,
    margin: float | Tensor = 0.3,
    similarity: str = "cosine",
    reduction: str = "sum",
) -> Tensor:
    """Triplet loss: the later frame beats the earlier one by a margin.

    L = sum_b max(0, margin - S(l_b, late_b) + S(l_b, early_b))

    Args:
      text: embeddings of the instructions (anchors), float [B, D].
      early: embeddings of the earlier frames (negatives), float [B, D].
      late: embeddings of the later frames (positives), float [B, D].
      margin: at least 0; a tensor [B] gives each sample its own, e.g. one that grows with the time gap.
      similarity: `cosine` or `negative_l2`.
      reduction: `sum` (the paper) or `mean`. Adam's steps hardly differ.

    Returns:
      Loss, scalar, at least 0.

    Reference:
      arXiv 2512.20675. Schroff et al., FaceNet, 2015 (arXiv 1503.03832).
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be sum or mean, got {reduction!r}")
    gap = similarity_rows(text, late, similarity) - similarity_rows(text, early, similarity)
    loss = (margin - gap).relu()
    return loss.sum() if reduction == "sum" else loss.mean()
