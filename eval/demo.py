"""The main job in a minute: a sentence becomes a dense reward on a task that no training has seen.

    python -m eval.demo                                   # what `make demo` runs
    python -m eval.demo --task button-press-v3 --sentence "press the button"

Rolls out an expert, one that goes astray and a random agent, scores each step of each camera with the
sentence, prints how good a reward that is, and writes a picture and a film.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

from eval.figures import STYLES, frames_over_curves
from eval.metrics import consistency, consistency_pairs, multi_view, voc
from vlm_reward._film import write_film
from vlm_reward.cameras import CameraRig, CameraSpec
from vlm_reward.envs import Kind, behaviour, make_env
from vlm_reward.reward_model import RewardModel
from vlm_reward.tasks import HELD_OUT, instruction

BEHAVIOURS: dict[str, Kind] = {"expert": "expert", "astray": "mixed", "random": "random"}
STEPS = 120


@dataclass(frozen=True)
class DemoConfig:
    """Score rollouts of a held-out task."""

    checkpoint: str = "siglip2-tiny/triplet"
    """Adapter or backbone: a folder, a name under checkpoints/, or a Hub id."""
    task: str = "drawer-open-v3"
    """Any Meta-World task; the default is one of the three held out from all training."""
    sentence: str | None = None
    """What the robot should do; the task's instruction when not given."""
    out: Path = Path("out/demo")
    """Folder of the picture and the film."""
    seed: int = 3
    """Seed of the rollouts."""


def roll_out(task: str, kind: Kind, seed: int, spec: CameraSpec) -> tuple[np.ndarray, np.ndarray]:
    """One rollout, cut where an expert succeeds.

    Returns:
        frames uint8 [T + 1, V, H, W, 3], the first after the reset; true rewards float64 [T].
    """
    env = make_env(task, max_episode_steps=STEPS, terminate_on_success=kind == "expert")
    observation, _ = env.reset(seed=seed)
    act = behaviour(task, kind, np.random.default_rng(seed))
    with CameraRig(env, spec) as rig:
        frames, rewards, done = [rig.render()], [], False
        while not done:
            observation, reward, terminated, truncated, _ = env.step(act(len(rewards), observation))
            frames.append(rig.render())
            rewards.append(float(reward))
            done = terminated or truncated
    env.close()
    return np.stack(frames), np.array(rewards)


def main(cfg: DemoConfig) -> None:
    """Roll out, score, print, draw."""
    began = time.perf_counter()
    sentence = cfg.sentence or instruction(cfg.task)
    model = RewardModel.from_pretrained(cfg.checkpoint)
    spec = model.camera_spec or CameraSpec()
    seen = "held out from all training" if cfg.task in HELD_OUT else "a training task"
    print(f'{cfg.checkpoint} scores {cfg.task} ({seen}) with "{sentence}"\n')

    frames, rewards, scores = {}, {}, {}
    for name, kind in BEHAVIOURS.items():
        frames[name], rewards[name] = roll_out(cfg.task, kind, cfg.seed, spec)
        scores[name] = multi_view(model.score(frames[name], sentence))  # [T + 1, V + 1], the mean last
        print(f"  {name:7s} {len(rewards[name]):3d} steps, score {curve(scores, name)}")

    views = [*spec.cameras, "all views"]
    others = [name for name in BEHAVIOURS if name != "expert"]
    true = np.concatenate([rewards[name] for name in others])
    pairs = consistency_pairs(true, n_pairs=2000, seed=cfg.seed)
    judged = np.concatenate([scores[name][1:] for name in others])
    print(f"\n  {'':34s}" + "".join(f"{view:>11s}" for view in views))
    vocs = [100 * voc(scores["expert"][:, v]) for v in range(len(views))]
    accuracies = [100 * consistency(judged[:, v], pairs) for v in range(len(views))]
    print("  VOC of the expert (chance 0)      " + "".join(f"{value:11.1f}" for value in vocs))
    print("  consistency, other two (chance 50)" + "".join(f"{value:11.1f}" for value in accuracies))

    cfg.out.mkdir(parents=True, exist_ok=True)
    picture, video = cfg.out / f"{cfg.task}.png", cfg.out / f"{cfg.task}.mp4"
    strips = {name: np.linspace(0, len(frames[name]) - 1, 6).round().astype(int) for name in BEHAVIOURS}
    frames_over_curves(
        {name: frames[name][steps, 0] for name, steps in strips.items()},
        {name: steps.tolist() for name, steps in strips.items()},
        {name: score[:, -1] for name, score in scores.items()},
        picture,
        title=f'"{sentence}"',
        ylabel="reward: mean score of the views",
    )
    film(video, frames, {name: score[:, -1] for name, score in scores.items()}, sentence)
    print(f"\npicture  {picture}\nfilm     {video}\n({time.perf_counter() - began:.0f} s)\n")
    print("Next: another sentence or task (python -m eval.demo --help), your own environment (README.md),")
    print("or train an adapter: python -m training.collect demos && python -m training.train --help")


def curve(scores: dict[str, np.ndarray], name: str) -> str:
    """A trajectory's scores as a line of block characters, eight levels over the range of all trajectories."""
    everything = np.concatenate([score[:, -1] for score in scores.values()])
    values = scores[name][:, -1]
    values = values[np.linspace(0, len(values) - 1, min(60, len(values))).round().astype(int)]
    levels = (values - everything.min()) / max(np.ptp(everything), 1e-9) * 7
    return "".join("▁▂▃▄▅▆▇█"[level] for level in levels.round().astype(int))


def film(path: Path, frames: dict[str, np.ndarray], curves: dict[str, np.ndarray], sentence: str) -> None:
    """An MP4 of one rollout after another above all their curves, with a cursor.

    Args:
        path: the file to write.
        frames: label -> uint8 [T, V, H, W, 3].
        curves: label -> reward [T].
        sentence: what was asked for.
    """
    figure = Figure(layout="constrained")
    ax = figure.add_subplot(xlabel="step", ylabel="reward", title=f'"{sentence}"')
    for (label, values), style in zip(curves.items(), STYLES, strict=False):
        ax.plot(values, label=label, linewidth=1.6, **style)  # pyright: ignore[reportArgumentType]
    ax.legend(frameon=False, fontsize=8)
    cursor, point = ax.axvline(0, color="black", linewidth=0.8), ax.plot(0, 0, "ko", markersize=5)[0]
    drawn = [curves[label] for label in frames]

    def point_at(number: int, step: int) -> None:
        cursor.set_xdata([step, step])
        point.set_data([step], [drawn[number][step]])

    write_film(path, list(frames.values()), figure, point_at)


if __name__ == "__main__":
    try:
        main(tyro.cli(DemoConfig, description=__doc__))
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
