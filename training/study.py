"""The paper's comparison, run whole: each objective trained and benchmarked, then the tables.

    python -m training.study                        # six objectives x two presets, and more seeds of triplet
    python -m training.study --plan choices         # what each choice costs that the paper leaves open
    python -m training.study --show                 # the two commands of each cell; nothing runs
    python -m training.study --only "liv/*" --overwrite    # some cells again

A cell is an objective, a preset, a seed and perhaps a setting changed. Its training and its evaluation are
processes of their own (training.train, eval.benchmark), so each can be run by hand. All state is in the cell's
folder: what is finished is skipped, what is half-trained goes on. After each cell its figures are put into
eval/results/study.json; at the end eval.report writes eval/RESULTS.md. Ctrl-C lets the running cells save.
"""

import fcntl
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import tyro
from tqdm import tqdm

from training.config import TrainConfig
from training.objectives import OBJECTIVES, find_objective
from vlm_reward._jobs import BAR_SECONDS, changes, replacing, stop_on_interrupt
from vlm_reward._parallel import run_jobs
from vlm_reward.cameras import CameraSpec
from vlm_reward.encoder import locate, weights_digest

POLL = 0.5  # seconds between looks at the running processes


@dataclass(frozen=True)
class Choice:
    """A setting that the paper leaves open, given another value than the default.

    Args:
        name: what is chosen.
        objective: the one it is tried on.
        why: a sentence for the tables.
        changes: fields of TrainConfig or hyper-parameters of the objective.
    """

    name: str
    objective: str
    why: str
    changes: Mapping[str, Any]

    @property
    def label(self) -> str:
        """What is changed, fit for the name of a folder."""
        words = {k: "+".join(v) if isinstance(v, tuple) else str(v) for k, v in self.changes.items()}
        return "-".join(f"{key}={word}" for key, word in words.items())

    def applied(self, config: TrainConfig) -> TrainConfig:
        """These settings with the change."""
        fields = {k: v for k, v in self.changes.items() if k in TrainConfig.__dataclass_fields__}
        hyper = {key: value for key, value in self.changes.items() if key not in fields}
        return replace(config, **fields, hyper=hyper)


# name, objective, why, then each other value on its own
_OPEN: tuple[tuple[Any, ...], ...] = (
    ("similarity", "triplet", "Distance in place of angle while training.", {"similarity": "negative_l2"}),
    (
        "temperature",
        "tcn_text",
        "At temperature 1 the cross-entropy of cosines, which span 2, is nearly flat.",
        {"temperature": 0.1},
        {"temperature": 0.02},
    ),
    (
        "temperature",
        "r3m",
        "The same, with R3M's time contrast between frames beside it.",
        {"temperature": 0.1},
    ),
    (
        "gamma",
        "vip_text",
        "How far ahead a value looks; the paper names none, VIP's code has 0.98.",
        {"gamma": 0.9},
        {"gamma": 0.99},
    ),
    (
        "value scale",
        "vip_text",
        "A cosine cannot fall by 1 a step; a scale gives values the room (None: LIV's, 1 / (1 - gamma)).",
        {"value_scale": 10.0},
        {"value_scale": None},
    ),
    (
        "negatives",
        "tcn_text",
        "The paper takes 3 samples of the batch (None: all).",
        {"num_negatives": 1},
        {"num_negatives": None},
    ),
    ("masking", "tcn_text", "Unmasked, the same sentence's frames are negatives.", {"mask_same_text": False}),
    (
        "InfoNCE",
        "liv",
        "Equation 6 leaves the positive out of the denominator; LIV's code has it, both ways, over the batch.",
        {"include_positive": True, "symmetric": True, "num_candidates": None},
    ),
    (
        "LoRA targets",
        "triplet",
        "The paper does not say which layers LoRA adapts.",
        {"lora_targets": ("attention",)},
        {"lora_targets": ("mlp",)},
    ),
    (
        "LoRA rank",
        "triplet",
        "More or fewer weights to learn; alpha / r stays 2.",
        {"lora_rank": 4, "lora_alpha": 8},
        {"lora_rank": 64, "lora_alpha": 128},
    ),
    ("margin", "triplet", "How much better a later frame must be.", {"margin": 0.1}, {"margin": 1.0}),
    ("learning rate", "triplet", "The paper's is 1e-4, over more steps.", {"learning_rate": 1e-4}),
    ("learning rate", "liv", "The paper's is 1e-5, over more steps.", {"learning_rate": 1e-5}),
)
CHOICES = tuple(
    Choice(name, objective, why, one) for name, objective, why, *values in _OPEN for one in values
)
"""One setting at a time against the objective's `paper` preset; a value that it has by itself makes no cell."""


