"""Train an agent on a Meta-World task, by the task's own reward or by a sentence.

    python -m agents.train --task drawer-close-v3 --reward dense
    python -m agents.train --task drawer-close-v3 --reward sparse --monitor siglip2-tiny/triplet+order+wrong+start
    python -m agents.train --task drawer-close-v3 --reward siglip2-tiny/triplet+order+start --cameras corner

The run's folder is printed at the end (runs/agents/...): `best` and `last` agent, `episodes.jsonl`,
`evaluations.jsonl`, TensorBoard's scalars; a row goes to `--results`. Ctrl-C stops, saves, and says how to go on.

Watch three curves side by side: learned return, true return, success. If the first rises alone, the agent
hacks the reward; a warning says so.
"""

import functools
import json
import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from stable_baselines3 import SAC
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat

from agents.agent import act, load_agent, make_agent, read_state, save_agent
from agents.callbacks import EpisodeLog, read_lines
from agents.config import AgentConfig, BestBy
from agents.environments import check_cameras, make_training_env
from agents.evaluate import AT_THE_END, DURING_TRAINING, evaluate, write_row
from agents.replay import FrameStore, TracedReplayBuffer
from agents.rewards import LoadedScorer, load_scorer, model_of
from vlm_reward._jobs import changes, replacing, stop_on_interrupt
from vlm_reward.encoder import write_folder
from vlm_reward.metrics import spearman
from vlm_reward.wrappers import Scorer

CHUNK = 100  # steps between two looks at Ctrl-C
LOG_INTERVAL = {"sac": 4, "ppo": 1}  # episodes, and rollouts, between two points in TensorBoard


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Args:
        folder: of the run.
        steps: environment steps done.
        row: what was added to the results; None when the run was interrupted.
        steps_per_second: environment steps in a second of learning, evaluation apart.
        alarm: what the reward-hacking warning said last, or None.
        interrupted: stopped by Ctrl-C.
    """

    folder: Path
    steps: int
    row: dict[str, Any] | None
    steps_per_second: float
    alarm: str | None
    interrupted: bool


def train(config: AgentConfig) -> TrainResult:
    """Train by `config`.

    Raises:
        ValueError: settings that contradict each other, the checkpoint, the task's cameras or the run to resume.
        FileNotFoundError: no such checkpoint or buffer; nothing to resume.
        FileExistsError: there is a run in the output folder already.
        RuntimeError: no renderer works, or a worker died.
        OSError: the disk is full; what was saved is kept.
    """
    # Whatever can be refused is refused before anything is computed.
    folder = config.folder
    check_folder(config)
    if config.buffer and not config.buffer.is_file():
        raise FileNotFoundError(f"no transitions at {config.buffer}")
    torch.set_num_threads(config.threads)
    scorer = load_scorer(config)
    if not config.resume:
        if scorer:
            check_cameras(config, scorer)
        remove_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        frames = stack.enter_context(closing(frame_store(config, scorer))) if config.keep_frames else None
        venv = stack.enter_context(closing(make_training_env(config, scorer, frames)))
        stop = stack.enter_context(stop_on_interrupt())

        # The agent: new, or as it was.
        agent = load_agent(config, folder / "last", venv) if config.resume else make_agent(config, venv)
        buffer = agent.replay_buffer if isinstance(agent, SAC) else None
        given = folder / "last" / "replay.npz" if config.resume else config.buffer
        if given and isinstance(buffer, TracedReplayBuffer):
            buffer.load(given)
        policy = functools.partial(act, agent)
        first = agent.num_timesteps
        board = TensorBoardOutputFormat(str(folder / "tensorboard"))
        stack.callback(board.close)
        agent.set_logger(Logger(str(folder), [board]))
        log = stack.enter_context(closing(EpisodeLog(folder, first, config)))
        evaluations = [row for row in read_lines(folder / "evaluations.jsonl") if row["step"] <= first]
        (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        seconds = 0.0

        def save(name: str) -> None:
            if frames:
                frames.flush()
            with write_folder(folder / name) as fresh:
                save_agent(agent, fresh, frame_rows=frames.rows if frames else 0)
                if isinstance(buffer, TracedReplayBuffer) and name == "last":
                    buffer.save(fresh / "replay.npz")

        while agent.num_timesteps < config.timesteps and not stop():
            began, before = time.perf_counter(), agent.num_timesteps
            chunk = min(CHUNK, config.timesteps - before)
            agent.learn(chunk, log, log_interval=LOG_INTERVAL[config.algo], reset_num_timesteps=False)
            seconds += time.perf_counter() - began
            steps = agent.num_timesteps
            if steps // config.eval_every > before // config.eval_every or steps >= config.timesteps:
                seeds = range(DURING_TRAINING, DURING_TRAINING + config.eval_episodes)
                row = {"step": steps, **evaluate(config, policy, None, seeds)}
                row["training_learned_return"] = log.learned_return()
                evaluations.append(row)
                write_lines(folder / "evaluations.jsonl", evaluations)
                for name in ("success", "env_return"):
                    agent.logger.record(f"evaluation/{name}", row[name])
                agent.logger.dump(steps)
                log.bar.write(
                    f"step {steps}: success {row['success']:.0%}, true return {row['env_return']:.0f}"
                )
                if row is max(evaluations, key=functools.partial(worth, config.keeps_best_by)):
                    save("best")
                save("last")
        steps = agent.num_timesteps
        interrupted = steps < config.timesteps
        if interrupted:
            save("last")
    # The environments are closed: the final evaluation has a renderer of its own.
    row = None if interrupted else final_row(config, policy, scorer, log, steps)
    if row:
        write_row(config.results, row)
    return TrainResult(folder, steps, row, (steps - first) / max(seconds, 1e-9), log.alarm, interrupted)


def worth(best_by: BestBy, row: dict[str, Any]) -> tuple[float, ...]:
    """Of an evaluation, a line of evaluations.jsonl: what the best agent is chosen by, more is better."""
    if best_by == "success":
        return row["success"], row["env_return"]
    score = row.get("training_learned_return")  # none before the first episode has ended
    return (-math.inf if score is None else score,)


def final_row(
    config: AgentConfig, policy: Callable, scorer: Scorer | None, log: EpisodeLog, steps: int
) -> dict[str, Any]:
    """The last agent on placements of its own; the rank correlation is that over all episodes of the training."""
    seeds = range(AT_THE_END, AT_THE_END + config.eval_episodes)
    summary = evaluate(config, policy, scorer, seeds)
    learned, true, _ = log.columns()
    return {
        "task": config.task,
        "reward": config.reward_label,
        "algo": config.algo,
        "seed": config.seed,
        "steps": steps,
        **summary,
        "rank_correlation": spearman(np.array(learned), np.array(true)) if learned else None,
    }


def check_folder(config: AgentConfig) -> None:
    """Refuse to overwrite a run unasked, to resume what is not there, or to resume with other settings."""
    folder = config.folder
    if not config.resume:
        if not config.overwrite and (folder / "last").exists():
            raise FileExistsError(
                f"{folder} holds a run already; go on with --resume, replace it with --overwrite, or choose "
                "another --output"
            )
        return
    if not (folder / "last" / "state.json").is_file():
        raise FileNotFoundError(f"nothing to resume: no agent was saved in {folder}; start without --resume")
    then, now = AgentConfig.of_run(folder).protocol(), config.protocol()
    if differ := changes(then, now):
        raise ValueError(f"cannot resume {folder} with other settings ({differ})")


def remove_run(folder: Path) -> None:
    """Remove what an earlier run wrote to the folder, so that nothing of it is taken for this one's."""
    for name in ("config.json", "episodes.jsonl", "evaluations.jsonl", "frames.u8", "frames.json"):
        (folder / name).unlink(missing_ok=True)
    for name in ("best", "last", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)


