"""Learning curves: success, true return and learned return over environment steps, a column for each task.

    python -m agents.figures runs/agents/drawer-close-v3/*/*

Lines are means over the seeds of a reward, bands go from the lowest to the highest seed. Success and returns are
those of the training episodes. Learned returns of different rewards have different units, so each is shown
from its lowest to its highest value: its shape is what to compare with the two rows above.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from matplotlib.figure import Figure

from agents.callbacks import read_lines
from agents.config import AgentConfig
from vlm_reward._jobs import replacing

ROWS = {"success": "success", "env_return": "true return", "learned_return": "learned return (scaled)"}


@dataclass(frozen=True)
class FiguresConfig:
    """Draw the learning curves of runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs of agents.train."""
    out: Path = Path("out/curves.png")
    """The picture to write."""
    points: int = 25
    """Points of a curve; the episodes between two of them are averaged."""


def curve(folder: Path, name: str, edges: np.ndarray) -> np.ndarray:
    """Means of `name` over a run's episodes that end between two `edges` [P + 1]: float64 [P], NaN for none."""
    episodes = [e for e in read_lines(folder / "episodes.jsonl") if e[name] is not None]
    place = np.digitize([episode["step"] for episode in episodes], edges[1:], right=True)
    values = np.array([float(episode[name]) for episode in episodes])
    means = [values[place == i].mean() if (place == i).any() else np.nan for i in range(len(edges) - 1)]
    return np.array(means)


def draw(config: FiguresConfig) -> None:
    """Write the picture.

    Raises:
        ValueError: no folder is given.
        FileNotFoundError: one of the folders holds no run.
    """
    if not config.runs:
        raise ValueError("give folders of runs, such as runs/agents/drawer-close-v3/*/*")
    groups: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    steps: dict[str, int] = defaultdict(int)
    for folder in config.runs:
        run = AgentConfig.of_run(folder)
        groups[run.task][f"{run.reward_label} ({run.algo})"].append(folder)
        steps[run.task] = max(steps[run.task], run.timesteps)
    labels = {label: i for i, label in enumerate(sorted({x for task in groups.values() for x in task}))}
    figure = Figure(figsize=(1 + 3.6 * len(groups), 7), dpi=120, layout="constrained")
    axes = figure.subplots(len(ROWS), len(groups), squeeze=False, sharex="col")
    for column, (task, rewards) in enumerate(sorted(groups.items())):
        edges = np.linspace(0, steps[task], config.points + 1)
        for row, (name, title) in enumerate(ROWS.items()):
            ax = axes[row, column]
            for label, folders in sorted(rewards.items()):
                curves = np.stack([curve(folder, name, edges) for folder in folders])  # [seeds, P]
                known = ~np.isnan(curves).any(0)
                if not known.any():
                    continue
                curves, x = curves[:, known], edges[1:][known]
                if name == "learned_return":
                    curves = (curves - curves.min()) / max(np.ptp(curves), 1e-9)
                color = f"C{labels[label]}"
                ax.plot(x, curves.mean(0), color, label=f"{label}, {len(folders)} seed(s)", linewidth=1.5)
                ax.fill_between(x, curves.min(0), curves.max(0), color=color, alpha=0.15, linewidth=0)
            ax.set_title(task if row == 0 else "")
            ax.set_ylabel(title if column == 0 else "")
            ax.spines[["top", "right"]].set_visible(False)
        axes[0, column].set_ylim(-0.02, 1.02)
        # a long name is cut at the edge, and takes no room from the axes
        axes[1, column].legend(frameon=False, fontsize=7).set_in_layout(False)
        axes[-1, column].set_xlabel("environment steps")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(config.out) as fresh:
        figure.savefig(fresh, format=config.out.suffix[1:] or "png")


if __name__ == "__main__":
    try:
        options = tyro.cli(FiguresConfig, prog="python -m agents.figures", description=__doc__)
        draw(options)
        print(f"picture: {options.out}")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
