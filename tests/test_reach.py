"""A reach model tells how near the hand is to what a sentence names, and nothing else."""

import json
import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from agents import loop
from agents.config import AgentConfig
from agents.rewards import load_scorer
from training import find, heads
from training import reach as command
from training.find import FindConfig
from training.reach import ReachConfig
from vlm_reward import reward_model as module
from vlm_reward.cameras import WORKSPACE, CameraSpec, projections
from vlm_reward.ensemble import Ensemble
from vlm_reward.envs import make_env
from vlm_reward.reach import (
    Finder,
    ReachHead,
    ReachModel,
    agree,
    load_weights,
    save_weights,
    triangulate,
)
from vlm_reward.reward_model import RewardModel
from vlm_reward.transforms import GoalBaseline

TEXT = "open the green drawer"
SPEC = CameraSpec(cameras=("corner", "corner3"), height=32, width=32)


SEES = torch.tensor(
    [
        [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, -0.2], [0.0, 1.0, 0.0, 0.0]],  # from the front, along y
        [[0.0, 1.0, 0.0, -0.7], [0.0, 0.0, 1.0, -0.2], [-1.0, 0.0, 0.0, 1.0]],  # from the right, against x
    ]
)
"""Of two cameras: u, v are x / y, (z - 0.2) / y and (y - 0.7) / (1 - x), (z - 0.2) / (1 - x)."""


def head_of(seed: int = 0, layers: int = 0) -> ReachHead:
    """A random head for `tiny_encoder`: 4 patches of 32 numbers, sentences of 32."""
    torch.manual_seed(seed)
    return ReachHead(4, 32, 32, asked=8, kept=4, layers=layers)


def finder_of(seed: int = 0) -> Finder:
    """A random finder for it: images of 32 pixels, so 8 x 8 cells."""
    torch.manual_seed(seed)
    return Finder(32, 4, 32, 32, asked=8)


@pytest.fixture
def model(tiny_encoder) -> ReachModel:
    return ReachModel(tiny_encoder, head_of(), camera_spec=SPEC, dtype=torch.float32)


@pytest.fixture
def placed(tiny_encoder) -> ReachModel:
    """One that looks for the thing in the first frame."""
    metadata = {"projections": dict(zip(SPEC.cameras, SEES.tolist(), strict=True))}
    return ReachModel(
        tiny_encoder,
        head_of(),
        finder_of(),
        camera_spec=SPEC,
        metadata=metadata,
        start_weight=1,
        dtype=torch.float32,
    )


@pytest.mark.parametrize(("metres", "score"), [(0.01, 1), (0.1, 0), (1.0, -1), (0.001, 1), (3.0, -1)])
def test_a_score_is_linear_in_the_logarithm_of_the_distance(model, frames, metres, score):
    last = model.head.distance[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(math.log(metres) - math.log(0.15))
    scores = model.score(frames, TEXT)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, np.full((3, 2), score), atol=1e-5)


def test_places_are_those_of_the_patches_that_are_meant():
    head = head_of()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        head.hand.weight[0, 0] = 50.0  # a patch with a number 0 is the hand
        head.shown.weight[0, 1] = 50.0  # one with a number 1 is asked for by a sentence with a number 2
        head.asked.weight[0, 2] = 1.0
    patches = torch.zeros(1, 4, 32)
    patches[0, 0, 0] = patches[0, 3, 1] = 1.0  # upper left, lower right
    text = torch.eye(32)[2]
    _, at_hand, at_thing, logits = head(head.look(patches), text)
    torch.testing.assert_close(at_hand, torch.tensor([[-0.5, 0.5]]))
    torch.testing.assert_close(at_thing, torch.tensor([[0.5, -0.5]]))
    assert logits.argmax() == 3
    _, _, nowhere, _ = head(head.look(patches), torch.eye(32)[3])  # a sentence that asks for nothing
    torch.testing.assert_close(nowhere, torch.zeros(1, 2))


