"""The Hugging Face Hub without a network: its cache as it lies on disk, its answers, its model cards."""

import hashlib
import http.server
import json
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from huggingface_hub import ModelCard, constants
from transformers import AutoModel

from vlm_reward import reward_model as module
from vlm_reward.cameras import CameraSpec
from vlm_reward.encoder import DualEncoder
from vlm_reward.reward_model import RewardModel

TEXT = "open the green drawer"
FIRST, SECOND = "1" * 40, "2" * 40  # commits
peft_warns = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def publish(cache: Path, repo: str, source: Path, commit: str, *refs: str) -> None:
    """Lay a folder's files into the cache as `huggingface_hub` does after a download."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for folder in (snapshot, root / "blobs", root / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file():
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copy(file, root / "blobs" / digest)
            (snapshot / file.name).symlink_to(Path("..", "..", "blobs", digest))
    for ref in refs:
        (root / "refs" / ref).write_text(commit)


def train(encoder: DualEncoder, folder: Path, seed: int = 0) -> RewardModel:
    """An adapter that changes the scores, saved to `folder`."""
    encoder.add_lora(r=2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    spec = CameraSpec(cameras=("corner", "corner3"), height=32, width=32)
    model = RewardModel(encoder.eval(), camera_spec=spec, metadata={"seed": seed}, dtype=torch.float32)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache; no request leaves, for the tests run with HF_HUB_OFFLINE=1."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def drawer(cache, tmp_path, tiny_backbone_dir) -> RewardModel:
    """The adapter me/drawer of the backbone me/tiny, both in the cache."""
    publish(cache, "me/tiny", tiny_backbone_dir, FIRST, "main", "v1")
    model = train(DualEncoder.from_pretrained("me/tiny"), tmp_path / "drawer")
    publish(cache, "me/drawer", tmp_path / "drawer", FIRST, "main")
    return model


def load(name: str, **options) -> RewardModel:
    return RewardModel.from_pretrained(name, dtype=torch.float32, **options)


# Loading


def test_an_adapter_and_its_backbone_come_from_the_cache_by_name(drawer, frames):
    model = load("me/drawer")
    assert (model.encoder.name, model.encoder.revision) == ("me/tiny", FIRST)
    assert model.camera_spec == drawer.camera_spec
    np.testing.assert_allclose(model.score(frames, TEXT), drawer.score(frames, TEXT), atol=1e-5)
    assert np.abs(model.score(frames, TEXT) - load("me/tiny").score(frames, TEXT)).max() > 0.01


def test_an_adapter_keeps_the_backbone_it_was_trained_on(drawer, cache, tmp_path, frames, make_tiny_encoder):
    expected = load("me/drawer").score(frames, TEXT)
    make_tiny_encoder(seed=1).save_pretrained(tmp_path / "newer")
    publish(cache, "me/tiny", tmp_path / "newer", SECOND, "main")
    fields = json.loads((tmp_path / "drawer" / "adapter_config.json").read_text())
    assert (fields["base_model_name_or_path"], fields["revision"]) == ("me/tiny", FIRST)
    np.testing.assert_array_equal(load("me/drawer").score(frames, TEXT), expected)
    newest, tagged, exact = load("me/tiny"), load("me/tiny", revision="v1"), load("me/tiny", revision=FIRST)
    assert [model.encoder.revision for model in (newest, tagged, exact)] == [SECOND, FIRST, FIRST]
    np.testing.assert_array_equal(tagged.score(frames, TEXT), exact.score(frames, TEXT))
    assert np.abs(newest.score(frames, TEXT) - exact.score(frames, TEXT)).max() > 0.01
    again = load("me/drawer")
    again.save_pretrained(tmp_path / "again")  # nor is it lost when the adapter is saved again
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["revision"] == FIRST


def test_the_revision_of_an_adapter_is_that_asked_for(drawer, cache, tmp_path, frames):
    other = train(DualEncoder.from_pretrained("me/tiny"), tmp_path / "other", seed=1)
    publish(cache, "me/drawer", tmp_path / "other", SECOND, "v2")
    assert load("me/drawer").metadata["seed"] == 0
    model = load("me/drawer", revision="v2")
    assert model.metadata["seed"] == 1
    np.testing.assert_allclose(model.score(frames, TEXT), other.score(frames, TEXT), atol=1e-5)
    with pytest.raises(FileNotFoundError, match=r"no model 'me/drawer'.* at revision v3"):
        load("me/drawer", revision="v3")


@peft_warns
@pytest.mark.parametrize("auto", [False, True])
def test_peft_and_transformers_alone_give_the_same_scores(drawer, frames, auto):
    encoder = DualEncoder.from_pretrained("me/tiny")
    if auto:
        encoder.model = peft.AutoPeftModel.from_pretrained("me/drawer")
    else:
        encoder.model = peft.PeftModel.from_pretrained(AutoModel.from_pretrained("me/tiny"), "me/drawer")
    plain = RewardModel(encoder.eval(), dtype=torch.float32)
    np.testing.assert_allclose(plain.score(frames, TEXT), drawer.score(frames, TEXT), atol=1e-6)
    np.testing.assert_allclose(plain.score(frames, TEXT), load("me/drawer").score(frames, TEXT), atol=1e-5)


# What is not there


@pytest.mark.parametrize("options", [{}, {"local_files_only": True}, {"revision": "v1"}])
def test_offline_without_a_cache_says_so_within_seconds(cache, options):
    start = time.perf_counter()
    reason = "local_files_only" if "local_files_only" in options else "HF_HUB_OFFLINE is set"
    with pytest.raises(FileNotFoundError, match=rf"no model 'me/drawer'.*nor in the cache {cache}.*{reason}"):
        load("me/drawer", **options)
    assert time.perf_counter() - start < 2


def test_an_adapter_whose_backbone_was_not_downloaded_names_it(drawer, cache):
    shutil.rmtree(cache / "models--me--tiny")
    with pytest.raises(
        FileNotFoundError, match=f"backbone of adapter .* no model 'me/tiny'.*revision {FIRST}"
    ):
        load("me/drawer")


def test_a_download_that_was_cut_off_is_named(drawer, cache):
    (cache / "models--me--tiny" / "snapshots" / FIRST / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"me/tiny .* has no \*.safetensors weights; .*download it again"
    ):
        load("me/tiny")


@pytest.mark.parametrize("name", ["siglip2-tiny/tripplet", "siglip2_tiny/triplet", "siglip-tiny/triplet"])
def test_a_name_that_is_nearly_an_embedded_one(cache, name):
    with pytest.raises(
        FileNotFoundError, match=rf"no model '{name}' \(did you mean .*'siglip2-tiny/triplet'"
    ):
        load(name)


def test_an_adapter_that_a_backbone_does_not_have_is_told_which_it_has(cache):
    with pytest.raises(FileNotFoundError, match=r"did you mean 'siglip2-tiny-zoom/triplet\+order\+lesson"):
        load("siglip2-tiny-zoom/vip")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("siglip2-tiny-ensembel", "siglip2-tiny-ensemble"),
        ("siglip2-tiny-soup/reech", "siglip2-tiny-soup/reach"),
    ],
)
def test_the_hint_knows_ensembles_and_reach_models(cache, name, near):
    with pytest.raises(FileNotFoundError, match=f"did you mean .*'{near}'"):
        load(name)


def test_a_name_that_is_like_no_other_gets_no_advice(cache):
    with pytest.raises(FileNotFoundError, match="no model 'google/bert': neither"):
        load("google/bert")


class NoSuchRepository(http.server.BaseHTTPRequestHandler):
    """What the Hub answers to a name that it does not know."""

    def do_GET(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def online(monkeypatch):
    """A Hub on this machine that knows no repository; yields how to shut it down."""
    server = http.server.HTTPServer(("127.0.0.1", 0), NoSuchRepository)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def shut_down() -> None:
        server.shutdown()
        thread.join()
        server.server_close()

    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield shut_down
    shut_down()


def test_a_name_that_the_hub_does_not_know(cache, online):
    start = time.perf_counter()
    with pytest.raises(
        FileNotFoundError, match=r"no model 'me/nothing'.*Face Hub: check the name.*Repository Not Found"
    ):
        load("me/nothing")
    assert time.perf_counter() - start < 5


def test_a_hub_that_nobody_reaches_gives_way_to_the_cache(drawer, online, frames):
    online()
    start = time.perf_counter()
    assert load("me/drawer").score(frames, TEXT).shape == (3, 2)
    with pytest.raises(FileNotFoundError, match=r"no model 'me/nothing'.*check the name and the network"):
        load("me/nothing")
    assert time.perf_counter() - start < 5


# Sharing


class Hub:
    """Stands in for `HfApi`: notes the calls, and what was uploaded."""

    calls: list[tuple]
    has_card = False

    def __init__(self, token=None):
        type(self).calls = [("login", token)]

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append(("repo", repo_id, private, exist_ok))

    def create_branch(self, repo_id, *, branch, exist_ok):
        self.calls.append(("branch", repo_id, branch, exist_ok))

    def file_exists(self, repo_id, filename, *, revision):
        return self.has_card

    def upload_folder(self, *, repo_id, folder_path, commit_message, revision, create_pr):
        files = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}
        self.calls.append(("upload", repo_id, commit_message, revision, create_pr, files))
        return f"https://huggingface.co/{repo_id}/commit/1"


def test_what_is_pushed_is_what_is_loaded(drawer, cache, tmp_path, monkeypatch, frames):
    monkeypatch.setattr(module, "HfApi", Hub)
    address = load("me/drawer").push_to_hub("you/copy", private=True, token="secret", revision="dev")
    assert address == "https://huggingface.co/you/copy/commit/1"
    login, repo, branch, (*upload, files) = Hub.calls
    assert (login, repo) == (("login", "secret"), ("repo", "you/copy", True, True))
    assert branch == ("branch", "you/copy", "dev", True)
    assert upload == ["upload", "you/copy", "Upload reward model", "dev", False]
    (tmp_path / "uploaded").mkdir()
    for name, content in files.items():
        (tmp_path / "uploaded" / name).write_bytes(content)
    publish(cache, "you/copy", tmp_path / "uploaded", SECOND, "main")
    np.testing.assert_array_equal(load("you/copy").score(frames, TEXT), load("me/drawer").score(frames, TEXT))
    card = ModelCard.load(tmp_path / "uploaded" / "README.md")
    assert (card.data.base_model, card.data.library_name) == ("me/tiny", "peft")
    assert 'RewardModel.from_pretrained("you/copy")' in card.text


def test_a_card_that_is_on_the_hub_stays(drawer, monkeypatch):
    monkeypatch.setattr(module, "HfApi", type("Known", (Hub,), {"has_card": True}))
    load("me/drawer").push_to_hub("me/drawer")
    _, repo, (*_, files) = module.HfApi.calls
    assert repo == ("repo", "me/drawer", None, True)
    assert sorted(files) == ["adapter_config.json", "adapter_model.safetensors", "vlm_reward.json"]


def test_an_adapter_of_a_local_backbone_is_not_pushed(tiny_adapter_dir, monkeypatch):
    monkeypatch.setattr(module, "HfApi", Hub)
    with pytest.raises(ValueError, match=r"backbone is the local folder .*: push the backbone first"):
        RewardModel.from_pretrained(tiny_adapter_dir).push_to_hub("me/drawer")


# Cards


def row(task: str, view: str, metric: str, mean: float, **others) -> dict:
    """A row of eval.benchmark."""
    own = {"checkpoint": "runs/x", "backbone": "tiny", "objective": "triplet", "preset": "paper", "seed": 0}
    figures = {"mean": mean, "std": 9.0, "low": mean - 1, "high": mean + 1, "n": 50}
    return own | {"task": task, "view": view, "metric": metric} | figures | others


def test_the_figures_of_a_card_are_those_of_the_evaluation(drawer, tmp_path):
    rows = [
        row("door-open-v3", "1", "voc", 11.11),  # a single view is not shown
        row("door-open-v3", "multi", "voc", -51.1485),
        row("drawer-open-v3", "multi", "voc", 78.1048),
        row("drawer-open-v3", "multi", "consistency", 57.89),
        row("average", "average", "voc", 37.7174),
        row("average", "average", "voc_reversed", -37.7174),  # a control
        row("average_training", "average", "voc_opposite", 67.4425),
    ]
    drawer.metadata |= {
        "evaluation": rows,
        "validation": {"step": 5, "val_voc": 0.8552},
        "protocol": {"dataset": "vlm-reward/demos-paper-v0"},
    }
    drawer.save_pretrained(tmp_path / "card")
    card = ModelCard.load(tmp_path / "card" / "README.md")
    assert card.data.model_name == "card"
    found = [(r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results]
    assert found == [
        ("Meta-World, door-open-v3", "voc", -51.1),
        ("Meta-World, drawer-open-v3", "voc", 78.1),
        ("Meta-World, drawer-open-v3", "consistency", 57.9),
        ("Meta-World, mean of the tasks", "voc", 37.7),
        ("Meta-World, mean of training tasks", "voc_opposite", 67.4),
        ("held-back trajectories of the training tasks", "voc", 85.5),
    ]
    assert {r.task_type for r in card.data.eval_results} == {"robotics"}
    assert card.data.eval_results[-1].dataset_type == "vlm-reward/demos-paper-v0"
    assert "| Meta-World, drawer-open-v3 | VOC, mean score of the views | 78.1 [77.1, 79.1] |" in card.text
    assert "11.1" not in card.content


def test_figures_are_kept_with_the_weights(drawer, tmp_path):
    drawer.metadata["evaluation"] = [row("average", "average", "voc", 37.7174)]
    drawer.save_pretrained(tmp_path / "one")
    again = load(str(tmp_path / "one"))
    again.save_pretrained(tmp_path / "two")
    (result,) = ModelCard.load(tmp_path / "two" / "README.md").data.eval_results
    assert (result.metric_name, result.metric_value) == ("VOC, mean over the views, %", 37.7)


def test_a_card_without_an_evaluation_claims_nothing(drawer, tmp_path):
    card = ModelCard.load(tmp_path / "drawer" / "README.md")
    assert card.data.eval_results is None
    assert "Figures" not in card.text


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"task": "average", "view": "multi", "metric": "voc"}], "lacks mean, low, high, n"),
        (
            [row("a", "multi", "voc", 1), row("a", "multi", "voc", 2, checkpoint="runs/y")],
            r"several checkpoints \(runs/x, runs/y\)",
        ),
    ],
)
def test_rows_that_are_no_evaluation_of_it_are_refused(drawer, tmp_path, rows, message):
    drawer.metadata["evaluation"] = rows
    with pytest.raises(ValueError, match=message):
        drawer.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    assert not [name for name in os.listdir(tmp_path) if "tmp" in name]
