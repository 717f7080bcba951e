"""eval/RESULTS.md: what the study came to, in the paper's tables and in words computed from the numbers.

    python -m eval.report --study eval/results/study.json --out eval/RESULTS.md

training.study writes the figures and ends with this command.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from eval.tables import (
    AVERAGE,
    CONTROLS,
    METHODS,
    Cell,
    Cells,
    listening_table,
    markdown,
    paper_numbers,
    paper_table,
    variants_of,
    write,
)

OBJECTIVES = METHODS[1:]
VIP_FAMILY = ("vip_text", "vip_text+vip", "liv")
BUTTON, DRAWER, DOOR = "button-press-v3", "drawer-open-v3", "door-open-v3"
RANKED = {
    "consistency": "consistency",
    "voc": "VOC",
    "right_of_10": "right of 10",
    "success_auc": "success AUC",
}
NEAR_CHANCE = 10.0  # points from 50, the consistency of chance: the paper's three are within 8.2
COLLAPSED = 20.0  # VOC of the mean of the views: the paper's six have 14.3 at most

INTRODUCTION = """# The six objectives, compared

Written by `python -m eval.report` from `eval/results/study.json`; no figure or verdict is typed by hand but in the
sections from "Every model that is shipped" on.

**What this is not:** the paper (arXiv 2512.20675) names neither the cameras nor the rollouts that it evaluates
on. Ours are three cameras of our choice (`vlm_reward/cameras.py`), demonstrations and rollouts that we collected
(`python -m training.collect`), and unless said otherwise a far smaller backbone than its SigLIP2-base. Its numbers
stand beside ours to compare orders and gaps; that one of ours is above or below one of theirs says little.

All figures are per cent. An interval in brackets is a 95 % bootstrap: over seeds where an objective has several
(their number is behind its name), else over trajectories. `±` is the standard deviation over trajectories, as in
the paper.
"""

CURVES = """## Reward curves

As in the paper's Figures 2-4, written by `python -m eval.figures`: an expert, a failed and a random trajectory of
each held-out task; in rows the backbone and the adapter of each objective that `checkpoints/` holds (the best by
validation, of either preset), in columns the three views and their mean. The expert's ends at its success."""

Entry = dict[str, Any]
Figures = Mapping[tuple[str, str, str], float]
"""(checkpoint, task of the average, metric) -> mean over tasks and views."""


@dataclass(frozen=True)
class ReportConfig:
    """RESULTS.md from the study's figures."""

    study: Path = Path("eval/results/study.json")
    """What training.study wrote."""
    out: Path = Path("eval/RESULTS.md")
    """The tables."""
    figures: Path = Path("eval/results/figures/objectives")
    """Folder of eval.figures, whose pictures are shown."""
    notes: Path = Path("eval/results/notes.md")
    """A text of your own for the end."""


def main(cfg: ReportConfig) -> Path:
    """Write the tables; returns their path."""
    if not cfg.study.is_file():
        raise FileNotFoundError(f"no figures at {cfg.study}; make them with python -m training.study")
    try:
        found = json.loads(cfg.study.read_text())
    except ValueError as error:
        raise ValueError(f"{cfg.study} is no result of training.study ({error})") from error
    try:
        text = report(found["commands"], found["cells"], found["rows"], pictures(cfg.figures, cfg.out))
        if cfg.notes.is_file():
            text += "\n" + cfg.notes.read_text()
    except KeyError as error:
        raise ValueError(f"{cfg.study} is no result of training.study: it lacks {error}") from error
    write(cfg.out, text)
    print(f"wrote {cfg.out}")
    return cfg.out


def pictures(folder: Path, beside: Path) -> list[str]:
    """Markdown of the pictures in a folder, as links from the file `beside`."""
    return [
        f"![{file.stem.replace('_', ' ')}]({os.path.relpath(file, beside.parent)})"
        for file in sorted(folder.glob("*.png"))
    ]


