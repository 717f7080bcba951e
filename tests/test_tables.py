import csv
import json

import pytest

from eval import tables
from eval.tables import TablesConfig

TASKS = ("button-press-v3", "drawer-open-v3", "door-open-v3")


def rows_of(checkpoint, objective, *, seed=0, preset="paper", backbone="tiny", voc=50.0, consistency=60.0):
    """Rows in the benchmark's schema with the same mean in each cell."""
    identity = {"checkpoint": checkpoint, "backbone": backbone, "objective": objective}
    identity |= {"preset": preset, "seed": seed}
    places = [(task, view) for task in TASKS for view in ("1", "2", "3", "multi")]
    means = {"consistency": consistency, "voc": voc, "voc_reversed": -voc, "right_of_10": 10.0}
    return [
        identity
        | {"task": task, "view": view, "metric": metric, "mean": mean, "std": 4.0}
        | {"low": mean - 2, "high": mean + 2, "n": 50}
        for task, view in [*places, ("average", "average")]
        for metric, mean in means.items()
    ]


@pytest.fixture
def write(tmp_path):
    def call(rows, name="result.json"):
        (tmp_path / name).write_text(json.dumps({"provenance": [], "rows": rows}))
        return TablesConfig(results=(tmp_path / name,), out=tmp_path / "tables")

    return call


@pytest.fixture
def study(write):
    rows = rows_of("bare", "zero_shot", preset="", seed=None, voc=-10)
    rows += rows_of("triplet-0", "triplet", seed=0, voc=60) + rows_of("triplet-1", "triplet", seed=1, voc=70)
    rows += rows_of("ours", "progress", voc=90.0)
    rows += rows_of("control/oracle", "oracle", preset="", backbone="none", consistency=100)
    return write(rows)


def test_the_papers_numbers():
    paper = tables.paper_numbers()
    assert paper["triplet", "button-press-v3", "1", "consistency"] == (75.36, None)
    assert paper["zero_shot", "door-open-v3", "multi", "voc"] == (11.82, 17.89)
    assert len(paper) == 2 * 7 * 13
    for method, metric, average in (("triplet", "voc", 62.64), ("zero_shot", "consistency", 46.85)):
        cells = [paper[method, task, view, metric][0] for task in TASKS for view in ("1", "2", "3", "multi")]
        assert sum(cells) / 12 == pytest.approx(average, abs=0.006)
        assert paper[method, "average", "average", metric][0] == average


def read_table(path):
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    header, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return header, {tuple(line[:2]): dict(zip(header[2:], line[2:], strict=True)) for line in body}


def test_markdown_has_the_papers_layout_and_its_numbers_beside_ours(study, tmp_path):
    tables.main(study)
    header, table = read_table(tmp_path / "tables" / "table2_voc.md")
    assert header[:3] == ["task", "view", "zero_shot (1)"]
    assert header[3:8] == ["tcn_text", "r3m", "vip_text", "vip_text+vip", "liv"]
    assert header[8:] == ["triplet (2)", "progress (1)", "oracle (1)"]
    assert [key for key in table if key[0] == TASKS[0]] == [(TASKS[0], v) for v in ("1", "2", "3", "multi")]
    assert len(table) == 14
    assert table[TASKS[0], "1"]["triplet (2)"] == "65.0 ± 4.0 [60.0, 70.0] (95.5 ± 2.1)"
    assert table[TASKS[0], "1"]["liv"] == "- (16.7 ± 17.9)"
    assert table[TASKS[0], "1"]["progress (1)"] == "90.0 ± 4.0"
    assert table["average", "average"]["zero_shot (1)"] == "-10.0 [-12.0, -8.0] (-18.5)"
    assert table["average", "time reversed"]["triplet (2)"].startswith("-65.0 ")
    _, table = read_table(tmp_path / "tables" / "table1_consistency.md")
    assert table[TASKS[1], "multi"]["triplet (2)"] == "60.0 [60.0, 60.0] (67.0)"
    assert table[TASKS[1], "multi"]["oracle (1)"] == "100.0"


