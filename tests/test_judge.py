"""A judge learns what is so where an episode begins, stops and goes on exactly, and refuses what it cannot use."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.synthetic import SPEC, write_dataset
from training import judge as module
from training.judge import ALIKE, JudgeConfig, Moments, judge, logits_of, told_loss
from vlm_reward.encoder import DualEncoder
from vlm_reward.envs import make_env
from vlm_reward.frame_cache import cached
from vlm_reward.reward_model import RewardModel
from vlm_reward.tasks import OPPOSITES, instruction

TASKS = ("window-open-v3", "window-close-v3", "reach-v3")
TEXTS = tuple(instruction(task) for task in TASKS)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six demonstrations of three tasks, thirty other beginnings, and some of a held-out task."""
    root = tmp_path_factory.mktemp("judge")
    same = {"tasks": TASKS, "texts": TEXTS}
    write_dataset(root / "minari", dataset_id="test/demos-v0", episodes=6, **same)
    write_dataset(root / "minari", dataset_id="test/starts-v0", episodes=30, lengths=(2, 3), seed=1, **same)
    pair = {"tasks": TASKS[:2], "texts": TEXTS[:2]}
    write_dataset(root / "minari", dataset_id="test/pair-v0", episodes=20, lengths=(2, 3), seed=2, **pair)
    write_dataset(root / "minari", dataset_id="test/leak-v0", tasks=("reach-v3", "door-open-v3"), episodes=2)
    return root


