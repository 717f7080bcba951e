import json
import shutil
import time
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlm_reward import encoder as encoder_module
from vlm_reward import reward_model as module
from vlm_reward.cameras import CameraSpec, Crop
from vlm_reward.encoder import DualEncoder
from vlm_reward.preprocess import resize
from vlm_reward.reward_model import RewardModel, auto_dtype

TEXT = "open the green drawer"
TWO_VIEWS = CameraSpec(cameras=("corner", "corner3"), height=32, width=32)


@pytest.fixture
def model(tiny_adapter_dir) -> RewardModel:
    return RewardModel.from_pretrained(tiny_adapter_dir, dtype=torch.float32)


def copy(source: Path, target: Path) -> Path:
    """A copy of a checkpoint's files, without the folders inside it."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file():
            shutil.copy(file, target)
    return target


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# Scores


def test_scores_are_the_cosines_of_the_embeddings(model, frames):
    scores = model.score(frames, TEXT)
    assert scores.shape == (3, 2)
    assert scores.dtype == np.float32
    images, text = model.embed(frames), model.embed_text([TEXT])[0]
    assert (images.shape, images.dtype, text.shape) == ((3, 2, 32), np.float32, (32,))
    np.testing.assert_allclose(np.linalg.norm(images, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(scores, images @ text, atol=1e-6)
    assert scores.std() > 0.001
    assert np.abs(scores).max() <= 1


def test_each_view_is_scored_by_itself(model, frames):
    scores = model.score(frames, TEXT)
    np.testing.assert_allclose(model.score(frames[:, ::-1], TEXT), scores[:, ::-1], atol=1e-6)
    np.testing.assert_allclose(model.score(frames[::-1], TEXT), scores[::-1], atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4, 6, 100])
def test_batch_size_does_not_matter(model, frames, batch_size):
    expected = model.score(frames, TEXT)
    np.testing.assert_allclose(model.score(frames, TEXT, batch_size=batch_size), expected, atol=1e-6)


def test_one_text_a_timestep(model, frames):
    texts = [TEXT, "close the door", TEXT]
    scores = model.score(frames, texts)
    for row, text in enumerate(texts):
        np.testing.assert_allclose(scores[row], model.score(frames, text)[row], atol=1e-6)
    assert np.abs(scores[1] - model.score(frames, TEXT)[1]).max() > 0.001


def test_with_a_start_weight_a_score_is_the_cosine_with_the_way_from_the_first_frame(model, frames):
    started, first = model.with_start_weight(0.5), frames[0]
    scores = started.score(frames, TEXT, start=first)
    images, text = model.embed(frames), model.embed_text([TEXT])[0]
    way = text - 0.5 * images[0]  # [V, D]
    way /= np.linalg.norm(way, axis=-1, keepdims=True)
    np.testing.assert_allclose(scores, (images * way).sum(-1), atol=1e-6)
    assert (scores.dtype, scores.shape) == (np.float32, (3, 2))
    each = [first, first, frames[1]]  # one start a timestep
    expected = [*scores[:2], started.score(frames[2:], TEXT, start=frames[1])[0]]
    np.testing.assert_allclose(started.score(frames, TEXT, start=np.stack(each)), expected, atol=1e-6)
    np.testing.assert_allclose(
        started.score(frames, TEXT, start=model.embed_start(np.stack(each))), expected, atol=1e-6
    )
    np.testing.assert_allclose(
        started.score(frames, TEXT, start=model.embed_start(first[None])[0]), scores, atol=1e-6
    )
    np.testing.assert_array_equal(model.score(frames, TEXT, start=first), model.score(frames, TEXT))


def test_with_an_approach_weight_the_hand_counts_at_what_the_instruction_names(model, frames):
    asked, there = model.embed_text(["open the drawer", "touch the drawer"])
    both = asked + 0.5 * there
    nearing = model.with_approach_weight(0.5)
    np.testing.assert_allclose(
        nearing.embed_text(["open the drawer"])[0], both / np.linalg.norm(both), atol=1e-6
    )
    expected = (model.embed(frames) * both / np.linalg.norm(both)).sum(-1)
    np.testing.assert_allclose(nearing.score(frames, "open the drawer"), expected, atol=1e-6)
    np.testing.assert_allclose(
        nearing.compare(model.embed(frames), ["open the drawer"])[..., 0], expected, atol=1e-6
    )
    statement = "the drawer is open"  # asks for no hand
    np.testing.assert_allclose(nearing.score(frames, statement), model.score(frames, statement), atol=1e-6)
    again = nearing.with_approach_weight(0).score(frames, "open the drawer")
    np.testing.assert_allclose(again, model.score(frames, "open the drawer"), atol=1e-6)
    for weight in (-0.1, float("inf")):
        with pytest.raises(ValueError, match="approach_weight must be at least 0"):
            model.with_approach_weight(weight)


@pytest.mark.parametrize("weight", [0, 0.5])
def test_embedded_frames_are_compared_with_several_sentences(model, frames, weight):
    model, texts = model.with_start_weight(weight), [TEXT, "close the door"]
    start = model.embed_start(frames[:1])[0]
    scores = model.compare(model.embed(frames), texts, start)
    assert scores.shape == (3, 2, 2)
    for number, text in enumerate(texts):
        np.testing.assert_allclose(scores[..., number], model.score(frames, text, start=start), atol=1e-6)


@pytest.fixture
def judged(model, make_tiny_encoder) -> RewardModel:
    """With a start_weight, and another random encoder for a judge."""
    encoder = make_tiny_encoder(seed=1)
    encoder.add_lora(r=4, alpha=8, seed=0, head=True)
    return model.with_start_weight(0.5).with_judge(RewardModel(encoder, camera_spec=TWO_VIEWS))


def test_what_the_judge_sees_done_in_the_first_frame_turns_the_score_round(judged, model, frames):
    first, texts = frames[0], [TEXT, "close the door"]
    seen = judged.judge.embed(first[None])[0] @ judged.judge.embed_text(texts).T  # [V, 2]
    done = 1 / (1 + np.exp(-10 * (seen.mean(0) - 0.3)))  # of both views together
    plain = np.stack([model.with_start_weight(0.5).score(frames, text, start=first) for text in texts], -1)
    expected = (1 - 2 * done) * plain
    assert np.abs(expected - plain).max() > 0.01
    start = judged.embed_start(first[None])[0]
    assert start.shape == (2, 64)
    np.testing.assert_allclose(judged.compare(judged.embed(frames), texts, start), expected, atol=1e-5)
    for number, text in enumerate(texts):
        for given in (first, start, np.stack([first] * 3)):
            np.testing.assert_allclose(
                judged.score(frames, text, start=given), expected[..., number], atol=1e-5
            )
    each = judged.score(frames, [texts[0], texts[1], texts[0]], start=first)  # one sentence a timestep
    np.testing.assert_allclose(each, expected[[0, 1, 2], :, [0, 1, 0]], atol=1e-5)


def test_without_the_first_frame_there_is_no_judge(judged, model, frames):
    with pytest.raises(ValueError, match="judge looks at the first frame: give a start_weight"):
        model.with_judge(judged.judge)
    bare = judged.with_start_weight(0)
    assert bare.judge is None
    np.testing.assert_array_equal(bare.score(frames, TEXT), model.score(frames, TEXT))


def test_a_judge_of_one_camera_sees_that_view_alone(judged, frames):
    one = judged.with_cameras(("corner3",))
    seen = judged.judge.embed(frames[:1])[0, 1] @ judged.judge.embed_text([TEXT])[0]
    plain = one.with_start_weight(0).with_start_weight(0.5).score(frames[:, 1:], TEXT, start=frames[0, 1:])
    expected = (1 - 2 / (1 + np.exp(-10 * (seen - 0.3)))) * plain
    np.testing.assert_allclose(one.score(frames[:, 1:], TEXT, start=frames[0, 1:]), expected, atol=1e-5)
    many = np.repeat(frames, 2, axis=1)
    assert judged.with_any_views().score(many, TEXT, start=many[0]).shape == (3, 4)


def test_the_judge_is_saved_with_its_adapter_and_an_older_library_would_refuse_it(
    judged, frames, tiny_backbone_dir, tmp_path
):
    copy(tiny_backbone_dir, tmp_path / "tiny")
    folder = tmp_path / "tiny" / "judged"
    judged.encoder.name = judged.judge.encoder.name = str(tmp_path / "tiny")
    judged.save_pretrained(folder)
    facts = json.loads((folder / module.METADATA).read_text())
    assert (facts["judge"], facts["format_version"], facts["objective"]) == (True, 3, "triplet+judge")
    assert facts["backbone"] == "tiny"
    assert "Its judge, in a folder of this one" in (folder / "README.md").read_text()
    shutil.move(tmp_path / "tiny", tmp_path / "else" / "tiny")  # all three can be moved together
    again = RewardModel.from_pretrained(tmp_path / "else" / "tiny" / "judged", dtype=torch.float32)
    assert again.judge.metadata["backbone"] == "tiny"
    again.save_pretrained(folder)  # and again, over nothing and over itself
    again.save_pretrained(folder)
    again = RewardModel.from_pretrained(folder, dtype=torch.float32)
    same = RewardModel.from_pretrained(tmp_path / "else" / "tiny" / "judged", dtype=torch.float32)
    np.testing.assert_allclose(
        again.score(frames, TEXT, start=frames[0]), same.score(frames, TEXT, start=frames[0]), atol=1e-5
    )
    (folder / module.JUDGE / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"judge has no adapter_model\.safetensors"):
        RewardModel.from_pretrained(folder)


def test_a_missing_or_foreign_start_is_refused(model, frames):
    started = model.with_start_weight(0.5)
    with pytest.raises(ValueError, match=r"against the first of its episode: give start=the first frame"):
        started.score(frames, TEXT)
    for wrong in (frames[0, :1], frames[:2], model.embed(frames)[:2], model.embed(frames)[0, :1]):
        with pytest.raises(ValueError, match=r"start must be one first frame or 3|views"):
            started.score(frames, TEXT, start=wrong)
    for weight in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="start_weight must be at least 0"):
            model.with_start_weight(weight)


def test_the_start_weight_is_saved_and_an_older_library_would_refuse_it(model, frames, tmp_path):
    model.with_start_weight(0.5).save_pretrained(tmp_path / "started")
    facts = json.loads((tmp_path / "started" / module.METADATA).read_text())
    assert (facts["start_weight"], facts["format_version"]) == (0.5, 2)
    again = RewardModel.from_pretrained(tmp_path / "started", dtype=torch.float32)
    assert again.start_weight == again.with_cameras(("corner",)).start_weight == 0.5
    expected = model.with_start_weight(0.5).score(frames, TEXT, start=frames[0])
    np.testing.assert_allclose(again.score(frames, TEXT, start=frames[0]), expected, atol=1e-5)
    model.save_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / module.METADATA).read_text())["format_version"] == 1


def test_the_approach_weight_is_saved_and_an_older_library_would_refuse_it(model, frames, tmp_path):
    nearing = model.with_approach_weight(0.5).with_start_weight(0.25)
    nearing.save_pretrained(tmp_path / "nearing")
    facts = json.loads((tmp_path / "nearing" / module.METADATA).read_text())
    assert (facts["approach_weight"], facts["start_weight"], facts["format_version"]) == (0.5, 0.25, 4)
    again = RewardModel.from_pretrained(tmp_path / "nearing", dtype=torch.float32)
    assert again.with_cameras(("corner",)).approach_weight == 0.5
    expected = nearing.score(frames, "open the drawer", start=frames[0])
    np.testing.assert_allclose(again.score(frames, "open the drawer", start=frames[0]), expected, atol=1e-5)


def test_with_crops_a_model_sees_those_parts_of_the_images_alone(model, frames, tmp_path):
    crops = {"corner": Crop(0.25, 0.5, 0.5), "corner3": Crop(0.0, 0.25, 0.5)}
    cropped = RewardModel(
        model.encoder, camera_spec=TWO_VIEWS, crops=crops, start_weight=0.5, dtype=torch.float32
    )
    parts = np.stack([frames[:, 0, 16:, 8:24], frames[:, 1, 8:24, :16]], axis=1)
    assert np.array_equal(cropped.look(frames), resize(parts, 32))
    expected = model.with_start_weight(0.5).score(parts, TEXT, start=parts[0])
    scores = cropped.score(frames, TEXT, start=frames[0])
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert np.abs(scores - model.with_start_weight(0.5).score(frames, TEXT, start=frames[0])).max() > 0.001
    torch_frames = torch.from_numpy(frames)
    np.testing.assert_allclose(cropped.score(torch_frames, TEXT, start=torch_frames[0]), expected, atol=1e-5)
    small, kept = cropped.with_small_frames(), cropped.look(frames)
    np.testing.assert_allclose(small.score(kept, TEXT, start=kept[0]), expected, atol=1e-5)
    one = cropped.with_cameras(("corner3",))
    np.testing.assert_allclose(
        one.score(frames[:, 1:], TEXT, start=frames[0, 1:]), expected[:, 1:], atol=1e-5
    )
    whole = cropped.with_any_views()
    assert whole.crops is None
    assert np.array_equal(whole.look(frames), frames)

    cropped.save_pretrained(tmp_path / "cropped")
    facts = json.loads((tmp_path / "cropped" / module.METADATA).read_text())
    assert facts["format_version"] == 5
    again = RewardModel.from_pretrained(tmp_path / "cropped", dtype=torch.float32)
    assert again.crops == crops == module.read_crops(tmp_path / "cropped")
    np.testing.assert_allclose(again.score(frames, TEXT, start=frames[0]), expected, atol=1e-4)

    with pytest.raises(ValueError, match="crops are of cameras: give a camera_spec, too"):
        RewardModel(model.encoder, crops=crops)
    with pytest.raises(ValueError, match="there is no crop of camera corner3"):
        RewardModel(model.encoder, camera_spec=TWO_VIEWS, crops={"corner": crops["corner"]})
    for wrong, message in ((Crop(0.6, 0, 0.5), "leaves the image"), (Crop(0, 0, 0.25), "must have one side")):
        with pytest.raises(ValueError, match=message):
            RewardModel(model.encoder, camera_spec=TWO_VIEWS, crops=crops | {"corner": wrong})


def test_larger_frames_are_resized_and_tensors_taken(model):
    frames = np.random.default_rng(0).integers(0, 256, (2, 2, 64, 64, 3), dtype=np.uint8)
    expected = model.score(resize(frames, 32), TEXT)
    np.testing.assert_array_equal(model.score(frames, TEXT), expected)
    np.testing.assert_array_equal(model.score(torch.from_numpy(frames), TEXT), expected)


def test_each_unique_text_is_encoded_once(model, frames, monkeypatch):
    encoded = []
    encode = model.encoder.encode_text
    monkeypatch.setattr(
        model.encoder, "encode_text", lambda texts: encoded.append(list(texts)) or encode(texts)
    )
    model.score(frames, TEXT)
    model.score(frames, [TEXT, "close the door", TEXT])
    model.embed_text(["close the door", "turn on faucet"])
    assert encoded == [[TEXT], ["close the door"], ["turn on faucet"]]


def test_all_frames_and_views_go_through_one_forward(model, frames, monkeypatch):
    sizes = []
    encode = model.encoder.encode_images
    monkeypatch.setattr(
        model.encoder, "encode_images", lambda pixels: sizes.append(len(pixels)) or encode(pixels)
    )
    model.score(frames, TEXT)
    assert sizes == [6]


def test_a_model_in_training_is_scored_as_it_is_now(tiny_encoder, frames):
    tiny_encoder.add_lora(r=4, dropout=0.5)
    tiny_encoder.train()
    model = RewardModel(tiny_encoder, dtype=torch.float32)
    before = model.score(frames, TEXT)
    np.testing.assert_array_equal(model.score(frames, TEXT), before)  # no dropout
    assert tiny_encoder.training
    with torch.no_grad():
        for name, parameter in tiny_encoder.named_parameters():
            if "text_model" in name and "lora_B" in name:
                parameter.fill_(0.2)
    assert np.abs(model.score(frames, TEXT) - before).max() > 0.001  # no stale text embedding


def test_bfloat16_moves_scores_by_less_than_a_fiftieth_and_keeps_their_order(tiny_adapter_dir):
    frames = np.random.default_rng(1).integers(0, 256, (64, 2, 32, 32, 3), dtype=np.uint8)
    frames = (frames * np.linspace(0.1, 1, 64)[:, None, None, None, None]).astype(np.uint8)  # ever brighter
    full = RewardModel.from_pretrained(tiny_adapter_dir, dtype=torch.float32).score(frames, TEXT)
    half = RewardModel.from_pretrained(tiny_adapter_dir, dtype=torch.bfloat16).score(frames, TEXT)
    assert 0 < np.abs(full - half).max() < 0.02
    ranks, half_ranks = (scores.ravel().argsort().argsort() for scores in (full, half))
    assert np.corrcoef(ranks, half_ranks)[0, 1] > 0.99


def test_a_merged_adapter_is_kept_in_bfloat16_and_saved_as_it_was(tiny_adapter_dir, tmp_path):
    model = RewardModel.from_pretrained(tiny_adapter_dir, dtype=torch.bfloat16)
    assert {p.dtype for p in model.encoder.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "again")
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (tiny_adapter_dir, tmp_path / "again")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_auto_dtype_follows_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda s=supported: s, raising=False)
        assert auto_dtype("cpu") == dtype


# Bad input


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            np.zeros((2, 2, 32, 32, 3), np.float32),
            r"uint8 \[N, V, H, W, 3\], got float32 \(2, 2, 32, 32, 3\); of values from 0 to 1: \(255 \* frames",
        ),
        (torch.zeros(2, 2, 32, 32, 3), r"got float32 \(2, 2, 32, 32, 3\)"),
        (np.zeros((2, 32, 32, 3), np.uint8), r"got uint8 \(2, 32, 32, 3\)"),
        (np.zeros((2, 2, 3, 32, 32), np.uint8), r"got uint8 \(2, 2, 3, 32, 32\)"),
        (np.zeros((2, 2, 32, 32, 4), np.uint8), r"got uint8 \(2, 2, 32, 32, 4\)"),
        (np.zeros((0, 2, 32, 32, 3), np.uint8), r"empty: got shape \(0, 2, 32, 32, 3\)"),
        (
            np.zeros((2, 3, 32, 32, 3), np.uint8),
            r"3 views, but .* 2 cameras: corner, corner3; of some of them: model.with_cameras\(\('corner',\)\)",
        ),
    ],
)
def test_bad_frames_are_named(model, bad, message):
    with pytest.raises(ValueError, match=message):
        model.score(bad, TEXT)
    with pytest.raises(ValueError, match=message):
        model.embed(bad)


def test_bad_texts_and_batch_sizes_are_named(model, frames):
    with pytest.raises(ValueError, match="got 2 for 3 timesteps"):
        model.score(frames, [TEXT, TEXT])
    with pytest.raises(ValueError, match="a text is empty"):
        model.score(frames, "  ")
    with pytest.raises(ValueError, match="at most 24 tokens"):
        model.score(frames, "door " * 30)
    with pytest.raises(ValueError, match="non-empty list"):
        model.embed_text([])
    with pytest.raises(ValueError, match="non-empty list"):
        model.embed_text(TEXT)
    with pytest.raises(ValueError, match="at least 1, got -1"):
        model.score(frames, TEXT, batch_size=-1)


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_nan_is_an_error(model, frames, tower):
    with torch.no_grad():
        next(p for name, p in model.encoder.named_parameters() if f"{tower}_model" in name).fill_(
            float("nan")
        )
    with pytest.raises(
        FloatingPointError, match=f"the {'image' if tower == 'vision' else 'text'} tower gave NaN"
    ):
        model.score(frames, TEXT)


def test_other_cameras_are_refused(model):
    model.check_camera_spec(TWO_VIEWS)
    with pytest.raises(ValueError, match="profile: fast against full"):
        model.check_camera_spec(CameraSpec(TWO_VIEWS.cameras, 32, 32, profile="full"))
    with pytest.raises(ValueError, match=r"cameras: .*corner3.* against .*topview"):
        model.check_camera_spec(CameraSpec(("topview",), 32, 32))


def test_some_of_its_cameras_score_as_all_of_them_do(model, tiny_backbone_dir, frames):
    second = TWO_VIEWS.cameras[1]
    one = model.with_cameras((second,))
    one.check_camera_spec(CameraSpec((second,), TWO_VIEWS.height, TWO_VIEWS.width))
    np.testing.assert_allclose(
        one.score(frames[:, 1:2], TEXT), model.score(frames[:, :2], TEXT)[:, 1:], atol=1e-5
    )
    assert model.camera_spec == TWO_VIEWS
    with pytest.raises(ValueError, match=r"not trained on camera topview; it knows"):
        model.with_cameras(("topview",))
    assert RewardModel.from_pretrained(tiny_backbone_dir).with_cameras(("topview",)).camera_spec is not None


def test_zero_shot_model_takes_any_cameras(tiny_backbone_dir, frames):
    model = RewardModel.from_pretrained(tiny_backbone_dir)
    assert (model.camera_spec, model.metadata) == (None, {})
    model.check_camera_spec(CameraSpec(("topview",), 7, 7))
    assert model.score(frames[:, :1], TEXT).shape == (3, 1)


# Files


def test_adapter_loads_its_parent_and_carries_its_facts(model, tiny_backbone_dir, frames):
    assert model.camera_spec == TWO_VIEWS
    facts = {
        key: model.metadata[key] for key in ("format_version", "backbone", "objective", "preset", "seed")
    }
    assert facts == {
        "format_version": 1,
        "backbone": "tiny",
        "objective": "triplet",
        "preset": "paper",
        "seed": 0,
    }
    assert model.metadata["train_tasks"] == ["reach-v3", "push-v3"]
    assert model.encoder.trainable_parameters() == []
    zero_shot = RewardModel.from_pretrained(tiny_backbone_dir, dtype=torch.float32)
    assert np.abs(model.score(frames, TEXT) - zero_shot.score(frames, TEXT)).max() > 0.01


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_merged_scores_equal_those_of_plain_peft(model, tiny_backbone_dir, tiny_adapter_dir, frames):
    encoder = DualEncoder.from_pretrained(tiny_backbone_dir)
    encoder.model = peft.PeftModel.from_pretrained(encoder.model, str(tiny_adapter_dir))
    unmerged = RewardModel(encoder.eval(), dtype=torch.float32)
    np.testing.assert_allclose(model.score(frames, TEXT), unmerged.score(frames, TEXT), atol=1e-5)


def test_saving_after_loading_loses_nothing(model, tiny_adapter_dir, tiny_backbone_dir, frames, tmp_path):
    backbone = copy(tiny_backbone_dir, tmp_path / "tiny")  # moved together, they find each other
    model.save_pretrained(backbone / "again")
    first, second = (
        load_file(tiny_adapter_dir / "adapter_model.safetensors"),
        load_file(backbone / "again" / "adapter_model.safetensors"),
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    # The copy names its backbone by the path it was loaded from, which is not its new parent.
    assert json.loads((backbone / "again" / "vlm_reward.json").read_text())["backbone"] == str(
        tiny_backbone_dir
    )
    again = RewardModel.from_pretrained(backbone / "again", dtype=torch.float32)
    assert again.camera_spec == TWO_VIEWS
    np.testing.assert_array_equal(again.score(frames, TEXT), model.score(frames, TEXT))
    shutil.copytree(tiny_adapter_dir, backbone / "moved")
    moved = RewardModel.from_pretrained(backbone / "moved", dtype=torch.float32)
    assert moved.encoder.name == str(backbone)
    np.testing.assert_array_equal(moved.score(frames, TEXT), model.score(frames, TEXT))


def test_bare_backbone_is_saved_whole(tiny_backbone_dir, frames, tmp_path):
    model = RewardModel.from_pretrained(tiny_backbone_dir)
    model.camera_spec = TWO_VIEWS
    model.save_pretrained(tmp_path / "whole")
    again = RewardModel.from_pretrained(tmp_path / "whole")
    assert again.camera_spec == TWO_VIEWS
    np.testing.assert_array_equal(again.score(frames, TEXT), model.score(frames, TEXT))
    assert not (tmp_path / "whole" / "adapter_config.json").exists()


def test_names_under_checkpoints_work_from_anywhere(tiny_backbone_dir, monkeypatch, tmp_path, frames):
    monkeypatch.setattr(encoder_module, "CHECKPOINTS", tiny_backbone_dir.parent)
    monkeypatch.chdir(tmp_path)
    model = RewardModel.from_pretrained("tiny/triplet", dtype=torch.float32)
    model.save_pretrained(tmp_path / "run")  # elsewhere, it names its backbone as the checkout does
    assert json.loads((tmp_path / "run" / "vlm_reward.json").read_text())["backbone"] == "tiny"
    again = RewardModel.from_pretrained(tmp_path / "run", dtype=torch.float32)
    np.testing.assert_array_equal(again.score(frames, TEXT), model.score(frames, TEXT))


def test_adapter_that_peft_alone_wrote_is_read_by_its_own_config(
    tiny_adapter_dir, tiny_backbone_dir, tmp_path, model, frames
):
    folder = copy(tiny_adapter_dir, tmp_path / "plain")
    (folder / "vlm_reward.json").unlink()
    fields = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(fields | {"base_model_name_or_path": str(tiny_backbone_dir)})
    )
    plain = RewardModel.from_pretrained(folder, dtype=torch.float32)
    assert plain.camera_spec is None
    np.testing.assert_array_equal(plain.score(frames, TEXT), model.score(frames, TEXT))


def test_model_card_has_the_facts_and_an_edited_one_stays(model, tmp_path):
    model.save_pretrained(tmp_path / "run")
    card = (tmp_path / "run" / "README.md").read_text()
    head, body = card.removeprefix("---\n").split("---\n", 1)
    assert "library_name: peft\n" in head
    assert "base_model: " in head
    assert "- vlm-reward\n" in head
    for line in (
        "| objective | triplet |",
        "| cameras | corner, corner3 |",
        "| train_tasks | reach-v3, push-v3 |",
    ):
        assert line in body
    (tmp_path / "run" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "run")
    assert (tmp_path / "run" / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), SafetensorError("IoError(code: 28)")]
)
def test_full_disk_leaves_the_old_checkpoint(model, tmp_path, monkeypatch, failure):
    model.save_pretrained(tmp_path / "run")
    before = contents(tmp_path / "run")

    def full(state, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise failure

    monkeypatch.setattr(encoder_module, "save_file", full)
    model.metadata["seed"] = 1
    with pytest.raises(OSError, match=r"could not write .*run: .*28.*what was there is unchanged"):
        model.save_pretrained(tmp_path / "run")
    assert contents(tmp_path / "run") == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_files_can_be_read_by_whoever_can_read_the_folder(model, tmp_path):
    (tmp_path / "plain").write_text("")
    model.save_pretrained(tmp_path / "run")
    modes = {path.stat().st_mode for path in (tmp_path / "run").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_interrupt_leaves_the_old_checkpoint(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "run")
    before = contents(tmp_path / "run")

    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "model_card", interrupt)  # the last file to be written
    (tmp_path / "run" / "README.md").unlink()
    del before["README.md"]
    model.metadata["seed"] = 1
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path / "run")
    assert contents(tmp_path / "run") == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_adapter_and_backbone_do_not_share_a_folder(model, tiny_backbone_dir, tiny_adapter_dir, tmp_path):
    backbone, adapter = copy(tiny_backbone_dir, tmp_path / "b"), copy(tiny_adapter_dir, tmp_path / "a")
    with pytest.raises(ValueError, match="holds a backbone"):
        model.save_pretrained(backbone)
    with pytest.raises(ValueError, match="holds an adapter"):
        RewardModel.from_pretrained(tiny_backbone_dir).save_pretrained(adapter)
    assert contents(backbone) == contents(tiny_backbone_dir)
    assert contents(adapter) == contents(tiny_adapter_dir)


def test_damaged_adapter_folders(tiny_backbone_dir, tiny_adapter_dir, tmp_path):
    root = copy(tiny_backbone_dir, tmp_path / "tiny")
    weights, config, facts = "adapter_model.safetensors", "adapter_config.json", "vlm_reward.json"
    fields = json.loads((tiny_adapter_dir / facts).read_text())

    def broken(name: str) -> Path:
        return copy(tiny_adapter_dir, root / name)

    for name, lost in (("no-weights", weights), ("no-config", config)):
        (broken(name) / lost).unlink()
    folder = broken("cut")
    (folder / weights).write_bytes((folder / weights).read_bytes()[:-1])
    (broken("facts") / facts).write_text("{")
    (broken("newer") / facts).write_text(json.dumps(fields | {"format_version": 11}))
    (broken("spec") / facts).write_text(json.dumps(fields | {"camera_spec": {"cameras": ["corner"]}}))
    (broken("orphan") / facts).write_text(json.dumps(fields | {"backbone": "who/knows"}))
    (broken("nameless") / facts).write_text(json.dumps(fields | {"backbone": ""}))
    (root / "nameless" / config).write_text(json.dumps({"peft_type": "LORA"}))
    state = load_file(tiny_adapter_dir / weights)
    state.popitem()
    save_file(state, broken("partial") / weights)
    expected = [
        ("no-weights", FileNotFoundError, "has no adapter_model.safetensors; copy or train it again"),
        ("no-config", FileNotFoundError, r"neither config.json \(a backbone\) nor adapter_config.json"),
        ("cut", ValueError, "truncated or damaged"),
        ("facts", ValueError, "vlm_reward.json is damaged"),
        ("newer", ValueError, "format version 11, this vlm-reward reads up to 10: upgrade"),
        ("spec", ValueError, "vlm_reward.json is damaged .*camera spec needs the fields"),
        ("orphan", FileNotFoundError, "the backbone of adapter .* is missing: no model 'who/knows'"),
        ("nameless", ValueError, "names no backbone"),
        ("partial", ValueError, "does not fit the backbone .*1 weights do not match"),
    ]
    start = time.perf_counter()
    for name, error, message in expected:
        with pytest.raises(error, match=message):
            RewardModel.from_pretrained(root / name)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("name", ["no-such/model", "siglip3-tiny", "/no/such/folder"])
def test_missing_checkpoint(name):
    with pytest.raises(
        FileNotFoundError, match=r"no model .*: neither a folder, nor one under .*checkpoints"
    ):
        RewardModel.from_pretrained(name)


@pytest.mark.parametrize("load", [RewardModel.from_pretrained, DualEncoder.from_pretrained])
def test_missing_device(load, tiny_backbone_dir):
    absent = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ValueError, match=rf"this machine has no device {absent}; it has cpu"):
        load(tiny_backbone_dir, device=absent)
    with pytest.raises(ValueError, match="device 'gpu' is none that PyTorch knows"):
        load(tiny_backbone_dir, device="gpu")


@pytest.mark.network
def test_google_siglip2_base_scores_by_name():
    model = RewardModel.from_pretrained("google/siglip2-base-patch16-224")
    frames = np.zeros((2, 1, 64, 64, 3), np.uint8)
    frames[0, ..., 0] = frames[1, ..., 1] = 255
    red, green = model.score(frames, "a red picture")[:, 0]
    assert red > green
