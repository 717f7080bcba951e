"""The benchmark's rows as the paper's Tables 1 and 2, its numbers beside ours, and as a short table.

    python -m eval.tables                       # of what eval.benchmark wrote

Writes table1_consistency and table2_voc as Markdown (to read) and CSV (every figure with its interval, its
number of seeds and the paper's), and listening.md and summary.md. Several seeds of an objective are averaged;
intervals are then over seeds and stand in each place, otherwise over trajectories and at the averages alone.
"""

import csv
import fnmatch
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from vlm_reward._jobs import replacing
from vlm_reward.metrics import bootstrap_interval

METHODS = ("zero_shot", "tcn_text", "r3m", "vip_text", "vip_text+vip", "liv", "triplet")
"""The columns of the paper's tables; its SigLIP2 is the backbone as it is."""
CONTROLS = ("random", "constant", "oracle")
PAPER_TABLES = {"consistency": "table1_consistency.csv", "voc": "table2_voc.csv"}
AVERAGE = ("average", "average")
LISTENING = {  # heading -> (task of the average, metric)
    "VOC, right sentence": ("average", "voc"),
    "VOC, wrong sentences": ("average", "voc_wrong"),
    "right of 10": ("average", "right_of_10"),
    "success AUC": ("average", "success_auc"),
    "training tasks: right of 10": ("average_training", "right_of_10"),
    "opposites: VOC, right sentence": ("average_training", "voc_right"),
    "opposites: VOC, opposite sentence": ("average_training", "voc_opposite"),
    "opposites: VOC, the difference of both": ("average_training", "voc_contrast"),
}


@dataclass(frozen=True)
class TablesConfig:
    """Tables from the benchmark's results."""

    results: tuple[Path, ...] = (Path("out/benchmark.json"),)
    """Results of eval.benchmark; where two hold the same checkpoint, the later counts."""
    out: Path = Path("out/tables")
    """Folder of the tables."""
    select: tuple[str, ...] = ("*",)
    """Only checkpoints that match one of these patterns; controls always do."""


@dataclass(frozen=True)
class Cell:
    """A figure in per cent over `seeds` training seeds."""

    mean: float
    std: float
    low: float
    high: float
    seeds: int

    def plain(self) -> str:
        return f"{self.mean:.1f}"

    def with_std(self) -> str:
        return f"{self.mean:.1f} ± {self.std:.1f}"

    def interval(self) -> str:
        return f" [{self.low:.1f}, {self.high:.1f}]"

    def with_interval(self) -> str:
        return self.plain() + self.interval()


Cells = dict[tuple[str, str, str, str], Cell]
"""(objective, task, view, metric) -> figure."""


def main(cfg: TablesConfig) -> list[Path]:
    """Write the tables; returns their paths."""
    variants = variants_of(load_rows(cfg.results, cfg.select))
    paper = paper_numbers()
    texts = {
        "table1_consistency.md": "# Consistency, %: the paper's Table 1\n\n"
        "Ours, and the paper's in brackets.\n",
        "table2_voc.md": "# Value-order correlation, %, mean ± std over trajectories: the paper's Table 2\n\n"
        "Ours, and the paper's in brackets. A constant score gives 0.\n",
        "listening.md": "# Does it listen?\n\nAverages over tasks and views, %. A reward that listens has a "
        "low VOC under wrong sentences and a negative one under the opposite sentence.\n",
        "summary.md": "# Averages over the held-out tasks\n\n"
        "%, over tasks and views, as the last rows of the paper's tables.\n",
    }
    sheets: dict[str, list[dict[str, Any]]] = {"table1_consistency.csv": [], "table2_voc.csv": []}
    for (backbone, preset), cells in variants.items():
        heading = f"\n## {backbone}" + (f", preset `{preset}`" if preset else "") + "\n\n"
        texts["table1_consistency.md"] += heading + paper_table(cells, "consistency", paper)
        texts["table2_voc.md"] += heading + paper_table(cells, "voc", paper)
        texts["listening.md"] += heading + listening_table(cells)
        texts["summary.md"] += heading + summary_table(cells, paper)
        for metric, name in PAPER_TABLES.items():
            records = paper_records(cells, metric, paper)
            sheets[name] += [{"backbone": backbone, "preset": preset} | record for record in records]
    texts |= {name: _csv(records) for name, records in sheets.items()}
    for name, text in texts.items():
        write(cfg.out / name, text)
    print(f"wrote {', '.join(texts)} in {cfg.out}")
    return [cfg.out / name for name in texts]