@pytest.fixture
def config(
    root: Path, tiny_backbone_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> JudgeConfig:
    """Six steps in less than a second."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root / "minari"))
    encoder = DualEncoder.from_pretrained(tiny_backbone_dir)
    encoder.add_lora(r=2)
    facts = {"objective": "triplet+start", "evaluation": [], "validation": {"val_voc": 0.9}}
    adapter = RewardModel(encoder, camera_spec=SPEC, start_weight=0.5, metadata=facts)
    adapter.save_pretrained(tmp_path / "adapter")
    return JudgeConfig(
        adapter=str(tmp_path / "adapter"),
        output=tmp_path / "out",
        dataset="test/demos-v0",
        starts=("test/starts-v0",),
        steps=6,
        batch_size=16,
        validate_every=4,
        cache=root / "cache",
        device="cpu",
    )


def moments(root: Path, config: JudgeConfig) -> Moments:
    demos = cached(config.dataset, 32, root / "cache")
    return Moments([(demos, range(6))], [demos], dict(zip(TASKS, TEXTS, strict=True)))


def test_a_beginning_has_what_the_opposite_asks_and_an_end_what_its_own_does(root, config):
    found = moments(root, config)
    assert found.sentences == list(TEXTS)
    unknown = np.nan
    begin, end = ([0, 1, 0], [1, 0, 0], [0, 0, 0]), ([1, 0, unknown], [0, 1, unknown], [unknown, unknown, 1])
    np.testing.assert_array_equal(found.told, [*begin, *begin, *end, *end])
    np.testing.assert_array_equal(found.asked[:3], [[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    assert [of.tolist() for of in found.of_kind] == [[0, 1, 3, 4], [2, 5], [6, 7, 8, 9, 10, 11]]
    demos = cached(config.dataset, 32, root / "cache")
    np.testing.assert_array_equal(found.frames[1], demos.frames[demos.episodes[1].start])
    np.testing.assert_array_equal(found.frames[6], demos.frames[demos.episodes[1].start - 1])


def test_batches_have_their_shares_and_differ_by_the_seed_alone(root, config):
    found = moments(root, config)
    chosen, frames = found.draw(32, np.random.default_rng(0))
    assert [int(np.isin(chosen, of).sum()) for of in found.of_kind] == [20, 6, 6]
    assert (frames.shape, frames.dtype) == ((32, 32, 32, 3), np.uint8)
    again, same = found.draw(32, np.random.default_rng(0))
    np.testing.assert_array_equal(again, chosen)
    np.testing.assert_array_equal(same, frames)


def test_told_loss_by_hand():
    logits = torch.tensor([[0.0, 2.0, -1.0], [1.0, 0.0, 0.0]])
    told = torch.tensor([[1.0, 0.0, 0.0], [0.0, np.nan, 1.0]])
    asked = torch.tensor([[True, True, False], [True, False, False]])
    own = (np.log(2) + np.log1p(np.exp(2)) + np.log1p(np.e)) / 3
    others = (np.log1p(np.exp(-1)) + np.log(2)) / 2
    assert told_loss(logits, told, asked).item() == pytest.approx(own + 0.3 * others)
    texts = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    torch.testing.assert_close(logits_of(torch.tensor([[1.0, 0.0]]), texts), torch.tensor([[7.0, 3.0]]))


def test_faucets_begin_alike_and_windows_do_not():
    def joints(task: str) -> np.ndarray:
        env = make_env(task, seed=0)
        env.reset(seed=0)
        found = env.unwrapped.data.qpos[9:].copy()  # pyright: ignore[reportAttributeAccessIssue]
        env.close()
        return found

    assert set(ALIKE) in [set(pair) for pair in OPPOSITES]
    assert [joints(task).tolist() for task in ALIKE] == [[0], [0]]
    assert joints(TASKS[1]) - joints(TASKS[0]) > 0.15  # metres that the window is open


def test_a_judge_learns_to_tell_and_is_saved_with_the_adapter(config, monkeypatch):
    monkeypatch.setattr(module, "SHARES", (1, 0, 0))  # ends, too, are much to learn for a tiny encoder
    pair = {"dataset": "test/pair-v0", "starts": ("test/pair-v0",)}
    found = judge(replace(config, steps=250, learning_rate=3e-3, validate_every=50, **pair))
    assert found == {"not so": 1, "so": 1}
    model = RewardModel.from_pretrained(config.output)
    assert model.judge
    assert model.metadata["objective"] == "triplet+start+judge"
    assert not {"evaluation", "validation"} & set(model.metadata)
    assert model.judge.metadata["validation"] == found
    assert not (config.output / "state.safetensors").exists()
    card = (config.output / "judge" / "README.md").read_text()
    assert "tells from camera frames whether what a sentence asks is so already" in card
    assert "what is not so in 100.0 %, so in 100.0 %." in card
    before = RewardModel.from_pretrained(config.adapter)
    frames = np.random.default_rng(0).integers(0, 255, (2, 2, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(model.embed(frames), before.embed(frames))  # the adapter is as it was
    demos = cached(config.dataset, 32, config.cache)
    episode = demos.episodes[0]
    for text, sign in zip(TEXTS, (1, -1), strict=False):
        now, then = (
            one.score(demos.frames[episode.rows], text, start=demos.frames[episode.start])
            for one in (model, before)
        )
        assert np.corrcoef(now.ravel(), then.ravel())[0, 1] == pytest.approx(sign, abs=1e-4)


def test_an_interrupted_and_resumed_run_has_the_same_weights(config, monkeypatch, tmp_path):
    judge(config)
    whole = RewardModel.from_pretrained(config.output).judge
    stopped = replace(config, output=tmp_path / "stopped")
    drawn = Moments.draw

    def draw(self, count, rng):
        draw.calls += 1
        if draw.calls == 3:
            signal.raise_signal(signal.SIGINT)
        return drawn(self, count, rng)

    draw.calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(Moments, "draw", draw)
        assert judge(stopped) == {}
    with pytest.raises(ValueError, match=r"other settings \(seed: 0 then, 1 now\)"):
        judge(replace(stopped, resume=True, seed=1))
    with pytest.raises(FileExistsError, match="--resume it, --overwrite it"):
        judge(stopped)
    judge(replace(stopped, resume=True))
    again = RewardModel.from_pretrained(stopped.output).judge
    assert whole
    assert again
    for name, weight in whole.encoder.state_dict().items():
        assert torch.equal(weight, again.encoder.state_dict()[name]), name


def test_what_cannot_be_judged_is_refused(config, tiny_adapter_dir):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        judge(replace(config, resume=True))
    with pytest.raises(ValueError, match="does not score against the first frame"):
        judge(replace(config, adapter=str(tiny_adapter_dir)))
    with pytest.raises(ValueError, match="holds door-open-v3"):
        judge(replace(config, starts=("test/leak-v0",)))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        replace(config, batch_size=0)
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        replace(config, learning_rate=0.0)
    assert not config.output.exists()


def test_the_command_line_says_how_to_go_on(config, monkeypatch, capsys):
    monkeypatch.setattr(module.tyro, "cli", lambda *_, **__: config)
    monkeypatch.setattr("sys.argv", ["judge", "--adapter", "a", "--output", "out"])

    def interrupted(config):
        config.output.mkdir()
        (config.output / "state.safetensors").touch()

    with monkeypatch.context() as patch:
        patch.setattr(module, "judge", interrupted)
        with pytest.raises(SystemExit) as stop:
            module.main()
    assert stop.value.code == 130
    assert "go on with: python -m training.judge --adapter a --output out --resume" in capsys.readouterr().out
    assert json.loads((Path(config.adapter) / "vlm_reward.json").read_text())["start_weight"] == 0.5
