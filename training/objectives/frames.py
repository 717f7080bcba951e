"""Which frames of a trajectory make up a sample: how they are drawn in time, or picked among frames at hand.

Three kinds: `PAIR` (early < late), `TRIPLE` (early < middle < late) and `TRANSITION` (first frame, t, t + 1,
last frame). Each has three functions:

- `timesteps`: draws whole samples, each with its own frames (the paper's sampler);
- `group`: draws the frames of one trajectory that are encoded once (the grouped sampler);
- `samples`: forms every valid sample among such frames.

`preset` says whose rule holds. `paper`: the timesteps of a sample differ; pairs and triples are uniform over
all. `official`: R3M draws the middle one first, the others around it, and lets middle equal late; VIP and LIV
let t be the first frame. VIP's own code also cuts a random window out of its (long) videos; LIV's, followed
here, takes whole demonstrations.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PRESETS = ("paper", "official")


@dataclass(frozen=True)
class FrameDraw:
    """One kind of sample.

    Attributes:
      names: the frames of a sample, in order of time.
      timesteps: (length, n, generator, preset) -> int64 [n, len(names)].
      group: (length, count, generator, preset) -> timesteps that a group must hold; `draw_group` fills up.
      samples: (timesteps [G, F], fresh [G, F], lengths [G], preset) -> (row [M], columns [M, len(names)]).
    """

    names: tuple[str, ...]
    timesteps: Callable[[int, int, np.random.Generator, str], np.ndarray]
    group: Callable[[int, int, np.random.Generator, str], np.ndarray]
    samples: Callable[[Tensor, Tensor, Tensor, str], tuple[Tensor, Tensor]]


def draw_timesteps(
    draw: FrameDraw, length: int, n: int, generator: np.random.Generator, *, preset: str = "paper"
) -> np.ndarray:
    """Draw the timesteps of `n` samples from a trajectory of `length` frames.

    Two frames hold no three different timesteps and no transition that starts after the first frame: there,
    as in the official rule, middle equals late and t is the first frame.

    Args:
      draw: the kind of sample.
      length: frames in the trajectory, at least 2.
      n: samples.
      generator: draws them.
      preset: `paper` or `official`.

    Returns:
      int64 [n, K] in [0, length), columns as `draw.names`.

    Raises:
      ValueError: the trajectory is too short, `n` is negative or the preset unknown.
    """
    _check(length, preset)
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    return draw.timesteps(length, n, generator, preset)


def draw_group(
    draw: FrameDraw, length: int, count: int, generator: np.random.Generator, *, preset: str = "paper"
) -> np.ndarray:
    """Draw `count` timesteps of one trajectory, among which samples can be formed.

    They are all different, and uniform beside what the kind needs (for transitions the first frame, the last,
    and pairs of consecutive ones). A trajectory shorter than `count` repeats its last frame.

    Args:
      draw: the kind of sample.
      length: frames in the trajectory, at least 2.
      count: frames to draw, at least as many as a sample has.
      generator: draws them.
      preset: `paper` or `official`.

    Returns:
      int64 [count] in [0, length), ascending.

    Raises:
      ValueError: the trajectory or `count` is too small or the preset unknown.
    """
    _check(length, preset)
    if count < len(draw.names):
        raise ValueError(
            f"a group must have at least {len(draw.names)} frames ({', '.join(draw.names)}), got {count}"
        )
    chosen = draw.group(length, count, generator, preset)
    rest = np.setdiff1d(np.arange(length), chosen)
    more = min(count - len(chosen), len(rest))
    chosen = np.sort(np.concatenate([chosen, generator.choice(rest, more, replace=False)]))
    return np.pad(chosen, (0, count - len(chosen)), mode="edge").astype(np.int64)


def group_samples(
    draw: FrameDraw,
    timesteps: Tensor,
    lengths: Tensor,
    *,
    preset: str = "paper",
    max_samples: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Form the samples among the frames of several trajectories that were encoded once.

    Args:
      draw: the kind of sample.
      timesteps: int64 [G, F], each row ascending, as `draw_group` gives; repeats are left out.
      lengths: int64 [G], frames in each trajectory.
      preset: `paper` or `official`.
      max_samples: keep at most this many, at random (without a generator: evenly spaced).
      generator: draws which.

    Returns:
      {name: int64 [M] for each of `draw.names`, indices into the G * F frames in row-major order;
      "trajectory": int64 [M], the row of each sample}.

    Raises:
      ValueError: wrong shapes, rows that do not ascend, or no sample can be formed.
    """
    if timesteps.ndim != 2 or lengths.shape != timesteps.shape[:1]:
        got = f"{tuple(timesteps.shape)} and {tuple(lengths.shape)}"
        raise ValueError(f"timesteps must be [G, F] and lengths [G], got {got}")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples must be at least 1, got {max_samples}")
    _check(int(lengths.min()) if len(lengths) else 0, preset)
    steps = timesteps.diff(dim=1, prepend=torch.full_like(timesteps[:, :1], -1))
    if (steps < 0).any() or (timesteps[:, -1] >= lengths).any():
        raise ValueError("each row of timesteps must ascend within [0, length)")
    trajectory, columns = draw.samples(timesteps, steps > 0, lengths, preset)
    total = len(trajectory)
    if total == 0:
        raise ValueError(
            f"no sample of {', '.join(draw.names)} can be formed among timesteps {timesteps.tolist()}"
        )
    if max_samples is not None and total > max_samples:
        if generator is None:
            keep = torch.linspace(0, total - 1, max_samples, device=timesteps.device).round().long()
        else:
            keep = (
                torch.randperm(total, generator=generator, device=generator.device)[:max_samples]
                .sort()
                .values
            )
            keep = keep.to(timesteps.device)
        trajectory, columns = trajectory[keep], columns[keep]
    flat = trajectory[:, None] * timesteps.shape[1] + columns
    return dict(zip(draw.names, flat.unbind(1), strict=True)) | {"trajectory": trajectory}


