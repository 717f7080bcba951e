"""The frame cache holds what was recorded, refuses what does not fit, and leaves nothing half written."""

import os
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.synthetic import SPEC, TASKS, TEXTS, write_dataset
from vlm_reward.cameras import CameraSpec, Crop
from vlm_reward.datasets import open_dataset
from vlm_reward.frame_cache import FrameCache, build_cache, cached


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return write_dataset(tmp_path / "minari", episodes=3, kinds=("expert", "noisy"))


def test_cache_holds_each_frame_reward_and_episode_of_the_dataset(dataset, tmp_path: Path) -> None:
    cache = build_cache(dataset, 32, tmp_path / "cache")
    assert cache.frames.shape == (12 + 9 + 12, 2, 32, 32, 3)
    assert cache.frames.dtype == np.uint8
    assert not cache.frames.flags.writeable
    assert [(e.start, e.length, e.task, e.instruction, e.kind, e.seed) for e in cache.episodes] == [
        (0, 12, TASKS[0], TEXTS[0], "expert", 0),
        (12, 9, TASKS[1], TEXTS[1], "noisy", 1),
        (21, 12, TASKS[0], TEXTS[0], "expert", 2),
    ]
    for info, episode in zip(cache.episodes, dataset, strict=True):
        for view, camera in enumerate(SPEC.cameras):
            np.testing.assert_array_equal(cache.frames[info.rows, view], episode.observations[camera])
        np.testing.assert_allclose(cache.rewards[info.rows][1:], episode.rewards)
        assert cache.success[info.rows].tolist() == [False] * (info.length - 1) + [True]
    assert np.flatnonzero(~cache.reward_valid).tolist() == [0, 12, 21]
    assert cache.rewards[[0, 12, 21]].tolist() == [0, 0, 0]
    assert (cache.size, cache.views, cache.camera_spec) == (32, 2, SPEC)
    assert cache.dataset_id == "test/squares-v0"


def test_cache_resizes_and_keeps_the_square_where_it_was(dataset, tmp_path: Path) -> None:
    cache = build_cache(dataset, 16, tmp_path / "cache")
    assert cache.frames.shape[2:] == (16, 16, 3)
    red = cache.frames[11, 0, :, :, 0] > 150  # the last frame: the square has reached the right border
    assert np.argwhere(red).mean(axis=0).tolist() == pytest.approx([7.5, 13.5])


def test_cache_of_crops_holds_what_the_model_looks_at(dataset, tmp_path: Path) -> None:
    crops = dict.fromkeys(SPEC.cameras, Crop(0.5, 0.25, 0.5))
    cache = cached("test/squares-v0", 16, tmp_path, crops=crops)
    assert cache.path != cached("test/squares-v0", 16, tmp_path).path
    assert cache.camera_spec == SPEC
    whole = cached("test/squares-v0", SPEC.height, tmp_path)
    assert np.array_equal(cache.frames, whole.frames[:, :, 8:24, 16:])
    assert cached("test/squares-v0", 16, tmp_path, crops=crops).path == cache.path


def test_cached_builds_once_and_again_when_the_dataset_changed(dataset, tmp_path: Path) -> None:
    first = cached("test/squares-v0", 16, tmp_path)
    built = (first.path / "meta.json").stat().st_mtime_ns
    again = cached("test/squares-v0", 16, tmp_path)
    assert again.path == first.path
    assert (again.path / "meta.json").stat().st_mtime_ns == built
    assert cached(dataset, 8, tmp_path).path != first.path
    before = open_dataset(dataset).fingerprint()
    dataset.storage.update_episode_metadata([{"kind": "random"}], [0])
    assert open_dataset(dataset).fingerprint() != before
    changed = cached(dataset, 16, tmp_path)
    assert changed.path != first.path
    assert changed.episodes[0].kind == "random"


def test_cache_of_a_filtered_dataset_has_its_episodes_alone(dataset, tmp_path: Path) -> None:
    part = dataset.filter_episodes(lambda episode: len(episode.rewards) == 8)
    cache = cached(part, 16, tmp_path)
    assert [episode.seed for episode in cache.episodes] == [1]
    assert cache.path != cached(dataset, 16, tmp_path).path


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (replace(SPEC, profile="full"), "profile: fast against full"),
        (replace(SPEC, cameras=("right", "left")), "cameras"),
        (replace(SPEC, height=64), "height: 32 against 64"),
    ],
)
def test_cache_refuses_another_camera_spec_before_it_builds(
    dataset, tmp_path: Path, asked: CameraSpec, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        cached(dataset, 16, tmp_path / "root", expect=asked)
    assert not (tmp_path / "root").exists()
    cache = build_cache(dataset, 16, tmp_path / "cache")
    with pytest.raises(ValueError, match=says):
        FrameCache.open(cache.path, expect=asked)
    assert FrameCache.open(cache.path, expect=SPEC).camera_spec == SPEC


def test_missing_dataset_says_which_there_are_and_how_to_collect(dataset, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'test/other-v0'.*test/squares-v0.*training\.collect"):
        cached("test/other-v0", 16, tmp_path)


def test_truncated_missing_and_foreign_caches_are_refused(dataset, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no frame cache"):
        FrameCache.open(tmp_path)
    cache = build_cache(dataset, 16, tmp_path / "cache")
    frames = cache.path / "frames.npy"
    os.truncate(frames, frames.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"cannot be read.*delete the folder"):
        FrameCache.open(cache.path)
    (cache.path / "meta.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="format is 99"):
        FrameCache.open(cache.path)


def test_full_disk_while_building_leaves_nothing_and_the_next_build_works(dataset, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (20_000, hard)
    )  # the kernel refuses the write, as a full disk does
    try:
        with pytest.raises(OSError):
            cached(dataset, 32, tmp_path / "root")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.suffix for path in (tmp_path / "root").iterdir()] == [".lock"]
    assert cached(dataset, 32, tmp_path / "root").frames.shape[0] == 33


def test_remains_of_a_killed_build_are_swept_away(dataset, tmp_path: Path) -> None:
    remains = tmp_path / "cache.partial"
    remains.mkdir()
    (remains / "frames.npy").write_bytes(b"half")
    cache = build_cache(dataset, 16, tmp_path / "cache")
    assert not remains.exists()
    assert len(cache.frames) == 33


def test_disk_without_room_is_noticed_before_writing(
    dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 1000})())
    with pytest.raises(OSError, match="VLM_REWARD_CACHE"):
        build_cache(dataset, 16, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_default_root_is_the_environment_variable(
    dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM_REWARD_CACHE", str(tmp_path / "elsewhere"))
    assert cached(dataset, 16).path.parent == tmp_path / "elsewhere"
