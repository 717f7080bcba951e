"""Record demonstrations and evaluation sets of Meta-World as Minari datasets.

    python -m training.collect demos           # 3 expert demonstrations for each of the 44 training tasks
    python -m training.collect eval-expert     # 50 expert trajectories for each held-out task (VOC)
    python -m training.collect eval-rollouts   # random and sub-optimal rollouts of them (consistency)
    python -m training.collect eval-opposites  # experts of the training tasks that have an opposite (listening)
    python -m training.collect train-rollouts  # random and sub-optimal rollouts of the training tasks
    python -m training.collect train-rollouts --kinds wander miss --dataset vlm-reward/train-hacks-v0
    python -m training.collect agent-rollouts --actions out/actions/*.npz   # what agents did (agents.record)

Expert episodes start with the hand moved by up to 10 cm and are cut at their first success; failures are
tried again. Sub-optimal ones are `noisy` (an expert with Gaussian action noise) and `mixed` (an expert that
goes astray at a random step); with `--kinds`, `wander` (an expert whose hand then goes anywhere), `miss` (an
expert beside the object) and `goal` (the hand goes to the mark of the goal, without the object). Stop with Ctrl-C
and start again: finished episodes are kept. The dataset appears under Minari's root (or `--data-root`) when it is
whole; `minari.load_dataset(ID)` opens it.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import gymnasium as gym
import h5py
import minari
import numpy as np
import tyro
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage
from minari.namespace import create_namespace, list_local_namespaces
from minari.storage.datasets_root_dir import get_dataset_path

from training.scenes import read_actions, replay
from vlm_reward._parallel import run_jobs
from vlm_reward.cameras import DEFAULT_CAMERAS, DEFAULT_SIZE, CameraRig, CameraSpec
from vlm_reward.envs import KINDS, Kind, MetaWorldTask, behaviour, make_env
from vlm_reward.tasks import HELD_OUT, OPPOSITES, check_task, instruction, train_tasks

MAX_ATTEMPTS = 40


@dataclass(frozen=True)
class Config:
    """Record a Minari dataset of Meta-World rollouts."""

    preset: Annotated[
        Literal[
            "demos", "eval-expert", "eval-rollouts", "eval-opposites", "train-rollouts", "agent-rollouts"
        ],
        tyro.conf.Positional,
    ]
    """demos, train-rollouts: training tasks; eval-expert, eval-rollouts: held-out ones; eval-opposites: those with
    opposites; agent-rollouts: those of `--actions`."""
    dataset: str | None = None
    """Minari id; default vlm-reward/PRESET-v0, for demos vlm-reward/demos-SPLIT-v0."""
    split: Literal["paper", "strict"] = "paper"
    """Which tasks train."""
    tasks: tuple[str, ...] | None = None
    """Other tasks than the preset's."""
    actions: tuple[Path, ...] = ()
    """Of agent-rollouts: files of agents.record, of training tasks; their episodes are done again."""
    kinds: tuple[Kind, ...] | None = None
    """Of eval-rollouts and train-rollouts: who acts; random, noisy and mixed when not given."""
    episodes: int | None = None
    """Episodes per task and kind; default 3 (demos, train-rollouts), 50, 12 and 2 (eval-*)."""
    horizon: int | None = None
    """Steps after which an episode is cut; default 500 (experts), 150 (eval-rollouts), 100 (train-rollouts)."""
    cameras: tuple[str, ...] = DEFAULT_CAMERAS
    """Cameras to record, in the order of the views."""
    size: int = DEFAULT_SIZE
    """Height and width of the frames, pixels."""
    profile: Literal["fast", "full"] = "fast"
    """Render profile; training and use must agree on it."""
    data_root: Path | None = None
    """Where Minari datasets live; default: MINARI_DATASETS_PATH, else ~/.minari/datasets."""
    workers: int = os.cpu_count() or 1
    """Processes; with --ray local, CPUs of the cluster."""
    ray: str | None = None
    """Record on a Ray cluster: local, or the address of one that shares this folder and the data root."""
    seed: int = 0
    """Seed of everything drawn. The result does not depend on the number of workers."""
    overwrite: bool = False
    """Replace an existing dataset of this id."""


