"""What is shipped: small, safe, and never trained on a held-out task."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from vlm_reward.cameras import CameraRig, CameraSpec
from vlm_reward.encoder import CHECKPOINTS
from vlm_reward.ensemble import Ensemble
from vlm_reward.envs import behaviour, make_env
from vlm_reward.metrics import spearman, voc
from vlm_reward.reward_model import REACH, RewardModel
from vlm_reward.tasks import HELD_OUT, instruction, train_tasks

BACKBONES = sorted(path.parent for path in CHECKPOINTS.glob("*/config.json"))
REACHES = sorted(path.parent for path in CHECKPOINTS.rglob(REACH))
ADAPTERS = sorted(path.parent for path in CHECKPOINTS.rglob("*/adapter_config.json")) + REACHES


def name_of(folder: Path) -> str:
    return folder.relative_to(CHECKPOINTS).as_posix()


def test_the_ensemble_is_of_shipped_models_of_training_tasks():
    ensemble = RewardModel.from_pretrained("siglip2-tiny-ensemble")
    assert isinstance(ensemble, Ensemble)
    assert set(ensemble.names) <= {name_of(folder) for folder in (*ADAPTERS, *BACKBONES)}
    assert len({member.encoder.name for member in ensemble.members}) == 2
    assert {name for name in ensemble.names if CHECKPOINTS / name in REACHES} == {"siglip2-tiny-soup/reach"}
    assert sum(ensemble.weights) == pytest.approx(1)
    assert set(ensemble.metadata["train_tasks"]) <= set(train_tasks())
    assert "held-out" in (CHECKPOINTS / "siglip2-tiny-ensemble" / "README.md").read_text()


def test_there_is_a_triplet_adapter():
    assert CHECKPOINTS / "siglip2-tiny" / "triplet" in ADAPTERS


def test_backbones_share_a_tokenizer():
    said = {(folder / "tokenizer.json").read_bytes() for folder in BACKBONES}
    assert len(BACKBONES) > 1
    assert len(said) == 1


@pytest.mark.parametrize("folder", BACKBONES, ids=name_of)
def test_the_backbone_is_small(folder):
    (weights,) = folder.glob("*.safetensors")
    with safe_open(weights, "pt") as stored:
        parameters = sum(stored.get_tensor(name).numel() for name in stored.keys())  # noqa: SIM118
    assert 5e6 <= parameters <= 10e6
    assert sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) <= 30e6


def test_no_file_but_safetensors_text_and_json():
    kinds = {file.suffix for file in CHECKPOINTS.rglob("*") if file.is_file()}
    assert kinds <= {".safetensors", ".json", ".md", ".txt"}


@pytest.mark.parametrize("folder", BACKBONES, ids=name_of)
def test_the_backbone_saw_training_tasks_alone(folder):
    tasks = json.loads((folder / "pretraining.json").read_text())["train_tasks"]
    assert set(tasks) <= set(train_tasks())
    assert not set(tasks) & set(HELD_OUT)


@pytest.mark.parametrize("folder", ADAPTERS, ids=name_of)
def test_adapters_saw_training_tasks_alone(folder):
    metadata = json.loads((folder / "vlm_reward.json").read_text())
    tasks = metadata["train_tasks"]
    assert tasks
    assert set(tasks) <= set(train_tasks())
    assert CameraSpec.from_dict(metadata["camera_spec"]) == CameraSpec()


@pytest.mark.parametrize("folder", [*BACKBONES, *ADAPTERS], ids=name_of)
def test_every_checkpoint_has_a_model_card(folder):
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert "held-out" in card


@pytest.mark.parametrize(
    ("adapter", "task"),
    [("triplet", "drawer-open-v3"), ("triplet+order+wrong+start+judge", "door-open-v3")],
)
def test_an_expert_on_a_held_out_task_is_rewarded(adapter, task):
    """The main job, on real frames: progress of the expert ranks by time, also where door-close was learned."""
    model = RewardModel.from_pretrained(f"siglip2-tiny/{adapter}")
    assert model.camera_spec is not None
    env = make_env(task, max_episode_steps=150, terminate_on_success=True)
    observation, _ = env.reset(seed=0)
    act = behaviour(task, "expert", np.random.default_rng(0))
    frames, done = [], False
    with CameraRig(env, model.camera_spec) as rig:
        while not done:
            observation, _, terminated, truncated, _ = env.step(act(len(frames), observation))
            frames.append(rig.render())
            done = terminated or truncated
    env.close()
    scores = model.score(np.stack(frames[::2]), instruction(task), start=frames[0])
    assert scores.shape == (len(frames[::2]), 3)
    assert voc(scores.mean(1)) > 0.5


def test_it_finds_the_hand_and_a_thing_of_a_task_never_seen():
    """How near the hand is to the handle of the held-out drawer, told from rendered frames of an expert."""
    model = RewardModel.from_pretrained("siglip2-tiny-soup/reach")
    assert model.camera_spec is not None
    env: Any = make_env("drawer-open-v3", max_episode_steps=70)
    observation, _ = env.reset(seed=0)
    act = behaviour("drawer-open-v3", "expert", np.random.default_rng(0))
    frames, metres = [], []
    with CameraRig(env, model.camera_spec) as rig:
        for step in range(0, 70):
            observation, *_ = env.step(act(step, observation))
            frames.append(rig.render())
            metres.append(np.linalg.norm(observation[:3] - observation[4:7]))
    env.close()
    scores = model.score(np.stack(frames), instruction("drawer-open-v3")).mean(1)
    assert min(metres) < 0.1 < max(metres)
    assert spearman(scores, -np.array(metres)) > 0.6


def test_loads_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RewardModel.from_pretrained("siglip2-tiny/triplet").metadata["objective"] == "triplet"
    assert Path("checkpoints").exists() is False
