"""RESULTS.md says what made-up figures say."""

import json
from pathlib import Path

import pytest

from eval import report
from eval.report import OBJECTIVES, ReportConfig

TASKS = ("button-press-v3", "drawer-open-v3", "door-open-v3")
# objective -> consistency, VOC on button-press and drawer-open, VOC on door-open, std of VOC
PAPER_LIKE = {
    "triplet": (69.0, 90.0, 7.0, 9.0),
    "r3m": (66.0, 85.0, 14.0, 9.5),
    "tcn_text": (65.0, 84.0, 10.0, 10.0),
    "vip_text": (58.0, 60.0, -31.0, 14.0),
    "vip_text+vip": (56.0, 55.0, -19.0, 15.0),
    "liv": (52.0, 50.0, 0.0, 13.5),
}


def rows_of(checkpoint, objective, figures, *, seed=0, preset="paper"):
    """The benchmark's rows of a checkpoint that scores the same in every view."""
    consistency, voc, door, std = figures
    identity = {"checkpoint": checkpoint, "backbone": "tiny", "objective": objective}
    identity |= {"preset": preset, "seed": seed}
    per_task = {task: door if task == TASKS[2] else voc for task in TASKS}
    rows = []
    for task, value in (*per_task.items(), ("average", sum(per_task.values()) / 3)):
        for view in ("average",) if task == "average" else ("1", "2", "3", "multi"):
            for metric, mean in {"consistency": consistency, "voc": value, "right_of_10": 10.0}.items():
                spread = {"std": std, "low": mean - 1, "high": mean + 1, "n": 50}
                rows.append(identity | {"task": task, "view": view, "metric": metric, "mean": mean} | spread)
    return rows


def entry_of(checkpoint, objective, *, validation=80.0, seed=0, preset="paper", choice=None, **settings):
    best = {"step": 300, "val_voc": validation / 100, "val_listening": 0.25, "val_loss": 1.0}
    protocol = {"sampler": "grouped", "max_steps": 1000, "validate_every": 100, "select": "voc"}
    protocol |= {
        "learning_rate": 1e-5 if objective == "liv" else 1e-4,
        "objective": objective,
        "lora_rank": 16,
    }
    hardware = {"device": "cpu", "processor": "EPYC", "machine": "x86_64", "threads": 2}
    return {
        "cell": checkpoint,
        "checkpoint": checkpoint,
        "backbone": "tiny",
        "weights": "abc",
        "objective": objective,
        "preset": preset,
        "seed": seed,
        "choice": choice,
        "train": f"python -m training.train --objective {objective} --output {checkpoint}",
        "evaluate": f"python -m eval.benchmark --checkpoint {checkpoint}",
        "steps": 1000,
        "best": best,
        "history": [best | {"step": 0, "val_voc": 0.7}],
        "hyper": {"margin": 0.3} | settings,
        "protocol": protocol | {name: settings[name] for name in settings if name in protocol},
        "hardware": hardware | {"dtype": "bfloat16", "torch": "2.13"},
        "train_wall_seconds": 540.0,
        "evaluate_wall_seconds": 60.0,
        "evaluation": {"date": "2026-11-23T01:00:00+00:00"},
    }


def zero_shot():
    entry = entry_of("tiny", "zero_shot", preset="", seed=None)
    for name in ("best", "history", "hyper", "protocol", "hardware"):
        del entry[name]
    return entry | {"train": None, "steps": 0, "train_wall_seconds": 0, "evaluate_wall_seconds": 60.0}


def study(figures=PAPER_LIKE, more=()):
    """Commands, cells and rows of a study with one cell an objective, and `more` (entry, rows)."""
    cells = [(entry_of(name, name), rows_of(name, name, own)) for name, own in figures.items()]
    bare = (zero_shot(), rows_of("tiny", "zero_shot", (60.0, 40.0, 36.5, 25.0), preset="", seed=None))
    control = rows_of("control/random", "random", (50.0, 0.0, 0.0, 12.0), preset="")
    everything = [bare, *cells, *more]
    entries = [entry for entry, _ in everything]
    return ["python -m training.study"], entries, [row for _, rows in everything for row in rows] + control


