# mujoco ships no type stubs
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
"""Varied views of the training tasks with what the simulator knows of each: the food of `training.pretrain`.

One *shard* is many short rollouts of one task: experts, noisy experts, experts of other tasks in the same
scene, random walks; objects and mechanisms put where no rollout would leave them; colours, lights and
cameras drawn anew each time. Each frame comes with a state vector, the image positions of hand, object and
goal, and the facts (`training.captions`) that hold and that do not.

    python -m training.scenes --output out/scenes --rounds 3
    python -m training.scenes --output out/apart --rounds 1 --apart                    # states apart from hands
    python -m training.scenes --output out/agent-scenes --actions out/actions/*.npz    # what agents did

`--actions` renders in the place of these rollouts what agents did in training tasks (`python -m agents.record`):
states that an optimiser finds, for `training.train --scenes`.

`--apart` adds to each picture one of the same moment with the mechanism or the object put elsewhere. In what
anybody does a drawer is open while the hand is still away and closed when it is there, so a model that learns
"the drawer is open" from rollouts alone learns that the hand is away. `--visits` sends the hand from place to
place about the object, whatever its state, so that the one tells nothing of the other; `--goals` sends it to the
goal, too: a demonstration ends with the hand where the goal is marked, and who only goes there has done nothing.
"""

import json
import os
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import tyro

from training.captions import PALETTE, WORDS, facts
from vlm_reward._jobs import keep_settings
from vlm_reward._parallel import run_jobs
from vlm_reward.cameras import WORKSPACE, CameraRig, CameraSpec, cut, project, projections
from vlm_reward.envs import FINGERS, MetaWorldTask, expert_policy
from vlm_reward.preprocess import resize
from vlm_reward.tasks import train_tasks

STATE = (
    *(
        "hand_x",
        "hand_y",
        "hand_z",
        "opening",
        "object_x",
        "object_y",
        "object_z",
        "goal_x",
        "goal_y",
        "goal_z",
    ),
    *("offset_x", "offset_y", "offset_z", "hand_object", "object_goal", "fraction", "reward", "success"),
)
"""The state vector: metres (times 5, about the table's centre), opening and fraction in [0, 1], reward / 10."""

POINTS = ("hand", "object", "goal")
CENTRE = np.array((0.0, 0.65, 0.1))
REACH = np.array(((-0.4, 0.4, 0.05), (0.4, 0.9, 0.45)))
"""Where the hand may be sent, metres: the corners of a box over the table."""
SIMULATED_STEPS = 160
RECORDED_STEPS = 12
VIEWS = 2
_DTYPES: dict[str, type] = {
    "frames": np.uint8,
    "state": np.float32,
    "points": np.float32,
    "view": np.int8,
    "episode": np.int32,
    "partner": np.int32,
    "things": np.float32,
    "spots": np.float32,
}


@dataclass(frozen=True)
class Config:
    """Render the pretraining scenes."""

    output: Path = Path("out/scenes")
    """Folder of the shards; those already there are kept, and must be made with the same settings."""
    size: int = 112
    """Side of the stored frames, pixels."""
    rounds: int = 3
    """Shards per task."""
    episodes: int = 40
    """Rollouts per shard (24 images each; with `apart` up to 48)."""
    apart: bool = False
    """Beside each image one of the same moment with the mechanism or the object elsewhere."""
    visits: float = 0.0
    """Share of the rollouts in which the hand goes from place to place about the object, whatever its state."""
    plain: float = 0.25
    """Share of the rollouts that keep Meta-World's colours, lights and cameras; of the others they are varied."""
    goals: float = 0.0
    """Share of these visits that go to the goal in place of the object: the hand there is not the object there."""
    far: float = 0.0
    """Share of the places of these visits that are anywhere within reach, as most of the way to a thing is."""
    crop: bool = False
    """Keep of each image the part where hands and objects are (vlm_reward.cameras.WORKSPACE)."""
    tasks: tuple[str, ...] = train_tasks()
    """Training tasks to render."""
    actions: tuple[Path, ...] = ()
    """Files of agents.record to render, a shard each, in place of `rounds` and `tasks`."""
    workers: int = 2
    """Processes."""
    seed: int = 0
    """Shard r of the k-th training task draws from (seed, k, r)."""