def test_it_hears_the_thing_and_not_what_is_to_be_done(model, frames):
    near = model.score(frames, "open the drawer")
    np.testing.assert_array_equal(near, model.score(frames, "close the drawer"))
    assert np.abs(near - model.score(frames, "press the button")).max() > 1e-4
    assert model.with_approach_weight(0) is model
    with pytest.raises(ValueError, match=r"nothing but the hand: approach_weight must be 0, got 0\.5"):
        model.with_approach_weight(0.5)
    with pytest.raises(ValueError, match=r"in the first \(1\), got 0\.5"):
        model.with_start_weight(0.5)
    with pytest.raises(ValueError, match="neither an ensemble nor a reach model"):
        GoalBaseline(model, "a robot arm")
    compared = model.compare(model.embed(frames), ["open the drawer", "press the button"])
    np.testing.assert_allclose(compared[..., 0], near, atol=1e-6)
    several = model.score(frames, ["open the drawer", "press the button", "open the drawer"])
    np.testing.assert_allclose(several[1], compared[1, :, 1], atol=1e-6)
    one = model.with_cameras("corner3")
    np.testing.assert_allclose(one.score(frames[:, 1:], TEXT), model.score(frames, TEXT)[:, 1:], atol=1e-6)


def test_a_point_that_two_cameras_see_is_found():
    points = torch.tensor([[0.1, 0.7, 0.2], [-0.2, 0.5, 0.05]])
    seen = torch.cat([points, torch.ones(2, 1)], 1) @ SEES.mT  # [V, N, 3]
    places = (seen[..., :2] / seen[..., 2:]).transpose(0, 1)
    torch.testing.assert_close(triangulate(places, SEES), points, atol=1e-5, rtol=0)


def test_a_thing_is_where_all_views_agree():
    point = torch.tensor([[0.15, 0.7, 0.35]])
    seen = torch.cat([point, torch.ones(1, 1)], 1) @ SEES.mT
    line = (torch.arange(8) + 0.5) / 4 - 1
    y, x = torch.meshgrid(-line, line, indexing="ij")
    away = (torch.stack([x, y], -1).reshape(1, 64, 2) - seen[..., :2] / seen[..., 2:]).square().sum(-1)
    logits = -away / 0.03
    found = agree(logits[None, :, None], SEES)  # one frame, two views, one sentence
    assert found.shape == (1, 1, 3)
    torch.testing.assert_close(found[0], point, atol=0.02, rtol=0)
    # A second one that the first view cannot tell from it, below, where the other sees nothing, moves it little.
    wrong = logits.clone()
    wrong[0] = torch.maximum(logits[0], logits[0].reshape(8, 8).flip(0).flatten())
    torch.testing.assert_close(agree(wrong[None, :, None], SEES)[0], point, atol=0.05, rtol=0)


def test_against_the_first_frame_it_measures_from_where_the_thing_was(model, placed, frames):
    start = frames[2]
    scores = placed.score(frames, TEXT, start=start)
    assert scores.shape == (3, 2)
    np.testing.assert_array_equal(scores[:, 0], scores[:, 1])  # one of all views
    hand = triangulate(torch.from_numpy(placed.embed(frames))[..., -2:], SEES)
    pixels = placed.encoder.preprocess(start)
    with torch.inference_mode():
        looked = placed.finder.look(pixels, placed.encoder.encode_patches(pixels)[1])
        logits = placed.finder(looked, placed._embed_texts([TEXT]))
    assert logits.shape == (2, 64)
    thing = agree(logits[None, :, None], SEES)[:, 0]
    metres = (hand - thing).norm(dim=-1).clamp(0.01, 1).numpy()
    np.testing.assert_allclose(scores[:, 0], -1 - np.log10(metres), atol=1e-4)
    np.testing.assert_allclose(placed.locate(start[None], TEXT), thing, atol=1e-5)
    both = placed.score(frames, [TEXT, "press the button", TEXT], start=start)
    np.testing.assert_allclose(both[::2], scores[::2], atol=1e-5)
    kinds = placed.compare(placed.embed(frames), [TEXT, "press the button"], placed.embed_start(start[None]))
    np.testing.assert_allclose(kinds[1, :, 1], both[1], atol=1e-5)
    located = placed.locate(frames, [TEXT, "press the button", TEXT])
    np.testing.assert_allclose(located[1], placed.locate(frames[1:2], "press the button")[0], atol=1e-5)
    by_head = ReachModel(
        placed.encoder, head_of(), camera_spec=SPEC, metadata=placed.metadata, dtype=torch.float32
    ).with_start_weight(1)
    seen = torch.from_numpy(by_head.embed_start(start[None]))
    with torch.inference_mode():
        thing = agree(by_head.head(seen[:, :, None], by_head._embed_texts([TEXT]))[3], SEES)[:, 0]
    np.testing.assert_allclose(by_head.locate(start[None], TEXT), thing, atol=1e-5)
    metres = (hand - thing).norm(dim=-1).clamp(0.01, 1).numpy()
    np.testing.assert_allclose(
        by_head.score(frames, TEXT, start=start)[:, 0], -1 - np.log10(metres), atol=1e-4
    )
    assert placed.with_start_weight(0).projections is None
    np.testing.assert_array_equal(placed.with_start_weight(0).score(frames, TEXT), model.score(frames, TEXT))


