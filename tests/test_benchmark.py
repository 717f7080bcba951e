"""The benchmark on models whose scores are known, so that every figure can be told beforehand."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eval import benchmark
from eval.benchmark import BenchmarkConfig
from vlm_reward.cameras import CameraSpec
from vlm_reward.frame_cache import EpisodeInfo, FrameCache
from vlm_reward.similarity import cosine, toward
from vlm_reward.tasks import OPPOSITES, all_tasks, instruction

SPEC = CameraSpec(cameras=("a", "b", "c"), height=2, width=2)
TASKS = ("drawer-open-v3", "door-open-v3")
TRAINING = ("window-open-v3", "window-close-v3", "hammer-v3")
SENTENCES = sorted({instruction(task) for task in all_tasks()})
OPPOSITE = {instruction(a): instruction(b) for pair in OPPOSITES for a, b in (pair, pair[::-1])}


def make_cache(dataset_id, episodes):
    """Episodes (task, kind, rewards): pixels hold the reward and the sentence; view b the inverse reward."""
    infos, frames, rewards, success = [], [], [], []
    for seed, (task, kind, own) in enumerate(episodes):
        info = EpisodeInfo(len(rewards), len(own), task, instruction(task), kind, seed, own[-1] > 90)
        infos.append(info)
        rewards += list(own)
        success += [value > 90 for value in own]
        for value in own:
            frame = np.zeros((3, 2, 2, 3), np.uint8)
            frame[..., 0] = np.array([value, 100 - value, value]).reshape(3, 1, 1)
            frame[..., 1] = SENTENCES.index(info.instruction)
            frames.append(frame)
    valid = np.ones(len(rewards), bool)
    valid[[info.start for info in infos]] = False
    true = np.where(valid, rewards, 0).astype(np.float32)
    return FrameCache(
        np.stack(frames), true, valid, np.array(success), tuple(infos), SPEC, dataset_id, Path(dataset_id)
    )


@pytest.fixture
def caches():
    rng = np.random.default_rng(0)
    expert = [(task, "expert", np.linspace(5, 100, n).astype(int)) for task in TASKS for n in (6, 9, 7)]
    rollouts = [
        (task, kind, rng.integers(0, 90, 30))
        for task in TASKS
        for kind in ("random", "noisy")
        for _ in range(3)
    ]
    demos = [(task, "expert", np.linspace(5, 100, n).astype(int)) for task in TRAINING for n in (5, 8)]
    return {"e": make_cache("e", expert), "r": make_cache("r", rollouts), "d": make_cache("d", demos)}


class FakeModel:
    """Reads reward and sentence from the pixels. Under the right sentence the score rises with the reward,
    under an opposite one it falls, under any other it is 0; a deaf model follows every sentence."""

    def __init__(self, name, metadata=None, deaf=False, start_weight=0.0):
        self.encoder = SimpleNamespace(name=name)
        self.is_part = metadata is not None
        self.image_size, self.crops = 2, None
        self.metadata = metadata or {}
        self.camera_spec = SPEC
        self.deaf = deaf
        self.start_weight, self.judge = start_weight, None
        self.made = name, metadata, deaf
        self.embedded = 0

    def embed(self, frames):
        self.embedded += len(frames)
        angle = frames[..., 0, 0, 0] / 100 * np.pi / 4
        embeddings = np.zeros((*frames.shape[:2], len(SENTENCES) + 1), np.float32)
        embeddings[..., -1] = np.cos(angle)
        sentence = frames[..., 0, 0, 1].astype(int)
        np.put_along_axis(embeddings, sentence[..., None], np.sin(angle)[..., None], axis=-1)
        return embeddings

    def embed_text(self, texts):
        embeddings = np.zeros((len(texts), len(SENTENCES) + 1), np.float32)
        for row, text in zip(embeddings, texts, strict=True):
            row[SENTENCES.index(text)] = 1
            if text in OPPOSITE:
                row[SENTENCES.index(OPPOSITE[text])] = -1
            if self.deaf:
                row[:-1] = 1
        return embeddings

    embed_start = embed

    def with_small_frames(self):
        return self

    def compare(self, images, texts, starts=None):
        goals = torch.from_numpy(self.embed_text(texts))
        if not self.start_weight:
            return images @ goals.numpy().T
        goals = toward(goals, torch.from_numpy(starts)[:, None], self.start_weight)  # [V, K, D]
        return cosine(torch.from_numpy(images)[:, :, None], goals).numpy()

    def with_start_weight(self, start_weight):
        return FakeModel(*self.made, start_weight=start_weight)

    def with_approach_weight(self, approach_weight):
        return self

    def check_camera_spec(self, spec):
        if spec != SPEC:
            raise ValueError("other cameras")


@pytest.fixture
def run(monkeypatch, tmp_path, caches):
    """Run the benchmark in a folder with the checkpoints `bare`, `good` and `deaf`."""
    facts = {
        "objective": "triplet",
        "preset": "paper",
        "seed": 3,
        "protocol": {"dataset": "d"},
        "validation_episodes": [1, 3, 5],
    }
    models = {
        "bare": FakeModel("bare"),
        "good": FakeModel("bare", facts),
        "deaf": FakeModel("bare", facts | {"objective": "r3m"}, deaf=True),
    }
    for name in models:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    monkeypatch.chdir(tmp_path)
    loaded = []

    def load(name, device):
        loaded.append(name)
        if name == "ctrl-c":
            raise KeyboardInterrupt
        return models[name]

    monkeypatch.setattr(benchmark.RewardModel, "from_pretrained", load)
    monkeypatch.setattr(benchmark, "cached", lambda data, size, root, expect, crops: caches[data.id])
    monkeypatch.setattr(
        benchmark,
        "open_dataset",
        lambda id_: SimpleNamespace(id=id_, episodes=caches[id_].episodes),
    )
    base = BenchmarkConfig(
        checkpoint=("good",),
        tasks=TASKS,
        expert="e",
        rollouts="r",
        demos="d",
        out=tmp_path / "out" / "result.json",
        n_pairs=500,
        n_bootstrap=50,
    )

    def call(**changes):
        loaded.clear()
        return benchmark.main(replace(base, **changes))

    call.loaded, call.models, call.out = loaded, models, base.out
    return call


def value(result, checkpoint, metric, view="multi", task=TASKS[0], field="mean"):
    keys = ("checkpoint", "task", "view", "metric")
    (row,) = [r for r in result["rows"] if [r[k] for k in keys] == [checkpoint, task, view, metric]]
    return row[field]


def test_a_perfect_model_gets_100_per_view_and_an_inverse_view_minus_100(run):
    result = run()
    for task in TASKS:
        for view in ("1", "3", "multi"):
            assert value(result, "good", "consistency", view, task) == 100
            assert value(result, "good", "voc", view, task) == 100
            assert value(result, "good", "voc_reversed", view, task) == -100
            assert value(result, "good", "success_auc", view, task) == 100
            assert value(result, "good", "right_of_10", view, task) == 100
            assert value(result, "good", "voc_wrong", view, task) == 0
        assert value(result, "good", "consistency", "2", task) == 0
        assert value(result, "good", "voc", "2", task) == -100
    assert value(result, "good", "voc", field="n") == 3
    assert value(result, "good", "consistency", field="n") == 500
    assert [value(result, "good", "voc", field=f) for f in ("std", "low", "high")] == [0, 100, 100]


def test_the_average_is_that_of_tasks_and_views_as_in_the_paper(run):
    result = run()
    assert value(result, "good", "voc", "average", "average") == 50  # three views at 100, one at -100
    assert value(result, "good", "consistency", "average", "average") == 75
    assert value(result, "good", "voc", "multi", "average") == 100
    assert value(result, "good", "voc", "average", "average", field="n") == 8


def test_another_start_weight_has_rows_of_its_own(run):
    """The first frame of the perfect model's trajectories has the least reward: unlike it is better, too."""
    run(zero_shot=("bare",))
    result = run(zero_shot=("bare",), start_weight=0.5)
    assert value(result, "good", "voc") == value(result, "good, start 0.5", "voc") == 100
    objectives = {row["checkpoint"]: row["objective"] for row in result["rows"]}
    assert objectives["bare, start 0.5"] == "zero_shot, start 0.5"
    assert objectives["good, start 0.5"] == "triplet, start 0.5"
    deaf = [run(checkpoint=("deaf",), start_weight=weight) for weight in (0, 100)]
    seen = [
        value(result, f"deaf, start {weight}", "right_of_10")
        for result, weight in zip(deaf, (0, 100), strict=True)
    ]
    assert seen[0] == seen[1]  # what is subtracted is the same for every sentence
    run(zero_shot=("bare",), start_weight=0.5)
    assert not run.loaded
    result = run(zero_shot=("bare",), start_weight=0.5, approach_weight=1)
    assert "bare, start 0.5, approach 1" in {row["checkpoint"] for row in result["rows"]}


