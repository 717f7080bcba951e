"""Train against what an optimiser does: agents hack the reward, what they did is ordered by the simulator, again.

    python -m agents.loop           # one round; 1.5 hours on two cores; needs training.collect train-rollouts
    python -m agents.loop --rounds 2 --tasks window-open-v3 faucet-open-v3

A round: PPO agents learn training tasks from the reward as it is (agents.train); what they do when they are done
(agents.record) is rendered with its true reward (training.collect agent-rollouts); the adapter is trained on, with
these rollouts beside the others (training.train --adapter --rollouts). After the last round agents learn from the
last adapter, too. Each step is a process of its own and its command is printed; what is finished is skipped, what
was stopped goes on. At the end: success, and the rank correlation of learned and true return over all episodes of
each training, round by round.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from vlm_reward._jobs import keep_settings
from vlm_reward._parallel import run_jobs
from vlm_reward.datasets import open_dataset
from vlm_reward.encoder import locate
from vlm_reward.reward_model import REACH, members_of
from vlm_reward.tasks import check_task, train_tasks

DATASET = "agent-rollouts-v0"


@dataclass(frozen=True)
class LoopConfig:
    """Agents, their rollouts, a better adapter, round by round."""

    reward: str = "siglip2-tiny/triplet+order+wrong+start+head"
    """Adapter that the first agents learn from, and that is trained on: a name, a folder or a Hub id."""
    tasks: tuple[str, ...] = (
        "window-open-v3",
        "faucet-open-v3",
        "handle-pull-v3",
        "door-lock-v3",
        "coffee-button-v3",
    )
    """Training tasks that agents learn."""
    rounds: int = 1
    """Adapters to train."""
    timesteps: int = 30_000
    """Environment steps of an agent."""
    episodes: int = 12
    """Episodes of each that an adapter learns from."""
    cameras: tuple[str, ...] = ("corner",)
    """Views that agents are rewarded by."""
    rollouts: tuple[str, ...] = ("vlm-reward/train-rollouts-v0",)
    """Those of training.collect train-rollouts, by nobody's agent."""
    start_weight: float = 0.5
    """Of an adapter (training.train)."""
    wrong_weight: float = 100.0
    """Of an adapter (training.train)."""
    max_steps: int = 300
    """Steps of an adapter."""
    backbone: str = "siglip2-tiny"
    """That of the adapters."""
    seed: int = 0
    """Of agents and adapters."""
    workers: int = 2
    """Agents side by side."""
    output: Path = Path("runs/loop")
    """Folder of all of it: 0, 1, ... with agents and actions, and all but the last with rollouts and adapter."""

    def __post_init__(self) -> None:
        for task in self.tasks:
            if check_task(task) not in train_tasks():
                raise ValueError(f"{task} is held out from all training; give some of tasks.train_tasks()")
        if self.rounds < 1 or self.workers < 1 or self.episodes < 1:
            raise ValueError("rounds, workers and episodes must be at least 1")
        if self.reward in ("dense", "sparse"):
            raise ValueError(
                f"reward must be a checkpoint, whose faults the agents find; got {self.reward!r}"
            )


@dataclass(frozen=True)
class Step:
    """A process, run once: then `done` exists. One that was stopped goes on with --resume if `begun` exists."""

    command: tuple[str, ...]
    done: Path
    begun: Path | None = None

    def run(self) -> None:
        """Run it unless it is done; RuntimeError if it fails."""
        if self.done.exists():
            return
        words = [*self.command, *(["--resume"] if self.begun and self.begun.exists() else [])]
        line = shlex.join(["python", *words])
        print(line, flush=True)
        if subprocess.run([sys.executable, *words]).returncode != 0:
            raise RuntimeError(f"failed: {line}")
        self.done.parent.mkdir(parents=True, exist_ok=True)
        self.done.touch()


def run_all(steps: Sequence[Step]) -> None:
    """One after the other: what a worker does."""
    for step in steps:
        step.run()