def load_rows(results: Sequence[Path], select: Sequence[str] = ("*",)) -> list[dict[str, Any]]:
    """The tidy rows of result files; of training.study's without the cells that try another setting.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a result of the benchmark, or no checkpoint matches `select`.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for path in results:
        if not path.is_file():
            raise FileNotFoundError(
                f"no results at {path}; make them with python -m eval.benchmark --out {path}"
            )
        try:
            result = json.loads(path.read_text())
            tried = {cell["checkpoint"] for cell in result.get("cells", ()) if cell.get("choice")}
            own: dict[str, list[dict[str, Any]]] = {}
            for row in result["rows"]:
                if row["checkpoint"] not in tried:
                    own.setdefault(row["checkpoint"], []).append(row)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no result of eval.benchmark ({error!r})") from error
        found |= own
    kept = [n for n in found if n.startswith("control/") or any(fnmatch.fnmatch(n, p) for p in select)]
    if all(name.startswith("control/") for name in kept):
        raise ValueError(
            f"no checkpoint matches {', '.join(select)}; there are: {', '.join(found) or 'none'}"
        )
    return [row for name in kept for row in found[name]]


def variants_of(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], Cells]:
    """The figures of each (backbone, preset): its objectives, over seeds, the bare backbone and the controls.

    Raises ValueError when two checkpoints claim the same backbone, preset, objective and seed.
    """
    trained = {(r["backbone"], r["preset"]) for r in rows if r["objective"] not in ("zero_shot", *CONTROLS)}
    bare = {(r["backbone"], "") for r in rows if r["objective"] == "zero_shot"}
    bare = {variant for variant in bare if variant[0] not in {backbone for backbone, _ in trained}}
    variants = {}
    for backbone, preset in sorted(trained | bare):
        pools: dict[tuple[str, str, str, str], dict[Any, dict[str, Any]]] = {}
        for row in rows:
            own = row["backbone"] == backbone and row["preset"] in (preset, "")
            if own or row["objective"] in CONTROLS:
                pool = pools.setdefault((row["objective"], row["task"], row["view"], row["metric"]), {})
                other = pool.setdefault(row["seed"], row)
                if other is not row:
                    raise ValueError(
                        f"{other['checkpoint']} and {row['checkpoint']} are both {row['objective']}, seed "
                        f"{row['seed']}, of {backbone}; choose between them with --select"
                    )
        variants[backbone, preset] = {key: _cell(list(pool.values())) for key, pool in pools.items()}
    return variants


def _cell(rows: list[dict[str, Any]]) -> Cell:
    means = np.array([row["mean"] for row in rows])
    low, high = (rows[0]["low"], rows[0]["high"]) if len(rows) == 1 else bootstrap_interval(means, seed=0)
    return Cell(float(means.mean()), float(np.mean([row["std"] for row in rows])), low, high, len(rows))


def paper_numbers() -> dict[tuple[str, str, str, str], tuple[float, float | None]]:
    """The paper's Tables 1 and 2: (objective, task, view, metric) -> mean, and standard deviation for VOC."""
    numbers = {}
    for metric, name in PAPER_TABLES.items():
        with open(Path(__file__).parent / "paper" / name, newline="") as file:
            for record in csv.DictReader(file):
                view = {"multi_view": "multi"}.get(record["view"], record["view"].removeprefix("view_"))
                for method in METHODS:
                    column = "siglip2" if method == "zero_shot" else method
                    spread = record.get(f"{column}_pm")
                    key = (method, record["task"], view, metric)
                    numbers[key] = float(record[column]), None if spread is None else float(spread)
    return numbers


def paper_table(cells: Cells, metric: str, paper: dict) -> str:
    """Rows task x view, columns objectives and controls, as in the paper; Markdown."""
    columns = _columns(cells, METHODS)
    lines = [["task", "view", *(f"{c} ({_seeds(cells, c)})" if _seeds(cells, c) else c for c in columns)]]
    for task, view in _places(cells, metric, paper):
        line = [task, view]
        for column in columns:
            ours, theirs = cells.get((column, task, view, metric)), paper.get((column, task, view, metric))
            text = "-"
            if ours and task == "average":
                text = ours.with_interval()
            elif ours:
                text = ours.with_std() if metric == "voc" else ours.plain()
                text += ours.interval() if ours.seeds > 1 else ""
            if theirs:
                mean, spread = theirs
                text += (
                    f" ({mean:.1f})"
                    if spread is None or task == "average"
                    else f" ({mean:.1f} ± {spread:.1f})"
                )
            line.append(text)
        lines.append(line)
    if metric == "voc":
        turned = [cells.get((column, *AVERAGE, "voc_reversed")) for column in columns]
        lines.append(
            ["average", "time reversed", *(cell.with_interval() if cell else "-" for cell in turned)]
        )
    return markdown(lines)