def test_rows_are_tidy_and_say_who_they_are(run):
    result = run(zero_shot=("bare",))
    fields = ["checkpoint", "backbone", "objective", "preset", "seed", "task", "view", "metric"]
    fields += ["mean", "std", "low", "high", "n"]
    assert all(list(row) == fields for row in result["rows"])
    assert len({(r["checkpoint"], r["task"], r["view"], r["metric"]) for r in result["rows"]}) == len(
        result["rows"]
    )
    identities = {tuple(row[f] for f in fields[:5]) for row in result["rows"]}
    assert identities == {
        ("bare", "bare", "zero_shot", "", None),
        ("good", "bare", "triplet", "paper", 3),
        ("control/random", "none", "random", "", 0),
        ("control/constant", "none", "constant", "", 0),
        ("control/oracle", "none", "oracle", "", 0),
    }
    assert json.loads(run.out.read_text()) == result
    assert [entry["checkpoint"] for entry in result["provenance"]] == ["bare", "control", "good"]
    entry = result["provenance"][0]
    assert entry["settings"]["seed"] == 0
    assert {"command", "date", "hardware", "seconds"} <= set(entry)
    assert not list(run.out.parent.glob(".*.tmp"))


def test_controls_keep_it_honest(run):
    result = run()
    for task in TASKS:
        for view in ("1", "2", "3", "multi"):
            assert value(result, "control/constant", "consistency", view, task) == 50
            assert value(result, "control/constant", "voc", view, task) == 0
            assert value(result, "control/oracle", "consistency", view, task) == 100
            # the first reward is unknown and taken as the second, which costs one tie
            assert 96 < value(result, "control/oracle", "voc", view, task) < 100
            assert value(result, "control/random", "consistency", view, task) == pytest.approx(50, abs=12)
    assert value(result, "control/random", "voc", "average", "average") == pytest.approx(0, abs=30)


