"""An ensemble scores as its members do together, whatever each of them looks at."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from agents import loop
from tests.synthetic import write_dataset
from training import ensemble as command
from training.average import average
from training.judge import JudgeConfig, judge
from vlm_reward import reward_model as module
from vlm_reward.cameras import CameraSpec, Crop
from vlm_reward.ensemble import Ensemble
from vlm_reward.reward_model import RewardModel
from vlm_reward.transforms import GoalBaseline

TEXT = "open the green drawer"
SPEC = CameraSpec(cameras=("corner", "corner3"), height=32, width=32)
CROPS = {"corner": Crop(0.25, 0.5, 0.5), "corner3": Crop(0.0, 0.25, 0.5)}


@pytest.fixture
def members(make_tiny_encoder) -> list[RewardModel]:
    """One of whole images and no first frame, one of parts of them with a first frame and a judge."""
    plain, parted, judge = (make_tiny_encoder(seed) for seed in range(3))
    like = {"camera_spec": SPEC, "dtype": torch.float32}
    own = RewardModel(judge, **like)
    return [
        RewardModel(plain, **like),
        RewardModel(parted, crops=CROPS, start_weight=0.5, judge=own, **like),
    ]


def test_its_score_is_the_weighted_mean_of_theirs(members, frames):
    both = Ensemble(members, [3.0, 1.0])
    assert both.weights == [0.75, 0.25]
    assert both.start_weight == 0.5
    expected = 0.75 * members[0].score(frames, TEXT) + 0.25 * members[1].score(frames, TEXT, start=frames[0])
    scores = both.score(frames, TEXT, start=frames[0])
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    starts = both.embed_start(frames[:1])
    assert starts.shape == (
        1,
        2,
        3 * 32,
    )  # one of the first member, two of the second: its own and its judge's
    np.testing.assert_allclose(both.score(frames, TEXT, start=starts[0]), expected, atol=1e-6)
    compared = both.compare(both.embed(frames), [TEXT, "close it"], starts[0])
    np.testing.assert_allclose(compared[..., 0], expected, atol=1e-6)
    with pytest.raises(ValueError, match="scores a frame against the first of its episode"):
        both.score(frames, TEXT)
    with pytest.raises(ValueError, match="start must be one first frame"):
        both.score(frames, TEXT, start=starts[0, :, :-1])


def test_frames_are_kept_so_that_each_member_sees_what_it_looks_at(members):
    both = Ensemble(members, [1.0, 1.0])
    assert both.image_size == 64  # 32 pixels of half the side
    frames = np.random.default_rng(1).integers(0, 256, (2, 2, 64, 64, 3), dtype=np.uint8)
    kept = both.look(frames)
    assert np.array_equal(kept, frames)
    small = both.with_small_frames()
    np.testing.assert_array_equal(
        small.score(kept, TEXT, start=kept[0]), both.score(frames, TEXT, start=frames[0])
    )


def test_what_is_asked_of_it_is_asked_of_each_member(members, frames):
    both = Ensemble(members, [1.0, 1.0])
    one = both.with_cameras(("corner3",))
    np.testing.assert_allclose(
        one.score(frames[:, 1:], TEXT, start=frames[0, 1:])[:, 0],
        sum(
            0.5 * member.with_cameras(("corner3",)).score(frames[:, 1:], TEXT, start=frames[0, 1:])[:, 0]
            for member in members
        ),
        atol=1e-6,
    )
    plain = both.with_start_weight(0)
    expected = sum(0.5 * member.with_start_weight(0).score(frames, TEXT) for member in members)
    np.testing.assert_allclose(plain.score(frames, TEXT), expected, atol=1e-6)
    nearing = both.with_approach_weight(1)
    assert all(member.approach_weight == 1 for member in nearing.members)
    assert both.with_any_views().camera_spec is None
    with pytest.raises(ValueError, match="an ensemble takes no judge"):
        both.with_judge(members[0])
    with pytest.raises(ValueError, match="which neither an ensemble nor a reach model has"):
        GoalBaseline(plain, "a robot")


def test_what_does_not_fit_together_is_refused(members):
    with pytest.raises(ValueError, match="needs two members or more, got 1"):
        Ensemble(members[:1], [1.0])
    for weights in ([1.0], [1.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="give 2 weights above 0"):
            Ensemble(members, weights)
    both = Ensemble(members, [1.0, 1.0])
    with pytest.raises(ValueError, match="not other ensembles"):
        Ensemble([both, members[0]], [1.0, 1.0])
    with pytest.raises(ValueError, match="each member counts once, got a, a"):
        Ensemble(members, [1.0, 1.0], names=("a", "a"))
    with pytest.raises(ValueError, match="trained with the same cameras"):
        Ensemble([members[0], members[1].with_cameras(("corner",))], [1.0, 1.0])


def test_it_is_saved_by_the_names_of_its_members(tiny_adapter_dir, members, frames, tmp_path):
    members[1].save_pretrained(tmp_path / "parted")
    names = [str(tiny_adapter_dir), str(tmp_path / "parted")]
    loaded = [RewardModel.from_pretrained(name, dtype=torch.float32) for name in names]
    both = Ensemble(loaded, [1.0, 3.0], names=names, metadata={"objective": "ensemble"})
    both.save_pretrained(tmp_path / "both")
    assert sorted(file.name for file in (tmp_path / "both").iterdir()) == ["README.md", "vlm_reward.json"]
    facts = json.loads((tmp_path / "both" / module.METADATA).read_text())
    assert facts["members"] == dict(zip(names, [0.25, 0.75], strict=True))
    assert facts["format_version"] == 6  # an older library refuses it
    assert module.members_of(tmp_path / "both") == names
    assert module.members_of(tiny_adapter_dir) == []
    again = RewardModel.from_pretrained(tmp_path / "both", dtype=torch.float32)
    assert isinstance(again, Ensemble)
    np.testing.assert_allclose(
        again.score(frames, TEXT, start=frames[0]), both.score(frames, TEXT, start=frames[0]), atol=1e-6
    )
    assert "The mean of the scores of" in (tmp_path / "both" / "README.md").read_text()
    with pytest.raises(ValueError, match="saved by the names of its members"):
        Ensemble(loaded, [1.0, 1.0]).save_pretrained(tmp_path / "nameless")
    with pytest.raises(ValueError, match="saved by the names of its members, unchanged"):
        both.with_start_weight(0).save_pretrained(tmp_path / "nameless")
    assert not (tmp_path / "nameless" / module.METADATA).exists()
    with pytest.raises(ValueError, match=r"nobody else can load .*parted"):
        both.push_to_hub("me/both")


def test_what_it_asks_of_all_members_is_saved(tiny_adapter_dir, members, frames, tmp_path):
    members[1].save_pretrained(tmp_path / "parted")
    names = [str(tiny_adapter_dir), str(tmp_path / "parted")]
    loaded = [RewardModel.from_pretrained(name, dtype=torch.float32) for name in names]
    both = Ensemble(loaded, [1.0, 1.0], approach_weight=0.5, names=names)
    assert both.approach_weight == 0.5
    expected = sum(0.5 * one.with_approach_weight(0.5).score(frames, TEXT, start=frames[0]) for one in loaded)
    np.testing.assert_allclose(both.score(frames, TEXT, start=frames[0]), expected, atol=1e-6)
    both.save_pretrained(tmp_path / "both")
    facts = json.loads((tmp_path / "both" / module.METADATA).read_text())
    assert (facts["format_version"], facts["approach_weight"]) == (7, 0.5)  # an older library refuses it
    again = RewardModel.from_pretrained(tmp_path / "both", dtype=torch.float32)
    np.testing.assert_allclose(again.score(frames, TEXT, start=frames[0]), expected, atol=1e-6)
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / module.METADATA).read_text())["approach_weight"] == 0.5


def test_an_ensemble_is_no_adapter(tiny_adapter_dir, members, tmp_path):
    members[1].save_pretrained(tmp_path / "parted")
    names = [str(tiny_adapter_dir), str(tmp_path / "parted")]
    loaded = [RewardModel.from_pretrained(name) for name in names]
    Ensemble(loaded, [1.0, 1.0], names=names).save_pretrained(tmp_path / "both")
    both = str(tmp_path / "both")
    with pytest.raises(ValueError, match="both is an ensemble: average its members"):
        average([both, str(tiny_adapter_dir)])
    with pytest.raises(ValueError, match="both is an ensemble: train a judge for one of its members"):
        judge(JudgeConfig(both, output=tmp_path / "judge"))
    assert not (tmp_path / "judge").exists()
    with pytest.raises(ValueError, match="both is an ensemble, of whose members one can be trained on"):
        loop.main(loop.LoopConfig(reward=both, output=tmp_path / "loop"))
    assert not (tmp_path / "loop").exists()


def test_the_command_weighs_each_by_the_inverse_of_its_spread(
    tmp_path, monkeypatch, tiny_adapter_dir, members
):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "data"))
    write_dataset(tmp_path / "data", dataset_id="test/rollouts-v0", spec=SPEC)
    members[1].save_pretrained(tmp_path / "parted")
    names = (str(tiny_adapter_dir), str(tmp_path / "parted"))
    config = command.EnsembleConfig(names, tmp_path / "both", "test/rollouts-v0", tmp_path / "cache")
    monkeypatch.setattr(command, "STRIDE", 1)
    command.main(config)
    made = RewardModel.from_pretrained(tmp_path / "both")
    loaded = [RewardModel.from_pretrained(name) for name in names]
    spreads = [command.spread(model, "test/rollouts-v0", config.cache) for model in loaded]
    assert spreads[0] > 0
    assert isinstance(made, Ensemble)
    assert made.weights[0] / made.weights[1] == pytest.approx(spreads[1] / spreads[0])
    with pytest.raises(FileExistsError, match="--overwrite replaces it"):
        command.main(config)
    command.main(replace(config, approach_weight=1.0, overwrite=True))
    near = RewardModel.from_pretrained(tmp_path / "both")
    spreads = [
        command.spread(model.with_approach_weight(1), "test/rollouts-v0", config.cache) for model in loaded
    ]
    assert isinstance(near, Ensemble)
    assert near.approach_weight == 1
    assert near.weights[0] / near.weights[1] == pytest.approx(spreads[1] / spreads[0])