class Variation:
    """Draws colours, lights and cameras of a model anew; `apply` starts from the model's own each time.

    `body`: the object, which may get another colour.
    """

    _FIELDS = (
        "cam_pos",
        "cam_quat",
        "cam_fovy",
        "light_pos",
        "light_diffuse",
        "geom_rgba",
        "geom_matid",
        "mat_rgba",
    )

    def __init__(self, model: mujoco.MjModel, body: str | None = None) -> None:
        self.model = model
        self._own = {name: getattr(model, name).copy() for name in self._FIELDS}
        head = model.vis.headlight
        self._head = {name: getattr(head, name).copy() for name in ("ambient", "diffuse")}
        root = model.body(body).id if body else -1
        inside = [b for b in range(model.nbody) if _is_under(model, b, root)]
        self._object = np.flatnonzero(np.isin(model.geom_bodyid, inside) & (model.geom_rgba[:, 3] > 0.1))

    def apply(self, rng: np.random.Generator, plain: float) -> str:
        """Vary the model, or, `plain` of the time, do not.

        Returns:
            The name of the object's new colour, or "" where it kept its own.
        """
        model = self.model
        for name, value in self._own.items():
            getattr(model, name)[:] = value
        for name, value in self._head.items():
            getattr(model.vis.headlight, name)[:] = value
        if rng.random() < plain:
            return ""
        model.cam_pos[:] += rng.normal(0, 0.04, model.cam_pos.shape)
        for quaternion in model.cam_quat:
            turn, axis = np.empty(4), rng.normal(size=3)
            mujoco.mju_axisAngle2Quat(turn, axis / np.linalg.norm(axis), rng.normal(0, 0.04))
            mujoco.mju_mulQuat(quaternion, turn, quaternion.copy())
        model.cam_fovy[:] *= rng.uniform(0.93, 1.07, model.cam_fovy.shape)
        model.light_diffuse[:] *= rng.uniform(0.4, 1.4)
        model.light_pos[:] += rng.normal(0, 0.3, model.light_pos.shape)
        model.vis.headlight.ambient[:] *= rng.uniform(0.6, 1.4)
        model.vis.headlight.diffuse[:] *= rng.uniform(0.6, 1.4)
        strength = rng.choice([0.1, 0.3, 0.6])
        tint = rng.uniform(1 - strength, 1 + strength, model.mat_rgba[:, :3].shape)
        model.mat_rgba[:, :3] = np.clip(model.mat_rgba[:, :3] * tint, 0, 1)
        tint = rng.uniform(1 - strength / 2, 1 + strength / 2, model.geom_rgba[:, :3].shape)
        model.geom_rgba[:, :3] = np.clip(model.geom_rgba[:, :3] * tint, 0, 1)
        if rng.random() < 0.5 and len(self._object):
            colour = str(rng.choice(list(PALETTE)))
            model.geom_matid[self._object] = -1
            model.geom_rgba[self._object, :3] = np.clip(
                np.array(PALETTE[colour]) * rng.uniform(0.85, 1.15), 0, 1
            )
            return colour
        return ""


def _is_under(model: mujoco.MjModel, body: int, root: int) -> bool:
    while body not in (0, root):
        body = int(model.body_parentid[body])
    return body == root


def _mechanism(model: mujoco.MjModel, name: str) -> int:
    """The qpos address of a task's mechanism; "" is the one unnamed hinge or slide."""
    for joint in range(model.njnt):
        if model.joint(joint).name == name and model.jnt_type[joint] != mujoco.mjtJoint.mjJNT_FREE:
            return int(model.jnt_qposadr[joint])
    raise ValueError(f"no joint {name!r} in the model")


def _same_scene(task: str, names: tuple[str, ...]) -> list[str]:
    """Tasks whose experts make sense in this task's scene."""
    return [
        other
        for other in names
        if WORDS[other].body == WORDS[task].body and WORDS[other].noun == WORDS[task].noun
    ]