@dataclass(frozen=True)
class StudyConfig:
    """Train and benchmark many cells, and write the tables."""

    plan: Literal["objectives", "choices"] = "objectives"
    """objectives: the paper's comparison. choices: each open setting in other values, preset `paper`."""
    objectives: tuple[str, ...] = tuple(OBJECTIVES)
    """Which of them."""
    presets: tuple[Literal["paper", "official"], ...] = ("paper", "official")
    """Whose hyper-parameters, in the plan `objectives`."""
    seeds: tuple[int, ...] = (0,)
    """Of every cell."""
    triplet_seeds: tuple[int, ...] = (1, 2)
    """Further ones of triplet, preset `paper`, in the plan `objectives`."""
    only: tuple[str, ...] = ("*",)
    """Only cells whose name (see --show) matches one of these patterns."""

    backbone: str = "siglip2-tiny"
    """Dual encoder: a name under checkpoints/, a folder or a Hub id."""
    cameras: CameraSpec = field(default_factory=CameraSpec)
    """What the demonstrations were recorded with."""
    sampler: Literal["paper", "grouped"] = "grouped"
    """grouped: what a CPU can afford."""
    steps: int | None = 1000
    """Steps of a cell; None for the paper's five epochs."""
    learning_rate: float | None = None
    """Peak; the paper's when not given: 1e-4, for liv 1e-5."""
    validate_every: int = 100
    """Validate every so many steps."""
    select: Literal["voc", "voc+listening"] = "voc"
    """What the kept adapter of a cell is best in."""
    device: Literal["auto", "cpu"] = "auto"
    """cpu: do not use an accelerator that is there."""

    workers: int = 1
    """Cells side by side; they share the cores."""
    ray: str | None = None
    """Do cells on a Ray cluster: local, or the address of one that shares these folders."""
    runs: Path = Path("runs/study")
    """Folder of the cells."""
    out: Path = Path("eval/results/study.json")
    """The figures of all cells, those of earlier plans included."""
    report: Path = Path("eval/RESULTS.md")
    """The tables."""
    overwrite: bool = False
    """Do the cells from the start although they are finished or begun."""
    show: bool = False
    """Print the commands of each cell and run nothing."""

    def __post_init__(self) -> None:
        for name in self.objectives:
            find_objective(name)
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")


@dataclass(frozen=True)
class Cell:
    """What is trained and scored once. Without settings it is the backbone as it is, which is only scored."""

    name: str
    folder: Path
    backbone: str
    device: str
    config: TrainConfig | None = None
    choice: Choice | None = None

    @property
    def train(self) -> list[str]:
        """The command that trains it from the start; empty for the backbone."""
        if self.config is None:
            return []
        return [sys.executable, "-m", "training.train", *arguments(self.config), "--overwrite"]

    @property
    def evaluate(self) -> list[str]:
        """The command that scores it."""
        what = ["--checkpoint", str(self.folder)] if self.config else ["--zero-shot", self.backbone]
        device = ["--device", "cpu"] if self.device == "cpu" else []
        return [sys.executable, "-m", "eval.benchmark", *what, "--out", str(self.scores), *device]

    @property
    def scores(self) -> Path:
        return self.folder / "benchmark.json"

    @property
    def log(self) -> Path:
        """What its processes print."""
        return self.folder / "study.log"

    @property
    def commands(self) -> Path:
        """Its processes that ended: command, exit status and seconds of each, a line of JSON."""
        return self.folder / "commands.jsonl"

    def next_command(self) -> list[str] | None:
        """What is left to do, by what lies in the folder; None when it is finished."""
        newest = 0.0
        if self.config is not None:
            log, state = self.folder / "train_log.json", self.folder / "state.safetensors"
            result = json.loads(log.read_text())["result"] if log.is_file() else None
            if result is None or result["steps"] < result["total_steps"]:
                return [*self.train[:-1], "--resume"] if state.is_file() else self.train
            newest = (self.folder / "adapter_model.safetensors").stat().st_mtime
        return None if self.scores.is_file() and self.scores.stat().st_mtime >= newest else self.evaluate


