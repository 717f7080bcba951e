"""Score what was recorded once again, with another model: one exploration serves many rewards.

    python -m agents.train --task drawer-close-v3 --reward siglip2-tiny/triplet --keep-frames --output runs/explore
    python -m agents.relabel runs/explore --reward runs/siglip2-tiny/liv --output out/liv.npz
    python -m agents.train --task drawer-close-v3 --reward runs/siglip2-tiny/liv --buffer out/liv.npz

    python -m agents.relabel vlm-reward/demos-paper-v0 --reward siglip2-tiny/triplet --output out/demos.npz

A run gives a file of transitions with new rewards, for `--buffer`. A Minari dataset gives the arrays
`scores` float32 [T, V], `rewards` and `env_rewards` float32 [T] (those of the step that led to the frame, 0 at
the first of an episode), `starts` and `lengths` int64 [episodes].
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

from agents.config import AgentConfig, RewardConfig
from agents.replay import load_transitions, open_frames
from agents.rewards import agent_reward, encoder_of, load_scorer, shaping
from eval.metrics import spearman
from vlm_reward._jobs import BAR_SECONDS, replacing
from vlm_reward.cameras import CameraSpec
from vlm_reward.frame_cache import cached
from vlm_reward.transforms import Transition
from vlm_reward.wrappers import Scorer

CHUNK = 256  # timesteps scored at once


@dataclass(frozen=True)
class RelabelConfig(RewardConfig):
    """Reward stored transitions or demonstrations again."""

    source: Annotated[str, tyro.conf.Positional]
    """Folder of a run with --keep-frames, or the Minari id of a dataset."""
    reward: str
    """A checkpoint, zero-shot, or (for a run) dense or sparse."""
    output: Path
    """The .npz file to write."""
    gamma: float | None = None
    """Discount of potential-based shaping; the run's own, or 0.99, when not given."""


def main(options: RelabelConfig) -> None:
    """Score, write, and say how well the new reward agrees with the task's own."""
    run = Path(options.source)
    if run.is_dir():
        learned, true = relabel_run(run, options)
    else:
        learned, true = relabel_dataset(options)
    print(f"{len(learned)} episodes: rank correlation of the new return with the true one ", end="")
    print(f"{spearman(learned, true):.3f}\nwritten: {options.output}")


def reward_settings(options: RelabelConfig, of: AgentConfig) -> AgentConfig:
    """The settings `of` a run, with the new reward."""
    new = {field.name: getattr(options, field.name) for field in fields(RewardConfig)}
    for name in ("instruction", "gamma"):
        given = getattr(options, name)
        new[name] = getattr(of, name) if given is None else given
    return replace(of, reward=options.reward, monitor=None, keep_frames=False, label=None, **new)


def relabel_run(run: Path, options: RelabelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Write the transitions of a run with new rewards.

    Returns:
        The new and the true return of its episodes, float64 [episodes].

    Raises:
        FileNotFoundError: no run, no frames or no checkpoint there.
        ValueError: the frames are not of the kind that the model was trained on.
    """
    config = reward_settings(options, AgentConfig.of_run(run))
    stored = load_transitions(run / "last" / "replay.npz")
    learned = None
    if config.learned:
        frames, spec = open_frames(run)
        config = replace(config, cameras=spec.cameras)
        scorer = load_scorer(config)
        assert scorer is not None
        check_frames(scorer, spec, frames.shape[2])
        before, after = stored["before"], stored["after"]
        if (before < 0).any() or max(before.max(), after.max()) >= len(frames):
            raise ValueError(f"some transitions of {run} have no frames: they came from its --buffer")
        scores = score_all(scorer, frames, [config.sentence] * len(frames)).mean(1, dtype=np.float64)
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
        start = 0
        for i, done in enumerate(mine["dones"] > 0):
            if i and mine["before"][i] != mine["after"][i - 1]:
                start = i  # a new episode, also where the run was stopped within one
            if done:
                new.append(values[start : i + 1].sum(dtype=np.float64))
                true.append(mine["env_rewards"][start : i + 1].sum(dtype=np.float64))
                start = i + 1
    return np.array(new), np.array(true)


def relabel_dataset(options: RelabelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Write scores and rewards of a Minari dataset; returns as `relabel_run`.

    Raises:
        FileNotFoundError: no such dataset or checkpoint.
        ValueError: frames that the model was not trained on; a reward that is not learned.
    """
    config = reward_settings(options, AgentConfig())
    if not config.learned or config.add != "none":
        raise ValueError("a dataset can be given learned rewards alone: its own are stored in it")
    scorer = load_scorer(config)
    assert scorer is not None
    encoder = encoder_of(scorer)
    cache = cached(options.source, encoder.image_size, expect=scorer.camera_spec, resample=encoder.resample)
    texts = [options.instruction or e.instruction for e in cache.episodes for _ in range(e.length)]
    scores = score_all(scorer, cache.frames, texts)
    rewards = np.zeros(len(scores), np.float32)
    for episode in cache.episodes:
        values = scores[episode.rows].mean(1, dtype=np.float64)
        steps = np.arange(1, episode.length)
        transition = Transition(
            values[1:],
            values[:-1],
            cache.rewards[episode.rows][1:].astype(np.float64),
            np.zeros(len(steps), bool),
            steps == episode.length - 1,
        )
        rewards[episode.rows][1:] = config.reward_scale * shaping(config)(transition)
    starts = np.array([episode.start for episode in cache.episodes])
    write_arrays(
        options.output,
        {
            "scores": scores,
            "rewards": rewards,
            "env_rewards": cache.rewards,
            "starts": starts,
            "lengths": np.array([episode.length for episode in cache.episodes]),
        },
    )
    return np.add.reduceat(rewards, starts).astype(float), np.add.reduceat(cache.rewards, starts).astype(
        float
    )


def score_all(scorer: Scorer, frames: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Scores of uint8 [N, V, S, S, 3], each with its sentence, in large batches: float32 [N, V]."""
    starts = tqdm(
        range(0, len(frames), CHUNK),
        "scoring",
        unit=f"x{CHUNK} steps",
        mininterval=BAR_SECONDS,
    )
    return np.concatenate([scorer.score(frames[i : i + CHUNK], texts[i : i + CHUNK]) for i in starts])


def check_frames(scorer: Scorer, spec: CameraSpec, size: int) -> None:
    """ValueError when frames of a run, `size` pixels wide, cannot serve a model."""
    scorer.check_camera_spec(spec)
    wanted = encoder_of(scorer).image_size
    if size < wanted:
        raise ValueError(f"the frames were kept at {size} pixels, but the model needs {wanted}: run again")


def write_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as fresh, open(fresh, "wb") as stream:  # given a name, savez would append .npz
        np.savez(stream, **arrays)  # pyright: ignore[reportArgumentType] (no array is called allow_pickle)


if __name__ == "__main__":
    try:
        main(tyro.cli(RelabelConfig, description=__doc__))
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
