"""What a saved agent does, as placements and actions that anybody can replay. Nothing is rendered.

    python -m agents.record runs/agents/window-close-v3/dense/ppo-seed0 --out out/actions/window-close.npz
    python -m training.scenes --actions out/actions/*.npz --output out/agent-scenes    # renders them

The file has the task, the seed of each reset and each action: the simulator does the rest.
"""

import functools
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from stable_baselines3.common.vec_env import DummyVecEnv

from agents.agent import act, load_agent
from agents.config import AgentConfig
from agents.environments import make_task_env
from agents.evaluate import run_episode
from vlm_reward._jobs import replacing

FIRST_SEED = 3_000_000
"""Of the recorded episodes; evaluations have others (agents.evaluate)."""


@dataclass(frozen=True)
class RecordConfig:
    """Record what a saved agent does."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run of agents.train; its last agent is taken."""
    out: Path
    """File to write (.npz): task, the seeds [E] of the resets, actions [E, T, 4]."""
    episodes: int = 40
    """Episodes."""
    explore: bool = True
    """Draw actions as in training; else take the best ones."""
    seed: int = 0
    """Of the drawn actions."""

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ValueError(f"episodes must be at least 1, got {self.episodes}")
        if self.out.suffix != ".npz":
            raise ValueError(f"out must end in .npz, got {self.out}")


def roll_out(
    policy: Callable[[np.ndarray], np.ndarray], task: str, horizon: int, seeds: range
) -> tuple[np.ndarray, np.ndarray]:
    """Actions float32 [E, T, 4] of an episode from each seed, and the true rewards [E, T] that they had."""
    actions: list[np.ndarray] = []

    def noted(observation: np.ndarray) -> np.ndarray:
        actions.append(policy(observation))
        return actions[-1]

    with closing(make_task_env(task, horizon)) as env:
        rewards = [run_episode(noted, env, seed).true for seed in seeds]
    return np.array(actions, np.float32).reshape(len(seeds), horizon, -1), np.stack(rewards)


def record(options: RecordConfig) -> np.ndarray:
    """Write the file; returns the true rewards float64 [E, T].

    Raises:
        FileNotFoundError: no such agent.
        ValueError: a damaged one.
    """
    config = AgentConfig.of_run(options.run)
    seeds = range(FIRST_SEED, FIRST_SEED + options.episodes)
    with closing(DummyVecEnv([functools.partial(make_task_env, config.task, config.horizon)])) as venv:
        agent = load_agent(replace(config, buffer_size=1), options.run / "last", venv)
        torch.manual_seed(options.seed)  # making an agent seeds PyTorch, too
        policy = functools.partial(act, agent, explore=options.explore)
        actions, rewards = roll_out(policy, config.task, config.horizon, seeds)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(options.out) as fresh, open(fresh, "wb") as file:
        np.savez(file, task=config.task, seeds=np.array(seeds), actions=actions)
    return rewards


if __name__ == "__main__":
    options = tyro.cli(RecordConfig, prog="python -m agents.record", description=__doc__)
    try:
        rewards = record(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{len(rewards)} episodes, mean true return {rewards.sum(1).mean():.0f}: {options.out}")