class _Actor:
    """One of several ways to behave, drawn per rollout."""

    def __init__(self, task: str, rng: np.random.Generator, names: tuple[str, ...]) -> None:
        self.rng = rng
        kind = rng.choice(["expert", "other", "random", "switch"], p=[0.5, 0.15, 0.1, 0.25])
        self.policy = expert_policy(str(rng.choice(_same_scene(task, names))) if kind == "other" else task)
        self.noise = float(rng.choice([0.0, 0.3, 0.8]))
        self.bias = rng.normal(0, 0.3, 4) * (rng.random() < 0.3)
        self.random_from = {"random": 0, "switch": int(rng.integers(10, 90))}.get(str(kind), 10**9)
        self.random_until = self.random_from + int(rng.integers(20, 100)) if kind == "switch" else 10**9
        self.walk = rng.normal(0, 1, 4)

    def __call__(self, step: int, observation: np.ndarray) -> np.ndarray:
        if self.random_from <= step < self.random_until:
            self.walk = 0.9 * self.walk + 0.45 * self.rng.normal(0, 1, 4)
            return self.walk
        return self.policy(observation) + self.bias + self.noise * self.rng.normal(0, 1, 4)


class _Visitor:
    """Goes from place to place about the object, wherever it is, or, `goals` of the time, about the goal.

    `far` of the places are anywhere within reach.
    """

    def __init__(self, rng: np.random.Generator, goals: float, far: float) -> None:
        self.rng, self.goals, self.far = rng, goals, far
        self.until, self.aside, self.grip, self.to_goal = 0, np.zeros(3), 0.0, False
        self.anywhere: np.ndarray | None = None

    def __call__(self, step: int, observation: np.ndarray) -> np.ndarray:
        rng = self.rng
        if step >= self.until:
            self.until = step + int(rng.integers(8, 24))
            self.aside = rng.normal(0, rng.choice([0.02, 0.06, 0.15]), 3)
            self.grip = float(rng.choice([-1, 1]))
            self.to_goal = self.goals > 0 and rng.random() < self.goals and bool(observation[36:39].any())
            goes_far = self.far > 0 and rng.random() < self.far
            self.anywhere = rng.uniform(*REACH) if goes_far else None
        place = observation[36:39] if self.to_goal else observation[4:7]
        place = place + self.aside if self.anywhere is None else self.anywhere
        way = place - (observation[:3] + FINGERS)
        return np.append(10 * way, self.grip)


def replay(actions: np.ndarray) -> Callable[[int, np.ndarray], np.ndarray]:
    """Does again what was done: actions [T, 4]."""
    return lambda step, _: actions[step]


def _disturb(env: MetaWorldTask, task: str, rng: np.random.Generator) -> None:
    """Put the mechanism or the object where no rollout of this task begins, now and then."""
    if rng.random() < (0.3 if WORDS[task].joint is None else 0.4):
        _put_elsewhere(env, task, rng)


def _put_elsewhere(env: MetaWorldTask, task: str, rng: np.random.Generator) -> None:
    """Draw the state of the mechanism, or the place of the object, anew; the hand stays where it is."""
    words, data = WORDS[task], env.data
    free = np.flatnonzero(env.model.jnt_type == mujoco.mjtJoint.mjJNT_FREE)
    if words.joint is not None:
        name, low, high = words.joint
        fraction = rng.choice([0.0, 1.0, rng.random()], p=[0.25, 0.25, 0.5])
        data.qpos[_mechanism(env.model, name)] = low + (high - low) * fraction
    elif len(free):
        address = int(env.model.jnt_qposadr[free[0]])
        where = rng.choice(["goal", "hand", "table"], p=[0.3, 0.2, 0.5])
        if where == "goal" and env.metaworld._target_pos is not None:
            place = env.metaworld._target_pos + rng.normal(0, 0.02, 3) + (0, 0, 0.02)
            data.qpos[address : address + 3] = place
        elif where == "hand":
            data.qpos[address : address + 2] = env.metaworld.tcp_center[:2] + rng.normal(0, 0.06, 2)
        else:
            data.qpos[address : address + 2] = rng.uniform((-0.3, 0.45), (0.3, 0.85))
    env.forward()