def test_a_deaf_model_is_found_out(run):
    result = run(checkpoint=("good", "deaf"))
    assert value(result, "deaf", "voc") == 100
    assert value(result, "deaf", "voc_wrong") == 100
    assert value(result, "deaf", "right_of_10") == 10  # ten alike share the credit
    window = "window-open-v3"
    assert value(result, "good", "voc_right", task=window) == 100
    assert value(result, "good", "voc_opposite", task=window) == -100
    assert value(result, "deaf", "voc_opposite", task=window) == 100
    assert value(result, "good", "voc_opposite", task="average_training") == -100
    assert value(result, "good", "voc_contrast", task=window) == 100
    assert value(result, "deaf", "voc_contrast", task=window) == 0  # both sentences score alike
    for task in TASKS:  # held out, against the training task that closes what they open
        assert value(result, "good", "voc_contrast", task=task) == 100
        assert value(result, "good", "consistency_contrast", task=task) == 100
        assert value(result, "deaf", "consistency_contrast", task=task) == 50
    assert value(result, "good", "told_at_start", task=window) == 0  # it sees what is asked, not what is so
    assert value(result, "deaf", "told_at_start", task=window) == 50
    assert value(result, "good", "right_of_10", task="hammer-v3") == 100
    assert not [r for r in result["rows"] if (r["task"], r["metric"]) == ("hammer-v3", "voc_opposite")]


def test_opposites_use_trajectories_that_were_not_trained_on(run):
    result = run(checkpoint=("good",), zero_shot=("bare",))
    assert value(result, "good", "voc_right", task="window-open-v3", field="n") == 1
    assert value(result, "bare", "voc_right", task="window-open-v3", field="n") == 2
    del run.models["good"].metadata["validation_episodes"]
    result = run(overwrite=True)
    assert value(result, "good", "voc_right", task="window-open-v3", field="n") == 2
    assert "training trajectories of d are among" in result["provenance"][-2]["notes"][0]