def arguments(config: Any, default: Any = None, prefix: str = "--") -> list[str]:
    """The words from which tyro reads a TrainConfig: objective, preset, seed, and all that is no default."""
    default = default or TrainConfig()
    words = []
    for name in default.__dataclass_fields__:
        value, flag = getattr(config, name), prefix + name.replace("_", "-")
        if value == getattr(default, name) and name not in ("objective", "preset", "seed"):
            continue
        if is_dataclass(value):
            words += arguments(value, getattr(default, name), f"{flag}.")
        elif isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-"))
        elif isinstance(value, dict):
            words += [flag, *(str(part) for pair in value.items() for part in pair)]
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return words


def plan(cfg: StudyConfig) -> list[Cell]:
    """The cells, in the order in which they are run: the backbone first.

    Raises:
        FileNotFoundError: no such backbone.
        ValueError: no cell matches `only`.
    """
    # Cells of another backbone, or of the same one before it was trained again, lie elsewhere.
    home = cfg.runs / f"{Path(cfg.backbone).name}-{weights_of(cfg.backbone)}"
    base = TrainConfig(
        backbone=cfg.backbone,
        cameras=cfg.cameras,
        sampler=cfg.sampler,
        max_steps=cfg.steps,
        learning_rate=cfg.learning_rate,
        validate_every=cfg.validate_every,
        select=cfg.select,
        device=cfg.device,
    )
    wanted: list[tuple[str, Any, int, Choice | None]] = []
    if cfg.plan == "objectives":
        wanted = [(o, p, seed, None) for seed in cfg.seeds for o in cfg.objectives for p in cfg.presets]
        if "triplet" in cfg.objectives and "paper" in cfg.presets:
            wanted += [("triplet", "paper", seed, None) for seed in cfg.triplet_seeds]
    else:
        chosen = [choice for choice in CHOICES if choice.objective in cfg.objectives]
        for seed in cfg.seeds:
            wanted += [(objective, "paper", seed, None) for objective in {c.objective: 0 for c in chosen}]
            wanted += [(choice.objective, "paper", seed, choice) for choice in chosen]
    cells = {"zero_shot": Cell("zero_shot", home / "zero_shot", cfg.backbone, cfg.device)}
    for objective, preset, seed, choice in wanted:
        name = f"{objective}/{preset}-seed{seed}" + (f"-{choice.label}" if choice else "")
        plain = replace(base, objective=objective, preset=preset, seed=seed, output=home / name)
        config = choice.applied(plain) if choice else plain
        if choice and config.protocol() == plain.protocol():
            continue  # the cell with nothing changed has this value
        cells[name] = Cell(name, home / name, cfg.backbone, cfg.device, config, choice)
    found = [c for c in cells.values() if any(fnmatch.fnmatch(c.name, pattern) for pattern in cfg.only)]
    if not found:
        raise ValueError(f"no cell matches {', '.join(cfg.only)}; there are: {', '.join(cells)}")
    return found


@cache
def weights_of(backbone: str) -> str:
    """Digest of a backbone's weights."""
    return weights_digest(locate(backbone))[:8]


def check_settings(cells: Sequence[Cell]) -> None:
    """ValueError when a cell's folder holds a training by other settings, which would be taken for this one."""
    for cell in cells:
        log = cell.folder / "train_log.json"
        if cell.config is None or not log.is_file():
            continue
        then, now = json.loads(log.read_text())["protocol"], json.loads(json.dumps(cell.config.protocol()))
        if differ := changes(then, now):
            raise ValueError(
                f"{cell.folder} was trained with other settings ({differ}); choose another --runs, or do it "
                "again with --overwrite"
            )


def start(command: Sequence[str], log: Path, cores: int | None) -> subprocess.Popen:
    """Start a process that prints to the end of `log`, out of reach of the terminal's Ctrl-C.

    It holds a lock on the log until it ends, even if the study is killed: BlockingIOError when another does.
    """
    environment = os.environ | ({"OMP_NUM_THREADS": str(cores)} if cores else {})
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            process_group=0,
        )


@dataclass
class Job:
    """A running process of a cell."""

    cell: Cell
    command: list[str]
    process: Any  # subprocess.Popen
    began: float = field(default_factory=time.monotonic)

    def following(self) -> tuple[list[str] | None, bool]:
        """What comes after this process, now ended; and whether it did what it should."""
        following = self.cell.next_command()
        well = self.process.poll() == 0 and following != self.command
        return (following if well else None), well