def depth(data: mujoco.MjData) -> float:
    """How deep things are in each other at most, metres."""
    return max((-data.contact[i].dist for i in range(data.ncon)), default=0.0)


def _moved(env: MetaWorldTask, task: str, rng: np.random.Generator, tries: int = 6) -> bool:
    """Put the mechanism or the object elsewhere, where the hand leaves room for it. Returns whether it moved."""
    moment, deep = env.snapshot(), depth(env.data) + 0.005
    for _ in range(tries):
        _put_elsewhere(env, task, rng)
        if depth(env.data) <= deep and np.abs(env.snapshot() - moment).max() > 1e-3:
            return True
        env.restore(moment)
    return False


def read_actions(file: Path) -> tuple[str, np.ndarray, np.ndarray]:
    """Task, seeds int64 [E] of the resets and actions float32 [E, T, 4] of a file of agents.record.

    Raises:
        ValueError: the file is something else, or of a task that is not for training.
    """
    try:
        with np.load(file) as stored:
            task, seeds, actions = str(stored["task"]), stored["seeds"], stored["actions"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} holds no actions of agents.record ({error!r})") from error
    if task not in train_tasks():
        raise ValueError(f"scenes are rendered of training tasks alone, {file} is of {task}")
    return task, seeds, actions


def inside(points: np.ndarray) -> np.ndarray:
    """Image coordinates [..., 2], NaN where they are outside of [-1, 1]."""
    return np.where((np.abs(points) <= 1).all(-1, keepdims=True), points, np.nan).astype(np.float32)


class Shard:
    """The rows of a shard in the making, view by view of one moment after the other.

    Args:
        rig: of the environment.
        env: with MuJoCo's `model` and `data`.
        size: side of the frames, pixels.
        crop: keep the part of each image where hands and objects are.
    """

    def __init__(self, rig: CameraRig, env: Any, size: int, crop: bool) -> None:
        self.rig, self.env, self.size, self.crop = rig, env, size, crop
        self._rows: dict[str, list] = defaultdict(list)

    def _seen(self, camera: str, points: np.ndarray) -> np.ndarray:
        """Where points [P, 3] are in the image that is kept: [P, 2] in [-1, 1], NaN where they are not in it."""
        crops = WORKSPACE if self.crop else None
        (projection,) = projections(self.env.model, self.env.data, [camera], crops)
        return inside(project(points, projection))

    def add(
        self,
        views: np.ndarray,
        points: np.ndarray,
        state: np.ndarray,
        places: np.ndarray | None = None,
        **known: Any,
    ) -> None:
        """Rows of some views of the moment as it stands.

        Args:
            views: int64 [V], which cameras of the rig.
            points: of POINTS, world coordinates [3, 3], NaN where there is none.
            state: the state vector.
            places: of several things, world coordinates [T, 3], NaN where there is none.
            known: what else is known of each of the rows.
        """
        pictures, cameras = self.rig.render_views(views), [self.rig.spec.cameras[view] for view in views]
        if self.crop:
            pictures = cut(pictures, [WORKSPACE[camera] for camera in cameras])
        for view, camera, picture in zip(views, cameras, resize(pictures, self.size), strict=True):
            row = {"frames": np.asarray(picture), "state": np.clip(state, -8, 8)}
            row["points"] = self._seen(camera, points)
            if places is not None:
                row["spots"] = self._seen(camera, places)
            for key, value in (row | {"view": view, "partner": -1} | known).items():
                self._rows[key].append(value)

    def pair(self, count: int) -> None:
        """The last `count` rows show the moment of the `count` before them, with the state elsewhere."""
        partner = self._rows["partner"]
        both = np.arange(len(partner) - 2 * count, len(partner))
        partner[-2 * count :] = np.roll(both, count).tolist()

    def packed(self) -> dict[str, Any]:
        """All rows by key, as arrays; facts stay lists."""
        rows = self._rows
        return {
            key: np.stack(rows[key]).astype(_DTYPES[key]) if key in _DTYPES else rows[key] for key in rows
        }