@dataclass(frozen=True)
class Job:
    """One episode to record; its draws are a function of these fields alone."""

    task: str
    kind: Kind | Literal["agent"]
    index: int
    seed: int
    horizon: int
    spec: CameraSpec
    path: Path
    actions: Path | None = None


def jobs_of(config: Config, parts: Path) -> list[Job]:
    """The episodes of a dataset in their final order."""
    spec = CameraSpec(config.cameras, config.size, config.size, config.profile)
    if (config.preset == "agent-rollouts") != bool(config.actions):
        raise ValueError("agent-rollouts, and nothing else, is made of --actions, files of agents.record")
    if config.actions:
        if config.tasks or config.kinds or config.episodes or config.horizon:
            raise ValueError(
                "tasks, kinds, episodes and horizon of agent-rollouts are those of their --actions"
            )
        return [
            Job(task, "agent", i, 0, acted.shape[1], spec, parts / f"{number:03d}-{task}-agent-{i:03d}", file)
            for number, file in enumerate(sorted(config.actions))
            for task, seeds, acted in [read_actions(file)]
            for i in range(len(seeds))
        ]
    opposites = tuple(dict.fromkeys(task for pair in OPPOSITES for task in pair))
    training, rollouts = train_tasks(config.split), config.preset.endswith("rollouts")
    usual = {"demos": training, "train-rollouts": training, "eval-opposites": opposites}.get(
        config.preset, HELD_OUT
    )
    tasks = config.tasks or usual
    for task in tasks:
        if check_task(task) not in training and config.preset in ("demos", "train-rollouts"):
            raise ValueError(f"{task} is held out from all training; eval-expert and eval-rollouts record it")
    if config.kinds and (not rollouts or "expert" in config.kinds):
        raise ValueError("kinds are for eval-rollouts and train-rollouts; experts have presets of their own")
    kinds = config.kinds or (("random", "noisy", "mixed") if rollouts else ("expert",))
    often = {"eval-expert": 50, "eval-rollouts": 12, "eval-opposites": 2}
    episodes = config.episodes or often.get(config.preset, 3)
    long = {"eval-rollouts": 150, "train-rollouts": 100}
    horizon = config.horizon or long.get(config.preset, 500)
    if episodes < 1 or not 1 <= horizon <= 500:
        raise ValueError(f"episodes must be >= 1 and horizon in [1, 500], got {episodes} and {horizon}")
    seed = config.seed + {"eval-opposites": 1, "train-rollouts": 2}.get(config.preset, 0)  # other episodes
    return [
        Job(task, kind, i, seed, horizon, spec, parts / f"{task}-{kind}-{i:03d}")
        for task in tasks
        for kind in kinds
        for i in range(episodes)
    ]


def run_episode(
    env: gym.Env, rig: CameraRig, act: Callable[[int, np.ndarray], np.ndarray], seed: int, *, cut: bool
) -> tuple[EpisodeBuffer, bool]:
    """Roll out one episode. Returns it with T + 1 observations, and whether any step succeeded.

    `cut` ends it at the first success. Frames are rendered afterwards, from the recorded states, only where
    they are wanted, so a caller that drops failures has not paid for their pictures.
    """
    observation, info = env.reset(seed=seed)
    task: MetaWorldTask = env.unwrapped  # type: ignore[assignment]
    states, observations, success = [task.snapshot()], [observation], [bool(info["success"])]
    actions, rewards, truncated = [], [], False
    while not truncated and not (cut and success[-1]):
        action = act(len(actions), observation)
        observation, reward, _, truncated, info = env.step(action)
        states.append(task.snapshot())
        observations.append(observation)
        actions.append(action)
        rewards.append(float(reward))
        success.append(bool(info["success"]))
    if cut and not any(success):
        return EpisodeBuffer(), False
    views = np.stack([_look(task, rig, state) for state in states], axis=1)
    steps = len(actions)
    ended = [False] * (steps - 1) + [True]
    return EpisodeBuffer(
        seed=seed,
        observations={"state": np.array(observations)} | dict(zip(rig.spec.cameras, views, strict=True)),
        actions=np.array(actions),  # type: ignore[arg-type]
        rewards=rewards,
        terminations=ended if cut else [False] * steps,
        truncations=[False] * steps if cut else ended,
        infos={"success": np.array(success, np.float32)},
    ), any(success)


