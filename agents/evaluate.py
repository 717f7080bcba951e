"""Replay a saved agent: success, true return, learned return, and how well the two returns agree.

python -m agents.evaluate runs/agents/drawer-close-v3/dense/sac-seed0
python -m agents.evaluate runs/agents/... --which best --video out/agent.mp4
python -m agents.evaluate runs/agents/... --checkpoint siglip2-tiny/triplet    # score it with another model
"""

import fcntl
import functools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import gymnasium as gym
import numpy as np
import tyro
from matplotlib.figure import Figure
from stable_baselines3.common.vec_env import DummyVecEnv
from tqdm import tqdm

from agents.agent import act, load_agent
from agents.config import AgentConfig
from agents.environments import make_task_env
from agents.rewards import load_scorer, shaping
from vlm_reward._film import write_film
from vlm_reward._jobs import BAR_SECONDS, replacing
from vlm_reward.cameras import CameraRig, CameraSpec
from vlm_reward.metrics import spearman
from vlm_reward.wrappers import Scorer, VLMRewardWrapper

DURING_TRAINING, AT_THE_END = 1_000_000, 2_000_000
"""First seed of the episodes that choose the best agent, and of those that are reported."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Replay a saved agent."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run of agents.train."""
    which: Literal["last", "best"] = "last"
    """The agent at the end, or the one that was kept as the best while training (agents.train --best-by)."""
    episodes: int = 20
    """Episodes; their placements are always the same."""
    checkpoint: str | None = None
    """Model for the learned return; the run's own when not given."""
    score: bool = True
    """Render and score; without it there is no learned return, and it takes seconds."""
    video: Path | None = None
    """Write the first episode to this MP4, its reward curve beside it."""

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ValueError(f"episodes must be at least 1, got {self.episodes}")


@dataclass(frozen=True)
class Episode:
    """One replayed episode of T steps.

    Args:
        success: whether any step succeeded.
        true: the task's own reward of each step, float64 [T].
        learned: the learned reward of each step, float64 [T]; None without a model.
        frames: uint8 [T, V, H, W, 3] if they were asked for.
    """

    success: bool
    true: np.ndarray
    learned: np.ndarray | None
    frames: np.ndarray | None = None


def evaluation_env(config: AgentConfig, scorer: Scorer | None) -> gym.Env:
    """The run's task, with the learned reward if there is a scorer; without one nothing is rendered."""
    env = make_task_env(config.task, config.horizon)
    if scorer is None:
        return env
    return VLMRewardWrapper(
        env,
        scorer,
        config.sentence,
        transform=shaping(config),
        score_every=config.score_every,
        over_views=config.over_views,
    )


def run_episode(
    policy: Callable[[np.ndarray], np.ndarray],
    env: gym.Env,
    seed: int,
    render: Callable[[], np.ndarray] | None = None,
) -> Episode:
    """One episode of `policy`, observation [39] to action [4], from the placement that `seed` gives."""
    observation, _ = env.reset(seed=seed)
    true, learned, frames, success, done = [], [], [], False, False
    while not done:
        observation, reward, terminated, truncated, info = env.step(policy(observation))
        true.append(info.get("env_reward", reward))
        if "env_reward" in info:
            learned.append(reward)
        if render:
            frames.append(render())
        success |= info["success"]
        done = terminated or truncated
    return Episode(
        success,
        np.array(true, np.float64),
        np.array(learned, np.float64) if learned else None,
        np.stack(frames) if frames else None,
    )


