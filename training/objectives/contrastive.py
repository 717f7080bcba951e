"""Contrastive objectives (InfoNCE, TCN, R3M's language term) and the similarities that all objectives share.

Embeddings arrive as the encoder made them, which for this project's encoder means unit norm. `cosine`
normalises once more, which changes nothing then; `negative_l2` acts on whatever it is given. R3M and VIP used
it on embeddings that were *not* normalised: on unit vectors it is -sqrt(2 - 2 cos), which lies in [-2, 0].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SIMILARITIES = ("cosine", "negative_l2")


def similarity_rows(a: Tensor, b: Tensor, similarity: str = "cosine") -> Tensor:
    """Similarity of each row of `a` with the same row of `b`.

    Args:
      a: embeddings, float [B, D].
      b: embeddings, float [B, D].
      similarity: `cosine` (in [-1, 1]) or `negative_l2`, -||a - b|| (at most 0; its gradient at a = b is 0).

    Returns:
      Similarities, float [B], at least float32.
    """
    a, b = _prepare(a, b, similarity)
    return (a * b).sum(-1) if similarity == "cosine" else -torch.linalg.vector_norm(a - b, dim=-1)


def similarity_matrix(a: Tensor, b: Tensor, similarity: str = "cosine") -> Tensor:
    """Similarity of each row of `a` with each row of `b`.

    Args:
      a: embeddings, float [M, D].
      b: embeddings, float [N, D].
      similarity: `cosine` or `negative_l2`, as in `similarity_rows`.

    Returns:
      Similarities, float [M, N], at least float32.
    """
    a, b = _prepare(a, b, similarity)
    if similarity == "cosine":
        return a @ b.T
    return -torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def negative_mask(
    batch: int,
    num_negatives: int | None,
    *,
    text_id: Tensor | None = None,
    mask_same_text: bool = False,
    include_self: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which samples of the batch serve each sample as negatives, drawn without replacement.

    Args:
      batch: B.
      num_negatives: how many each sample gets; fewer where the batch has fewer; None for all.
      text_id: int64 [B], equal where the instructions are; needed by `mask_same_text`.
      mask_same_text: never take a sample with the same instruction (it is a false negative).
      include_self: a sample may be its own negative, as in R3M and VIP, which shuffle the batch.
      generator: draws the negatives. Without it they are the samples that follow in the batch.
      device: of the result.

    Returns:
      bool [B, B]; row b marks the negatives of sample b. A row may be empty.
    """
    if num_negatives is not None and num_negatives < 0:
        raise ValueError(f"num_negatives must be at least 0 or None for all, got {num_negatives}")
    allowed = torch.ones(batch, batch, dtype=torch.bool, device=device)
    if not include_self:
        allowed.fill_diagonal_(False)
    if mask_same_text:
        if text_id is None or text_id.shape != (batch,):
            shape = None if text_id is None else tuple(text_id.shape)
            raise ValueError(f"mask_same_text needs text_id of shape ({batch},), got {shape}")
        same = text_id[:, None] == text_id[None, :]
        if include_self:
            same.fill_diagonal_(False)
        allowed &= ~same.to(allowed.device)
    if num_negatives is None or num_negatives >= batch:
        return allowed
    if generator is None:
        row = torch.arange(batch, device=allowed.device)
        order = (row[:, None] - row[None, :]).remainder(batch)  # the next sample ranks highest, oneself last
        order = order.float() + 1
    else:
        order = torch.rand(batch, batch, generator=generator, device=generator.device).to(allowed.device) + 1
    chosen = order.masked_fill(~allowed, 0).topk(int(num_negatives), dim=1).indices
    return torch.zeros_like(allowed).scatter_(1, chosen, True) & allowed


