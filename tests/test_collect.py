"""Collection: real rollouts, real rendering, a dataset that Minari opens, stops and restarts."""

import io
import json
from dataclasses import replace
from pathlib import Path

import minari
import numpy as np
import pytest
from PIL import Image

from training import collect
from training.collect import Config, Job, jobs_of
from vlm_reward import envs, recording
from vlm_reward.cameras import CameraRig, CameraSpec
from vlm_reward.envs import make_env
from vlm_reward.tasks import HELD_OUT, train_tasks

QUICK = Config(
    "demos", tasks=("drawer-close-v3",), episodes=2, cameras=("corner", "topview"), size=32, workers=2
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("minari")


@pytest.fixture(scope="module")
def dataset(root):
    patch = pytest.MonkeyPatch()
    patch.setenv("MINARI_DATASETS_PATH", str(root))
    yield minari.load_dataset(collect.collect(replace(QUICK, data_root=root)))
    patch.undo()


def test_minari_opens_what_was_recorded(dataset):
    assert dataset.total_episodes == 2
    episodes = list(dataset.iterate_episodes())
    assert dataset.total_steps == sum(len(e.rewards) for e in episodes)
    for episode in episodes:
        steps = len(episode.rewards)
        assert episode.observations["state"].shape == (steps + 1, 39)
        assert episode.observations["corner"].shape == (steps + 1, 32, 32, 3)
        assert episode.observations["topview"].dtype == np.uint8
        assert episode.actions.shape == (steps, 4)
        assert np.abs(episode.actions).max() <= 1


def test_experts_are_cut_at_their_first_success(dataset):
    for episode in dataset.iterate_episodes():
        success = episode.infos["success"]
        assert success[-1] == 1
        assert success[:-1].sum() == 0
        assert bool(episode.terminations[-1])


def test_metadata_says_what_it_is(dataset):
    meta = dataset.storage.metadata
    assert json.loads(meta["camera_spec"]) == CameraSpec(("corner", "topview"), 32, 32).to_dict()
    assert json.loads(meta["tasks"]) == ["drawer-close-v3"]
    for episode in dataset.storage.get_episode_metadata([0, 1]):
        assert episode["task"] == "drawer-close-v3"
        assert episode["instruction"] == "close the green drawer"
        assert episode["kind"] == "expert"
        assert episode["success"]
    first, second = dataset.storage.get_episode_metadata([0, 1])
    assert first["seed"] != second["seed"]


def _jpeg(frame: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="JPEG")
    return np.asarray(Image.open(buffer))


def test_recorded_frames_are_those_of_the_environment(dataset):
    """First and last frames are what a camera sees after the same seed and actions, JPEG apart."""
    episode = next(iter(dataset.iterate_episodes()))
    seed = next(iter(dataset.storage.get_episode_metadata([0])))["seed"]
    env = make_env("drawer-close-v3", random_hand_start=True)
    observation, _ = env.reset(seed=seed)
    assert np.allclose(observation, episode.observations["state"][0])
    with CameraRig(env, CameraSpec(("corner", "topview"), 32, 32)) as rig:
        assert np.array_equal(_jpeg(rig.render()[0]), episode.observations["corner"][0])
        for action in episode.actions:
            env.step(action)
        assert np.array_equal(_jpeg(rig.render()[1]), episode.observations["topview"][-1])
    env.close()


def test_an_existing_dataset_is_not_overwritten(dataset, root):
    with pytest.raises(FileExistsError, match="--overwrite replaces it"):
        collect.collect(replace(QUICK, data_root=root))


def test_a_stopped_collection_goes_on(root, monkeypatch):
    """The second episode cannot be recorded at first; the first is kept, and the result is complete."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    config = replace(QUICK, data_root=root, dataset="test/again-v0", workers=1)
    written = []

    def inline(function, jobs, **_):
        for job in jobs:
            if len(written) == 1 and not config_fixed:
                raise OSError("No space left on device")
            function(job)
            written.append(job.path)

    config_fixed: list[bool] = []
    monkeypatch.setattr(collect, "run_jobs", inline)
    with pytest.raises(OSError, match="No space left"):
        collect.collect(config)
    assert not (root / "test" / "again-v0").exists()
    first = written[0] / "main_data.hdf5"
    before = first.stat().st_mtime_ns
    config_fixed.append(True)
    with pytest.raises(ValueError, match="recorded with other settings"):
        collect.collect(replace(config, seed=1))
    assert first.stat().st_mtime_ns == before
    collect.collect(config)
    assert len(written) == 2
    assert minari.load_dataset("test/again-v0").total_episodes == 2
    assert not written[0].exists()


def test_same_seed_same_episodes_whatever_the_workers(dataset, root, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    again = minari.load_dataset("test/again-v0")  # one process, in line
    for a, b in zip(dataset.iterate_episodes(), again.iterate_episodes(), strict=True):
        assert np.array_equal(a.observations["corner"], b.observations["corner"])
        assert np.array_equal(a.rewards, b.rewards)


def test_presets():
    def tasks(config: Config) -> list[str]:
        return list(dict.fromkeys(job.task for job in jobs_of(config, Path())))

    demos = jobs_of(Config("demos"), Path())
    assert len(demos) == 132
    assert tasks(Config("demos")) == list(train_tasks())
    assert len(jobs_of(Config("demos", split="strict"), Path())) == 120
    assert tasks(Config("eval-expert")) == list(HELD_OUT)
    assert len(jobs_of(Config("eval-expert"), Path())) == 150
    assert {job.kind for job in jobs_of(Config("eval-rollouts"), Path())} == {"random", "noisy", "mixed"}
    rollouts = jobs_of(Config("train-rollouts"), Path())
    assert len(rollouts) == 44 * 3 * 3
    assert {job.horizon for job in rollouts} == {100}
    assert not {job.task for job in rollouts} & set(HELD_OUT)
    wander = jobs_of(Config("train-rollouts", kinds=("wander",)), Path())
    assert [(job.task, job.kind) for job in wander] == [
        (t, "wander") for t in train_tasks() for _ in range(3)
    ]
    opposites = jobs_of(Config("eval-opposites"), Path())
    assert len(opposites) == 48
    shown = {(job.task, job.kind, job.index, job.seed) for job in demos}
    assert not shown & {(job.task, job.kind, job.index, job.seed) for job in opposites}


def test_bad_settings_fail_at_once(tmp_path):
    with pytest.raises(ValueError, match="unknown Meta-World task 'drawer-shut-v3'"):
        jobs_of(Config("demos", tasks=("drawer-shut-v3",)), Path())
    with pytest.raises(ValueError, match=r"drawer-open-v3 is held out from all training; eval-expert"):
        jobs_of(Config("demos", tasks=("push-v3", "drawer-open-v3")), Path())
    for preset, kinds in (("demos", ("wander",)), ("eval-rollouts", ("random", "expert"))):
        with pytest.raises(ValueError, match="kinds are for eval-rollouts and train-rollouts"):
            jobs_of(Config(preset, kinds=kinds), Path())
    with pytest.raises(ValueError, match="episodes must be >= 1"):
        jobs_of(Config("demos", horizon=501), Path())
    with pytest.raises(ValueError, match="agent-rollouts, and nothing else, is made of --actions"):
        jobs_of(Config("agent-rollouts"), Path())
    with pytest.raises(ValueError, match="agent-rollouts, and nothing else, is made of --actions"):
        jobs_of(Config("demos", actions=(tmp_path / "actions.npz",)), Path())
    with pytest.raises(ValueError, match="tasks, kinds, episodes and horizon of agent-rollouts"):
        jobs_of(Config("agent-rollouts", actions=(tmp_path / "actions.npz",), episodes=2), Path())
    with pytest.raises(ValueError, match="no camera named corner9"):
        collect.collect(replace(QUICK, cameras=("corner9",), data_root=tmp_path))


def test_an_expert_that_never_succeeds_is_an_error(tmp_path):
    job = Job("drawer-close-v3", "expert", 0, 0, 1, CameraSpec(("corner",), 32, 32), tmp_path / "part")
    with pytest.raises(RuntimeError, match="the expert of drawer-close-v3 failed 40 times in a row"):
        collect.record(job)


def test_a_dataset_may_hold_all_that_can_be_collected():
    assert (*envs.KINDS, "agent") == recording.KINDS