def report(
    commands: Sequence[str],
    entries: Sequence[Entry],
    rows: Sequence[dict[str, Any]],
    shown: Sequence[str] = (),
) -> str:
    """All of RESULTS.md.

    Args:
        commands: lines that made the figures.
        entries: the cells of training.study, finished and failed.
        rows: the benchmark's tidy rows of the finished cells and of the controls.
        shown: Markdown of pictures.
    """
    paper = paper_numbers()
    done = [entry for entry in entries if "error" not in entry]
    figures = {
        (row["checkpoint"], row["task"], row["metric"]): row["mean"]
        for row in rows
        if row["view"] == "average"
    }
    changed = {entry["checkpoint"] for entry in done if entry["choice"]}
    variants = variants_of([row for row in rows if row["checkpoint"] not in changed])
    trained = {name: cells for name, cells in variants.items() if set(OBJECTIVES) & {key[0] for key in cells}}

    parts = [INTRODUCTION]
    for (backbone, preset), cells in trained.items():
        own = {key: cell for key, cell in cells.items() if key[0] not in CONTROLS}
        parts += [
            f"## `{backbone}`, preset `{preset}`",
            "### Ranks\n\nAmong the six objectives, by the average over tasks and views; the paper's in brackets.",
            rank_table(cells, paper),
            "### The paper's three claims",
            "\n".join(f"{number}. {claim}" for number, claim in enumerate(claims(cells, paper), 1)),
            "### Table 1: consistency\n\nOurs, and the paper's in brackets.",
            paper_table(own, "consistency", paper),
            "### Table 2: value-order correlation\n\nOurs, and the paper's in brackets. A constant score gives 0.",
            paper_table(own, "voc", paper),
            "### Listening\n\nA reward that listens has a low VOC under wrong sentences, and a negative one under "
            "the opposite sentence.",
            listening_table(cells),
        ]
    if changed:
        parts += ["## What each open choice costs", choices_note(done, figures), choices_table(done, figures)]
    if shown:
        parts += [CURVES, *shown]
    parts += ["## Cells", cost_note(done), cells_table(entries, figures)]
    parts += ["## Commands", commands_text(commands, done)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def rank(values: Mapping[str, float], name: str) -> int:
    """1 for the highest value; equal ones share the better rank."""
    return 1 + sum(other > values[name] for other in values.values())


def _means(cells: Cells, metric: str, paper: Mapping | None = None) -> dict[str, float]:
    """Average of each objective that has the metric; the paper's where given."""
    if paper is not None:
        return {o: paper[o, *AVERAGE, metric][0] for o in OBJECTIVES if (o, *AVERAGE, metric) in paper}
    return {o: cells[o, *AVERAGE, metric].mean for o in OBJECTIVES if (o, *AVERAGE, metric) in cells}


def rank_table(cells: Cells, paper: Mapping) -> str:
    """One row an objective, best VOC first, each metric with its rank; then backbone and controls without."""
    header = ["objective", "seeds"]
    for metric, heading in RANKED.items():
        header += [heading, "rank (paper)" if _means({}, metric, paper) else "rank"]
    ours = {metric: _means(cells, metric) for metric in RANKED}
    theirs = {metric: _means({}, metric, paper) for metric in RANKED}
    rest = [name for name in ("zero_shot", *CONTROLS) if any(key[0] == name for key in cells)]
    lines = [[*header, "VOC, std over trajectories"]]
    for name in [*sorted(ours["voc"], key=lambda name: -ours["voc"][name]), *rest]:
        average = cells[name, *AVERAGE, "voc"]
        texts = [name, str(average.seeds)]
        for metric in RANKED:
            cell = cells.get((name, *AVERAGE, metric))
            place = str(rank(ours[metric], name)) if name in ours[metric] else "-"
            if name in theirs[metric]:
                place += f" ({rank(theirs[metric], name)})"
            texts += [cell.with_interval() if cell else "-", place]
        lines.append([*texts, f"{average.std:.1f}"])
    return markdown(lines)


def claims(cells: Cells, paper: Mapping) -> list[str]:
    """The paper's three claims, each with a verdict and the figures that it rests on."""
    missing = [name for name in OBJECTIVES if (name, *AVERAGE, "voc") not in cells]
    if missing:
        return [f"Cannot be told yet: there are no figures of {', '.join(missing)}."]
    return [_triplet_is_first(cells, paper), _vip_near_chance(cells), _collapse_on_door(cells)]


def _verdict(holds: int, of: int) -> str:
    return "**holds**" if holds == of else "**does not hold**" if holds == 0 else "**holds in part**"


def _triplet_is_first(cells: Cells, paper: Mapping) -> str:
    first, details = 0, []
    for metric in ("consistency", "voc"):
        means, own = _means(cells, metric), cells["triplet", *AVERAGE, metric]
        best = max((name for name in means if name != "triplet"), key=lambda name: means[name])
        other = cells[best, *AVERAGE, metric]
        first += own.mean > other.mean
        against = "before" if own.mean > other.mean else "behind" if own.mean < other.mean else "level with"
        details.append(
            f"{RANKED[metric]} {own.with_interval()}, rank {rank(means, 'triplet')} of {len(means)}, {against} "
            f"{best} with {other.with_interval()} (the intervals "
            f"{'are apart' if own.low > other.high or other.low > own.high else 'overlap'})"
        )
    theirs = " and ".join(f"{paper['triplet', *AVERAGE, metric][0]:.1f}" for metric in ("consistency", "voc"))
    return (
        f"Triplet is first overall, by both averages (the paper: {theirs}): {_verdict(first, 2)}. It has "
        f"{'; '.join(details)}."
    )


def _vip_near_chance(cells: Cells) -> str:
    near = {name: cells[name, *AVERAGE, "consistency"].mean for name in VIP_FAMILY}
    spread = {name: cells[name, *AVERAGE, "voc"].std for name in OBJECTIVES}
    bound = max(value for name, value in spread.items() if name not in VIP_FAMILY)
    is_near = [name for name in VIP_FAMILY if abs(near[name] - 50) <= NEAR_CHANCE]
    is_wide = [name for name in VIP_FAMILY if spread[name] > bound]
    return (
        f"The VIP family is near chance (average consistency within {NEAR_CHANCE:.0f} points of 50) and of high "
        f"variance (standard deviation of VOC above that of each other objective): "
        f"{_verdict(len(is_near) + len(is_wide), 2 * len(VIP_FAMILY))}. Consistency: {_list(near)}; near chance: "
        f"{', '.join(is_near) or 'none'}. Standard deviation: {_list({n: spread[n] for n in VIP_FAMILY})}, "
        f"against at most {bound:.1f} of the others; higher: {', '.join(is_wide) or 'none'}."
    )


def _collapse_on_door(cells: Cells) -> str:
    def of(name: str, task: str) -> Cell:
        return cells[name, task, "multi", "voc"]

    door = {name: of(name, DOOR).mean for name in OBJECTIVES}
    others = {n: (of(n, BUTTON).mean + of(n, DRAWER).mean) / 2 for n in OBJECTIVES}
    fallen = [name for name in OBJECTIVES if door[name] <= COLLAPSED]
    text = (
        f"All collapse on door-open (VOC of the mean of the views at most {COLLAPSED:.0f}): "
        f"{_verdict(len(fallen), len(OBJECTIVES))}. Door-open: {_list(door)}; the mean of the two other tasks: "
        f"{_list(others)}."
    )
    if ("zero_shot", DOOR, "multi", "voc") in cells:
        text += f" The backbone before any finetuning has {of('zero_shot', DOOR).mean:.1f} on door-open."
    return text


def _list(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in values.items())


def _validation(entry: Entry) -> float:
    return 100 * entry["best"]["val_voc"]


def _plain(entries: Sequence[Entry]) -> dict[tuple[str, str, str, int], Entry]:
    """Trained cells with nothing changed, by backbone, objective, preset and seed."""
    return {_identity(entry): entry for entry in entries if entry.get("best") and not entry["choice"]}


def _identity(entry: Entry) -> tuple[str, str, str, int]:
    return entry["backbone"], entry["objective"], entry["preset"], entry["seed"]


def choices_note(entries: Sequence[Entry], figures: Figures) -> str:
    """What the table's differences are to be measured by: how far seeds of triplet lie apart."""
    text = (
        "One setting at a time, beside the same cell with nothing changed. A choice is judged by its validation "
        "VOC alone, on held-back trajectories of training tasks (the best of each group is in bold); the held-out "
        "figures are there to be read, nothing is chosen by them."
    )
    seeds: dict[tuple[str, str, str], list[Entry]] = {}
    for (backbone, objective, preset, _), entry in _plain(entries).items():
        seeds.setdefault((backbone, objective, preset), []).append(entry)
    most = max(seeds.values(), key=len, default=[])
    if len(most) < 2:
        return text + " Each row is one seed: small differences mean nothing."
    validation = [_validation(entry) for entry in most]
    held_out = [figures[entry["checkpoint"], "average", "voc"] for entry in most]
    return text + (
        f" Each row is one seed; {len(most)} seeds of {most[0]['objective']} with nothing changed lie "
        f"{max(validation) - min(validation):.1f} points of validation VOC and "
        f"{max(held_out) - min(held_out):.1f} of held-out VOC apart, so differences of that size mean nothing."
    )


def choices_table(entries: Sequence[Entry], figures: Figures) -> str:
    """A row for each setting tried, in groups that begin with the default."""
    plain = _plain(entries)
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        if entry["choice"]:
            groups.setdefault((entry["choice"]["name"], *_identity(entry)), []).append(entry)
    lines = [
        [
            "choice",
            "of",
            "setting",
            "validation VOC",
            "held-out consistency",
            "VOC",
            "right of 10",
            "in a sentence",
        ]
    ]
    for (name, *identity), tried in groups.items():
        reference = plain.get(tuple(identity))
        both = ([reference] if reference else []) + tried
        best = max(map(_validation, both))
        for entry in both:
            metrics = ("consistency", "voc", "right_of_10")
            held_out = [figures.get((entry["checkpoint"], "average", metric)) for metric in metrics]
            score = f"{_validation(entry):.1f}"
            lines.append(
                [
                    name,
                    entry["objective"],
                    _setting(entry, tried) + (" (default)" if entry is reference else ""),
                    f"**{score}**" if _validation(entry) == best else score,
                    *("-" if value is None else f"{value:.1f}" for value in held_out),
                    tried[0]["choice"]["why"] if entry is reference else _sentence(entry, reference, figures),
                ]
            )
    return markdown(lines, left=(0, 1, 2, 7))


def _setting(entry: Entry, tried: Sequence[Entry]) -> str:
    """What a cell has of all that is changed in its group."""
    names = dict.fromkeys(name for one in tried for name in one["choice"]["changes"])
    known = entry["protocol"] | entry["hyper"]
    texts = {name: known[name] for name in names}
    return ", ".join(
        f"{name} {'+'.join(value) if isinstance(value, list) else value}" for name, value in texts.items()
    )


def _sentence(entry: Entry, reference: Entry | None, figures: Figures) -> str:
    if reference is None:
        return "The default has not been run."
    held_out = [figures[one["checkpoint"], "average", "voc"] for one in (entry, reference)]
    gains = _validation(entry) - _validation(reference), held_out[0] - held_out[1]
    words = [
        f"{'better' if gain > 0 else 'worse'} ({gain:+.1f})" if round(gain, 1) else "the same"
        for gain in gains
    ]
    link = "and" if gains[0] * gains[1] > 0 else "but"
    return f"By validation {words[0]}, {link} on the held-out tasks {words[1]}."


def cost_note(entries: Sequence[Entry]) -> str:
    """Hardware, hours and dates."""
    trained = [entry for entry in entries if entry.get("best")]
    hours = sum(entry["train_wall_seconds"] + entry["evaluate_wall_seconds"] for entry in entries) / 3600
    seeds = {entry["seed"] for entry in trained}
    machines = dict.fromkeys(
        "{device}, {processor} ({machine}), {threads} threads, {dtype}, torch {torch}".format(
            **entry["hardware"]
        )
        for entry in trained
    )
    dates = sorted(entry["evaluation"]["date"][:10] for entry in entries)
    period = (dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}") if dates else "no date"
    minutes = [_minutes(entry) for entry in trained]
    text = (
        f"{len(trained)} trainings (seeds {', '.join(map(str, sorted(seeds)))}), {hours:.1f} hours of processes, "
        f"{period}, on: {'; '.join(machines)}."
    )
    if minutes:
        text += (
            f" A cell cost {min(minutes):.1f} to {max(minutes):.1f} minutes, {sum(minutes) / len(minutes):.1f} on "
            f"average, validations and evaluation included. Settings: {settings_note(trained)}."
        )
    return text


def settings_note(trained: Sequence[Entry]) -> str:
    """Sampler, steps, learning rate and choice of the kept adapter, as the cells with nothing changed had them."""
    keys = ("sampler", "max_steps", "validate_every", "select")
    protocols = [entry["protocol"] for entry in trained if not entry["choice"]] or [trained[0]["protocol"]]
    texts = [f"{key} {', '.join(map(str, dict.fromkeys(p[key] for p in protocols)))}" for key in keys]
    rates = {f"{p['learning_rate']:g} ({p['objective']})": p["learning_rate"] for p in protocols}
    usual = max(set(rates.values()), key=list(rates.values()).count)
    special = [text for text, value in rates.items() if value != usual]
    return ", ".join([*texts, f"learning rate {usual:g}" + "".join(f", {text}" for text in special)])


def _minutes(entry: Entry) -> float:
    return (entry["train_wall_seconds"] + entry["evaluate_wall_seconds"]) / 60


def best_of(entries: Sequence[Entry], preset: str = "paper") -> dict[tuple[str, str], Entry]:
    """The cell with the best validation VOC of each (backbone, objective), nothing changed."""
    best: dict[tuple[str, str], Entry] = {}
    for (backbone, objective, named, _), entry in _plain(entries).items():
        rival = best.get((backbone, objective))
        if named == preset and (rival is None or _validation(entry) > _validation(rival)):
            best[backbone, objective] = entry
    return best


def cells_table(entries: Sequence[Entry], figures: Figures) -> str:
    """One row a cell: how it was validated, what it came to, what it cost; failed ones with their last words."""
    header = [
        "cell",
        "steps",
        "validation VOC before",
        "kept",
        "at step",
        "right sentence",
        "held-out VOC",
        "minutes",
    ]
    chosen = {entry["checkpoint"] for entry in best_of(entries).values()}
    lines = [header]
    for entry in entries:
        if "error" in entry:
            lines.append([f"`{entry['cell']}`", f"failed: {entry['error'].replace('|', '/')}", *["-"] * 6])
            continue
        kept = entry.get("best")
        held_out = f"{figures[entry['checkpoint'], 'average', 'voc']:.1f}"
        name = f"`{entry['cell']}`" + (" (best seed by validation)" if entry["checkpoint"] in chosen else "")
        validated = ["-"] * 4
        if kept:
            before, heard = entry["history"][0]["val_voc"], f"{100 * kept['val_listening']:.1f}"
            validated = [f"{100 * before:.1f}", f"{100 * kept['val_voc']:.1f}", f"{kept['step']:.0f}", heard]
        lines.append([name, str(entry["steps"]), *validated, held_out, f"{_minutes(entry):.1f}"])
    return markdown(lines)


def commands_text(commands: Sequence[str], entries: Sequence[Entry]) -> str:
    """All at once, one cell at a time, and the paper's Figures 2-4 of the cells with the best validation."""
    best = [entry["checkpoint"] for entry in best_of(entries).values()]
    bare = list(dict.fromkeys(entry["backbone"] for entry in entries))
    figures = [
        "python",
        "-m",
        "eval.figures",
        "--checkpoint",
        *bare,
        *best,
        "--out",
        "eval/results/figures/study",
    ]
    single = [entry[stage] for entry in entries for stage in ("train", "evaluate") if entry[stage]]
    return (
        "All cells (finished ones are skipped):\n\n```sh\n" + "\n".join(commands) + "\n```\n\n"
        "The paper's Figures 2-4, the best seed of each objective:\n\n```sh\n"
        + " ".join(figures)
        + "\n```\n\n"
        "One cell:\n\n```sh\n" + "\n".join(single) + "\n```"
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(ReportConfig, prog="python -m eval.report", description=__doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"eval.report: {error}") from error