def info_nce(
    goal: Tensor,
    text: Tensor,
    *,
    text_id: Tensor | None = None,
    similarity: str = "cosine",
    temperature: float = 1.0,
    num_candidates: int | None = 3,
    include_positive: bool = False,
    symmetric: bool = False,
    mask_same_text: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """InfoNCE between instructions and goal images.

    L = mean_b [ -S(l_b, g_b) / tau + log sum_{n in N(b)} exp(S(l_b, g_n) / tau) ]

    N(b) are other samples of the batch, and b itself where `include_positive`. The paper's eq. 6 leaves it
    out, so that a positive that wins already is pushed on. A sample without negatives is then left out of the
    mean (the loss is 0 where none has any).

    Args:
      goal: embeddings of the last frames, float [B, D].
      text: embeddings of the instructions, float [B, D].
      text_id: int64 [B], equal where the instructions are; needed by `mask_same_text`.
      similarity: `cosine` or `negative_l2`.
      temperature: tau, positive.
      num_candidates: other samples in each denominator; None for the whole batch.
      include_positive: put the positive into the denominator, which makes it a cross-entropy.
      symmetric: average with the loss that has the images as anchors and the instructions as candidates.
      mask_same_text: leave samples with the same instruction out of the denominator.
      generator: draws the candidates; see `negative_mask`.

    Returns:
      Loss, scalar.

    Reference:
      Ma et al., LIV: Language-Image Representations and Rewards for Robotic Control, 2023 (arXiv 2306.00958):
      symmetric, whole batch, positive included. arXiv 2512.20675, eq. 6: the defaults.
    """
    logits = similarity_matrix(text, goal, similarity) / _positive("temperature", temperature)

    def one_way(logits: Tensor) -> Tensor:
        mask = negative_mask(
            len(logits),
            num_candidates,
            text_id=text_id,
            mask_same_text=mask_same_text,
            generator=generator,
            device=logits.device,
        )
        return _nce(logits.diagonal(), logits, mask, include_positive=include_positive)

    return (one_way(logits) + one_way(logits.T)) / 2 if symmetric else one_way(logits)


def tcn_text(
    text: Tensor,
    early: Tensor,
    late: Tensor,
    *,
    text_id: Tensor | None = None,
    similarity: str = "cosine",
    temperature: float = 1.0,
    num_negatives: int | None = 3,
    mask_same_text: bool = False,
    include_self: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Time-contrastive loss with the instruction as the anchor: the later frame fits it better.

    L = -mean_b log [ e(l_b, late_b) / (e(l_b, late_b) + e(l_b, early_b) + sum_{n in N(b)} e(l_b, late_n)) ],
    e(x, y) = exp(S(x, y) / tau)

    Args:
      text: embeddings of the instructions, float [B, D].
      early: embeddings of the earlier frames, float [B, D].
      late: embeddings of the later frames, float [B, D].
      text_id: int64 [B], equal where the instructions are; needed by `mask_same_text`.
      similarity: `cosine` or `negative_l2`.
      temperature: tau, positive.
      num_negatives: later frames of other samples in each denominator; None for the whole batch.
      mask_same_text: take no negatives with the same instruction.
      include_self: a sample may be drawn as its own negative, as R3M's shuffles do.
      generator: draws the negatives; see `negative_mask`.

    Returns:
      Loss, scalar, at least 0.

    Reference:
      Nair et al., R3M: A Universal Visual Representation for Robot Manipulation, 2022 (arXiv 2203.12601),
      language term, with S in place of its learned score. arXiv 2512.20675.
    """
    tau = _positive("temperature", temperature)
    positive = similarity_rows(text, late, similarity) / tau
    hard = similarity_rows(text, early, similarity) / tau
    others = similarity_matrix(text, late, similarity) / tau
    mask = negative_mask(
        len(text),
        num_negatives,
        text_id=text_id,
        mask_same_text=mask_same_text,
        include_self=include_self,
        generator=generator,
        device=text.device,
    )
    return _nce(positive, others, mask, hard=hard)


def tcn(
    early: Tensor,
    middle: Tensor,
    late: Tensor,
    *,
    text_id: Tensor | None = None,
    similarity: str = "cosine",
    temperature: float = 1.0,
    num_negatives: int | None = 3,
    symmetric: bool = False,
    mask_same_text: bool = False,
    include_self: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Time-contrastive loss within a trajectory: frames that are closer in time are more alike.

    L = -mean_b log [ e(early_b, middle_b) /
                      (e(early_b, middle_b) + e(early_b, late_b) + sum_{n in N(b)} e(early_b, early_n)) ],
    e(x, y) = exp(S(x, y) / tau)

    Args:
      early: embeddings of the first of three frames, float [B, D].
      middle: embeddings of the second, float [B, D].
      late: embeddings of the third, float [B, D].
      text_id: int64 [B], equal where the instructions are; needed by `mask_same_text`.
      similarity: `cosine` or `negative_l2`.
      temperature: tau, positive.
      num_negatives: frames of other samples in each denominator; None for the whole batch.
      symmetric: average with the same loss seen from the late frame (its negatives are other late frames).
      mask_same_text: take no negatives with the same instruction.
      include_self: a sample may be drawn as its own negative, as R3M's shuffles do.
      generator: draws the negatives; see `negative_mask`.

    Returns:
      Loss, scalar, at least 0.

    Reference:
      R3M (arXiv 2203.12601), time-contrastive term: one anchor; its code: `symmetric` and negative_l2.
      arXiv 2512.20675.
    """
    tau = _positive("temperature", temperature)

    def seen_from(anchor: Tensor, far: Tensor) -> Tensor:
        positive = similarity_rows(anchor, middle, similarity) / tau
        hard = similarity_rows(anchor, far, similarity) / tau
        others = similarity_matrix(anchor, anchor, similarity) / tau
        mask = negative_mask(
            len(anchor),
            num_negatives,
            text_id=text_id,
            mask_same_text=mask_same_text,
            include_self=include_self,
            generator=generator,
            device=anchor.device,
        )
        return _nce(positive, others, mask, hard=hard)

    return (seen_from(early, late) + seen_from(late, early)) / 2 if symmetric else seen_from(early, late)


def r3m_language(
    text: Tensor,
    early: Tensor,
    middle: Tensor,
    late: Tensor,
    *,
    all_pairs: bool = False,
    text_id: Tensor | None = None,
    similarity: str = "cosine",
    temperature: float = 1.0,
    num_negatives: int | None = 3,
    mask_same_text: bool = False,
    include_self: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """R3M's video-language alignment: `tcn_text` on pairs of three frames of a trajectory.

    L = tcn_text(text, early, middle), or with `all_pairs` the mean of
    tcn_text(text, early, middle), tcn_text(text, middle, late) and tcn_text(text, early, late).

    Args:
      text: embeddings of the instructions, float [B, D].
      early: embeddings of the first of three frames, float [B, D].
      middle: embeddings of the second, float [B, D].
      late: embeddings of the third, float [B, D].
      all_pairs: average three pairs. R3M's code does, with the first and last frame of the video as the
        third pair; here it is (early, late), so that a sample needs three frames, not five.
      text_id, similarity, temperature, num_negatives, mask_same_text, include_self, generator: as in
        `tcn_text`.

    Returns:
      Loss, scalar, at least 0.

    Reference:
      R3M (arXiv 2203.12601), language term, with S in place of its learned score.
    """
    pairs = ((early, middle), (middle, late), (early, late)) if all_pairs else ((early, middle),)
    losses = [
        tcn_text(
            text,
            before,
            after,
            text_id=text_id,
            similarity=similarity,
            temperature=temperature,
            num_negatives=num_negatives,
            mask_same_text=mask_same_text,
            include_self=include_self,
            generator=generator,
        )
        for before, after in pairs
    ]
    return torch.stack(losses).mean()


def _nce(
    positive: Tensor,
    others: Tensor,
    mask: Tensor,
    *,
    hard: Tensor | None = None,
    include_positive: bool = True,
) -> Tensor:
    """Mean over rows of -positive + logsumexp(positive, hard, others[mask]), empty rows left out."""
    columns, valid = [others], [mask]
    for extra in (hard, positive if include_positive else None):
        if extra is not None:
            columns.append(extra[:, None])
            valid.append(torch.ones_like(mask[:, :1]))
    keep = torch.cat(valid, 1)
    logits = torch.cat(columns, 1).masked_fill(~keep, -torch.inf)
    usable = keep.any(1)
    # An empty row would be log 0, whose gradient is NaN even where it is not used.
    logits = logits.masked_fill(~usable[:, None], 0)
    return ((logits.logsumexp(1) - positive) * usable).sum() / usable.sum().clamp(min=1)


def _prepare(a: Tensor, b: Tensor, similarity: str) -> tuple[Tensor, Tensor]:
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {', '.join(SIMILARITIES)}, got {similarity!r}")
    if a.dtype in (torch.float16, torch.bfloat16):
        a = a.float()
    if b.dtype in (torch.float16, torch.bfloat16):
        b = b.float()
    return (F.normalize(a, dim=-1), F.normalize(b, dim=-1)) if similarity == "cosine" else (a, b)


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return value
