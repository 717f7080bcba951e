"""Training learns, keeps the best, stops and goes on exactly, and says what is wrong with its input."""

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eval.lerobot_writer import write_lerobot
from tests.synthetic import SPEC, TASKS, TEXTS, write_dataset
from training.config import TrainConfig
from training.language import lessons
from training.objectives import OBJECTIVES
from training.order import Orders, Rollouts, Scenes, ranked_loss, without_first, wrong_loss
from training.train import (
    LESSON_POOL,
    check_tasks,
    hyper_parameters,
    jitter,
    learning_rate,
    main,
    meant_by,
    read_state,
    split_episodes,
    ten_of,
    train,
)
from vlm_reward._jobs import stop_on_interrupt
from vlm_reward.cameras import Crop
from vlm_reward.frame_cache import FrameCache, cached
from vlm_reward.metrics import voc
from vlm_reward.recording import EpisodeInfo
from vlm_reward.reward_model import RewardModel
from vlm_reward.similarity import toward


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty demonstrations of a moving square, six noisy ones, and one of a held-out task."""
    root = tmp_path_factory.mktemp("training")
    write_dataset(root / "minari", episodes=20)
    write_dataset(root / "minari", dataset_id="test/mixed-v0", episodes=6, kinds=("expert", "noisy", "noisy"))
    write_dataset(root / "minari", dataset_id="test/leak-v0", episodes=2, tasks=(TASKS[0], "door-open-v3"))
    return root


@pytest.fixture
def config(
    root: Path, tiny_backbone_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> TrainConfig:
    """Ten steps in less than a second."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root / "minari"))
    return TrainConfig(
        backbone=str(tiny_backbone_dir),
        dataset="test/squares-v0",
        cameras=SPEC,
        cache=root / "cache",
        output=tmp_path / "out",
        samples=40,
        batch_size=8,
        epochs=2,
        dtype="float32",
        device="cpu",
        tensorboard=False,
    )


def test_the_kept_adapter_is_best_in_what_was_asked_for(config: TrainConfig) -> None:
    config = replace(config, select="voc+listening", samples=160, learning_rate=1e-2, validate_every=4)
    done = train(config)
    assert all(0 <= row["val_listening"] <= 1 for row in done.history)
    assert len({row["val_listening"] for row in done.history}) > 1
    assert done.best == max(
        done.history[1:], key=lambda row: (row["val_voc"] + row["val_listening"], -row["val_loss"])
    )
    model = RewardModel.from_pretrained(done.folder)
    assert model.metadata["validation"] == done.best


def test_ten_sentences_begin_with_the_right_one() -> None:
    said = [f"sentence {i}" for i in range(20)]
    ten = ten_of(said, "sentence 3")
    assert ten[0] == "sentence 3"
    assert len(set(ten)) == 10
    assert ten == ten_of(said, "sentence 3") != ten_of(said, "sentence 4")
    assert ten_of(["a"], "a") == ["a"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "state.safetensors")


@pytest.mark.parametrize("sampler", ["paper", "grouped"])
def test_triplet_raises_validation_voc_from_chance_above_90(config: TrainConfig, sampler: Any) -> None:
    config = replace(
        config, sampler=sampler, samples=640, batch_size=32, epochs=6, learning_rate=3e-3, tensorboard=True
    )
    done = train(config)
    assert abs(done.history[0]["val_voc"]) < 0.4
    assert done.best["val_voc"] > 0.9
    assert done.steps == done.total_steps == (120 if sampler == "paper" else 60)

    # What is on disk is the best, and it is what the validation saw: whole trajectories that were held back.
    assert done.best == max(done.history[1:], key=lambda row: (row["val_voc"], -row["val_loss"]))
    model = RewardModel.from_pretrained(done.folder, dtype=torch.float32)
    cache = cached(config.dataset, 32, config.cache)
    _, held_back = split_episodes(cache, config)
    scores = [model.score(cache.frames[e.rows], e.instruction).mean(1) for e in held_back]
    assert np.mean([voc(score) for score in scores]) == pytest.approx(done.best["val_voc"], abs=0.02)
    assert model.camera_spec == SPEC
    assert model.metadata["objective"] == "triplet"
    assert model.metadata["train_tasks"] == sorted(TASKS)
    assert model.metadata["validation"] == done.best
    assert model.metadata["protocol"]["lora_rank"] == 16
    log = json.loads((done.folder / "train_log.json").read_text())
    assert log["result"]["best"] == done.best
    assert log["result"]["samples_per_second"] > 0
    assert log["hardware"]["dtype"] == "float32"
    assert any((done.folder / "tensorboard").iterdir())


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize(("preset", "sampler"), [("paper", "paper"), ("official", "grouped")])
def test_every_objective_trains_both_towers(
    config: TrainConfig, objective: str, preset: Any, sampler: Any
) -> None:
    done = train(
        replace(
            config, objective=objective, preset=preset, sampler=sampler, max_steps=2, validation_fraction=0
        )
    )
    assert np.isfinite(done.loss)
    learned = weights(done.folder)
    for tower in ("vision_model", "text_model"):
        changed = [k for k, v in learned.items() if k.startswith("weight/") and "lora_B" in k and v.any()]
        assert any(tower in key for key in changed)