def test_csv_has_intervals_seeds_and_the_paper(study, tmp_path):
    tables.main(study)
    with open(tmp_path / "tables" / "table2_voc.csv", newline="") as file:
        records = list(csv.DictReader(file))
    assert len(records) == 13
    first, last = records[0], records[-1]
    assert list(first.values())[:4] == ["tiny", "paper", TASKS[0], "1"]
    assert (first["triplet"], first["triplet_seeds"]) == ("65.0", "2")
    assert (first["triplet_low"], first["triplet_high"]) == ("60.0", "70.0")  # over the two seeds
    assert (first["progress_low"], first["progress_high"]) == ("88.0", "92.0")  # over trajectories
    assert (first["triplet_paper"], first["triplet_paper_pm"]) == ("95.47", "2.11")
    assert first["liv"] == ""
    assert (last["task"], last["zero_shot_paper"]) == ("average", "-18.46")


def test_summary_and_listening(study, tmp_path):
    tables.main(study)
    _, table = read_table(tmp_path / "tables" / "summary.md")
    assert list(table) == [("zero_shot", "1"), ("triplet", "2"), ("progress", "1"), ("oracle", "1")]
    line = (tmp_path / "tables" / "summary.md").read_text().splitlines()[-4:]
    assert line[1].startswith("| triplet | 2 | 60.0 [60.0, 60.0] | 68.9 | 65.0 [60.0, 70.0] | 62.6 | 10.0 ")
    _, table = read_table(tmp_path / "tables" / "listening.md")
    assert table["progress", "1"]["VOC, right sentence"] == "90.0 [88.0, 92.0]"
    assert "VOC, wrong sentences" not in table["progress", "1"]  # which nobody measured
    assert table["progress", "1"]["right of 10"] == "10.0 [8.0, 12.0]"


def test_each_backbone_and_preset_has_a_table_with_the_bare_backbone(write):
    rows = rows_of("bare", "zero_shot", preset="", seed=None) + rows_of(
        "other", "zero_shot", preset="", backbone="b"
    )
    rows += rows_of("p", "triplet") + rows_of("o", "triplet", preset="official", voc=1)
    variants = tables.variants_of(rows)
    assert list(variants) == [("b", ""), ("tiny", "official"), ("tiny", "paper")]
    key = ("triplet", TASKS[0], "1", "voc")
    assert (variants["tiny", "official"][key].mean, variants["tiny", "paper"][key].mean) == (1, 50)
    assert all(("zero_shot", *key[1:]) in cells for cells in variants.values())


def test_the_studys_other_settings_are_left_to_its_report(tmp_path):
    rows = rows_of("a", "triplet") + rows_of("b", "triplet")
    cells = [{"checkpoint": "a", "choice": None}, {"checkpoint": "b", "choice": {"name": "margin"}}]
    (tmp_path / "study.json").write_text(json.dumps({"cells": cells, "rows": rows}))
    assert {row["checkpoint"] for row in tables.load_rows((tmp_path / "study.json",))} == {"a"}


def test_select_and_later_files_win(write, tmp_path):
    one = write(rows_of("a", "triplet") + rows_of("b", "triplet"), "one.json")
    with pytest.raises(ValueError, match="a and b are both triplet, seed 0, of tiny; choose between them"):
        tables.main(one)
    write(rows_of("a", "triplet", voc=1), "two.json")
    rows = tables.load_rows((tmp_path / "one.json", tmp_path / "two.json"), ("a*",))
    assert {row["checkpoint"] for row in rows} == {"a"}
    assert {row["mean"] for row in rows if row["metric"] == "voc"} == {1}
    with pytest.raises(ValueError, match=r"no checkpoint matches c\*; there are: a, b"):
        tables.load_rows(one.results, ("c*",))


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"make them with python -m eval\.benchmark"):
        tables.load_rows((tmp_path / "none.json",))
    (tmp_path / "foreign.json").write_text('{"rows": 3}')
    with pytest.raises(ValueError, match=r"is no result of eval\.benchmark"):
        tables.load_rows((tmp_path / "foreign.json",))