def make_shard(
    task: str,
    size: int,
    episodes: int,
    seed: tuple[int, ...],
    actions: Path | None = None,
    apart: bool = False,
    visits: float = 0.0,
    plain: float = 0.25,
    crop: bool = False,
    goals: float = 0.0,
    far: float = 0.0,
) -> dict[str, Any]:
    """Render one shard.

    Args:
        task: a training task.
        size: side of the frames, pixels.
        episodes: rollouts.
        seed: of all that is drawn.
        actions: a file of agents.record, whose episodes are replayed; the number of rollouts is theirs.
        apart: beside each image one of the same moment with the mechanism or the object elsewhere.
        visits: share of the rollouts in which the hand goes from place to place about the object.
        plain: share of the rollouts that keep Meta-World's colours, lights and cameras.
        crop: keep the part of each image where hands and objects are.
        goals: share of the visits that go to the goal in place of the object.
        far: share of the places of the visits that are anywhere within reach.

    Returns:
        `frames` uint8 [N, size, size, 3]; `state` float32 [N, len(STATE)] with NaN where a quantity does
        not exist; `points` float32 [N, 3, 2] image positions (NaN outside the image); `view` int8 [N];
        `episode` int32 [N]; `partner` int32 [N], the image of the same moment and view with the state
        elsewhere, or -1; `true`, `false`: N lists of facts each.
    """
    rng = np.random.default_rng(seed)
    names = train_tasks()
    words = WORDS[task]
    env = MetaWorldTask(task, int(rng.integers(2**31)), random_hand_start=actions is None)
    seeds, acted = [None] * episodes, None
    if actions:
        _, seeds, acted = read_actions(actions)
    steps = SIMULATED_STEPS if acted is None else acted.shape[1]
    variation = Variation(env.model, words.body)
    spec = CameraSpec()
    address = _mechanism(env.model, words.joint[0]) if words.joint else None

    def show(episode: int, views: np.ndarray, known: tuple[np.ndarray, list[str], list[str]]) -> None:
        state, true, false = known
        points = np.stack([state[i : i + 3] / 5 + CENTRE for i in (0, 4, 7)])
        shard.add(views, points, state, episode=episode, true=true, false=false)

    with CameraRig(env, spec) as rig:
        shard = Shard(rig, env, size, crop)
        for episode, start_seed in enumerate(seeds):
            observation, _ = env.reset(seed=None if start_seed is None else int(start_seed))
            colour = variation.apply(rng, plain) or words.colour
            env.forward()
            start = observation[4:7].copy()
            act: Callable[[int, np.ndarray], np.ndarray]
            if acted is not None:
                act = replay(acted[episode])
            elif visits and rng.random() < visits:
                _put_elsewhere(env, task, rng)
                act = _Visitor(rng, goals, far)
            else:
                _disturb(env, task, rng)
                act = _Actor(task, rng, names)

            recorded = set(rng.choice(steps, min(RECORDED_STEPS, steps), replace=False).tolist())
            for step in range(steps):
                observation, reward, _, _, info = env.step(act(step, observation))
                if step not in recorded:
                    continue
                views = rng.choice(len(spec.cameras), VIEWS, replace=False)
                known = partial(_known, env, task, start=start, colour=colour, joint=address, generator=rng)
                show(episode, views, known(observation, reward, info["success"]))
                moment = env.snapshot()
                if apart and _moved(env, task, rng):
                    there, reward, info = env.observe()
                    show(episode, views, known(there, reward, info["success"]))
                    shard.pair(VIEWS)
                    env.restore(moment)
    env.close()
    return shard.packed()