def test_bfloat16_forward_keeps_float32_weights_and_trains(config: TrainConfig) -> None:
    done = train(replace(config, dtype="bfloat16", augment=True, samples=320, learning_rate=3e-3))
    assert done.best["val_loss"] < done.history[0]["val_loss"]
    assert {tensor.dtype for tensor in weights(done.folder).values()} == {torch.float32}


def test_interrupted_and_resumed_run_has_the_same_weights_and_validation(
    config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(config, samples=24, validate_every=2)  # six steps, validated after 2, 3 (epoch), 4, 6
    straight = train(replace(config, output=tmp_path / "straight"))
    assert straight.steps == 6

    def press_ctrl_c(step: int) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    stopped = train(config, on_step=press_ctrl_c)
    assert (stopped.steps, stopped.interrupted) == (3, True)
    with pytest.raises(FileExistsError, match="--resume"):
        train(config)
    resumed = train(replace(config, resume=True))
    assert (resumed.steps, resumed.interrupted) == (6, False)
    assert resumed.history == straight.history
    assert [row["step"] for row in resumed.history] == [0, 2, 3, 4, 6]
    one, other = weights(straight.folder), weights(resumed.folder)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    adapters = [load_file(done.folder / "adapter_model.safetensors") for done in (straight, resumed)]
    assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])