def table(text, heading):
    """First column -> the other columns by name, of the first table after a heading."""
    lines = [line for line in text.split(heading, 1)[1].splitlines() if line]
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    found = {}
    header = [cell.strip() for cell in lines[start].strip("|").split("|")]
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found[cells[0]] = dict(zip(header[1:], cells[1:], strict=True))
    return found


def claims(text):
    return [line for line in text.splitlines() if line[:3] in ("1. ", "2. ", "3. ")]


def test_figures_like_the_papers_have_its_ranks_and_its_three_claims():
    text = report.report(*study())
    ranks = table(text, "### Ranks")
    assert list(ranks) == [
        "triplet",
        "r3m",
        "tcn_text",
        "liv",
        "vip_text+vip",
        "vip_text",
        "zero_shot",
        "random",
    ]
    assert ranks["triplet"]["consistency"] == "69.0 [68.0, 70.0]"
    line = next(line for line in text.splitlines() if line.startswith("| liv | 1 | 52.0"))
    assert line.startswith("| liv | 1 | 52.0 [51.0, 53.0] | 6 (6) | 33.3 [32.3, 34.3] | 4 (4) | 10.0 ")
    assert ranks["liv"]["VOC, std over trajectories"] == "13.5"
    first, second, third = claims(text)
    assert "by both averages (the paper: 68.9 and 62.6): **holds**" in first
    assert "consistency 69.0 [68.0, 70.0], rank 1 of 6, before r3m with 66.0" in first
    assert "the intervals are apart" in first
    assert "of high variance" in second
    assert "**holds**" in second
    assert "against at most 10.0 of the others" in second
    assert "at most 20): **holds**" in third
    assert "The backbone before any finetuning has 36.5" in third
    assert "one of theirs says little" in text
    assert "names neither the cameras nor the rollouts" in text


def test_claims_that_fail_are_said_to_fail():
    figures = PAPER_LIKE | {
        "r3m": (70.0, 91.0, 60.0, 30.0),
        "liv": (65.0, 50.0, 0.0, 13.5),
    }
    first, second, third = claims(report.report(*study(figures)))
    assert "62.6): **does not hold**. It has consistency 69.0 [68.0, 70.0], rank 2 of 6, behind r3m" in first
    assert "the intervals overlap" in first
    assert "**holds in part**" in second
    assert "near chance: vip_text, vip_text+vip." in second
    assert "higher: none." in second
    assert "**holds in part**" in third
    figures = {name: (69.0 if name == "triplet" else 65.0, 90.0, 50.0, 9.0) for name in OBJECTIVES}
    verdicts = [claim.count("**does not hold**") for claim in claims(report.report(*study(figures)))]
    assert verdicts == [0, 1, 1]
    assert "**holds in part**" in claims(report.report(*study(figures)))[0]
    assert "rank 1 of 6, level with tcn_text" in claims(report.report(*study(figures)))[0]


def test_missing_objectives_leave_the_claims_open():
    text = report.report(*study({name: PAPER_LIKE[name] for name in ("triplet", "r3m")}))
    assert claims(text) == [
        "1. Cannot be told yet: there are no figures of tcn_text, vip_text, vip_text+vip, liv."
    ]


def test_seeds_are_averaged_counted_and_have_an_interval_of_their_own():
    second = (
        entry_of("triplet-1", "triplet", seed=1, validation=82.0),
        rows_of("triplet-1", "triplet", (71.0, 90.0, 7.0, 9.0), seed=1),
    )
    text = report.report(*study(more=[second]))
    ranks = table(text, "### Ranks")
    assert (ranks["triplet"]["seeds"], ranks["r3m"]["seeds"]) == ("2", "1")
    assert ranks["triplet"]["consistency"] == "70.0 [69.0, 71.0]"
    assert "| triplet (2) |" in text
    assert "| 70.0 [69.0, 71.0] (75.4) |" in text
    assert "`triplet-1` (best seed by validation)" in table(text, "## Cells")
    figures = next(line for line in text.splitlines() if "eval.figures" in line)
    assert set(figures.split("--checkpoint ")[1].split(" --out")[0].split()) == {
        "tiny",
        "triplet-1",
        *(set(OBJECTIVES) - {"triplet"}),
    }