def test_frames_that_no_pair_names_are_not_embedded(run, caches):
    run(n_pairs=3, demos=None)
    expert, rollouts = len(caches["e"].frames), len(caches["r"].episodes)
    assert expert + rollouts < run.models["good"].embedded <= expert + rollouts + 2 * len(TASKS) * 3


def test_ten_sentences_are_fixed_and_differ():
    right = instruction("door-open-v3")
    ten = benchmark.ten_sentences(right, seed=0)
    assert ten[0] == right
    assert len(set(ten)) == 10
    assert ten == benchmark.ten_sentences(right, seed=0)
    assert ten != benchmark.ten_sentences(right, seed=1)


def test_done_checkpoints_are_skipped_until_something_changed(run):
    first = run()
    assert run(checkpoint=("good", "deaf"))["rows"][: len(first["rows"])] == first["rows"]
    assert run.loaded == ["deaf"]
    run(checkpoint=("good",), overwrite=True)
    assert run.loaded == ["good"]
    run(checkpoint=("good",))
    assert run.loaded == []
    Path("good/model.safetensors").write_bytes(b"trained again")
    run(checkpoint=("good",))
    assert run.loaded == ["good"]
    result = run(checkpoint=("good",), n_pairs=400)
    assert run.loaded == ["good"]
    assert {entry["checkpoint"] for entry in result["provenance"]} == {"good", "deaf", "control"}
    assert value(result, "good", "consistency", field="n") == 400


def test_ctrl_c_keeps_what_is_done(run, capsys):
    Path("ctrl-c").mkdir()
    with pytest.raises(SystemExit) as stopped:
        run(checkpoint=("good", "ctrl-c", "deaf"))
    assert stopped.value.code == 130
    assert "interrupted" in capsys.readouterr().out
    assert {row["checkpoint"] for row in json.loads(run.out.read_text())["rows"]} >= {
        "good",
        "control/oracle",
    }
    run(checkpoint=("good", "deaf"))
    assert run.loaded == ["deaf"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": ("good", "nowhere")}, "no model 'nowhere'"),
        ({"checkpoint": (), "zero_shot": ("good",)}, "good is an adapter"),
        ({"checkpoint": ()}, "nothing to score"),
        ({"n_pairs": 0}, "n_pairs must be at least 1, got 0"),
        ({"tasks": ("hammer-v3",)}, "e has no expert trajectories of 'hammer-v3'; its tasks are door-open"),
    ],
)
def test_bad_input_says_what_was_wrong(run, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(**changes)
    assert not run.out.exists()


def test_foreign_results_are_not_overwritten(run):
    run.out.parent.mkdir()
    run.out.write_text("[1, 2]")
    with pytest.raises(ValueError, match="is no result of this benchmark"):
        run()
    assert run.out.read_text() == "[1, 2]"


def test_frames_of_other_cameras_are_refused(run, caches):
    caches["r"] = replace(caches["r"], camera_spec=CameraSpec(cameras=("a", "b", "d"), height=2, width=2))
    with pytest.raises(ValueError, match="other cameras"):
        run()


def test_the_real_path_from_minari_to_rows(tiny_benchmark, tiny_adapter_dir):
    cfg = tiny_benchmark
    tasks = cfg.tasks
    result = benchmark.main(cfg)
    rows = [row for row in result["rows"] if row["checkpoint"] == str(tiny_adapter_dir)]
    assert {(row["backbone"], row["objective"]) for row in rows} == {("tiny", "triplet")}
    model = benchmark.RewardModel.from_pretrained(tiny_adapter_dir)
    cache = benchmark.cached("test/expert-v0", 32, root=cfg.cache)
    infos = [info for info in cache.episodes if info.task == tasks[1]]
    rho = [benchmark.voc(model.score(cache.frames[info.rows], info.instruction)[:, 1]) for info in infos]
    # scored at once or one by one, bfloat16 rounds a little differently
    assert value(result, str(tiny_adapter_dir), "voc", "2", tasks[1]) == pytest.approx(
        100 * np.mean(rho), abs=15
    )
    assert value(result, "control/oracle", "voc", "1", tasks[0]) > 99
