"""Datasets that people have are read as they were written, and what is wrong with one is named."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer

from eval.lerobot_writer import CAMERAS, edit, level, write_lerobot, write_video
from tests.synthetic import SPEC, write_dataset
from vlm_reward.cameras import CameraRig, CameraSpec
from vlm_reward.datasets import open_dataset
from vlm_reward.envs import make_env
from vlm_reward.frame_cache import cached
from vlm_reward.lerobot import LeRobotRecording
from vlm_reward.recording import CHUNK, Recording

EPISODES = Path("meta/episodes/chunk-000/file-000.parquet")
DATA = Path("data/chunk-000/file-000.parquet")
VIDEO = Path("videos") / CAMERAS[0] / "chunk-000/file-000.mp4"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lerobot(tmp_path_factory.mktemp("lerobot") / "pouring")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two episodes in one file, to be spoilt."""
    return write_lerobot(tmp_path / "pouring", lengths=(6, 5))


def greys(data: Recording, first: int = 0, last: int | None = None) -> dict[tuple[int, int], list[int]]:
    """(episode, frame) -> the grey of each view."""
    found = {}
    for chunk in data.chunks(first, last):
        for i, views in enumerate(chunk.frames):
            found[chunk.episode, chunk.start + i] = (
                views[:, -4:, -4:].mean((1, 2, 3)).round().astype(int).tolist()
            )
    return found


def test_lerobot_episodes_say_how_long_they_are_and_what_was_asked(written: Path) -> None:
    data = open_dataset(written)
    assert (data.id, data.folder, data.ours) == ("pouring", written, False)
    assert data.camera_spec == CameraSpec(CAMERAS, 32, 48, "recorded")
    assert [(e.start, e.length, e.instruction, e.seed) for e in data.episodes] == [
        (0, 12, "close the green drawer", 0),
        (12, 9, "turn on faucet", 1),
        (21, 14, "close the green drawer", 2),
        (35, 8, "turn on faucet", 3),
        (43, 12, "close the green drawer", 4),
    ]


@pytest.mark.parametrize("codec", ["libx264", "libsvtav1"])
def test_each_lerobot_frame_is_the_one_of_its_moment_and_camera(tmp_path: Path, codec: str) -> None:
    data = open_dataset(write_lerobot(tmp_path / "d", codec=codec, size=(64, 64)))
    found = greys(data)
    assert len(found) == 12 + 9 + 14 + 8 + 12
    for (episode, frame), values in found.items():
        for view, value in enumerate(values):
            assert abs(value - level(episode, frame, view)) <= 2, (episode, frame, view)
    assert greys(data, 3, 5) == {key: found[key] for key in found if 3 <= key[0] < 5}  # seeks within a file
    assert greys(data, 1, 2) == {key: found[key] for key in found if key[0] == 1}


def test_a_long_episode_comes_in_chunks(tmp_path: Path) -> None:
    data = open_dataset(
        write_lerobot(tmp_path / "d", lengths=(CHUNK + 3,), cameras=CAMERAS[:1], outcome=False)
    )
    assert [(chunk.start, chunk.frames.shape) for chunk in data.chunks()] == [
        (0, (CHUNK, 1, 32, 48, 3)),
        (CHUNK, (3, 1, 32, 48, 3)),
    ]


def test_lerobot_images_in_parquet_are_read_exactly(tmp_path: Path) -> None:
    data = open_dataset(write_lerobot(tmp_path / "d", images=True, lengths=(5, 4, 3)))
    for (episode, frame), values in greys(data).items():
        assert values == [level(episode, frame, view) for view in range(2)]


def test_views_are_chosen_and_ordered(written: Path) -> None:
    data = open_dataset(written, cameras=CAMERAS[1:])
    assert greys(data, 0, 1)[0, 3] == pytest.approx([level(0, 3, 1)], abs=1)
    with pytest.raises(ValueError, match=r"no camera top; it has observation.images.front, observation"):
        open_dataset(written, cameras=("top",))