def test_cost_and_commands():
    text = report.report(*study())
    assert (
        "6 trainings (seeds 0), 1.0 hours of processes, 2026-11-23, on: cpu, EPYC (x86_64), 2 threads" in text
    )
    assert "A cell cost 10.0 to 10.0 minutes" in text
    assert "max_steps 1000" in text
    assert "learning rate 0.0001, 1e-05 (liv)" in text
    cells = table(text, "## Cells")
    assert cells["`liv` (best seed by validation)"]["minutes"] == "10.0"
    assert cells["`tiny`"]["kept"] == "-"
    assert "python -m training.train --objective liv --output liv" in text.split("One cell")[1]


def test_choices_are_judged_by_validation_beside_their_default():
    def tried(margin, validation, voc):
        choice = {"name": "margin", "changes": {"margin": margin}, "why": "How much better."}
        entry = entry_of(f"m{margin}", "triplet", validation=validation, choice=choice, margin=margin)
        return entry, rows_of(f"m{margin}", "triplet", (69.0, voc, 7.0, 9.0))

    commands, entries, rows = study(more=[tried(0.1, 79.0, 93.0), tried(1.0, 82.0, 93.0)])
    text = report.report(commands, entries, rows)
    part = text.split("## What each open choice costs")[1].split("## Cells")[0]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in part.splitlines()
        if "| margin" in line
    ]
    assert [line[2:4] for line in lines] == [
        ["margin 0.3 (default)", "80.0"],
        ["margin 0.1", "79.0"],
        ["margin 1.0", "**82.0**"],
    ]
    assert [line[-1] for line in lines] == [
        "How much better.",
        "By validation worse (-1.0), but on the held-out tasks better (+2.0).",
        "By validation better (+2.0), and on the held-out tasks better (+2.0).",
    ]
    assert "Each row is one seed: small differences mean nothing." in part
    assert claims(text) == claims(report.report(*study()))  # what was changed is in no other table


def test_failed_cells_are_listed_with_their_last_words():
    commands, entries, rows = study()
    entries.append({**entry_of("liv-1", "liv", seed=1), "error": "error: training diverged at step 7"})
    cells = table(report.report(commands, entries, rows), "## Cells")
    assert cells["`liv-1`"]["steps"] == "failed: error: training diverged at step 7"


def test_from_file_to_file(tmp_path: Path):
    choice = {"name": "margin", "changes": {"margin": 0.1}, "why": "How much better."}
    tried = entry_of("m", "triplet", choice=choice, margin=0.1)
    commands, entries, rows = study(more=[(tried, rows_of("m", "triplet", (69.0, 93.0, 7.0, 9.0)))])
    cfg = ReportConfig(
        tmp_path / "study.json",
        tmp_path / "RESULTS.md",
        tmp_path / "results" / "curves",
        tmp_path / "notes.md",
    )
    with pytest.raises(FileNotFoundError, match=r"make them with python -m training\.study"):
        report.main(cfg)
    cfg.study.write_text('{"rows": [')
    with pytest.raises(ValueError, match=r"study\.json is no result of training\.study"):
        report.main(cfg)
    cfg.study.write_text(json.dumps({"rows": rows}))
    with pytest.raises(ValueError, match=r"no result of training\.study: it lacks 'commands'"):
        report.main(cfg)
    cfg.study.write_text(json.dumps({"commands": commands, "cells": entries, "rows": rows}))
    assert report.main(cfg).read_text() == report.report(commands, entries, rows)
    cfg.figures.mkdir(parents=True)
    (cfg.figures / "reward_curves_reach-v3.png").touch()
    assert (
        "\n![reward curves reach-v3](results/curves/reward_curves_reach-v3.png)\n"
        in report.main(cfg).read_text()
    )
    cfg.notes.write_text("## Tried\n")
    assert report.main(cfg).read_text().endswith("\n\n## Tried\n")
