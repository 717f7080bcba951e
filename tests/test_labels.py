"""Rewards of a stored dataset: each of its own frame, written once, and nothing lost by a stop."""

import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eval.lerobot_writer import CAMERAS, write_lerobot
from tests.synthetic import write_dataset
from training.config import TrainConfig
from training.train import split_episodes, train
from vlm_reward import labels
from vlm_reward.__main__ import main as command
from vlm_reward.datasets import open_dataset
from vlm_reward.frame_cache import cached
from vlm_reward.labels import Job, ahead, label, label_block
from vlm_reward.reward_model import RewardModel


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_lerobot(tmp_path / "pouring")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "rewards.parquet"


def expected(folder: Path, model: RewardModel) -> np.ndarray:
    """Scores [T, V] of all frames, one call an episode."""
    data = open_dataset(folder)
    return np.concatenate(
        [
            model.score(frames, episode.instruction, start=frames[0])
            for n, episode in enumerate(data.episodes)
            if len(frames := np.concatenate([chunk.frames for chunk in data.chunks(n, n + 1)]))
        ]
    )


def test_each_frame_has_the_reward_that_its_model_gives_it(
    folder: Path, tiny_backbone_dir: Path, out: Path
) -> None:
    table = pq.read_table(label(folder, tiny_backbone_dir, out, per_view=True))
    scores = expected(folder, RewardModel.from_pretrained(tiny_backbone_dir))
    assert table.column_names == [
        "index",
        "episode_index",
        "frame_index",
        "reward",
        *(f"reward.{c}" for c in CAMERAS),
    ]
    assert table["index"].to_pylist() == list(range(55))
    assert table["episode_index"].to_pylist() == [0] * 12 + [1] * 9 + [2] * 14 + [3] * 8 + [4] * 12
    assert table["frame_index"].to_pylist()[10:15] == [10, 11, 0, 1, 2]
    np.testing.assert_allclose(table["reward"].to_numpy(), scores.mean(1), atol=1e-5)
    for view, camera in enumerate(CAMERAS):
        np.testing.assert_allclose(table[f"reward.{camera}"].to_numpy(), scores[:, view], atol=1e-5)
    assert np.ptp(scores) > 1e-3  # the frames differ, and so must their scores


def test_each_frame_is_scored_against_the_first_of_its_episode(
    folder: Path, tiny_backbone_dir: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        labels, "BATCH", 10
    )  # batches end within episodes, and hold the end of one and the next
    monkeypatch.setattr("vlm_reward.lerobot.CHUNK", 5)
    model = RewardModel.from_pretrained(tiny_backbone_dir).with_start_weight(0.5)
    model.save_pretrained(tmp_path / "started")
    table = pq.read_table(label(folder, tmp_path / "started", out))
    scores = expected(folder, model)
    np.testing.assert_allclose(table["reward"].to_numpy(), scores.mean(1), atol=1e-5)
    assert np.abs(scores - expected(folder, model.with_start_weight(0))).max() > 0.01


def test_the_file_lies_beside_the_dataset_and_is_not_replaced_unasked(
    folder: Path, tiny_backbone_dir: Path
) -> None:
    before = open_dataset(folder).fingerprint()
    file = label(folder, tiny_backbone_dir)
    assert file.parent == folder
    assert sorted(path.name for path in folder.iterdir()) == sorted(["data", "meta", "videos", file.name])
    assert open_dataset(folder).fingerprint() == before  # caches of the frames stay good
    with pytest.raises(FileExistsError, match="--overwrite"):
        label(folder, tiny_backbone_dir)
    label(folder, tiny_backbone_dir, overwrite=True)