def test_what_takes_a_first_frame_is_refused_without(model, placed, frames):
    with pytest.raises(ValueError, match=r"takes two views .*: got corner;"):
        placed.with_cameras("corner")
    with pytest.raises(ValueError, match="there is no projection of corner, corner3"):
        model.with_start_weight(1)
    with pytest.raises(ValueError, match="give start=the first frame"):
        placed.score(frames, TEXT)
    with pytest.raises(ValueError, match=r"only a start_weight of 1 knows where things are"):
        placed.with_start_weight(0).locate(frames, TEXT)
    with pytest.raises(ValueError, match="the finder is of another backbone"):
        ReachModel(model.encoder, head_of(), Finder(32, 4, 8, 32), camera_spec=SPEC)
    with pytest.raises(ValueError, match="a multiple of 8 pixels a side and patches be a square grid"):
        Finder(30, 4, 32, 32)


def test_a_finder_tells_places_finer_than_patches():
    """Two images with the same patches that differ in their pixels, learned in some steps: each to its cell."""
    finder = finder_of()
    pixels, patches, text = torch.full((2, 3, 32, 32), -1.0), torch.zeros(2, 4, 32), torch.eye(32)[2]
    cells = (9, 27)  # of 8 x 8, both in the upper left patch
    for image, cell in enumerate(cells):
        row, column = divmod(cell, 8)
        pixels[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1.0
    torch.testing.assert_close(finder.centres[9], torch.tensor([-0.625, 0.625]))
    optimizer = torch.optim.AdamW(finder.parameters(), 3e-3)
    for _ in range(30):
        logits = finder(finder.look(pixels, patches), text)
        loss = heads.where_loss(logits[:, None], finder.centres[list(cells)][:, None], finder.centres)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logits.argmax(-1).tolist() == [*cells]


def test_an_agent_may_have_one_view_without_the_first_frame():
    config = AgentConfig(reward="siglip2-tiny-soup/reach+start", cameras=("corner",))
    with pytest.raises(ValueError, match="with a start_weight of 0 one will do"):
        load_scorer(config)
    scorer = load_scorer(replace(config, start_weight=0.0))
    assert isinstance(scorer, ReachModel)
    assert scorer.camera_spec is not None
    assert scorer.camera_spec.cameras == ("corner",)


@pytest.mark.parametrize(("layers", "finds"), [(0, False), (1, True)])
def test_saved_and_loaded_it_scores_the_same(layers, finds, tiny_backbone_dir, tmp_path, frames):
    backbone = tmp_path / "tiny"
    backbone.symlink_to(tiny_backbone_dir)
    sees = dict(zip(SPEC.cameras, SEES.tolist(), strict=True))
    made = ReachModel(
        RewardModel.from_pretrained(tiny_backbone_dir).encoder,
        head_of(layers=layers),
        finder_of() if finds else None,
        camera_spec=SPEC,
        start_weight=float(finds),
        metadata={"objective": "reach", "train_tasks": ["reach-v3"], "projections": sees},
    )
    made.save_pretrained(tmp_path / "reach")
    names = {file.name for file in (tmp_path / "reach").iterdir()}
    finder = {"finder.safetensors"} if finds else set()
    assert names == {"README.md", "reach.safetensors", "vlm_reward.json"} | finder
    facts = json.loads((tmp_path / "reach" / module.METADATA).read_text())
    assert facts["format_version"] == module.REACH_VERSION == 10
    sizes = {"image_size": 32, "patches": 4, "width": 32, "text_width": 32, "asked": 8}
    assert facts.get("finder") == (sizes if finds else None)
    assert facts["reach"] == {
        "patches": 4,
        "width": 32,
        "text_width": 32,
        "asked": 8,
        "kept": 4,
        "layers": layers,
    }
    card = (tmp_path / "reach" / "README.md").read_text()
    assert "A head on the patches of a frozen backbone" in card
    assert "lora" not in card.lower()
    again = RewardModel.from_pretrained(tmp_path / "reach")
    assert isinstance(again, ReachModel)
    assert again.metadata["train_tasks"] == ["reach-v3"]
    start = frames[0] if finds else None
    np.testing.assert_array_equal(
        again.score(frames, TEXT, start=start), made.score(frames, TEXT, start=start)
    )
    with pytest.raises(ValueError, match="push the backbone first"):
        again.push_to_hub("me/reach")


@pytest.mark.parametrize("part", [head_of(), finder_of()])
def test_damaged_or_foreign_weights_are_refused(part, tmp_path):
    file, kind = tmp_path / "weights", type(part)
    save_weights(part, file)
    assert torch.equal(load_weights(kind, file, part.sizes).asked.weight, part.asked.weight)
    with pytest.raises(ValueError, match="is damaged"):
        load_weights(kind, file, part.sizes | {"asked": 9})
    with pytest.raises(ValueError, match="is damaged"):
        load_weights(kind, file, None)
    with pytest.raises(FileNotFoundError, match=r"has no reach\.safetensors"):
        load_weights(kind, tmp_path / "reach.safetensors", part.sizes)
    file.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match=rf"train it again: .*{'reach' if kind is ReachHead else 'find'}"):
        load_weights(kind, file, part.sizes)


