"""What is written down and shown while an agent learns, and the alarm for a reward that is being hacked."""

import json
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from tqdm import tqdm

from agents.config import AgentConfig
from vlm_reward._jobs import BAR_SECONDS

SOLVED = 0.8
"""From this success rate on there is little left to rise, and nothing is called hacked."""


def reward_hacking(
    learned: Sequence[float], true: Sequence[float], success: Sequence[float], window: int = 20
) -> str | None:
    """Whether the learned return rises while neither success nor the true return does.

    The last `window` episodes are compared with the first ones and with those in the middle of the run. The
    learned return must have risen by three standard errors; success or the true return counts as risen from
    one on, so that noise alone raises no alarm. A task that is solved (success of at least 0.8) raises none.

    Args:
        learned: learned return of each episode so far, the oldest first.
        true: the task's own return of each.
        success: whether it succeeded, of each.
        window: episodes that are averaged.

    Returns:
        What happened, in words, or None.
    """
    count = len(learned)
    if not count == len(true) == len(success):
        raise ValueError(
            f"three sequences of one length are needed, got {count}, {len(true)}, {len(success)}"
        )
    late = slice(count - window, count)
    if count < 2 * window or np.mean(success[late]) >= SOLVED:
        return None
    for start in {0, min(count // 2, count - 2 * window)}:
        early = slice(start, start + window)
        rises = [_rise(np.asarray(values, float), early, late) for values in (learned, true, success)]
        if rises[0] > 3 and rises[1] < 1 and rises[2] < 1:
            then, now = (
                [float(np.mean(values[part])) for values in (learned, true, success)]
                for part in (early, late)
            )
            return (
                f"the learned return rose from {then[0]:.2f} to {now[0]:.2f} since episode {start}, but the true "
                f"return went from {then[1]:.1f} to {now[1]:.1f} and success from {then[2]:.0%} to {now[2]:.0%}"
            )
    return None


def _rise(values: np.ndarray, early: slice, late: slice) -> float:
    """The difference of two means in standard errors."""
    error = np.sqrt((values[early].var(ddof=1) + values[late].var(ddof=1)) / len(values[late]))
    return float((values[late].mean() - values[early].mean()) / max(error, 1e-9))


class EpisodeLog(BaseCallback):
    """Writes each finished episode to `episodes.jsonl` and TensorBoard, shows progress, and sounds the alarm.

    A line has `step` (environment steps of the run when the episode ended), `learned_return` (null without a
    model), `env_return`, `success` and `length`. Lines beyond `step`, of a run that was cut off after its last
    save, are dropped.

    Args:
        folder: of the run.
        step: where the run goes on; 0 for a new one.
        config: its settings.
    """

    def __init__(self, folder: Path, step: int, config: AgentConfig) -> None:
        super().__init__()
        self.file = folder / "episodes.jsonl"
        self.window, self.score_every = config.hacking_window, config.score_every
        self.episodes = [episode for episode in read_lines(self.file) if episode["step"] <= step]
        self.alarm: str | None = None
        with open(self.file, "w") as file:
            file.writelines(json.dumps(episode) + "\n" for episode in self.episodes)
        self._lines = open(self.file, "a", buffering=1)  # noqa: SIM115 (closed by `close`)
        self._pace = deque([(time.perf_counter(), step)], maxlen=self.window)
        self.bar = tqdm(
            total=config.timesteps,
            initial=step,
            desc=f"{config.algo} {config.task}",
            unit="step",
            mininterval=BAR_SECONDS,
        )

    def _on_step(self) -> bool:
        self.bar.update(self.num_timesteps - self.bar.n)
        for info in self.locals["infos"]:
            if "outcome" in info:
                views = len(info.get("reward_per_view", ()))
                self._note({"step": self.num_timesteps, **info["outcome"]}, views / self.score_every)
        return True

    def _note(self, episode: dict[str, Any], images_per_step: float) -> None:
        self.episodes.append(episode)
        self._lines.write(json.dumps(episode) + "\n")
        for name in ("learned_return", "env_return", "success"):
            if episode[name] is not None:
                self.logger.record_mean(f"rollout/{name}", float(episode[name]))
        self._pace.append((time.perf_counter(), self.num_timesteps))
        (began, first), (now, last) = self._pace[0], self._pace[-1]
        rate = (last - first) / max(now - began, 1e-9)
        self.logger.record("time/steps_per_second", rate)
        self.logger.record("time/frames_per_second", rate * images_per_step)
        if episode["learned_return"] is not None and len(self.episodes) % self.window == 0:
            before, self.alarm = self.alarm, reward_hacking(*self.columns(), self.window)
            if self.alarm and not before:
                self.bar.write(f"warning: reward hacking at step {self.num_timesteps}? {self.alarm}")
            self.logger.record("rollout/reward_hacking", float(self.alarm is not None))
        self._show()

    def _show(self) -> None:
        recent = self.episodes[-self.window :]
        parts = [f"success {np.mean([episode['success'] for episode in recent]):.0%}"]
        parts += [f"true {np.mean([episode['env_return'] for episode in recent]):.0f}"]
        learned = self.learned_return()
        parts += [] if learned is None else [f"learned {learned:.2f}"]
        parts += ["REWARD HACKING?"] if self.alarm else []
        self.bar.set_postfix_str(", ".join(parts), refresh=False)

    def learned_return(self) -> float | None:
        """Mean learned return of the last `window` episodes; None without a model, or an episode."""
        recent = [episode["learned_return"] for episode in self.episodes[-self.window :]]
        return None if not recent or None in recent else float(np.mean(recent))

    def columns(self) -> tuple[list[float], list[float], list[float]]:
        """Learned return, true return and success of all episodes that have a learned return."""
        scored = [episode for episode in self.episodes if episode["learned_return"] is not None]
        learned, true, success = (
            [float(e[name]) for e in scored] for name in ("learned_return", "env_return", "success")
        )
        return learned, true, success

    def close(self) -> None:
        """Close the file and the progress bar."""
        self._lines.close()
        self.bar.close()


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, none if there is no file; a last line that was cut off is left out."""
    if not file.is_file():
        return []
    lines = file.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