def test_a_stopped_run_goes_on_after_the_last_whole_block(
    folder: Path, tiny_backbone_dir: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pq.read_table(label(folder, tiny_backbone_dir, out.with_name("whole.parquet")))
    monkeypatch.setattr(labels, "BLOCK", 20)  # frames: episodes 0-1, 2-3, 4
    write, written = pq.write_table, []

    def write_and_stop(table, file) -> None:
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(len(table))
        write(table, file)

    monkeypatch.setattr(labels.pq, "write_table", write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        label(folder, tiny_backbone_dir, out)
    assert not out.exists()
    monkeypatch.setattr(
        labels.pq, "write_table", lambda table, file: (written.append(len(table)), write(table, file))
    )
    table = pq.read_table(label(folder, tiny_backbone_dir, out))
    assert written == [21, 22, 12]
    assert table["index"].equals(whole["index"])
    np.testing.assert_allclose(table["reward"].to_numpy(), whole["reward"].to_numpy(), atol=1e-6)
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []


def test_blocks_of_another_model_are_not_taken_for_this_ones(folder: Path, tiny_backbone_dir: Path) -> None:
    job = Job(str(folder), str(tiny_backbone_dir))
    model, data = labels.opened(job)
    same = labels._fingerprint(job, model, data)
    assert labels._fingerprint(job, model, data) == same
    assert labels._fingerprint(replace(job, per_view=True), model, data) != same
    file = tiny_backbone_dir / "config.json"
    then = file.stat().st_mtime_ns
    os.utime(file, ns=(1, 1))
    assert labels._fingerprint(job, model, data) != same
    os.utime(file, ns=(then, then))


def test_a_block_alone_is_what_the_whole_run_writes(
    folder: Path, tiny_backbone_dir: Path, out: Path, tmp_path: Path
) -> None:
    data = open_dataset(folder)
    block = labels.Block(Job(str(folder), str(tiny_backbone_dir)), 2, 4, tmp_path / "block.parquet")
    label_block(block)
    whole = pq.read_table(label(folder, tiny_backbone_dir, out)).slice(data.episodes[2].start, 22)
    part = pq.read_table(block.path)
    assert part["index"].equals(whole["index"])
    np.testing.assert_allclose(part["reward"].to_numpy(), whole["reward"].to_numpy(), atol=1e-6)


def test_frames_of_other_cameras_are_refused_before_any_is_decoded(
    folder: Path, tiny_backbone_dir: Path, tiny_adapter_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labels, "write_blocks", None)
    with pytest.raises(ValueError, match=r"cameras: \['corner', 'corner3'\] against.*siglip2-tiny"):
        label(folder, tiny_adapter_dir)
    with pytest.raises(ValueError, match="shorten"):
        label(folder, tiny_backbone_dir, instruction="very " * 40 + "long")
    with pytest.raises(FileNotFoundError, match="no model"):
        label(folder, "nobody")


def test_ahead_keeps_the_order_runs_ahead_by_so_much_and_passes_errors_on() -> None:
    made: list[int] = []

    def items():
        for i in range(50):
            made.append(i)
            yield i
        raise ZeroDivisionError

    seen = []
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        for item in ahead(items(), 4):
            seen.append(item)
            assert len(made) <= len(seen) + 4 + 1  # the queue, and one in the thread's hand
    assert seen == list(range(50))

    threads = threading.active_count()
    part = ahead(items(), 4)
    assert next(part) == 0
    part.close()
    assert threading.active_count() == threads


def test_a_minari_dataset_is_labelled_too(
    tiny_backbone_dir: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    dataset = write_dataset(tmp_path / "minari", episodes=2)
    table = pq.read_table(label("test/squares-v0", tiny_backbone_dir, out))
    model = RewardModel.from_pretrained(tiny_backbone_dir)
    first = next(iter(dataset.iterate_episodes())).observations
    frames = np.stack([first["left"], first["right"]], axis=1)
    scores = model.score(frames, "close the green drawer").mean(1)
    np.testing.assert_allclose(table["reward"].to_numpy()[:12], scores, atol=1e-5)
    assert len(table) == 12 + 9


def test_from_a_lerobot_dataset_to_an_adapter_to_rewards(
    folder: Path, tiny_backbone_dir: Path, tmp_path: Path
) -> None:
    config = TrainConfig(
        backbone=str(tiny_backbone_dir),
        dataset=str(folder),
        views=CAMERAS[:1],
        cache=tmp_path / "cache",
        output=tmp_path / "adapter",
        sampler="grouped",
        samples=400,
        epochs=2,
        learning_rate=3e-3,
        dtype="float32",
        device="cpu",
        tensorboard=False,
    )
    done = train(config)
    model = RewardModel.from_pretrained(done.folder)
    assert model.camera_spec == open_dataset(folder, CAMERAS[:1]).camera_spec
    assert model.metadata["train_tasks"] == ["close the green drawer", "turn on faucet"]
    training, held_back = split_episodes(
        cached(open_dataset(folder, CAMERAS[:1]), 32, tmp_path / "cache"), config
    )
    assert sorted(e.length for e in (*training, *held_back)) == [
        7,
        8,
        11,
        11,
        13,
    ]  # cut at the first success...

    table = pq.read_table(label(folder, done.folder, tmp_path / "r.parquet", views=CAMERAS[:1]))
    assert len(table) == 55  # ... but each frame has its reward
    labels.draw_curves(tmp_path / "r.parquet", folder, tmp_path / "curves", views=CAMERAS[:1])
    pictures = sorted((tmp_path / "curves").iterdir())
    assert [picture.name for picture in pictures] == [f"episode_{i:06d}.png" for i in range(5)]
    with Image.open(pictures[0]) as picture:
        assert picture.size[0] > 300
    rewards = table["reward"].to_numpy()[:12]
    assert np.corrcoef(rewards, np.arange(12))[0, 1] > 0.8  # brighter and brighter: it has learned that


def test_the_command_labels_draws_and_says_where(
    folder: Path, tiny_backbone_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["label", str(folder), "--model", str(tiny_backbone_dir), "--output", str(tmp_path / "r.parquet")]
    with pytest.raises(SystemExit) as end:
        command([*words, "--curves", str(tmp_path / "curves"), "--device", "cpu"])
    assert not end.value.code
    assert capsys.readouterr().out.split() == [
        "rewards",
        str(tmp_path / "r.parquet"),
        "curves",
        f"{tmp_path}/curves",
    ]
    assert len(list((tmp_path / "curves").iterdir())) == 5
    with pytest.raises(SystemExit, match=r"error: .*is there already; --overwrite"):
        command(words)


def test_one_sentence_for_all_is_drawn_too(tmp_path: Path, tiny_backbone_dir: Path) -> None:
    silent = write_lerobot(tmp_path / "silent", lengths=(4, 5), tasks=("",))
    words = ["label", str(silent), "--model", str(tiny_backbone_dir), "--output", str(tmp_path / "r.parquet")]
    with pytest.raises(SystemExit) as end:
        command([*words, "--instruction", "close the green drawer", "--curves", str(tmp_path / "curves")])
    assert not end.value.code
    assert len(list((tmp_path / "curves").iterdir())) == 2
