"""Score what was recorded once again, with another model: one exploration serves many rewards.

    python -m agents.train --task drawer-close-v3 --reward siglip2-tiny/triplet --keep-frames --output runs/explore
    python -m agents.relabel runs/explore --reward siglip2-tiny/liv --output out/liv.npz
    python -m agents.train --task drawer-close-v3 --reward siglip2-tiny/liv --buffer out/liv.npz

It writes the run's transitions with new rewards. Frames of a Minari or LeRobot dataset are scored by
`vlm-reward label`.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

from agents.config import AgentConfig, RewardConfig
from agents.replay import load_transitions, open_frames
from agents.rewards import LoadedScorer, agent_reward, load_scorer, model_of, shaping
from vlm_reward._jobs import BAR_SECONDS, replacing
from vlm_reward.cameras import CameraSpec, Crop
from vlm_reward.metrics import spearman
from vlm_reward.similarity import multi_view
from vlm_reward.transforms import Transition
from vlm_reward.wrappers import Scorer

CHUNK = 256  # timesteps scored at once


@dataclass(frozen=True)
class RelabelConfig(RewardConfig):
    """Reward stored transitions again."""

    source: Annotated[Path, tyro.conf.Positional]
    """Folder of a run with --keep-frames."""
    reward: str
    """A checkpoint, zero-shot, dense or sparse."""
    output: Path
    """The .npz file to write."""
    gamma: float | None = None
    """Discount of potential-based shaping; the run's own, or 0.99, when not given."""


def main(options: RelabelConfig) -> None:
    """Score, write, and say how well the new reward agrees with the task's own."""
    learned, true = relabel_run(options)
    print(f"{len(learned)} episodes: rank correlation of the new return with the true one ", end="")
    print(f"{spearman(learned, true):.3f}\nwritten: {options.output}")


def reward_settings(options: RelabelConfig, of: AgentConfig) -> AgentConfig:
    """The settings `of` a run, with the new reward."""
    new = {field.name: getattr(options, field.name) for field in fields(RewardConfig)}
    for name in ("instruction", "gamma"):
        given = getattr(options, name)
        new[name] = getattr(of, name) if given is None else given
    if options.reward in ("dense", "sparse"):
        new |= {"instruction": None, "cameras": ()}  # nothing is scored
    return replace(of, reward=options.reward, monitor=None, keep_frames=False, label=None, **new)


def relabel_run(options: RelabelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Write the transitions of a run with new rewards.

    Returns:
        The new and the true return of its episodes, float64 [episodes].

    Raises:
        FileNotFoundError: no run, no frames or no checkpoint there.
        ValueError: the frames are not of the kind that the model was trained on.
    """
    run = options.source
    config = reward_settings(options, AgentConfig.of_run(run))
    stored = load_transitions(run / "last" / "replay.npz")
    learned = None
    if config.learned:
        frames, spec, crops = open_frames(run)
        config = replace(config, cameras=spec.cameras)
        scorer = load_scorer(config)
        assert scorer is not None
        check_frames(scorer, spec, frames.shape[2], crops)
        scorer = scorer.with_small_frames()
        before, after = stored["before"], stored["after"]
        if (before < 0).any() or max(before.max(), after.max()) >= len(frames):
            raise ValueError(f"some transitions of {run} have no frames: they came from its --buffer")
        starts = first_frames(stored, config.setting("envs"), len(frames)) if scorer.start_weight else None
        every_view = score_all(scorer, frames, config.sentence, starts).astype(np.float64)
        scores = multi_view(every_view, config.over_views)
        truncated = stored["timeouts"] > 0
        learned = shaping(config)(
            Transition(
                scores[after],
                scores[before],  # of the same episode: each begins with a frame of its own
                stored["env_rewards"].astype(np.float64),
                (stored["dones"] > 0) & ~truncated,
                truncated,
            )
        )
    rewards = agent_reward(config, learned, stored["env_rewards"], stored["success"])
    write_arrays(options.output, {**stored, "rewards": rewards})
    new, true = [], []
    for env in range(envs := config.setting("envs")):  # transitions of parallel environments alternate
        mine = {name: values[env::envs] for name, values in stored.items()}
        values = (rewards if learned is None else learned)[env::envs]
        begin = episode_starts(mine)
        for end in np.flatnonzero(mine["dones"] > 0):
            whole = slice(begin[end], end + 1)
            new.append(values[whole].sum(dtype=np.float64))
            true.append(mine["env_rewards"][whole].sum(dtype=np.float64))
    return np.array(new), np.array(true)


def first_frames(stored: dict[str, np.ndarray], envs: int, rows: int) -> np.ndarray:
    """Row of the first frame of the episode that each of `rows` kept frames belongs to: int64 [rows].

    Raises:
        ValueError: the run's buffer dropped its oldest transitions, and with them where an episode began.
    """
    if stored["before"][:envs].max() >= envs:
        raise ValueError(
            "this model scores a frame against the first of its episode, which cannot be told for the oldest "
            "transitions left: run again with a --buffer-size of all steps, or take another model"
        )
    starts = np.arange(rows)  # a frame that no transition has stands for itself
    for env in range(envs):
        mine = {name: values[env::envs] for name, values in stored.items()}
        before, after = mine["before"], mine["after"]
        starts[after] = starts[before] = before[episode_starts(mine)]
    return starts


def episode_starts(mine: dict[str, np.ndarray]) -> np.ndarray:
    """Of each of one environment's T transitions, the first of its episode: int64 [T].

    A new episode also begins where the run was stopped within one.
    """
    begins = np.ones(len(mine["dones"]), bool)
    begins[1:] = (mine["dones"][:-1] > 0) | (mine["before"][1:] != mine["after"][:-1])
    return np.flatnonzero(begins)[begins.cumsum() - 1]


def score_all(scorer: Scorer, frames: np.ndarray, text: str, starts: np.ndarray | None = None) -> np.ndarray:
    """Scores of uint8 [N, V, S, S, 3], in large batches, float32 [N, V]; `starts` as of `first_frames`."""
    scores = []
    for i in tqdm(range(0, len(frames), CHUNK), "scoring", unit=f"x{CHUNK} steps", mininterval=BAR_SECONDS):
        start = None
        if starts is not None:
            first, place = np.unique(starts[i : i + CHUNK], return_inverse=True)
            start = scorer.embed_start(frames[first])[place]
        scores.append(scorer.score(frames[i : i + CHUNK], text, start=start))
    return np.concatenate(scores)


def check_frames(scorer: LoadedScorer, spec: CameraSpec, size: int, crops: dict[str, Crop] | None) -> None:
    """ValueError when frames of a run, `size` pixels wide and these parts of the images, cannot serve a model."""
    scorer.check_camera_spec(spec)
    model = model_of(scorer)
    if model.crops != crops:
        raise ValueError("the model looks at other parts of the images than the run kept: run again with it")
    wanted = model.image_size
    if size < wanted:
        raise ValueError(f"the frames were kept at {size} pixels, but the model needs {wanted}: run again")


def write_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as fresh, open(fresh, "wb") as stream:  # given a name, savez would append .npz
        np.savez(stream, **arrays)  # pyright: ignore[reportArgumentType] (no array is called allow_pickle)


if __name__ == "__main__":
    try:
        main(tyro.cli(RelabelConfig, prog="python -m agents.relabel", description=__doc__))
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