def summarise(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Means over episodes, and the rank correlation of their learned and true returns (None without either)."""
    true = [float(episode.true.sum()) for episode in episodes]
    learned = [float(episode.learned.sum()) for episode in episodes if episode.learned is not None]
    return {
        "success": float(np.mean([episode.success for episode in episodes])),
        "learned_return": float(np.mean(learned)) if learned else None,
        "env_return": float(np.mean(true)),
        "rank_correlation": spearman(np.array(learned), np.array(true)) if learned else None,
        "episodes": len(episodes),
    }


def evaluate(
    config: AgentConfig,
    policy: Callable[[np.ndarray], np.ndarray],
    scorer: Scorer | None,
    seeds: Iterable[int],
    video: Path | None = None,
) -> dict[str, Any]:
    """Run an episode for each seed and `summarise` them; the first goes to `video`."""
    seeds = list(seeds)
    env = evaluation_env(config, scorer)
    with closing(env):
        episodes = []
        if video:
            spec = scorer.camera_spec if scorer and scorer.camera_spec else CameraSpec(("corner",))
            with CameraRig(env, spec) as rig:
                episodes.append(run_episode(policy, env, seeds[0], rig.render))
            film(video, episodes[0], f'"{config.sentence}"')
        # quick without frames: a progress bar would only disturb that of a training
        waiting = tqdm(
            seeds[len(episodes) :],
            "evaluation",
            unit="episode",
            disable=scorer is None,
            mininterval=BAR_SECONDS,
        )
        episodes += [run_episode(policy, env, seed) for seed in waiting]
    return summarise(episodes)


def write_row(file: Path, row: dict[str, Any]) -> None:
    """Add a row to a JSON list of rows, in the place of one with the same task, reward, algo, seed and
    steps: a shorter run stays beside a longer one.

    Several runs may end at once: they wait for each other, and the file is replaced whole.

    Raises:
        ValueError: the file is not a list of rows.
    """
    key = ("task", "reward", "algo", "seed", "steps")
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name(f".{file.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed by the kernel, also when the process is killed
        try:
            rows = json.loads(file.read_text()) if file.exists() else []
            rows = [old for old in rows if [old[k] for k in key] != [row[k] for k in key]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a list of results ({error!r}); move it away") from error
        rows = sorted([*rows, row], key=lambda one: [one[k] for k in key])
        with replacing(file) as fresh:
            fresh.write_text(json.dumps(rows, indent=2, allow_nan=False) + "\n")


def film(path: Path, episode: Episode, title: str) -> None:
    """An MP4 of an episode with frames, below them its rewards with a cursor."""
    assert episode.frames is not None
    figure = Figure(layout="constrained")
    ax = figure.add_subplot(xlabel="step", title=title)
    if episode.learned is None:
        ax.plot(episode.true, "C1")
        ax.set_ylabel("true reward")
    else:
        ax.plot(episode.learned, "C0")
        ax.set_ylabel("learned reward", color="C0")
        true = ax.twinx()
        true.plot(episode.true, "C1", linewidth=0.8)
        true.set_ylabel("true reward", color="C1")
    cursor = ax.axvline(0, color="black", linewidth=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_film(path, [episode.frames], figure, lambda _, step: cursor.set_xdata([step, step]))


def main(options: EvaluateConfig) -> None:
    """Load, replay, print."""
    config = AgentConfig.of_run(options.run)
    if options.checkpoint:
        watched = {"monitor": options.checkpoint} if not config.learned else {"reward": options.checkpoint}
        config = replace(config, **watched)
    scorer = load_scorer(config) if options.score else None
    venv = DummyVecEnv([functools.partial(make_task_env, config.task, config.horizon)])
    with closing(venv):
        agent = load_agent(replace(config, buffer_size=1), options.run / options.which, venv)
        seeds = range(AT_THE_END, AT_THE_END + options.episodes)
        summary = evaluate(config, functools.partial(act, agent), scorer, seeds, options.video)
    print(f"{config.task}, {options.which} agent of {options.run} after {agent.num_timesteps} steps:")
    for name, value in summary.items():
        print(f"  {name.replace('_', ' '):17s} {'-' if value is None else f'{value:.3g}'}")
    if options.video:
        print(f"film: {options.video}")


if __name__ == "__main__":
    try:
        main(tyro.cli(EvaluateConfig, prog="python -m agents.evaluate", description=__doc__))
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        sys.exit(130)