def frame_store(config: AgentConfig, scorer: LoadedScorer | None) -> FrameStore:
    """Where the run's frames go; OSError when the disk has no room for all of them."""
    assert scorer is not None
    rows = read_state(config.folder / "last")["frame_rows"] if config.resume else 0
    store = FrameStore(config.folder, model_of(scorer), rows)
    needed = store.row_bytes * (config.timesteps * (1 + 1 / config.horizon) - rows)
    free = shutil.disk_usage(config.folder).free
    if needed > free:
        store.close()
        raise OSError(
            f"the frames of {config.timesteps} steps need {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free: "
            "use fewer --cameras or --timesteps"
        )
    return store


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a JSON-lines file at once."""
    with replacing(file) as fresh:
        fresh.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Read the command line, train, and say what came of it and what to do next."""
    try:
        config = tyro.cli(AgentConfig, prog="python -m agents.train", description=__doc__)
        done = train(config)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted; what was saved last is kept, go on with --resume") from None
    print(f"{done.steps} of {config.timesteps} steps, {done.steps_per_second:.1f} steps/s: {done.folder}")
    if done.interrupted:
        arguments = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--overwrite")]
        print(f"stopped; go on with: python -m agents.train {shlex.join([*arguments, '--resume'])}")
        raise SystemExit(130)
    print(json.dumps(done.row))
    print(f"film: python -m agents.evaluate {done.folder} --video out/agent.mp4")


if __name__ == "__main__":
    main()