def test_next_reward_and_success_belong_to_the_frame_that_the_step_led_to(written: Path) -> None:
    chunk = next(open_dataset(written).chunks())
    assert chunk.rewards.tolist() == [0, *range(11)]
    assert chunk.success.tolist() == [False] * 10 + [True, True]  # next.success holds from step 9 on


def test_the_cache_of_a_lerobot_dataset_is_made_anew_when_it_or_the_choice_changes(
    folder: Path, tmp_path: Path
) -> None:
    cache = cached(folder, 16, tmp_path / "cache")
    assert cache.frames.shape == (11, 2, 16, 16, 3)
    assert cache.camera_spec.profile == "recorded"
    assert cached(folder, 16, tmp_path / "cache").path == cache.path
    assert cached(open_dataset(folder, CAMERAS[:1]), 16, tmp_path / "cache").path != cache.path
    os.utime(folder / DATA, ns=(1, 1))
    assert cached(folder, 16, tmp_path / "cache").path != cache.path


def info(folder: Path, **changes: Any) -> None:
    file = folder / "meta" / "info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def features(folder: Path, **changes: Any) -> None:
    stored = json.loads((folder / "meta" / "info.json").read_text())["features"]
    stored[CAMERAS[1]] |= changes
    info(folder, features=stored)