def test_a_foreign_head_is_refused(model):
    with pytest.raises(ValueError, match="the head is of another backbone"):
        ReachModel(model.encoder, ReachHead(9, 32, 32), camera_spec=SPEC)
    with pytest.raises(ValueError, match="square grid"):
        ReachHead(5, 32, 32)
    with pytest.raises(ValueError, match="takes no judge"):
        model.with_judge(model)


def test_in_an_ensemble_it_counts_by_its_share(model, make_tiny_encoder, frames):
    other = RewardModel(make_tiny_encoder(1), camera_spec=SPEC, start_weight=0.5, dtype=torch.float32)
    both = Ensemble([other, model], [3.0, 1.0], approach_weight=0.5)
    assert [member.approach_weight for member in both.with_approach_weight(0.25).members] == [0.25, 0]
    assert [member.start_weight for member in both.with_start_weight(0.75).members] == [0.75, 0]
    asked = other.with_approach_weight(0.5)
    expected = 0.75 * asked.score(frames, TEXT, start=frames[0]) + 0.25 * model.score(frames, TEXT)
    np.testing.assert_allclose(both.score(frames, TEXT, start=frames[0]), expected, atol=1e-6)
    start = both.embed_start(frames[:1])[0]
    compared = both.compare(both.embed(frames), [TEXT, "press the button"], start)
    np.testing.assert_allclose(compared[..., 0], expected, atol=1e-6)


def test_an_ensemble_runs_a_backbone_once_for_all_that_read_it(tiny_backbone_dir, tmp_path, frames):
    plain = RewardModel.from_pretrained(tiny_backbone_dir, dtype=torch.float32)
    head = ReachModel(plain.encoder, head_of(), dtype=torch.float32)
    head.save_pretrained(tmp_path / "reach")
    names = [str(tiny_backbone_dir), str(tmp_path / "reach")]
    Ensemble([plain, head], [3.0, 1.0], names=names).save_pretrained(tmp_path / "both")
    both = RewardModel.from_pretrained(tmp_path / "both", dtype=torch.float32)
    assert both.members[0].encoder is both.members[1].encoder
    forwards = []
    both.encoder.model.vision_model.register_forward_hook(lambda *_: forwards.append(1))
    expected = 0.75 * plain.score(frames, TEXT) + 0.25 * head.score(frames, TEXT)
    np.testing.assert_allclose(both.score(frames, TEXT), expected, atol=1e-6)
    assert len(forwards) == 1
    both.members[0].dtype = torch.bfloat16  # no longer the same arithmetic
    both.score(frames, TEXT)
    assert len(forwards) == 3


def test_the_shipped_ensemble_runs_three_backbones_for_four_members():
    members = RewardModel.from_pretrained("siglip2-tiny-ensemble").members
    assert len(members) == 4
    assert len({id(member.encoder) for member in members}) == 3