def _known(
    env: MetaWorldTask,
    task: str,
    observation: np.ndarray,
    reward: float,
    success: bool,
    *,
    start: np.ndarray,
    colour: str,
    joint: int | None,
    generator: np.random.Generator,
) -> tuple[np.ndarray, list[str], list[str]]:
    """State vector of a moment, facts that hold and facts that do not; `joint`: the mechanism's qpos address."""
    words = WORDS[task]
    hand, position, goal = env.metaworld.tcp_center, observation[4:7], observation[36:39]
    opening = float(observation[3])
    value = float(env.data.qpos[joint]) if joint is not None else None
    fraction = np.nan
    if words.joint is not None and value is not None:
        fraction = (value - words.joint[1]) / (words.joint[2] - words.joint[1])
    distance = float(np.linalg.norm(hand - position))
    grasped = distance < 0.05 and 0.1 < opening < 0.85 and position[2] - start[2] > 0.03
    true, false = facts(
        task,
        hand=hand,
        opening=opening,
        position=position,
        start=start,
        goal=goal,
        joint=value,
        success=success,
        grasped=grasped,
        colour=colour,
        generator=generator,
    )
    state = np.hstack(
        [
            (hand - CENTRE) * 5,
            opening,
            (position - CENTRE) * 5,
            (goal - CENTRE) * 5,
            (position - hand) * 5,
            distance * 5,
            np.linalg.norm(position - goal) * 5,
            np.clip(fraction, -0.5, 1.5),
            reward / 10,
            float(success),
        ]
    )
    return state, true, false


def _write_shard(job: tuple[Path, str, tuple[int, ...], Path | None, Config]) -> None:
    path, task, seed, actions, config = job
    size = config.size
    how = (config.apart, config.visits, config.plain, config.crop, config.goals, config.far)
    shard = make_shard(task, size, config.episodes, seed, actions, *how)
    write_shard(path, {"task": task, "seed": seed, "size": size, "crop": config.crop}, shard)


def write_shard(path: Path, header: dict[str, Any], shard: dict[str, Any]) -> None:
    """Write what `make_shard` returned; the header gets the table of its facts."""
    vocabulary = sorted({fact for key in ("true", "false") for row in shard[key] for fact in row})
    index = {fact: i for i, fact in enumerate(vocabulary)}
    for key in ("true", "false"):
        width = max(len(row) for row in shard[key])
        ids = [[index[fact] for fact in row] + [-1] * (width - len(row)) for row in shard[key]]
        shard[key] = np.array(ids, np.int16)
    fresh = path.with_suffix(".partial")
    with fresh.open("wb") as file:
        np.savez(file, header=np.array(json.dumps(header | {"facts": vocabulary})), **shard)
    os.replace(fresh, path)


def main(config: Config) -> None:
    """Render all shards that are not there yet, round by round, so that any prefix is balanced over tasks."""
    for name in ("visits", "plain", "goals", "far"):
        if not 0 <= (share := getattr(config, name)) <= 1:
            of = "visits" if name in ("goals", "far") else "rollouts"
            raise ValueError(f"--{name} is a share of the {of}, from 0 to 1, got {share}")
    if config.actions and config.visits:
        raise ValueError("--actions are replayed as they were: there is no room for --visits")
    order = train_tasks()
    unknown = [task for task in config.tasks if task not in order]
    if unknown:
        raise ValueError(f"scenes are rendered of training tasks alone, got {', '.join(unknown)}")
    keep_settings(config, "rounds", "tasks", "actions", otherwise="holds scenes made otherwise")
    wanted = [(task, round_, None) for round_ in range(config.rounds) for task in config.tasks]
    if config.actions:
        found = [(read_actions(file)[0], file) for file in sorted(config.actions)]
        counts = Counter[str]()
        wanted = []
        for task, file in found:
            wanted.append((task, counts[task], file))
            counts[task] += 1
    jobs = [
        (path, task, (config.seed, order.index(task), round_), file, config)
        for task, round_, file in wanted
        if not (path := config.output / f"{round_:03d}-{task}.npz").exists()
    ]
    done = len(wanted) - len(jobs)
    run_jobs(_write_shard, jobs, workers=config.workers, unit="shard", done=done)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, prog="python -m training.scenes", description=__doc__))
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