def _check(length: int, preset: str) -> None:
    if length < 2:
        raise ValueError(f"a trajectory must have at least 2 frames to be ranked in time, got {length}")
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")


def _ascending(length: int, n: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """`n` ascending draws of `count` different timesteps, uniform over all such sets: int64 [n, count]."""
    drawn = np.empty((n, 0), dtype=np.int64)
    for k in range(count):
        new = generator.integers(0, length - k, size=n)
        for earlier in drawn.T:  # ascending: step over what is taken already
            new += new >= earlier
        drawn = np.sort(np.column_stack([drawn, new]), axis=1)
    return drawn


def _pair_timesteps(length: int, n: int, generator: np.random.Generator, preset: str) -> np.ndarray:
    if preset == "paper":
        return _ascending(length, n, 2, generator)
    late = generator.integers(1, length, size=n)
    return np.column_stack([generator.integers(0, late), late])


def _triple_timesteps(length: int, n: int, generator: np.random.Generator, preset: str) -> np.ndarray:
    if length == 2:
        return np.tile(np.array([0, 1, 1], dtype=np.int64), (n, 1))
    if preset == "paper":
        return _ascending(length, n, 3, generator)
    middle = generator.integers(1, length - 1, size=n)
    return np.column_stack([generator.integers(0, middle), middle, generator.integers(middle, length)])


def _first_transition(length: int, preset: str) -> int:
    return 1 if preset == "paper" and length > 2 else 0


def _transition_timesteps(length: int, n: int, generator: np.random.Generator, preset: str) -> np.ndarray:
    current = generator.integers(_first_transition(length, preset), length - 1, size=n)
    return np.column_stack([np.zeros_like(current), current, current + 1, np.full_like(current, length - 1)])


def _no_frames(length: int, count: int, generator: np.random.Generator, preset: str) -> np.ndarray:
    return np.empty(0, dtype=np.int64)


def _transition_group(length: int, count: int, generator: np.random.Generator, preset: str) -> np.ndarray:
    starts = np.arange(_first_transition(length, preset), length - 1)
    starts = generator.choice(starts, min((count - 2) // 2, len(starts)), replace=False)
    return np.unique(np.concatenate([[0, length - 1], starts, starts + 1]))


def _combined(indices: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Candidate columns [P, K] and who has them, bool [G, P] -> trajectory [M] and columns [M, K]."""
    trajectory, candidate = valid.nonzero(as_tuple=True)
    return trajectory, indices[candidate]


def _pair_samples(timesteps: Tensor, fresh: Tensor, lengths: Tensor, preset: str) -> tuple[Tensor, Tensor]:
    pairs = torch.combinations(torch.arange(timesteps.shape[1], device=timesteps.device), 2)
    return _combined(pairs, fresh[:, pairs].all(-1))


def _triple_samples(timesteps: Tensor, fresh: Tensor, lengths: Tensor, preset: str) -> tuple[Tensor, Tensor]:
    frames = torch.arange(timesteps.shape[1], device=timesteps.device)
    triples = torch.combinations(frames, 3)
    pairs = torch.combinations(frames, 2)
    valid = fresh[:, triples].all(-1)
    may_equal = (fresh.sum(1, keepdim=True) == 2) | torch.tensor(preset == "official", device=fresh.device)
    candidates = torch.cat([triples, torch.stack([pairs[:, 0], pairs[:, 1], pairs[:, 1]], 1)])
    return _combined(candidates, torch.cat([valid, fresh[:, pairs].all(-1) & may_equal], 1))


def _transition_samples(
    timesteps: Tensor, fresh: Tensor, lengths: Tensor, preset: str
) -> tuple[Tensor, Tensor]:
    if (timesteps[:, 0] != 0).any() or (timesteps[:, -1] != lengths - 1).any():
        raise ValueError("each row of timesteps must hold the first and the last timestep of its trajectory")
    first = torch.tensor(
        [_first_transition(length, preset) for length in lengths.tolist()], device=timesteps.device
    )
    start = timesteps[:, :-1]
    valid = fresh[:, :-1] & (timesteps[:, 1:] == start + 1) & (start >= first[:, None])
    trajectory, current = valid.nonzero(as_tuple=True)
    zero, last = torch.zeros_like(current), torch.full_like(current, timesteps.shape[1] - 1)
    return trajectory, torch.stack([zero, current, current + 1, last], 1)


PAIR = FrameDraw(("early", "late"), _pair_timesteps, _no_frames, _pair_samples)
TRIPLE = FrameDraw(("early", "middle", "late"), _triple_timesteps, _no_frames, _triple_samples)
TRANSITION = FrameDraw(
    ("initial", "current", "next", "goal"), _transition_timesteps, _transition_group, _transition_samples
)
