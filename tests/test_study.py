"""The study has the cells it should, and runs them: skipped, resumed, failed, stopped, and really."""

import contextlib
import importlib
import json
import shlex
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tyro

from tests.synthetic import SPEC, write_dataset
from training import ship, study
from training.config import TrainConfig
from training.objectives import OBJECTIVES
from training.study import CHOICES, StudyConfig, arguments, main, plan
from training.train import hyper_parameters, train
from vlm_reward.tasks import HELD_OUT


@pytest.fixture
def config(tiny_backbone_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    """Two objectives, two steps each."""
    monkeypatch.setattr(study, "POLL", 0)
    return StudyConfig(
        objectives=("triplet", "r3m"),
        presets=("paper",),
        triplet_seeds=(),
        backbone=str(tiny_backbone_dir),
        steps=2,
        device="cpu",
        runs=tmp_path / "runs",
        out=tmp_path / "results" / "study.json",
        report=tmp_path / "RESULTS.md",
    )


class FakeProcess:
    """Ends at once, or when told to."""

    def __init__(self, status: int | None) -> None:
        self.status = status
        self.told: list[str] = []

    def poll(self) -> int | None:
        return self.status

    wait = poll

    def terminate(self) -> None:
        self.told.append("terminate")
        self.status = 130

    def kill(self) -> None:
        self.told.append("kill")
        self.status = -9


class FakeStart:
    """Writes what training and benchmark would; `says` maps a part of a command to its exit status."""

    def __init__(self, says: dict[str, int | None] | None = None) -> None:
        self.says = says or {}
        self.started: list[list[str]] = []
        self.processes: list[FakeProcess] = []

    def __call__(self, command: list[str], log: Path, cores: int | None) -> FakeProcess:
        self.started.append(command[2:])
        log.parent.mkdir(parents=True, exist_ok=True)
        line = shlex.join(command)
        status = next((status for part, status in self.says.items() if part in line), 0)
        log.write_text("" if status == 0 else " 50%|#####     \rerror: it went wrong\n")
        if status == 0 and "training.train" in line:
            config = tyro.cli(TrainConfig, args=command[3:])
            result = {"steps": 2, "total_steps": 2, "seconds": 1.0, "best": {"step": 2, "val_voc": 0.5}}
            result |= {"history": [], "samples_per_second": 1.0, "images_per_second": 1.0}
            protocol = json.loads(json.dumps(config.protocol()))
            whole = {"result": result, "hyper": {}, "hardware": {}, "protocol": protocol}
            (config.folder / "train_log.json").write_text(json.dumps(whole))
            (config.folder / "adapter_model.safetensors").touch()
        elif status == 0 and "eval.benchmark" in line:
            out, checkpoint = Path(command[command.index("--out") + 1]), command[4]
            places = {"task": "average", "view": "average", "metric": "voc", "mean": 1.0}
            rows = [{"checkpoint": name} | places for name in (checkpoint, "control/random")]
            entries = [{"checkpoint": checkpoint}, {"checkpoint": "control"}]
            out.write_text(json.dumps({"provenance": entries, "rows": rows}))
        self.processes.append(FakeProcess(status))
        return self.processes[-1]

    @property
    def stages(self) -> list[str]:
        """What was done, and to which objective."""
        return [
            next(
                (f"{stage} {name}" for name in ("triplet", "r3m") if f"/{name}/" in shlex.join(words)), stage
            )
            for words in self.started
            for stage in [words[0].split(".")[1]]
        ]


def test_the_default_plan_is_the_papers_comparison(config: StudyConfig) -> None:
    cells = plan(replace(StudyConfig(), backbone=config.backbone))
    names = [cell.name for cell in cells]
    assert names[0] == "zero_shot"
    both = {f"{objective}/{preset}-seed0" for objective in OBJECTIVES for preset in ("paper", "official")}
    assert set(names[1:]) == both | {"triplet/paper-seed1", "triplet/paper-seed2"}
    assert len(names) == 1 + 12 + 2
    settings = {(c.config.sampler, c.config.max_steps, c.config.learning_rate) for c in cells if c.config}
    assert settings == {("grouped", 1000, None)}


def test_choices_change_one_setting_of_the_paper_preset(config: StudyConfig) -> None:
    cells = plan(StudyConfig(plan="choices", backbone=config.backbone, learning_rate=3e-4))
    plain = {cell.config.objective: cell.config for cell in cells if cell.config and not cell.choice}
    assert len(cells) == 1 + len(plain) + len(CHOICES)
    named = "similarity temperature gamma value|scale negatives masking InfoNCE LoRA|targets LoRA|rank margin"
    assert {word.replace("|", " ") for word in named.split()} <= {choice.name for choice in CHOICES}
    for cell in cells:
        if cell.config and cell.choice:
            assert (cell.config.preset, cell.config.objective) == ("paper", cell.choice.objective)
            objective, default = OBJECTIVES[cell.config.objective], plain[cell.config.objective]
            before, after = hyper_parameters(default, objective), hyper_parameters(cell.config, objective)
            changed = {key for key in after if after[key] != before[key]} | {
                key for key, value in cell.config.protocol().items() if default.protocol()[key] != value
            }
            assert changed - {"hyper"} == set(cell.choice.changes)


def test_a_choice_that_the_others_have_made_is_no_cell(config: StudyConfig) -> None:
    given = plan(StudyConfig(plan="choices", backbone=config.backbone, learning_rate=3e-4))
    papers = plan(StudyConfig(plan="choices", backbone=config.backbone))
    missing = {cell.name for cell in given} - {cell.name for cell in papers}
    assert missing == {
        "triplet/paper-seed0-learning_rate=0.0001",
        "liv/paper-seed0-learning_rate=1e-05",
    }


def test_commands_are_read_as_the_settings_that_they_were_made_of(config: StudyConfig) -> None:
    for name in ("objectives", "choices"):
        for cell in plan(replace(StudyConfig(plan=name), backbone=config.backbone, device="cpu")):
            if cell.config:
                assert tyro.cli(TrainConfig, args=arguments(cell.config)) == cell.config
                assert cell.train[:3] == [sys.executable, "-m", "training.train"]
                assert cell.evaluate[-2:] == ["--device", "cpu"]
    assert "--no-tensorboard" in arguments(TrainConfig(tensorboard=False))


def test_a_backbone_trained_again_has_cells_of_its_own(
    config: StudyConfig, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"other weights")
    other = plan(replace(config, backbone=str(tmp_path / "tiny")))
    assert [cell.name for cell in other] == [cell.name for cell in plan(config)]
    assert not {cell.folder for cell in other} & {cell.folder for cell in plan(config)}
    assert main(replace(config, show=True, only=("r3m/*",)), FakeStart({"": 1})) == 0
    said = capsys.readouterr().out
    assert "python -m training.train --objective r3m --preset paper" in said
    assert "triplet" not in said
    with pytest.raises(
        ValueError, match=r"no cell matches liv/\*; there are: zero_shot, triplet/paper-seed0"
    ):
        plan(replace(config, only=("liv/*",)))


def test_a_failed_cell_is_reported_and_the_others_are_finished(
    config: StudyConfig, capsys: pytest.CaptureFixture
) -> None:
    start = FakeStart({"--objective triplet": 1})
    assert main(config, start) == 1
    assert start.stages == ["benchmark", "train triplet", "train r3m", "benchmark r3m", "report"]
    assert "failed: triplet/paper-seed0: error: it went wrong" in capsys.readouterr().out
    found = json.loads(config.out.read_text())
    assert {e["cell"]: e.get("error") for e in found["cells"]} == {
        "zero_shot": None,
        "triplet/paper-seed0": "error: it went wrong",
        "r3m/paper-seed0": None,
    }
    assert len(found["rows"]) == 3  # backbone, r3m, and the controls once

    again = FakeStart()
    assert main(config, again) == 0
    assert again.stages == ["train triplet", "benchmark triplet", "report"]
    found = json.loads(config.out.read_text())
    assert not [entry for entry in found["cells"] if "error" in entry]
    assert len(found["rows"]) == 4
    trained, scored = map(json.loads, plan(config)[1].commands.read_text().splitlines())
    assert (trained["status"], "eval.benchmark" in scored["command"]) == (0, True)


def test_other_settings_are_not_taken_for_the_same_cell(config: StudyConfig) -> None:
    assert main(config, FakeStart()) == 0
    with pytest.raises(ValueError, match=r"other settings \(max_steps: 2 then, 3 now\).*--overwrite"):
        main(replace(config, steps=3), FakeStart())
    start = FakeStart()
    assert main(replace(config, steps=3, overwrite=True, only=("triplet/*",)), start) == 0
    assert start.stages == ["train triplet", "benchmark triplet", "report"]
    cells = json.loads(config.out.read_text())["cells"]
    steps = {entry["cell"]: entry["protocol"]["max_steps"] for entry in cells if entry["train"]}
    assert steps == {"r3m/paper-seed0": 2, "triplet/paper-seed0": 3}


def test_side_by_side_cells_share_the_cores_and_failing_tables_are_an_error(config: StudyConfig) -> None:
    cores: list[int | None] = []

    def start(command: list[str], log: Path, share: int | None) -> FakeProcess:
        cores.append(share)
        return fake(command, log, share)

    fake = FakeStart({"eval.report": 1})
    assert main(replace(config, workers=2), start) == 1
    assert fake.stages[:2] == ["benchmark", "train triplet"]
    assert cores[-1] is None
    assert all(cores[:-1])


def test_ctrl_c_tells_the_running_cells_and_starts_no_more(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = FakeStart({"--objective triplet": None})

    def press(seconds: float) -> None:
        if "train triplet" in start.stages and not start.processes[-1].told:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(study.time, "sleep", press)
    assert main(config, start) == 130
    assert start.stages[-1] == "train triplet"
    assert start.processes[-1].told == ["terminate"]
    assert [entry["cell"] for entry in json.loads(config.out.read_text())["cells"]] == ["zero_shot"]


def test_a_cell_that_another_process_runs_is_left_to_it(config: StudyConfig) -> None:
    def start(command: list[str], log: Path, cores: int | None) -> FakeProcess:
        if "triplet" in command:
            raise BlockingIOError
        return fake(command, log, cores)

    fake = FakeStart()
    assert main(config, start) == 1
    assert fake.stages == ["benchmark", "train r3m", "benchmark r3m", "report"]


def test_a_second_ctrl_c_kills(config: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(seconds: float) -> None:
        raise KeyboardInterrupt

    start = FakeStart({"": None})
    monkeypatch.setattr(study.time, "sleep", press)
    with pytest.raises(KeyboardInterrupt):
        main(config, start)
    assert [process.told for process in start.processes] == [["kill"]]


def test_a_foreign_file_is_not_overwritten(config: StudyConfig) -> None:
    config.out.parent.mkdir()
    config.out.write_text("[1]")
    start = FakeStart()
    with pytest.raises(ValueError, match="no result of this study"):
        main(config, start)
    assert not start.started
    with pytest.raises(ValueError, match="did you mean triplet"):
        replace(config, objectives=("triplets",))


def test_a_process_is_out_of_reach_of_ctrl_c_and_prints_to_the_log(tmp_path: Path) -> None:
    code = "import os, time; print(os.environ['OMP_NUM_THREADS'], os.getpgid(0) == os.getpid(), flush=True);"
    process = study.start([sys.executable, "-c", code + "time.sleep(60)"], tmp_path / "a" / "log", 3)
    for _ in range(500):
        if (tmp_path / "a" / "log").read_text():
            break
        time.sleep(0.02)
    with pytest.raises(BlockingIOError):
        study.start([sys.executable, "-c", code], tmp_path / "a" / "log", 3)
    process.terminate()
    assert process.wait() == -signal.SIGTERM
    assert (tmp_path / "a" / "log").read_text() == "3 True\n"


def in_process(command: list[str], log: Path, cores: int | None) -> FakeProcess:
    """Run a command here: a process of its own takes seconds to import torch."""
    module = importlib.import_module(command[2])
    configs = {"eval.benchmark": "BenchmarkConfig", "eval.report": "ReportConfig"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, open(log, "a") as out, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", command[2:])
        if command[2] in configs:
            module.main(tyro.cli(getattr(module, configs[command[2]])))
        else:
            module.main()
    return FakeProcess(0)


def test_a_real_study_from_demonstrations_to_tables(
    config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("VLM_REWARD_CACHE", str(tmp_path / "cache"))
    config = replace(config, cameras=SPEC)
    data: dict[str, Any] = {"lengths": (6, 5)}
    write_dataset(tmp_path / "minari", dataset_id="vlm-reward/demos-paper-v0", **data)
    write_dataset(tmp_path / "minari", dataset_id="vlm-reward/eval-opposites-v0", **data)
    data |= {"tasks": HELD_OUT, "texts": ("press the button", "open the green drawer", "open the green door")}
    write_dataset(tmp_path / "minari", dataset_id="vlm-reward/eval-expert-v0", **data)
    write_dataset(tmp_path / "minari", dataset_id="vlm-reward/eval-rollouts-v0", kinds=("random",), **data)

    # One cell is half-trained: its training goes on in a process of its own.
    _, triplet, r3m = plan(config)
    assert r3m.config
    half = train(r3m.config, on_step=lambda step: signal.raise_signal(signal.SIGINT))
    assert (half.steps, half.total_steps) == (1, 2)
    started: list[list[str]] = []

    def start(command: list[str], log: Path, cores: int | None) -> Any:
        started.append(command[2:])
        return (study.start if "--resume" in command else in_process)(command, log, cores)

    monkeypatch.setattr(study, "POLL", 0.1)
    assert main(config, start) == 0, r3m.log.read_text()
    modules = [words[0] for words in started]
    assert modules == ["eval.benchmark", *("training.train", "eval.benchmark") * 2, "eval.report"]
    assert [words[-1] for words in started if words[0] == "training.train"] == ["--overwrite", "--resume"]
    found = json.loads(config.out.read_text())
    entries = {entry["cell"]: entry for entry in found["cells"]}
    assert [entries[cell.name]["steps"] for cell in (triplet, r3m)] == [2, 2]
    assert entries[r3m.name]["history"][0]["step"] == 0
    assert entries[r3m.name]["train_wall_seconds"] > 1
    assert entries[r3m.name]["hardware"]["device"] == "cpu"
    rows = {(r["checkpoint"], r["objective"], r["preset"], r["seed"]) for r in found["rows"]}
    assert rows >= {
        (config.backbone, "zero_shot", "", None),
        (str(triplet.folder), "triplet", "paper", 0),
        (str(r3m.folder), "r3m", "paper", 0),
        ("control/oracle", "oracle", "", 0),
    }
    (voc,) = [
        row["mean"]
        for row in found["rows"]
        if (row["checkpoint"], row["task"], row["view"], row["metric"])
        == (str(r3m.folder), "average", "average", "voc")
    ]
    report = config.report.read_text()
    assert "| r3m | 1 | " in report
    assert f"| {voc:.1f} [" in report
    assert "Cannot be told yet: there are no figures of tcn_text, vip_text, vip_text+vip, liv." in report

    started.clear()
    assert main(config, start) == 0
    assert [words[0] for words in started] == ["eval.report"]

    # The best adapter of an objective gets a name and a card.
    found["cells"].append(entries[r3m.name] | {"cell": "worse", "checkpoint": "nowhere"})
    found["cells"][-1]["best"] = {"val_voc": -2.0}
    config.out.write_text(json.dumps(found))
    shipped = tmp_path / "checkpoints" / Path(config.backbone).name / "r3m"
    shipping = ship.ShipConfig(config.out, ("r3m",), tmp_path / "checkpoints")
    assert ship.main(shipping) == ship.main(shipping) == [shipped]
    card = (shipped / "README.md").read_text()
    assert f"| Meta-World, mean of the tasks | VOC, mean over the views | {voc:.1f} [" in card
    assert f"preset `paper`, seed 0; {config.sampler} sampler; peak learning rate 0.0001;" in card
    assert "no sentence of a held-out task" in card
    assert "| validation VOC of the backbone alone, % | " in card
    assert json.loads((shipped / "train_log.json").read_text())["result"]["steps"] == 2
    with pytest.raises(ValueError, match="no finished cell of liv"):
        ship.main(replace(shipping, objectives=("liv",)))


def test_with_ray_each_cell_is_one_job_that_fails_alone(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeStart({"--objective r3m": 1})
    monkeypatch.setattr(study, "start", fake)
    asked: dict[str, Any] = {}

    def run_jobs(function: Any, cells: Any, **settings: Any) -> None:
        asked.update(settings, cells=[cell.name for cell in cells])
        for cell in cells:
            function(cell)

    monkeypatch.setattr(study, "run_jobs", run_jobs)
    assert main(replace(config, ray="local", workers=2), fake) == 1
    assert asked["cells"] == ["zero_shot", "triplet/paper-seed0", "r3m/paper-seed0"]
    assert (asked["ray"], asked["workers"], asked["gpu"]) == ("local", 2, False)
    stages = ["benchmark", "train triplet", "benchmark triplet", "train r3m", "report"]
    assert fake.stages == stages
    found = {entry["cell"]: entry for entry in json.loads(config.out.read_text())["cells"]}
    assert found["r3m/paper-seed0"]["error"] == "error: it went wrong"
    assert "error" not in found["triplet/paper-seed0"]