def run(
    cells: Sequence[Cell],
    workers: int,
    on_end: Callable[[dict[str, str]], None],
    start: Callable[..., Any] = start,
) -> tuple[dict[str, str], bool]:
    """Do what is left of the cells, `workers` of them at once.

    Args:
        cells: finished ones are skipped.
        workers: cells side by side.
        on_end: called with the failures so far after each cell that ended.
        start: `start(command, log, cores)` starts a process.

    Returns:
        What failed, cell -> last line that it printed; the other cells are done all the same. And whether
        Ctrl-C (or SIGTERM) stopped it all: then the running processes saved and ended. The second one kills.
    """
    cores = max(1, (os.cpu_count() or 1) // workers) if workers > 1 else None
    waiting = [cell for cell in cells if cell.next_command()]
    running: list[Job] = []
    failed: dict[str, str] = {}

    def fail(cell: Cell, reason: str) -> None:
        failed[cell.name] = reason
        tqdm.write(f"{cell.name} failed ({cell.log}): {reason}")
        on_end(failed)

    def launch(cell: Cell, command: list[str]) -> None:
        try:
            running.append(Job(cell, command, start(command, cell.log, cores)))
        except BlockingIOError:
            fail(cell, "another process, perhaps of a study that was killed, is running it; wait for it")

    bar = tqdm(
        total=len(cells),
        initial=len(cells) - len(waiting),
        desc="study",
        unit="cell",
        mininterval=BAR_SECONDS,
        miniters=0,
    )
    with stop_on_interrupt() as stop, bar:
        told = False
        try:
            while running or (waiting and not stop()):
                while waiting and len(running) < workers and not stop():
                    cell = waiting.pop(0)
                    launch(cell, cell.next_command() or cell.evaluate)
                bar.set_postfix_str(", ".join(map(_where, running)), refresh=False)
                bar.update(0)
                time.sleep(POLL)
                if stop() and not told:
                    told = True
                    tqdm.write("stopping: the running cells save what they have; once more kills them")
                    for job in running:
                        job.process.terminate()
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    _note(job)
                    following, ended_well = job.following()
                    if following is None and ended_well:
                        bar.update()
                        on_end(failed)
                    elif not stop() and following:
                        launch(job.cell, following)
                    elif not stop():
                        fail(job.cell, _last_line(job.cell.log))
        finally:
            for job in running:
                job.process.kill()
                job.process.wait()
    return failed, stop()


def do_cell(cell: Cell) -> None:
    """What is left of a cell, one process after another: what a Ray worker does. A failure is in its log."""
    command = cell.next_command()
    while command is not None:
        job = Job(cell, command, start(command, cell.log, None))
        job.process.wait()
        _note(job)
        command, _ = job.following()


def _note(job: Job) -> None:
    """Add an ended process to its cell's list."""
    seconds = round(time.monotonic() - job.began, 1)
    record = {"command": line(job.command), "status": job.process.poll(), "seconds": seconds}
    with open(job.cell.commands, "w" if "--overwrite" in job.command else "a") as file:  # from the start
        file.write(json.dumps(record) + "\n")


def _where(job: Job) -> str:
    """Cell, stage, and the last per cent that its progress bar printed."""
    percents = re.findall(r"(\d+%)\|", job.cell.log.read_text(errors="replace")[-2000:])
    return " ".join([job.cell.name, job.command[2], *percents[-1:]])


def _last_line(log: Path) -> str:
    lines = [text.strip() for text in log.read_text(errors="replace").splitlines() if text.strip()]
    return lines[-1] if lines else "it printed nothing"


def line(command: Sequence[str]) -> str:
    """A command as one would type it."""
    return shlex.join(["python", *command[1:]])


def entry_of(cell: Cell, weights: str) -> dict[str, Any]:
    """Who a cell is and how it is run, JSON-ready."""
    config, choice = cell.config, cell.choice
    return {
        "cell": cell.name,
        "checkpoint": str(cell.folder) if config else cell.backbone,
        "backbone": cell.backbone,
        "weights": weights,
        "objective": config.objective if config else "zero_shot",
        "preset": config.preset if config else "",
        "seed": config.seed if config else None,
        "choice": asdict(choice) if choice else None,
        "train": line(cell.train) if config else None,
        "evaluate": line(cell.evaluate),
    }


def outcome_of(cell: Cell) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a finished cell came to: figures of its training and evaluation, and the benchmark's tidy rows."""
    found: dict[str, Any] = {"steps": 0}
    if cell.config is not None:
        log = json.loads((cell.folder / "train_log.json").read_text())
        names = ("steps", "best", "history", "samples_per_second", "images_per_second")
        found = {name: log["result"][name] for name in names}
        found |= {"training_seconds": log["result"]["seconds"]}
        found |= {name: log[name] for name in ("hyper", "protocol", "hardware")}
    ended = cell.commands.read_text().splitlines() if cell.commands.exists() else []
    records = [json.loads(text) for text in ended]
    for stage, module in (("train", "training.train"), ("evaluate", "eval.benchmark")):
        found[f"{stage}_wall_seconds"] = sum(r["seconds"] for r in records if f" {module} " in r["command"])
    scored = json.loads(cell.scores.read_text())
    (found["evaluation"],) = [e for e in scored["provenance"] if e["checkpoint"] != "control"]
    return found, scored["rows"]


def collect(cfg: StudyConfig, cells: Sequence[Cell], failed: Mapping[str, str]) -> None:
    """Put finished and failed cells in the place of their old entries in `cfg.out`; others stay.

    Cells of the same backbone's earlier weights go: a table must not mix them with these.
    """
    weights = weights_of(cfg.backbone)
    entries, rows = [], []
    for cell in cells:
        entry = entry_of(cell, weights)
        if cell.name in failed:
            entries.append(entry | {"error": failed[cell.name]})
        elif cell.next_command() is None:
            outcome, own = outcome_of(cell)
            entries.append(entry | outcome)
            rows += own
    if not entries:
        return
    old = read(cfg.out)
    new = {entry["cell"] for entry in entries}
    kept = [
        entry
        for entry in old["cells"]
        if entry["backbone"] != cfg.backbone or (entry["weights"] == weights and entry["cell"] not in new)
    ]
    stay = {entry["checkpoint"] for entry in kept}
    unique: dict[tuple[str, ...], dict[str, Any]] = {}  # each cell brings the controls' rows
    for row in [row for row in old["rows"] if row["checkpoint"] in stay] + rows:
        unique[row["checkpoint"], row["task"], row["view"], row["metric"]] = row
    command = shlex.join(["python", "-m", "training.study", *sys.argv[1:]])
    result = {
        "commands": list(dict.fromkeys([*(old["commands"] if kept else []), command])),
        "cells": kept + entries,
        "rows": list(unique.values()),
    }
    parts = [f'"{key}": [\n' + ",\n".join(map(json.dumps, result[key])) + "\n]" for key in result]
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(cfg.out) as fresh:
        fresh.write_text("{" + ",\n".join(parts) + "}\n")


def read(file: Path) -> dict[str, list[Any]]:
    """The figures so far; ValueError when the file is something else."""
    if not file.exists():
        return {"commands": [], "cells": [], "rows": []}
    try:
        found = json.loads(file.read_text())
        return {key: list(found[key]) for key in ("commands", "cells", "rows")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is no result of this study ({error!r}); move it away or set --out"
        ) from error


def main(cfg: StudyConfig, start: Callable[..., Any] = start) -> int:
    """Run the study; returns the exit status: 0, 1 when a cell or the tables failed, 130 when it was stopped."""
    cells = plan(cfg)
    if cfg.show:
        for cell in cells:
            print(f"\n# {cell.name}")
            print("\n".join(line(command) for command in (cell.train, cell.evaluate) if command))
        return 0
    read(cfg.out)  # refused before hours are spent
    if cfg.overwrite:
        for cell in cells:
            shutil.rmtree(cell.folder, ignore_errors=True)
    check_settings(cells)
    collect(cfg, cells, {})
    if cfg.ray:
        waiting = [cell for cell in cells if cell.next_command()]
        done, gpu = len(cells) - len(waiting), cfg.device == "auto"
        run_jobs(do_cell, waiting, workers=cfg.workers, unit="cell", done=done, ray=cfg.ray, gpu=gpu)
        failed, stopped = {cell.name: _last_line(cell.log) for cell in cells if cell.next_command()}, False
        collect(cfg, cells, failed)
    else:
        failed, stopped = run(cells, cfg.workers, lambda failures: collect(cfg, cells, failures), start)
    if stopped:
        print(f"stopped; the same command goes on; tables so far: python -m eval.report --study {cfg.out}")
        return 130
    problems = dict(failed)
    if cfg.out.exists():
        command = [sys.executable, "-m", "eval.report", "--study", str(cfg.out), "--out", str(cfg.report)]
        process = start(command, log := cfg.runs / "report.log", None)
        if process.wait() != 0:
            problems["eval.report"] = _last_line(log)
    done = len(cells) - len(failed)
    print(f"{done} of {len(cells)} cells finished; figures in {cfg.out}, tables in {cfg.report}")
    for name, reason in problems.items():
        print(f"failed: {name}: {reason}")
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(tyro.cli(StudyConfig, prog="python -m training.study", description=__doc__)))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"training.study: {error}") from error
