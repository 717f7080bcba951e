"""The main job in a minute: a sentence becomes a dense reward on a task that no training has seen.

    vlm-reward demo                                       # what `make demo` runs
    vlm-reward demo --task button-press-v3 --instruction "press the button"

Rolls out an expert, one that goes astray and a random agent, scores each step of each camera with the
sentence, prints how good a reward that is, and writes a picture and a film.
"""

import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from vlm_reward._film import write_film
from vlm_reward._jobs import BAR_SECONDS
from vlm_reward.cameras import CameraRig, CameraSpec
from vlm_reward.curves import STYLES, blocks, frames_over_curves
from vlm_reward.envs import Kind, behaviour, make_env
from vlm_reward.metrics import consistency, consistency_pairs, multi_view, voc
from vlm_reward.reward_model import RewardModel
from vlm_reward.tasks import HELD_OUT, instruction

BEHAVIOURS: dict[str, Kind] = {"expert": "expert", "astray": "mixed", "random": "random"}
STEPS = 120


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


def demo(
    checkpoint: str, task: str, sentence: str | None = None, *, out: Path = Path("out/demo"), seed: int = 3
) -> None:
    """Roll out, score, print, draw.

    Args:
        checkpoint: adapter, backbone or ensemble: a folder, an embedded name, or a Hub id.
        task: any Meta-World task.
        sentence: what the robot should do; the task's instruction when not given.
        out: folder of the picture and the film.
        seed: of the rollouts.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: no such task, an empty sentence.
        RuntimeError: nothing renders; the message says what to install.
    """
    began = time.perf_counter()
    sentence = instruction(task) if sentence is None else sentence
    model = RewardModel.from_pretrained(checkpoint)
    model.embed_text([sentence])  # an empty one is refused before anything is rendered
    spec = model.camera_spec or CameraSpec()
    seen = "held out from all training" if task in HELD_OUT else "a training task"
    print(f'{checkpoint} scores {task} ({seen}) with "{sentence}"\n')

    frames, rewards, scores = {}, {}, {}
    for name, kind in tqdm(BEHAVIOURS.items(), unit="rollout", mininterval=BAR_SECONDS, leave=False):
        frames[name], rewards[name] = roll_out(task, kind, seed, spec)
        every_view = model.score(frames[name], sentence, start=frames[name][0])
        scores[name] = multi_view(every_view)  # [T + 1, V + 1], the mean last
    low = min(score[:, -1].min() for score in scores.values())
    high = max(score[:, -1].max() for score in scores.values())
    for name, score in scores.items():
        print(f"  {name:7s} {len(rewards[name]):3d} steps, score {blocks(score[:, -1], low, high)}")

    views = [*spec.cameras, "all views"]
    others = [name for name in BEHAVIOURS if name != "expert"]
    true = np.concatenate([rewards[name] for name in others])
    pairs = consistency_pairs(true, n_pairs=2000, seed=seed)
    judged = np.concatenate([scores[name][1:] for name in others])
    print(f"\n  {'':34s}" + "".join(f"{view:>11s}" for view in views))
    vocs = [100 * voc(scores["expert"][:, v]) for v in range(len(views))]
    accuracies = [100 * consistency(judged[:, v], pairs) for v in range(len(views))]
    print("  VOC of the expert (chance 0)      " + "".join(f"{value:11.1f}" for value in vocs))
    print("  consistency, other two (chance 50)" + "".join(f"{value:11.1f}" for value in accuracies))
    if accuracies[-1] < 50:
        print(
            "  Below 50 the failures are ordered worse than by chance. These are two; of many: README, Results."
        )

    out.mkdir(parents=True, exist_ok=True)
    picture, video = out / f"{task}.png", out / f"{task}.mp4"
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
    print("Next (in a checkout after `source .venv/bin/activate`):")
    print("  vlm-reward demo --help             another sentence or task")
    print("  vlm-reward demo --model siglip2-tiny-soup/reach+start    how near the hand is, for agents")
    print("  vlm-reward score --help            your own video")
    print("  python -m training.train --help    an adapter of your own")
    print("  README.md                          your own environment")


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
