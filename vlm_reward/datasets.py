"""Datasets that people have, read one way: episodes with a sentence each, and their frames in chunks.

    open_dataset("vlm-reward/demos-paper-v0")     # a Minari dataset by its id, or by its folder
    open_dataset("~/data/aloha_pour")             # a LeRobotDataset v3.0 folder

Of a dataset that `training.collect` did not write, every camera is a view; the frames come from elsewhere, so
its `CameraSpec` has the profile `recorded`.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np

from vlm_reward.cameras import CameraSpec
from vlm_reward.recording import CHUNK, KINDS, Chunk, EpisodeInfo, Recording, digest, in_rows, one_size


def open_dataset(
    dataset: "minari.MinariDataset | Recording | str | Path",
    cameras: Sequence[str] = (),
    instruction: str | None = None,
) -> Recording:
    """Open a Minari dataset (by id, folder or as it is) or a LeRobotDataset v3.0 folder.

    Args:
        dataset: which.
        cameras: the views, in order; all that it has when not given.
        instruction: the sentence of all episodes, in place of their own.

    Raises:
        FileNotFoundError: no such dataset; says which Minari ones there are.
        ValueError: damaged, without images, without a sentence, or without these cameras.
    """
    if isinstance(dataset, Recording):
        return dataset
    if not isinstance(dataset, minari.MinariDataset):
        folder = Path(dataset).expanduser()
        if (folder / "meta" / "info.json").is_file():
            from vlm_reward.lerobot import LeRobotRecording  # pyarrow, for those who read LeRobot's format

            return LeRobotRecording(folder, cameras, instruction)
        dataset = _load_minari(dataset, folder)
    return MinariRecording(dataset, cameras, instruction)


def _load_minari(name: str | Path, folder: Path) -> minari.MinariDataset:
    for data in (folder / "data", folder):
        if (data / "metadata.json").is_file():
            return minari.MinariDataset(data)
    if folder.is_dir():
        raise ValueError(
            f"{folder} is no dataset: neither meta/info.json (LeRobot v3.0) nor data/metadata.json (Minari)"
        )
    if folder.is_absolute() or str(name).startswith("."):
        raise FileNotFoundError(
            f"no folder {folder}: give that of a LeRobotDataset v3.0 (it holds meta/info.json) or of a Minari "
            "dataset (data/metadata.json), or a Minari id"
        )
    try:
        return minari.load_dataset(str(name))
    except (FileNotFoundError, ValueError):
        ours = re.match(r"vlm-reward/(demos|eval-(?:expert|rollouts|opposites)|train-rollouts)-", str(name))
        collect = f"python -m training.collect{f' {ours[1]}' if ours else ''}"
        local = ", ".join(minari.list_local_datasets()) or "none"
        raise FileNotFoundError(
            f"no dataset {str(name)!r}: no such folder, and no such Minari dataset on this machine (it has: "
            f"{local}); collect it with `{collect}`, or point MINARI_DATASETS_PATH at the folder that holds it"
        ) from None


class MinariRecording(Recording):
    """A Minari dataset whose observations are uint8 images [H, W, 3], or a Dict with some.

    One that `training.collect` wrote says in its metadata with which cameras, and of each episode which task,
    kind and seed. Of any other, all images of the observation are views; an episode's sentence is its
    metadata's `instruction`, `language_instruction` or `task`; its success is `success` or `is_success` of the
    infos.
    """

    def __init__(
        self, dataset: minari.MinariDataset, cameras: Sequence[str] = (), instruction: str | None = None
    ) -> None:
        self.dataset = dataset
        self.id = dataset.id
        self.folder = Path(dataset.storage.data_path).parent
        stored = dataset.storage.metadata.get("camera_spec")
        spec = CameraSpec.from_dict(json.loads(stored)) if stored else None
        self._chosen = [*cameras, instruction or ""]
        images = _images(dataset.observation_space)
        if not images:
            raise ValueError(
                f"dataset {self.id} has no uint8 images [H, W, 3] in its observations: "
                f"{dataset.observation_space}"
            )
        views = tuple(cameras) or (spec.cameras if spec else (*images,))
        if unknown := [name for name in views if name not in images]:
            raise ValueError(
                f"dataset {self.id} has no camera {', '.join(unknown)}; it has {', '.join(images)}"
            )
        if spec:
            self.camera_spec = replace(spec, cameras=views)
        else:
            self.camera_spec = CameraSpec(
                views, *one_size(self.id, {v: images[v] for v in views}), "recorded"
            )
        rows = dataset.storage.get_episode_metadata(dataset.episode_indices)
        numbers = map(int, dataset.episode_indices)
        read = self._of_collect if spec else self._of_others
        self.episodes = in_rows(
            self.id, (read(n, meta, instruction) for n, meta in zip(numbers, rows, strict=True))
        )

    def _of_collect(self, number: int, meta: Mapping[str, Any], sentence: str | None) -> EpisodeInfo:
        if missing := {"task", "instruction", "kind", "seed", "success", "total_steps"} - set(meta):
            raise ValueError(f"episode {number} of {self.id} lacks the metadata {', '.join(sorted(missing))}")
        if meta["kind"] not in KINDS:
            raise ValueError(
                f"episode {number} of {self.id}: kind {meta['kind']!r} is none of {', '.join(KINDS)}"
            )
        return EpisodeInfo(
            0,
            int(meta["total_steps"]) + 1,
            str(meta["task"]),
            sentence or str(meta["instruction"]),
            str(meta["kind"]),
            int(meta["seed"]),
            bool(meta["success"]),
        )

    def _of_others(self, number: int, meta: Mapping[str, Any], sentence: str | None) -> EpisodeInfo:
        said = (meta.get(key) for key in ("instruction", "language_instruction", "task"))
        sentence = sentence or next((str(each).strip() for each in said if each), "")
        if not sentence:
            raise ValueError(
                f"episode {number} of {self.id} has no sentence: its metadata has no `instruction`; write one, or "
                "give one for all episodes (--instruction)"
            )
        length = int(meta["total_steps"]) + 1
        return EpisodeInfo(0, length, sentence, sentence, "expert", number, True)

    def chunks(self, first: int = 0, last: int | None = None) -> Iterator[Chunk]:
        spec, chosen = self.camera_spec, self.dataset.episode_indices[first:last]
        for number, episode in enumerate(self.dataset.iterate_episodes(chosen), start=first):
            length = self.episodes[number].length
            views = []
            for camera in spec.cameras:
                view = np.asarray(_at(episode.observations, camera))
                if view.dtype != np.uint8 or view.shape != (length, spec.height, spec.width, 3):
                    raise ValueError(
                        f"episode {episode.id} of {self.id}: frames of camera {camera!r} must be uint8 "
                        f"{[length, spec.height, spec.width, 3]}, got {view.dtype} {view.shape}"
                    )
                views.append(view)
            rewards = np.zeros(length, np.float32)
            rewards[1:] = episode.rewards
            success = self._success(episode, length)
            for start in range(0, length, CHUNK):
                part = slice(start, start + CHUNK)
                frames = np.stack([view[part] for view in views], axis=1)
                yield Chunk(number, start, frames, rewards[part], success[part])

    def _success(self, episode: minari.EpisodeData, length: int) -> np.ndarray:
        infos = episode.infos or {}
        flags = next((infos[key] for key in ("success", "is_success") if key in infos), None)
        if flags is None and not self.ours:
            return np.zeros(length, bool)
        flags = np.asarray(flags, np.float32)
        if flags.shape not in ((length,), (length - 1,)):
            raise ValueError(f"episode {episode.id} of {self.id}: infos need `success` [{length}]")
        return np.concatenate([np.zeros(length - len(flags), bool), flags > 0])

    def fingerprint(self) -> str:
        numbers = ",".join(str(int(number)) for number in self.dataset.episode_indices)
        data = Path(self.dataset.storage.data_path)
        return digest(
            sorted(file for file in data.rglob("*") if file.is_file()), data, [numbers, *self._chosen]
        )


def _images(space: gym.Space, path: str = "") -> dict[str, tuple[int, int]]:
    """Camera -> (height, width) of the uint8 images in a space; nested names are joined by dots."""
    if isinstance(space, gym.spaces.Dict):
        parts = [_images(part, f"{path}.{key}" if path else key) for key, part in space.spaces.items()]
        return {name: size for part in parts for name, size in part.items()}
    if isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 and space.shape[2:] == (3,):
        return {path or "observation": (space.shape[0], space.shape[1])}
    return {}


def _at(observations: Any, camera: str) -> Any:
    """The array of a camera that `_images` named."""
    if not isinstance(observations, dict):
        return observations
    for key in [camera] if camera in observations else camera.split("."):
        observations = observations.get(key)
    return observations