def test_the_loop_refuses_to_train_on_from_it(model, tmp_path):
    model.save_pretrained(tmp_path / "reach")
    with pytest.raises(ValueError, match="how near the hand is and no more"):
        loop.main(loop.LoopConfig(reward=str(tmp_path / "reach"), output=tmp_path / "loop"))


# Training


def test_the_loss_is_that_of_hand(model):
    """A head whose places are those of patch 0, with one of four equally likely patches: by hand."""
    head = model.head
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    looked = head.look(torch.zeros(2, 4, 32))
    hand = torch.tensor([[0.05, 0.0], [math.nan, math.nan]])
    nowhere = [math.nan, math.nan]
    thing = torch.tensor([[[0.5, 0.5], nowhere, nowhere], [nowhere, nowhere, nowhere]])
    far = torch.tensor([[0.15, 0.15, math.nan], [math.nan, math.nan, math.nan]])
    losses = command.losses_of(head, looked, torch.zeros(2, 3, 32), hand, thing, far)
    assert losses["distance"] == pytest.approx(0.0, abs=1e-6)  # an untrained head says 15 cm
    assert losses["hand"] == pytest.approx(0.5 * 0.05**2 / 0.1 / 2, abs=1e-6)
    assert losses["thing"] == pytest.approx(0.5 - 0.05, abs=1e-6)
    share = np.exp([-0.0, -2.0, -2.0, -4.0])  # squared distances 0, 1, 1, 2 over 2 / 4
    share /= share.sum()
    assert losses["where"] == pytest.approx(np.log(4) + (share * np.log(share)).sum(), abs=1e-5)
    wide = heads.where_loss(torch.zeros(1, 1, 4), thing[:1, :1], head.centres, spread=1.0)
    share = np.exp([-0.0, -0.5, -0.5, -1.0])
    share /= share.sum()
    assert wide == pytest.approx(np.log(4) + (share * np.log(share)).sum(), abs=1e-5)


@pytest.fixture
def config(tiny_backbone_dir: Path, shards: Path, tmp_path: Path, monkeypatch) -> ReachConfig:
    monkeypatch.setattr(command, "train_tasks", lambda: ("window-open-v3", "push-v3"))
    return ReachConfig(
        output=tmp_path / "reach",
        backbone=str(tiny_backbone_dir),
        scenes=(shards,),
        steps=6,
        batch_size=16,
        save_every=2,
        threads=1,
    )


def test_stopped_and_resumed_it_comes_to_the_same_weights(config, tmp_path, monkeypatch):
    right = command.reach(config)
    assert set(right) == {"learned tasks"}
    whole = (config.output / module.REACH).read_bytes()
    assert {file.name for file in config.output.iterdir()} == {"README.md", module.REACH, module.METADATA}
    with pytest.raises(FileExistsError, match="--overwrite"):
        command.reach(config)

    parted = replace(config, output=tmp_path / "parted")
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        command.reach(replace(parted, resume=True))
    calls = iter([False] * 3 + [True])  # among the patches
    stopped = type("Stop", (), {"__enter__": lambda _: lambda: next(calls), "__exit__": lambda *_: None})
    with monkeypatch.context() as patched:
        patched.setattr(command, "stop_on_interrupt", stopped)
        assert command.reach(parted) == {}
    stored = (parted.output / "patches.f16").stat().st_size
    assert stored == 3 * 32 * (4 * 32 * 2 + 8)  # three batches of 32: 4 patches of 32 halves, and a move
    with pytest.raises(ValueError, match="begun with other settings"):
        command.reach(replace(parted, resume=True, seed=1))
    full = 2 * len(command.Scenes(config.scenes, command.train_tasks())) * (4 * 32 * 2 + 8)
    steps = [0]

    def stop() -> bool:
        steps[0] += (parted.output / "patches.f16").stat().st_size >= full
        return steps[0] > 4  # after some steps of training

    stopped = type("Stop", (), {"__enter__": lambda _: stop, "__exit__": lambda *_: None})
    with monkeypatch.context() as patched:
        patched.setattr(command, "stop_on_interrupt", stopped)
        assert command.reach(replace(parted, resume=True)) == {}
    assert (parted.output / "state.safetensors").exists()
    assert command.reach(replace(parted, resume=True)) == right
    assert (parted.output / module.REACH).read_bytes() == whole


