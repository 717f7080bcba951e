"""Reward curves as pictures, and as text for a terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from vlm_reward._jobs import replacing

STYLES = (  # Okabe and Ito's colours, told apart by colour-blind readers; the dashes help in print
    {"color": "#0072B2", "linestyle": "-"},
    {"color": "#D55E00", "linestyle": "--"},
    {"color": "#8C8C8C", "linestyle": "-"},
    {"color": "#009E73", "linestyle": ":"},
    {"color": "#CC79A7", "linestyle": (0, (5, 1, 1, 1))},
)


def frames_over_curves(
    frames: np.ndarray | Mapping[str, np.ndarray],
    times: np.ndarray | Sequence[int] | Mapping[str, Sequence[int]],
    curves: Mapping[str, np.ndarray],
    path: str | Path,
    *,
    title: str = "",
    ylabel: str = "reward",
    xlabel: str = "step",
    every: int = 1,
) -> None:
    """A strip of frames over the reward curves of several trajectories, as a PNG.

    Args:
        frames: uint8 [K, H, W, 3] of the first trajectory of `curves`, or one such strip for each of several:
            label -> uint8 [K, H, W, 3].
        times: the steps [K] at which the frames were taken, or label -> steps; marked on the curve.
        curves: label -> reward [T]; drawn as they are.
        path: the PNG to write.
        title: e.g. the sentence.
        ylabel: what the curves are.
        xlabel: what their steps are, e.g. "frame".
        every: how many of these lie between one value of a curve and the next.

    Raises:
        ValueError: frames of another shape or type, times that do not fit, a label without a curve.
    """
    first = next(iter(curves), "")
    strips = dict(frames) if isinstance(frames, Mapping) else {first: frames}
    steps = (
        {label: list(t) for label, t in times.items()}
        if isinstance(times, Mapping)
        else {label: list(times) for label in strips}
    )
    for label, strip in strips.items():
        if strip.dtype != np.uint8 or strip.ndim != 4 or strip.shape[3] != 3 or not len(strip):
            raise ValueError(
                f"frames of {label!r} must be uint8 [K, H, W, 3], got {strip.dtype} {strip.shape}"
            )
        if label not in curves:
            raise ValueError(
                f"frames of {label!r} have no curve; there are curves of {', '.join(curves) or 'none'}"
            )
        given, last = steps.get(label, []), len(curves[label]) - 1
        if len(given) != len(strip) or not all(0 <= t <= last for t in given):
            raise ValueError(f"{label!r} needs {len(strip)} times from 0 to {last}, got {given}")
    n_columns = max(map(len, strips.values()))
    aspect = max(strip.shape[1] / strip.shape[2] for strip in strips.values())
    height = 9 / n_columns * aspect + 0.25
    figure = Figure(
        figsize=(9, height * len(strips) + 2.8), layout=ConstrainedLayoutEngine(w_pad=0.02, wspace=0)
    )
    grid = figure.add_gridspec(len(strips) + 1, n_columns, height_ratios=[height] * len(strips) + [2.6])
    ax = figure.add_subplot(grid[-1, :])
    draw(ax, curves, every)
    colors = {label: STYLES[i % len(STYLES)]["color"] for i, label in enumerate(curves)}
    for row, (label, strip) in enumerate(strips.items()):
        for column, (frame, step) in enumerate(zip(strip, steps[label], strict=True)):
            image = figure.add_subplot(grid[row, column], xticks=[], yticks=[])
            image.imshow(frame)
            image.set_title(f"{xlabel} {step * every}", fontsize=8, pad=2)
            image.spines[:].set(color=colors[label], linewidth=1.5)
            if column == 0:
                image.set_ylabel(label, color=colors[label])
        at = np.array(steps[label])
        ax.plot(at * every, curves[label][at], "o", color=colors[label], markersize=4)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend(frameon=False)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    save(figure, Path(path))


def blocks(curve: np.ndarray, low: float, high: float) -> str:
    """A curve [T] as at most 60 block characters: eight levels from `low` to `high`."""
    values = curve[np.linspace(0, len(curve) - 1, min(60, len(curve))).round().astype(int)]
    levels = ((values - low) / max(high - low, 1e-9) * 7).clip(0, 7)
    return "".join("▁▂▃▄▅▆▇█"[level] for level in levels.round().astype(int))


def draw(ax: Any, curves: Mapping[str, np.ndarray], every: int = 1) -> None:
    """Plot curves [T] in the styles of `STYLES`; value t stands at t * every."""
    for i, (label, curve) in enumerate(curves.items()):
        ax.plot(np.arange(len(curve)) * every, curve, label=label, linewidth=1.6, **STYLES[i % len(STYLES)])
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#E5E5E5", linewidth=0.6)
    ax.set_axisbelow(True)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as fresh:
        figure.savefig(fresh, format="png", dpi=150)