def _look(task: MetaWorldTask, rig: CameraRig, state: np.ndarray) -> np.ndarray:
    task.restore(state)
    return rig.render()


class _Worker:
    """What a process keeps between episodes: the environment and renderer of the last task."""

    def __init__(self) -> None:
        self.key: tuple[str, int, CameraSpec, bool] | None = None
        self.env: gym.Env | None = None
        self.rig: CameraRig | None = None

    def of(self, job: Job) -> tuple[gym.Env, CameraRig]:
        key = (job.task, job.horizon, job.spec, job.actions is None)
        if self.env is None or self.rig is None or self.key != key:
            if self.rig is not None and self.env is not None:
                self.rig.close()
                self.env.close()
            self.env = make_env(
                job.task, max_episode_steps=job.horizon, random_hand_start=job.actions is None
            )
            self.rig, self.key = CameraRig(self.env, job.spec), key
        return self.env, self.rig


_WORKER = _Worker()


def record(job: Job) -> None:
    """Record one episode as a Minari storage of its own at `job.path` (JPEG frames, Minari's default)."""
    if job.path.exists():  # by a worker that died before it could say so
        return
    env, rig = _WORKER.of(job)
    if job.actions:
        _, seeds, acted = read_actions(job.actions)
        again = replay(acted[job.index])
        episode, success = run_episode(env, rig, again, int(seeds[job.index]), cut=False)
    else:
        episode, success = _act(env, rig, job)
    partial = job.path.with_name(job.path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    storage = MinariStorage.new(partial, *spaces(job.spec), data_format="hdf5")
    storage.update_episodes([episode])
    storage.update_episode_metadata([
        {
            "task": job.task,
            "instruction": instruction(job.task),
            "kind": job.kind,
            "success": success,
        }
    ])  # fmt: skip
    os.replace(partial, job.path)


def _act(env: gym.Env, rig: CameraRig, job: Job) -> tuple[EpisodeBuffer, bool]:
    """An episode of a behaviour, drawn anew where an expert failed."""
    assert job.kind != "agent"
    entropy = (job.seed, *job.task.encode(), KINDS.index(job.kind), job.index)
    generator = np.random.default_rng(entropy)
    for _ in range(MAX_ATTEMPTS):
        seed = int(generator.integers(2**31))
        act = behaviour(job.task, job.kind, generator)
        episode, success = run_episode(env, rig, act, seed, cut=job.kind == "expert")
        if success or job.kind != "expert":
            return episode, success
    raise RuntimeError(f"the expert of {job.task} failed {MAX_ATTEMPTS} times in a row")


def spaces(spec: CameraSpec) -> tuple[gym.spaces.Dict, gym.spaces.Box]:
    """Observation and action space of a dataset: `state` float64 [39], and a uint8 image per camera."""
    image = gym.spaces.Box(0, 255, (spec.height, spec.width, 3), np.uint8)
    state = gym.spaces.Box(-np.inf, np.inf, (39,), np.float64)
    images: dict[str, gym.Space] = dict.fromkeys(spec.cameras, image)
    observation = gym.spaces.Dict({"state": state} | images)
    return observation, gym.spaces.Box(-1.0, 1.0, (4,), np.float32)


def collect(config: Config) -> str:
    """Record the dataset that `config` describes; returns its Minari id."""
    name = f"demos-{config.split}" if config.preset == "demos" else config.preset
    dataset_id = config.dataset or f"vlm-reward/{name}-v0"
    if config.data_root is not None:
        os.environ["MINARI_DATASETS_PATH"] = str(config.data_root.resolve())
    target = get_dataset_path(dataset_id)
    parts = target.with_name(target.name + ".parts")
    jobs = jobs_of(config, parts)  # refuses a wrong name before one is told to replace what is there
    if target.exists() and not config.overwrite:
        raise FileExistsError(f"dataset {dataset_id} is at {target} already; --overwrite replaces it")
    _check_parts(parts, replace(config, workers=1, ray=None, overwrite=False))
    with CameraRig(make_env(jobs[0].task), jobs[0].spec):
        pass  # a missing renderer or camera shows here, in a second, and not in every worker
    todo = [job for job in jobs if not job.path.exists()]
    done = len(jobs) - len(todo)
    run_jobs(record, todo, workers=config.workers, unit="episode", done=done, ray=config.ray)
    if absent := [job.path for job in jobs if not job.path.exists()]:
        raise FileNotFoundError(
            f"{len(absent)} episodes were recorded, but are not at {parts}: is it shared with the Ray cluster?"
        )
    _assemble(dataset_id, target, jobs, config)
    shutil.rmtree(parts)
    return dataset_id


def _check_parts(parts: Path, config: Config) -> None:
    """Refuse to go on with episodes that were recorded with other settings."""
    parts.mkdir(parents=True, exist_ok=True)
    said = parts / "config.txt"
    if said.exists() and said.read_text() != repr(config):
        raise ValueError(
            f"{parts} holds episodes recorded with other settings; delete it, or use those settings"
        )
    said.write_text(repr(config))


def _assemble(dataset_id: str, target: Path, jobs: list[Job], config: Config) -> None:
    """Join the episodes into one dataset, without encoding their images again, and put it in its place."""
    spec = jobs[0].spec
    tasks = list(dict.fromkeys(job.task for job in jobs))
    namespace = dataset_id.rpartition("/")[0]
    if namespace and namespace not in list_local_namespaces():
        create_namespace(namespace)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    data = partial / "data"  # Minari's layout of a dataset folder
    data.mkdir(parents=True)
    storage = MinariStorage.new(data, *spaces(spec), data_format="hdf5")
    steps = 0
    with h5py.File(data / "main_data.hdf5", "a", track_order=True) as file:
        for i, job in enumerate(jobs):
            with h5py.File(job.path / "main_data.hdf5") as part:
                part.copy("episode_0", file, name=f"episode_{i}")
            file[f"episode_{i}"].attrs["id"] = i
            steps += int(file[f"episode_{i}"].attrs["total_steps"])  # pyright: ignore[reportArgumentType]
    storage.update_metadata({
        "dataset_id": dataset_id, "total_episodes": len(jobs), "total_steps": steps,
        "algorithm_name": "agents" if config.actions else "Meta-World scripted policies", "author": {"vlm-reward"},
        "minari_version": f"{minari.__version__}", "dataset_size": storage.get_size(),
        "description": f"Meta-World v3 rollouts ({config.preset}) seen by {len(spec.cameras)} cameras.",
        "camera_spec": json.dumps(spec.to_dict()), "split": config.split, "tasks": json.dumps(tasks),
        "seed": config.seed,
    })  # fmt: skip
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)


def main(config: Config) -> None:
    """Record, then say what is where."""
    dataset_id = collect(config)
    dataset = minari.load_dataset(dataset_id)
    where = get_dataset_path(dataset_id)
    print(f"{dataset_id}: {dataset.total_episodes} episodes, {dataset.total_steps} steps, {where}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, prog="python -m training.collect", description=__doc__))
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, FileExistsError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