SPOILT = {
    "truncated MP4": (lambda d: os.truncate(d / VIDEO, 900), r"file-000.mp4"),
    "no video at all": (lambda d: (d / VIDEO).write_bytes(b"hello"), r"file-000.mp4 cannot be decoded"),
    "video shorter than its table": (
        lambda d: write_video(d / VIDEO, [np.zeros((32, 48, 3), np.uint8)] * 8, (32, 48)),
        r"file-000.mp4 is shorter than its table: of an episode of 5 frames from 0.60 s on it has 2",
    ),
    "video of another size": (
        lambda d: write_video(d / VIDEO, [np.zeros((32, 32, 3), np.uint8)] * 11, (32, 32)),
        r"file-000.mp4 has frames of \(32, 32\), meta/info.json says \(32, 48\)",
    ),
    "missing video": (lambda d: (d / VIDEO).unlink(), r"needs .*file-000.mp4: no such file"),
    "truncated parquet": (lambda d: os.truncate(d / DATA, 300), r"file-000.parquet is truncated"),
    "rows missing": (
        lambda d: edit(d / DATA, lambda t: [values.pop() for values in t.values()]),
        r"file-000.parquet has 4 rows of episode 1, its table in meta/episodes says 5",
    ),
    "no episode_index": (
        lambda d: edit(d / DATA, lambda t: t.pop("episode_index")),
        r"no column 'episode_index'",
    ),
    "reward that is text": (
        lambda d: edit(d / DATA, lambda t: t.update({"next.reward": ["much"] * 11})),
        r"column 'next.reward' must hold one number a row",
    ),
    "table without a column": (
        lambda d: edit(d / EPISODES, lambda t: t.pop(f"videos/{CAMERAS[1]}/from_timestamp")),
        rf"file-000.parquet has no column 'videos/{CAMERAS[1]}/from_timestamp'",
    ),
    "table with a hole": (
        lambda d: edit(d / EPISODES, lambda t: t.update(length=[6, None])),
        r"column 'length' must hold a number for each episode",
    ),
    "episode without a sentence": (
        lambda d: edit(d / EPISODES, lambda t: t.update(tasks=[["pour"], []])),
        r"episode 1 has no sentence in its `tasks`.*--instruction",
    ),
    "episode with two sentences": (
        lambda d: edit(d / EPISODES, lambda t: t.update(tasks=[["pour", "stir"], ["pour"]])),
        r"episode 0 has 2 sentences",
    ),
    "episodes that skip one": (
        lambda d: edit(d / EPISODES, lambda t: t.update(episode_index=[0, 2])),
        r"episode_index must count from 0",
    ),
    "no tables": (lambda d: (d / EPISODES).unlink(), r"has no chunk-\*/file-\*.parquet"),
    "older version": (
        lambda d: info(d, codebase_version="v2.1"),
        r"version v2.1.*convert_dataset_v21_to_v30",
    ),
    "no features": (lambda d: info(d, features={}), r"names no camera"),
    "no fps": (lambda d: info(d, fps=0), r"fps must be positive"),
    "path that leads out": (
        lambda d: info(d, data_path="../../{chunk_index}/{file_index}"),
        r"data_path leads out of the dataset",
    ),
    "path of other names": (
        lambda d: info(d, data_path="data/{episode}.parquet"),
        r"data_path 'data/{episode}",
    ),
    "no json": (lambda d: (d / "meta/info.json").write_text("{"), r"info.json is damaged"),
    "cameras of two sizes": (
        lambda d: features(d, shape=[64, 48, 3]),
        r"differ in size \(observation.images.front 32 x 48, observation.images.wrist 64 x 48\)",
    ),
    "a shape that is none": (lambda d: features(d, shape=[64, 48]), r"shape must be \[H, W, 3\]"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_wrong_with_a_lerobot_dataset_is_named(folder: Path, what: str) -> None:
    spoil, says = SPOILT[what]
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        list(open_dataset(folder).chunks())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
COLUMN = st.one_of(
    st.lists(strategy, min_size=2, max_size=2)
    for strategy in (
        st.none() | st.integers(-(2**40), 2**40),
        st.none() | st.floats(),
        st.none() | st.text(max_size=8),
        st.none() | st.lists(st.text(max_size=8), max_size=2),
        st.booleans(),
    )
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_malformed_metadata_raises_anything_but_what_it_should(folder: Path, data: st.DataObject) -> None:
    before = {file: (folder / file).read_bytes() for file in (Path("meta/info.json"), EPISODES)}
    try:
        stored = json.loads(before[Path("meta/info.json")])
        if data.draw(st.booleans()):
            keys = st.sampled_from(["codebase_version", "fps", "features", "data_path", "video_path"])
            info(folder, **data.draw(st.dictionaries(keys, JSON, min_size=1)))
        elif data.draw(st.booleans()):
            keys = st.sampled_from(["dtype", "shape", "names", "info"])
            features(folder, **data.draw(st.dictionaries(keys, JSON, min_size=1)))
        else:
            names = [
                "episode_index",
                "length",
                "tasks",
                "data/chunk_index",
                f"videos/{CAMERAS[0]}/from_timestamp",
            ]
            change = data.draw(st.dictionaries(st.sampled_from(names), COLUMN, min_size=1))
            edit(folder / EPISODES, lambda table: table.update(change))
        assert stored["codebase_version"] == "v3.0"
        try:
            frames = sum(len(chunk.frames) for chunk in LeRobotRecording(folder).chunks())
            assert frames > 0
        except (ValueError, FileNotFoundError):
            pass
    finally:
        for file, content in before.items():
            (folder / file).write_bytes(content)


# ------------------------------------------------------------------------------------------------- Minari


def write_minari(
    root: Path, space: gym.Space, observations: list[Any], metadata: dict[str, Any] | None, infos: Any = None
) -> minari.MinariDataset:
    """A dataset as a user would make it, without our metadata."""
    os.environ["MINARI_DATASETS_PATH"] = str(root)
    buffers = [
        EpisodeBuffer(
            observations=each,
            actions=np.zeros((4, 2), np.float32),  # pyright: ignore[reportArgumentType]
            rewards=[1.0, 2.0, 3.0, 4.0],
            terminations=[False] * 3 + [True],
            truncations=[False] * 4,
            infos=infos or {},
        )
        for each in observations
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = minari.create_dataset_from_buffers(
            "someone/else-v0",
            buffers,
            action_space=gym.spaces.Box(-1, 1, (2,), np.float32),
            observation_space=space,
            data_format="hdf5",
            jpeg_encoding=False,
        )
    if metadata:
        dataset.storage.update_episode_metadata([metadata] * len(observations))
    return minari.load_dataset("someone/else-v0")


IMAGE = gym.spaces.Box(0, 255, (8, 10, 3), np.uint8)


@pytest.fixture
def minari_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


def pictures(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (5, 8, 10, 3), dtype=np.uint8)


def test_a_minari_dataset_of_images_alone_is_one_view(minari_root: Path) -> None:
    write_minari(
        minari_root,
        IMAGE,
        [pictures(0), pictures(1)],
        {"instruction": "pour"},
        {"is_success": np.array([0.0, 0, 0, 1, 1])},
    )
    for name in (
        "someone/else-v0",
        minari_root / "someone" / "else-v0",
        minari_root / "someone/else-v0/data",
    ):
        data = open_dataset(name)
        assert data.camera_spec == CameraSpec(("observation",), 8, 10, "recorded")
        assert [(e.length, e.instruction) for e in data.episodes] == [(5, "pour")] * 2
        chunks = list(data.chunks())
        np.testing.assert_array_equal(chunks[1].frames[:, 0], pictures(1))
        assert chunks[0].rewards.tolist() == [0, 1, 2, 3, 4]
        assert chunks[0].success.tolist() == [False, False, False, True, True]
    assert open_dataset("someone/else-v0", instruction="stir").episodes[0].instruction == "stir"


def test_images_of_a_nested_observation_are_views(minari_root: Path) -> None:
    state = gym.spaces.Box(-1, 1, (3,), np.float64)
    space = gym.spaces.Dict({"state": state, "pixels": gym.spaces.Dict({"top": IMAGE, "wrist": IMAGE})})
    seen = {"state": np.zeros((5, 3)), "pixels": {"top": pictures(0), "wrist": pictures(1)}}
    write_minari(minari_root, space, [seen], {"task": "pour"})
    assert open_dataset("someone/else-v0").camera_spec.cameras == ("pixels.top", "pixels.wrist")
    chunk = next(open_dataset("someone/else-v0", cameras=("pixels.wrist",)).chunks())
    np.testing.assert_array_equal(chunk.frames[:, 0], pictures(1))
    assert not chunk.success.any()


def test_a_minari_dataset_without_images_or_sentences_is_refused(minari_root: Path) -> None:
    write_minari(minari_root, IMAGE, [pictures(0)], None)
    with pytest.raises(ValueError, match=r"episode 0 of someone/else-v0 has no sentence.*--instruction"):
        open_dataset("someone/else-v0")
    minari.delete_dataset("someone/else-v0")
    write_minari(minari_root, gym.spaces.Box(-1, 1, (3,), np.float64), [np.zeros((5, 3))], {"task": "pour"})
    with pytest.raises(ValueError, match="no uint8 images"):
        open_dataset("someone/else-v0")


def test_a_name_that_is_no_dataset_says_what_was_looked_for(minari_root: Path) -> None:
    write_dataset(minari_root, episodes=1)
    with pytest.raises(FileNotFoundError, match=r"'test/other-v0'.*test/squares-v0.*training\.collect"):
        open_dataset("test/other-v0")
    with pytest.raises(FileNotFoundError, match=r"`python -m training\.collect eval-rollouts`"):
        open_dataset("vlm-reward/eval-rollouts-v0")
    with pytest.raises(FileNotFoundError, match=r"`python -m training\.collect demos`"):
        open_dataset("vlm-reward/demos-strict-v0")
    (minari_root / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is no dataset: neither meta/info.json"):
        open_dataset(minari_root / "empty")
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere: give that of a LeRobotDataset v3.0"):
        open_dataset(minari_root / "nowhere")


def test_our_own_dataset_is_known_by_its_camera_spec(minari_root: Path) -> None:
    data = open_dataset(write_dataset(minari_root, episodes=2))
    assert data.ours
    assert data.camera_spec == SPEC
    assert open_dataset("test/squares-v0", cameras=("right",)).camera_spec.cameras == ("right",)


def test_mujoco_refuses_to_render_recorded_cameras() -> None:
    env = make_env("reach-v3")
    with pytest.raises(ValueError, match=r"recorded elsewhere.*frames_fn"):
        CameraRig(env, CameraSpec(("corner",), 32, 32, "recorded"))