def test_it_learns_to_tell_the_nearer_hand(config):
    """Of real scenes, with patches of the embedded backbone; half would be chance."""
    learned = replace(config, backbone="siglip2-tiny", steps=150, batch_size=64)
    right = command.reach(learned)
    assert right["learned tasks"] > 0.85
    model = RewardModel.from_pretrained(learned.output)
    assert model.metadata["train_tasks"] == ["push-v3", "window-open-v3"]
    assert model.metadata["validation"] == right
    frames = np.zeros((1, 1, 56, 56, 3), np.uint8)
    assert model.with_cameras("corner").score(frames, TEXT).shape == (1, 1)


def test_it_learns_to_find_things(config, monkeypatch, capsys):
    """The same scenes; stopped and resumed it comes to the same weights."""
    command.reach(replace(config, backbone="siglip2-tiny", steps=2))
    monkeypatch.setattr(find, "train_tasks", command.train_tasks)
    monkeypatch.setattr(find, "PER_SCENE", 16)
    finding = FindConfig(
        output=config.output.parent / "found",
        reach=str(config.output),
        scenes=config.scenes,
        steps=30,
        batch_size=16,
        learning_rate=3e-3,
        threads=1,
    )
    right = find.find(finding)
    assert right["learned tasks"] > 0.6  # at the first step 2 %
    assert {file.name for file in finding.output.iterdir()} == {
        "README.md",
        module.REACH,
        module.FINDER,
        module.METADATA,
    }
    model = RewardModel.from_pretrained(finding.output)
    assert model.metadata["validation"] == right
    assert model.metadata["head"]["trained_steps"] == 2
    frames = np.zeros((1, 3, 56, 56, 3), np.uint8)
    assert model.score(frames, TEXT, start=frames[0]).shape == (1, 3)
    assert model.with_cameras(("corner4", "corner")).score(
        frames[:, :2], TEXT, start=frames[0, :2]
    ).shape == (1, 2)
    assert model.with_start_weight(0).with_cameras("corner").score(frames[:, :1], TEXT).shape == (1, 1)
    with pytest.raises(FileExistsError, match="--overwrite"):
        find.find(finding)
    with pytest.raises(ValueError, match="is no reach model"):
        find.find(replace(finding, reach="siglip2-tiny", output=finding.output / "other"))

    short = replace(finding, steps=3, output=finding.output.parent / "whole")
    find.find(short)
    parted, calls = replace(short, output=finding.output.parent / "parted"), iter([False, True])
    stopped = type("Stop", (), {"__enter__": lambda _: lambda: next(calls), "__exit__": lambda *_: None})
    with monkeypatch.context() as patched:
        patched.setattr(find, "stop_on_interrupt", stopped)
        assert find.find(parted) == {}
    find.find(replace(parted, resume=True))
    whole, again = ((each.output / module.FINDER).read_bytes() for each in (short, parted))
    assert whole == again


def test_the_cameras_of_all_tasks_see_the_same():
    spec = CameraSpec()
    for task in ("coffee-button-v3", "hammer-v3"):
        with closing(make_env(task)) as env:
            env.reset(seed=1)
            scene = env.unwrapped
            sees = projections(scene.model, scene.data, spec.cameras, WORKSPACE)
        np.testing.assert_allclose(sees, [*command.what_cameras_see(spec, WORKSPACE).values()], atol=1e-5)


def test_stand_ins_are_not_learned_from(config):
    right = command.reach(replace(config, stand_ins=("push-v3",)))
    assert set(right) == {"learned tasks", "stand-ins"}
    facts = json.loads((config.output / module.METADATA).read_text())
    assert facts["train_tasks"] == ["window-open-v3"]
    with pytest.raises(ValueError, match="is no training task"):
        command.reach(replace(config, stand_ins=("drawer-open-v3",), overwrite=True))


def test_what_cannot_be_learned_from_is_refused(config):
    with pytest.raises(ValueError, match="render them again"):
        command.reach(replace(config, backbone="siglip2-tiny-soup"))  # which looks at crops
    with pytest.raises(FileNotFoundError, match="run python -m training"):
        command.reach(replace(config, scenes=(config.output,)))
    with pytest.raises(ValueError, match="steps must be at least 1"):
        replace(config, steps=0)
    assert not config.output.exists()