def test_two_processes_give_the_gradients_of_one_with_the_joint_batch(
    config: TrainConfig, root: Path, tmp_path: Path
) -> None:
    # LIV has in-batch negatives, so a loss of each half alone would differ; 5 samples do not divide by 2.
    config = replace(config, objective="liv", batch_size=5, max_steps=1, learning_rate=1e-4)
    one = train(config)
    cores = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    # With --cpu, accelerate starts one process unless it has MPI: --multi_gpu is its name for torchrun.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0", "-m", "training.train"]
    arguments = ["--objective", "liv", "--backbone", config.backbone, "--dataset", config.dataset]
    arguments += ["--cameras.cameras", *SPEC.cameras, "--cameras.height", "32", "--cameras.width", "32"]
    arguments += ["--cache", str(config.cache), "--output", str(tmp_path / "two"), "--samples", "40"]
    arguments += ["--batch-size", "5", "--epochs", "2", "--max-steps", "1", "--learning-rate", "1e-4"]
    arguments += ["--dtype", "float32", "--device", "cpu", "--threads", "1", "--no-tensorboard"]
    ran = subprocess.run(
        [*launch, *arguments], env=os.environ | cores, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert "1 of 1 steps" in ran.stdout
    log = json.loads((tmp_path / "two" / "train_log.json").read_text())
    assert log["hardware"]["processes"] == 2
    assert log["result"]["loss"] == pytest.approx(one.loss, abs=1e-5)
    assert log["result"]["history"][0]["val_voc"] == pytest.approx(one.history[0]["val_voc"], abs=1e-6)
    alone, together = weights(one.folder), weights(tmp_path / "two")
    gradients = [key for key in alone if key.startswith("exp_avg/")]  # after one step: 0.1 times the gradient
    assert max(alone[key].abs().max() for key in gradients) > 1e-3
    assert any("text_model" in key and alone[key].any() for key in gradients)
    for key in alone:
        torch.testing.assert_close(together[key], alone[key], atol=1e-5, rtol=0)


def test_infinite_loss_names_step_objective_and_remedy(config: TrainConfig) -> None:
    config = replace(config, objective="tcn_text", hyper={"temperature": 1e-45}, validation_fraction=0)
    with pytest.raises(
        FloatingPointError, match=r"step 1 of tcn_text \(paper\).*higher temperature.*nothing"
    ):
        train(config)


def test_divergence_keeps_the_last_state_and_adapter(config: TrainConfig) -> None:
    config = replace(config, learning_rate=1e36, save_every=1, validation_fraction=0)
    with pytest.raises(
        FloatingPointError, match=r"step \d of triplet.*lower --learning-rate than 1e\+36.*last good"
    ):
        train(config)
    assert read_state(config.folder / "state.safetensors")["progress"]["step"] >= 1
    assert (config.folder / "adapter_model.safetensors").is_file()


def test_full_disk_while_saving_keeps_the_checkpoint_before(config: TrainConfig) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(step: int) -> None:
        if step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))

    try:
        with pytest.raises(OSError, match="unchanged"):
            train(replace(config, save_every=1, validation_fraction=0), on_step=fill_the_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_state(config.folder / "state.safetensors")["progress"]["step"] == 2
    assert RewardModel.from_pretrained(config.folder).metadata["trained_steps"] == 2
    written = {path.name for path in config.folder.iterdir()}
    adapter = {"README.md", "adapter_config.json", "adapter_model.safetensors", "vlm_reward.json"}
    assert written == adapter | {"state.safetensors", "train_log.json"}
    done = train(replace(config, save_every=1, validation_fraction=0, resume=True))
    assert done.steps == done.total_steps == 10


def test_damaged_state_is_refused(config: TrainConfig) -> None:
    done = train(replace(config, max_steps=1))
    state = done.folder / "state.safetensors"
    os.truncate(state, state.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"truncated or damaged.*--overwrite"):
        train(replace(config, max_steps=1, resume=True))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"objective": "triplets"}, ValueError, "did you mean triplet"),
        ({"backbone": "no-such-backbone"}, FileNotFoundError, "no-such-backbone"),
        ({"dataset": "test/none-v0"}, FileNotFoundError, "test/none-v0.*test/squares-v0"),
        (
            {"dataset": "test/leak-v0"},
            ValueError,
            "holds door-open-v3, which split 'paper' does not train on",
        ),
        ({"cameras": replace(SPEC, profile="full")}, ValueError, "profile: fast against full"),
        ({"cameras": replace(SPEC, cameras=("corner",))}, ValueError, "cameras.*corner"),
        ({"cameras": replace(SPEC, height=224)}, ValueError, "height: 32 against 224"),
        ({"hyper": {"marign": 1.0}}, ValueError, "triplet has no marign; it has margin"),
        ({"kinds": ("random",)}, ValueError, r"0 trajectories of kind random .*the kinds expert"),
        ({"resume": True}, FileNotFoundError, "nothing to resume"),
        ({"lora_targets": ("heads",)}, ValueError, "LoRA targets"),
        ({"scene_starts": True}, ValueError, "scene_starts needs scenes, and a start_weight"),
        (
            {"scene_starts": True, "scenes": (Path("x"),), "start_weight": 0.5, "contrast_weight": 1.0},
            ValueError,
            "scene_starts scores against one image, contrast_weight against a sentence: choose",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_and_nothing_is_written(
    config: TrainConfig, change: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        train(replace(config, **change))
    assert not config.folder.exists()


def test_scenes_are_ordered_beside_the_objective(
    config: TrainConfig, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = ("window-open-v3", "push-v3")
    monkeypatch.setattr("training.train.train_tasks", lambda split: tasks)
    config = replace(config, split="none", samples=160, order_groups=2, learning_rate=1e-2)
    orders = Orders(Scenes([shards], tasks))

    def loss(folder: Path, start_weight: float = 0.0) -> float:
        model = RewardModel.from_pretrained(folder)
        losses = []
        for seed in range(8):
            rows, ranked = orders.draw(2, 8, np.random.default_rng(seed))
            views = orders.scenes.frames[rows][:, None].repeat(2, 1)
            images = torch.from_numpy(model.embed(views)[:, 0])
            texts = torch.from_numpy(model.embed_text([one.sentence for one in ranked]))
            if start_weight:
                texts = toward(texts, images[[8 * one.group for one in ranked]], start_weight)
                ranked = [replace(one, pairs=without_first(one)) for one in ranked]
                assert not ranked[0].pairs[0].any()
                assert not ranked[0].pairs[:, 0].any()
                assert ranked[0].pairs[1, 2]
            losses.append(ranked_loss(images, texts, ranked).item())
        return float(np.mean(losses))

    without = train(replace(config, output=tmp_path / "without"))
    done = train(replace(config, scenes=(shards,)))
    assert loss(done.folder) < loss(without.folder) - 0.02
    assert json.loads((done.folder / "vlm_reward.json").read_text())["objective"] == "triplet+order"
    # Against one of them, as an episode's frames against its first.
    against = replace(config, scenes=(shards,), start_weight=0.75, output=tmp_path / "plain")
    plain, done = train(against), train(replace(against, scene_starts=True, output=tmp_path / "starts"))
    assert loss(done.folder, 0.75) < loss(plain.folder, 0.75) - 0.001
    with pytest.raises(FileNotFoundError, match=r"has no scenes of push-v3, window-open-v3; run python -m"):
        train(replace(config, scenes=(tmp_path,), overwrite=True))


def test_rollouts_are_ordered_by_their_reward_against_their_first_frame(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.train.train_tasks", lambda split="paper": TASKS)
    config = replace(config, samples=160, learning_rate=1e-2, start_weight=0.5)
    done = train(replace(config, rollouts=("test/mixed-v0",), output=tmp_path / "with"))
    model = RewardModel.from_pretrained(done.folder)
    assert model.start_weight == 0.5
    assert model.metadata["objective"] == "triplet+order+start"
    cache = cached("test/mixed-v0", 32, config.cache)

    def order(judge: RewardModel) -> float:
        """VOC: in these the reward rises with time."""
        own = [(cache.frames[e.rows], e.instruction) for e in cache.episodes]
        return float(np.mean([voc(judge.score(f, text, start=f[0]).mean(1)) for f, text in own]))

    assert order(model) > 0.9 > order(RewardModel.from_pretrained(config.backbone).with_start_weight(0.5))

    def rise(judge: RewardModel) -> float:
        """From the second to the last frame."""
        own = [(cache.frames[e.rows], e.instruction) for e in cache.episodes]
        return float(np.mean([np.ptp(judge.score(f, text, start=f[0])[[1, -1], 0]) for f, text in own]))

    wide = train(replace(config, rollouts=("test/mixed-v0",), rollout_margin=0.1, output=tmp_path / "wide"))
    assert rise(RewardModel.from_pretrained(wide.folder)) > 1.05 * rise(model)
    card = (wide.folder / "README.md").read_text()
    assert "by their true reward, at least 0.1 of score for each unit of it: `test/mixed-v0`" in card
    drawn = Rollouts([cache], TASKS).draw(3, 4, 2, np.random.default_rng(0))
    assert drawn.values.shape == drawn.frames.shape == drawn.starts.shape == (3, 8)
    first = {e.start for e in cache.episodes}
    assert set(drawn.rows[drawn.starts.ravel()].tolist()) <= first
    assert not set(drawn.rows[drawn.frames.ravel()].tolist()) & first
    np.testing.assert_array_equal(drawn.values, cache.rewards[drawn.rows[drawn.frames]])
    np.testing.assert_array_equal(drawn.views[drawn.frames], drawn.views[drawn.starts])
    assert all(len(set(views)) == 1 for views in drawn.views[drawn.frames])  # a group is seen in one view
    with pytest.raises(ValueError, match=r"has no rollouts of push-v3"):
        Rollouts([cache], (*TASKS, "push-v3"))
    with pytest.raises(ValueError, match=r"holds door-open-v3, which split 'paper' does not train"):
        train(replace(config, rollouts=("test/mixed-v0", "test/leak-v0")))


def test_rollouts_of_several_datasets_are_drawn_as_often_as_there_are_episodes(config: TrainConfig) -> None:
    caches = [cached(name, 32, config.cache) for name in ("test/squares-v0", "test/mixed-v0")]
    both = Rollouts(caches, TASKS)
    drawn = both.draw(400, 1, 1, np.random.default_rng(0))
    counts = [sum(e.task == task for cache in caches for e in cache.episodes) for task in TASKS]
    said = np.array(drawn.sentences)
    share = np.mean(said == both.of[TASKS[0]][0].instruction)
    assert share == pytest.approx(counts[0] / sum(counts), abs=0.08)
    first = len(caches[0].frames)
    assert (drawn.rows < first).any()
    assert (drawn.rows >= first).any()
    every = np.concatenate([cache.frames for cache in caches])
    np.testing.assert_array_equal(both.frames(drawn.rows, drawn.views), every[drawn.rows, drawn.views])
    np.testing.assert_array_equal(both.rewards, np.concatenate([cache.rewards for cache in caches]))


def test_wrong_loss_by_hand_is_the_mean_rise_under_the_sentences_of_others() -> None:
    scores = torch.tensor([[0.0, 0.1, 0.5], [0.9, 0.4, 0.2], [0.3, 0.3, 0.3], [0.2, 0.6, 0.5]])
    rows, own, trajectory = np.array([4, 5, 8, 9]), torch.tensor([0, 0, 1, 1]), np.array([7, 7, 2, 2])
    # Frame 1 after 0 under sentences 1 and 2: +0.3 and -0.3; frame 3 after 2 under 0 and 2: -0.1 and +0.2.
    assert wrong_loss(scores, rows, own, trajectory).item() == pytest.approx((0.3 + 0 + 0 + 0.2) / 4)
    alone = wrong_loss(scores[:2, :1], rows[:2], own[:2], trajectory[:2])
    assert alone.item() == 0  # no other sentence


def test_wrong_sentences_learn_not_to_rise(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, sampler="grouped", start_weight=0.5, samples=1600, learning_rate=1e-2)

    def rise(folder: Path) -> float:
        """VOC of the demonstrations under the other task's sentence."""
        model, cache = RewardModel.from_pretrained(folder), cached(config.dataset, 32, config.cache)
        wrong = dict(zip(TEXTS, TEXTS[::-1], strict=True))
        own = [(cache.frames[e.rows], wrong[e.instruction]) for e in cache.episodes]
        return float(np.mean([voc(model.score(f, text, start=f[0]).mean(1)) for f, text in own]))

    deaf = train(replace(config, output=tmp_path / "deaf"))
    told = train(replace(config, wrong_weight=100.0))
    assert rise(deaf.folder) > 0.5 > 0.2 > rise(told.folder)
    assert told.best["val_voc"] > 0.8
    written = json.loads((told.folder / "vlm_reward.json").read_text())
    assert written["objective"] == "triplet+wrong+start"


def test_instructions_learn_to_lie_between_outcome_and_hand(config: TrainConfig, tmp_path: Path) -> None:
    taught = lessons(LESSON_POOL, config.seed)[:64]
    bare = RewardModel.from_pretrained(config.backbone)
    meant = meant_by(taught, bare).numpy()
    outcome, there = (
        bare.embed_text([getattr(one, part) for one in taught]) for part in ("outcome", "there")
    )
    np.testing.assert_allclose(meant, outcome + 2 * there, atol=1e-6)
    meant /= np.linalg.norm(meant, axis=1, keepdims=True)

    def nearness(model: RewardModel) -> float:
        return float((model.embed_text([one.asked for one in taught]) * meant).sum(1).mean())

    config = replace(config, learning_rate=1e-2)
    plain = train(replace(config, output=tmp_path / "plain"))
    told = train(replace(config, lesson_weight=100.0))
    folders = (config.backbone, plain.folder, told.folder)
    before, without, after = (nearness(RewardModel.from_pretrained(folder)) for folder in folders)
    assert after > 0.95 > before > without  # random weights: all sentences are alike before
    written = json.loads((told.folder / "vlm_reward.json").read_text())
    assert written["objective"] == "triplet+lesson"
    assert written["protocol"]["lesson_weight"] == 100.0


def test_a_demonstration_is_told_from_its_opposite(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, other = TASKS
    monkeypatch.setattr("training.train.opposite", {task: other, other: task}.get)
    config = replace(config, samples=320, learning_rate=1e-2, validation_fraction=0.5)
    plain = train(replace(config, output=tmp_path / "plain"))
    told = train(replace(config, contrast_weight=100.0))
    assert "val_contrast" not in plain.best
    first, *_, last = [row["val_contrast"] for row in told.history]
    assert last > first + 0.2
    written = json.loads((told.folder / "vlm_reward.json").read_text())
    assert written["objective"] == "triplet+contrast"
    # The opposite of a task that is left out is not asked for, nor is that of a held-out one.
    with pytest.raises(ValueError, match="no task with an opposite"):
        train(replace(config, contrast_weight=1.0, leave_out=(other,), overwrite=True))


def test_training_goes_on_from_an_adapter(config: TrainConfig, tmp_path: Path) -> None:
    first = replace(
        config, learning_rate=1e-2, lora_rank=4, lora_alpha=4, head=True, output=tmp_path / "first"
    )
    first = train(first)
    still = replace(
        config, adapter=str(first.folder), learning_rate=1e-12, final_learning_rate=0.0, max_steps=1
    )
    scores = [
        RewardModel.from_pretrained(name).score(np.full((1, 2, 32, 32, 3), 200, np.uint8), TEXTS[0])
        for name in (train(still).folder, first.folder, config.backbone)
    ]
    assert RewardModel.from_pretrained(still.folder).metadata["objective"] == "triplet+head"
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-6)
    assert np.abs(scores[0] - scores[2]).max() > 1e-3
    with pytest.raises(FileNotFoundError, match="no/where"):
        train(replace(still, adapter="no/where/here", overwrite=True))


def test_an_adapter_looks_at_what_its_backbone_looks_at(
    config: TrainConfig, make_tiny_encoder: Any, tmp_path: Path
) -> None:
    crops = dict.fromkeys(SPEC.cameras, Crop(0.5, 0.25, 0.5))
    backbone = tmp_path / "parts"
    RewardModel(make_tiny_encoder(), camera_spec=SPEC, crops=crops).save_pretrained(backbone)
    trained = RewardModel.from_pretrained(train(replace(config, backbone=str(backbone))).folder)
    assert trained.crops == crops
    assert trained.encoder.name == str(backbone)

    own = write_lerobot(tmp_path / "pouring", lengths=(6, 5))
    foreign = replace(config, backbone=str(backbone), dataset=str(own), output=tmp_path / "none")
    with pytest.raises(ValueError, match="looks at parts of the images of Meta-World's cameras"):
        train(foreign)
    assert not (tmp_path / "none").exists()


def test_resuming_with_other_settings_is_refused_but_other_threads_are_fine(config: TrainConfig) -> None:
    train(replace(config, max_steps=1))
    with pytest.raises(ValueError, match=r"learning_rate: 0\.0001 then, 0\.5 now"):
        train(replace(config, max_steps=1, resume=True, learning_rate=0.5))
    assert train(replace(config, max_steps=1, resume=True, save_every=7)).steps == 1


def test_overwrite_leaves_nothing_of_the_run_before(config: TrainConfig) -> None:
    train(replace(config, max_steps=1, seed=1))
    done = train(replace(config, max_steps=2, overwrite=True), on_step=lambda step: None)
    assert json.loads((done.folder / "vlm_reward.json").read_text())["seed"] == 0
    assert "'seed': 1" not in (done.folder / "README.md").read_text()


def test_a_folder_with_a_backbone_is_not_written_to(config: TrainConfig) -> None:
    with pytest.raises(FileExistsError, match="holds a backbone"):
        train(replace(config, output=Path(config.backbone), overwrite=True))


def test_command_line_says_what_is_wrong(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--objective", "vip", "--output", str(config.output)])
    with pytest.raises(SystemExit, match="error: objective must be one of triplet"):
        main()


@pytest.mark.parametrize(
    "fields",
    [{"samples": 0}, {"epochs": 0}, {"max_steps": 0}, {"validation_fraction": 1.0}, {"learning_rate": -1.0}],
)
def test_settings_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        TrainConfig(**fields)


def test_defaults_are_the_protocol_of_the_paper() -> None:
    config = TrainConfig()
    assert (config.samples, config.epochs, config.batch_size) == (50_000, 5, 32)
    assert (config.lora_rank, config.lora_alpha) == (16, 32)
    assert (config.peak_learning_rate, config.final_learning_rate) == (1e-4, 1e-6)
    assert TrainConfig(objective="liv").peak_learning_rate == 1e-5
    assert hyper_parameters(config, OBJECTIVES["triplet"])["margin"] == 0.3
    assert hyper_parameters(config, OBJECTIVES["tcn_text"])["num_negatives"] == 3
    assert not config.augment


def test_grouped_batches_never_take_the_same_sentence_as_a_negative() -> None:
    grouped = TrainConfig(sampler="grouped")
    assert hyper_parameters(grouped, OBJECTIVES["r3m"])["mask_same_text"] is True
    assert "mask_same_text" not in hyper_parameters(grouped, OBJECTIVES["triplet"])
    unmasked = replace(grouped, hyper={"mask_same_text": False})
    assert hyper_parameters(unmasked, OBJECTIVES["r3m"])["mask_same_text"] is False


def test_learning_rate_falls_from_peak_to_final_as_a_cosine() -> None:
    rates = [learning_rate(step, 101, 1e-4, 1e-6) for step in (0, 50, 100)]
    assert rates == pytest.approx([1e-4, 5.05e-5, 1e-6])
    assert learning_rate(25, 101, 1.0, 0.0) == pytest.approx((1 + 2**-0.5) / 2)


def test_a_tenth_of_the_trajectories_is_held_back_whole_and_the_same_for_all_seeds(
    root: Path, config: TrainConfig
) -> None:
    cache = cached("test/squares-v0", 32, root / "cache")
    training, held_back = split_episodes(cache, config)
    assert (len(training), len(held_back)) == (18, 2)
    assert {e.start for e in training} | {e.start for e in held_back} == {e.start for e in cache.episodes}
    assert split_episodes(cache, replace(config, seed=5)) == (training, held_back)
    assert split_episodes(cache, replace(config, validation_seed=5))[1] != held_back


def test_only_trajectories_of_the_wanted_kinds_are_learned_from(root: Path, config: TrainConfig) -> None:
    cache = cached("test/mixed-v0", 32, root / "cache")
    training, held_back = split_episodes(cache, config)
    assert [e.kind for e in training + held_back] == ["expert", "expert"]
    assert sum(map(len, split_episodes(cache, replace(config, kinds=("expert", "noisy"))))) == 6


def test_tasks_are_checked_against_the_split(root: Path, config: TrainConfig) -> None:
    cache = cached("test/leak-v0", 32, root / "cache")
    check_tasks(cache, "none")
    with pytest.raises(ValueError, match="door-open-v3"):
        check_tasks(cache, "paper")
    coffee = EpisodeInfo(0, 2, "coffee-push-v3", TEXTS[0], "expert", 0, True)
    fields = {name: getattr(cache, name) for name in FrameCache.__dataclass_fields__}
    strict = FrameCache(**fields | {"episodes": (coffee,)})
    check_tasks(strict, "paper")
    with pytest.raises(ValueError, match="coffee-push-v3, which split 'strict'"):
        check_tasks(strict, "strict")


def test_jitter_of_a_frame_depends_on_its_place_alone_and_stays_small() -> None:
    frames = np.zeros((6, 50, 50, 3), np.uint8)
    frames[:, 20:30, 20:30] = 200
    places = np.arange(6)
    changed = jitter(frames, 3, places)
    np.testing.assert_array_equal(jitter(frames[2:4], 3, places[2:4]), changed[2:4])
    assert not np.array_equal(changed[0], changed[1])
    assert changed.max() <= 230  # 15 % brighter
    for frame in changed:  # 4 % of 50 pixels: two
        assert np.abs(np.argwhere(frame[..., 0]).mean(0) - 24.5).max() <= 2
        assert (frame > 0).sum() == 300


@pytest.fixture
def interruptible():
    """Jobs in the background of a shell start with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_second_ctrl_c_interrupts_at_once_and_the_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_an_adapter_that_is_worse_than_its_backbone_says_so(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = train(replace(config, max_steps=1))
    worse = replace(done, best=done.best | {"val_voc": done.history[0]["val_voc"] - 0.1})
    for outcome, warned in ((worse, True), (replace(worse, best=done.history[0]), False)):
        monkeypatch.setattr("training.train.train", lambda _, outcome=outcome: outcome)
        monkeypatch.setattr(sys, "argv", ["training.train"])
        main()
        assert ("warning: what it began with has" in capsys.readouterr().out) == warned