def paper_records(cells: Cells, metric: str, paper: dict) -> list[dict[str, Any]]:
    """The same as records: for each column its mean, _pm, _low, _high, _seeds, _paper and _paper_pm."""
    records = []
    for task, view in _places(cells, metric, paper):
        record: dict[str, Any] = {"task": task, "view": view}
        for column in _columns(cells, METHODS):
            cell = cells.get((column, task, view, metric))
            figures = (cell.mean, cell.std, cell.low, cell.high, cell.seeds) if cell else ("",) * 5
            names = (column, f"{column}_pm", f"{column}_low", f"{column}_high", f"{column}_seeds")
            record |= dict(zip(names, figures, strict=True))
            if (column, task, view, metric) in paper:
                mean, spread = paper[column, task, view, metric]
                record |= {f"{column}_paper": mean} | (
                    {} if spread is None else {f"{column}_paper_pm": spread}
                )
        records.append(record)
    return records


def listening_table(cells: Cells) -> str:
    """One row an objective: VOC under the right, wrong and opposite sentence, and the best of ten."""
    known = {(task, metric) for _, task, _, metric in cells}
    shown = {heading: place for heading, place in LISTENING.items() if place in known}
    lines = [["method", "seeds", *shown]]
    for method in _columns(cells):
        figures = [cells.get((method, task, "average", metric)) for task, metric in shown.values()]
        line = [method, _seeds(cells, method), *(cell.with_interval() if cell else "-" for cell in figures)]
        lines.append([str(text) for text in line])
    return markdown(lines)


def summary_table(cells: Cells, paper: dict) -> str:
    """One row an objective: both averages beside the paper's, and how often it finds the right sentence."""
    lines = [["method", "seeds", "consistency", "(paper)", "VOC", "(paper)", "right of 10"]]
    for method in _columns(cells):
        line = [method, str(_seeds(cells, method))]
        for metric in ("consistency", "voc", "right_of_10"):
            cell, theirs = cells.get((method, *AVERAGE, metric)), paper.get((method, *AVERAGE, metric))
            line.append(cell.with_interval() if cell else "-")
            if metric in PAPER_TABLES:
                line.append(f"{theirs[0]:.1f}" if theirs else "-")
        lines.append(line)
    return markdown(lines)


def _columns(cells: Cells, always: Sequence[str] = ()) -> list[str]:
    """Objectives in the paper's order, then our own, then controls."""
    known = {objective for objective, *_ in cells}
    own = sorted(known - {*METHODS, *CONTROLS})
    return [c for c in (*METHODS, *own, *CONTROLS) if c in known or c in always]


def _seeds(cells: Cells, objective: str) -> int:
    return max((cell.seeds for (name, *_), cell in cells.items() if name == objective), default=0)


def _places(cells: Cells, metric: str, paper: dict) -> list[tuple[str, str]]:
    """(task, view) of the rows: the paper's first, then further ones of ours; the overall average last."""
    ours = [(task, view) for _, task, view, name in cells if name == metric]
    theirs = [(task, view) for _, task, view, name in paper if name == metric]
    both = dict.fromkeys(place for place in (*theirs, *ours) if place[0] != "average")
    order = list(dict.fromkeys(task for task, _ in both))
    return [*sorted(both, key=lambda place: (order.index(place[0]), place[1])), AVERAGE]


def markdown(lines: list[list[str]], left: Sequence[int] = (0, 1)) -> str:
    """A table of `lines`, the header first; the columns `left` hold words, the others figures."""
    header, *body = lines
    rule = ["---" if column in left else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *body)) + "\n"


def _csv(records: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    columns = dict.fromkeys(column for record in records for column in record)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def write(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as fresh:
        fresh.write_text(text)


if __name__ == "__main__":
    try:
        main(tyro.cli(TablesConfig, prog="python -m eval.tables", description=__doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"eval.tables: {error}") from error
