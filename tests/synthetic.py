"""A tiny Minari dataset in the layout of training.collect: a square that moves as the task goes on."""

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer

from vlm_reward.cameras import CameraSpec

SPEC = CameraSpec(cameras=("left", "right"), height=32, width=32)
TASKS = ("drawer-close-v3", "faucet-open-v3")  # the square goes right, goes down
TEXTS = ("close the green drawer", "turn on faucet")


def moving_square(length: int, task: int, rng: np.random.Generator, spec: CameraSpec = SPEC) -> np.ndarray:
    """Frames uint8 [length, V, H, W, 3]: a square crosses a noisy background; each view has a colour."""
    frames = rng.integers(0, 60, (length, len(spec.cameras), spec.height, spec.width, 3), dtype=np.uint8)
    side = spec.height // 4
    for t in range(length):
        at = round(t / (length - 1) * (spec.height - side))
        y, x = (spec.height // 2 - side // 2, at) if task == 0 else (at, spec.width // 2 - side // 2)
        for view in range(len(spec.cameras)):
            frames[t, view, y : y + side, x : x + side] = (250, 60, 60) if view == 0 else (60, 60, 250)
    return frames


def write_dataset(
    folder: Path,
    *,
    dataset_id: str = "test/squares-v0",
    episodes: int = 6,
    lengths: Sequence[int] = (12, 9),
    spec: CameraSpec = SPEC,
    tasks: Sequence[str] = TASKS,
    texts: Sequence[str] = TEXTS,
    kinds: Sequence[str] = ("expert",),
    seed: int = 0,
) -> minari.MinariDataset:
    """Write `episodes` episodes with the given numbers of frames under MINARI_DATASETS_PATH=`folder`."""
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    rng = np.random.default_rng(seed)
    image = gym.spaces.Box(0, 255, (spec.height, spec.width, 3), np.uint8)
    state = gym.spaces.Box(-np.inf, np.inf, (39,), np.float64)
    buffers, metadatas = [], []
    for index in range(episodes):
        length, task = lengths[index % len(lengths)], index % len(tasks)
        frames = moving_square(length, task, rng, spec)
        done = np.arange(length) == length - 1
        observations = {"state": np.zeros((length, 39))}
        observations |= {camera: frames[:, view] for view, camera in enumerate(spec.cameras)}
        buffers.append(
            EpisodeBuffer(
                observations=observations,
                actions=np.zeros((length - 1, 4), np.float32),  # pyright: ignore[reportArgumentType]
                rewards=list(np.linspace(1, 10, length - 1)),
                terminations=list(done[1:]),
                truncations=[False] * (length - 1),
                infos={"success": done.astype(float)},
            )
        )
        metadatas.append(
            {
                "task": tasks[task],
                "instruction": texts[task],
                "kind": kinds[index % len(kinds)],
                "seed": index,
                "success": True,
            }
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # minari wishes for an author, a description, an environment
        dataset = minari.create_dataset_from_buffers(
            dataset_id,
            buffers,
            action_space=gym.spaces.Box(-1, 1, (4,), np.float32),
            observation_space=gym.spaces.Dict({"state": state} | dict.fromkeys(spec.cameras, image)),
            data_format="hdf5",
            jpeg_encoding=False,
        )
    dataset.storage.update_episode_metadata(metadatas)
    dataset.storage.update_metadata(
        {
            "camera_spec": json.dumps(spec.to_dict()),
            "split": "paper",
            "tasks": json.dumps(sorted(set(tasks))),
            "seed": seed,
        }
    )
    return minari.load_dataset(dataset_id)