def agent_steps(cfg: LoopConfig, number: int, task: str, reward: str) -> tuple[Step, ...]:
    """Train a round's agent on a task, and record what it does."""
    home = cfg.output / str(number)
    run = home / "agents" / task
    learn = [
        "-m",
        "agents.train",
        "--algo",
        "ppo",
        "--task",
        task,
        "--reward",
        reward,
        "--cameras",
        *cfg.cameras,
    ]
    learn += ["--score-every", "2", "--processes", "False", "--timesteps", str(cfg.timesteps)]
    learn += ["--seed", str(cfg.seed), "--output", str(run), "--results", str(home / "agents.json")]
    record = ["-m", "agents.record", str(run), "--out", str(home / "actions" / f"{task}.npz")]
    record += ["--episodes", str(cfg.episodes)]
    return (
        Step(tuple(learn), home / "done" / f"agent-{task}", run / "last" / "state.json"),
        Step(tuple(record), home / "done" / f"actions-{task}"),
    )


def adapter_steps(cfg: LoopConfig, number: int, reward: str) -> tuple[Step, ...]:
    """Render what the round's agents did, and train `reward` on with the rollouts of all rounds so far."""
    home = cfg.output / str(number)
    adapter = home / "adapter"
    folders = [cfg.output / str(earlier) / "rollouts" for earlier in range(number + 1)]
    datasets = [*cfg.rollouts, *(str(folder / DATASET) for folder in folders)]
    actions = [str(home / "actions" / f"{task}.npz") for task in cfg.tasks]
    render = ["-m", "training.collect", "agent-rollouts", "--actions", *actions, "--dataset", DATASET]
    render += ["--data-root", str(folders[-1]), "--workers", str(cfg.workers), "--overwrite"]
    learn = ["-m", "training.train", "--objective", "triplet", "--sampler", "grouped"]
    learn += ["--backbone", cfg.backbone, "--adapter", reward, "--rollouts", *datasets]
    learn += ["--start-weight", str(cfg.start_weight), "--wrong-weight", str(cfg.wrong_weight)]
    learn += ["--max-steps", str(cfg.max_steps), "--learning-rate", "3e-4", "--threads", "1"]
    learn += ["--validate-every", "100", "--select", "voc+listening"]
    learn += ["--seed", str(cfg.seed), "--output", str(adapter)]
    return (
        Step(tuple(render), home / "done" / "rollouts"),
        Step(tuple(learn), home / "done" / "adapter", adapter / "state.safetensors"),
    )


def table(rounds: Sequence[Sequence[dict]]) -> str:
    """Success and rank correlation of each task's agent, a column for each reward."""
    heads = ["first reward", *(f"adapter {number}" for number in range(len(rounds) - 1))]
    lines = ["task" + "".join(f"{head:>24s}" for head in heads)]
    for row, *later in zip(*rounds, strict=True):
        cells = [f"{each['success']:.0%}, {each['rank_correlation']:.2f}" for each in (row, *later)]
        lines.append(row["task"] + "".join(f"{cell:>24s}" for cell in cells))
    return "\n".join(lines)


def main(cfg: LoopConfig) -> Path:
    """Run what is left of all rounds; returns the last adapter."""
    folder = locate(cfg.reward)
    if members_of(folder):
        raise ValueError(
            f"{cfg.reward} is an ensemble, of whose members one can be trained on: give its name"
        )
    if (folder / REACH).is_file():
        raise ValueError(
            f"{cfg.reward} tells how near the hand is and no more: give an adapter or a backbone"
        )
    try:
        for dataset in cfg.rollouts:
            open_dataset(dataset)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; or make it: python -m training.collect train-rollouts") from error
    keep_settings(cfg, "rounds", otherwise="was begun with other settings")
    reward, rounds = cfg.reward, []
    for number in range(cfg.rounds + 1):  # the last round's agents try the last adapter
        jobs = [agent_steps(cfg, number, task, reward) for task in cfg.tasks]
        run_jobs(run_all, jobs, workers=cfg.workers, unit="agent")
        rounds.append(json.loads((cfg.output / str(number) / "agents.json").read_text()))
        if number < cfg.rounds:
            run_all(adapter_steps(cfg, number, reward))
            reward = str(cfg.output / str(number) / "adapter")
    print(f"success, rank correlation of learned and true return:\n{table(rounds)}\nadapter: {reward}")
    return Path(reward)


if __name__ == "__main__":
    try:
        main(tyro.cli(LoopConfig, prog="python -m agents.loop", description=__doc__))
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"agents.loop: {error}") from error
    except KeyboardInterrupt:
        sys.exit(130)
