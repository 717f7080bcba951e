"""Tiny fakes of the expensive things, and a quiet, deterministic machine."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Before any test module imports a Hugging Face library, which read this once.
    if config.getoption("-m") != "network":
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    import torch

    torch.set_num_threads(1)


def word_tokenizer(sentences: list[str], max_length: int):
    """One token a word, [UNK] for others; lower-cases and ends with [EOS], as SigLIP's tokenizers do."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for sentence in sentences for word in re.findall(r"\w+|[^\w\s]+", sentence.lower())})
    vocab = {word: index for index, word in enumerate(["[PAD]", "[EOS]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        model_max_length=max_length,
    )


@pytest.fixture
def make_tiny_encoder() -> Callable:
    """`make_tiny_encoder(seed=0)`: see `tiny_encoder`."""
    return _make_tiny_encoder


@pytest.fixture
def tiny_encoder():
    """A `SiglipModel` of 55k random parameters: 32 px images in patches of 16, texts of up to 24 words."""
    return _make_tiny_encoder()


@pytest.fixture(scope="session")
def tiny_backbone_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_encoder`, saved: model, tokenizer, preprocessor_config.json. Read-only for tests."""
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    _make_tiny_encoder().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_adapter_dir(tiny_backbone_dir: Path) -> Path:
    """A rank-4 adapter that changes the scores, in a folder inside its backbone's. Read-only for tests."""
    import torch

    from vlm_reward.cameras import CameraSpec
    from vlm_reward.encoder import DualEncoder
    from vlm_reward.reward_model import RewardModel

    encoder = DualEncoder.from_pretrained(tiny_backbone_dir)
    encoder.add_lora(r=4, alpha=8, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # B starts at 0, where the adapter would do nothing
        for parameter in encoder.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    spec = CameraSpec(cameras=("corner", "corner3"), height=32, width=32)
    metadata = {"objective": "triplet", "preset": "paper", "seed": 0, "train_tasks": ["reach-v3", "push-v3"]}
    path = tiny_backbone_dir / "triplet"
    RewardModel(encoder, camera_spec=spec, metadata=metadata).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real scenes of window-open and push, 28 pixels wide."""
    from training import scenes

    folder = tmp_path_factory.mktemp("scenes")
    tasks = ("window-open-v3", "push-v3")
    scenes.main(scenes.Config(folder, size=28, rounds=1, episodes=2, tasks=tasks, workers=1))
    return folder


@pytest.fixture
def tiny_benchmark(
    tiny_backbone_dir: Path, tiny_adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The settings of a benchmark of the tiny backbone and adapter on two tasks of moving squares."""
    from eval.benchmark import BenchmarkConfig
    from tests.synthetic import TASKS, write_dataset
    from vlm_reward.cameras import CameraSpec

    monkeypatch.setenv("MINARI_DATASETS_PATH", "nowhere")  # put back afterwards; data_root decides
    spec = CameraSpec(cameras=("corner", "corner3"), height=32, width=32)
    for name, kinds in (("expert-v0", ("expert",)), ("rollouts-v0", ("random", "random", "noisy", "noisy"))):
        write_dataset(tmp_path, dataset_id=f"test/{name}", spec=spec, kinds=kinds)
    return BenchmarkConfig(
        checkpoint=(str(tiny_adapter_dir),),
        zero_shot=(str(tiny_backbone_dir),),
        tasks=TASKS,
        expert="test/expert-v0",
        rollouts="test/rollouts-v0",
        demos=None,
        data_root=tmp_path,
        cache=tmp_path / "cache",
        out=tmp_path / "result.json",
        n_pairs=200,
        n_bootstrap=20,
    )


@pytest.fixture
def frames() -> np.ndarray:
    """uint8 [3, 2, 32, 32, 3], random."""
    return np.random.default_rng(0).integers(0, 256, (3, 2, 32, 32, 3), dtype=np.uint8)


def _make_tiny_encoder(seed: int = 0):
    from transformers import SiglipConfig

    from vlm_reward.encoder import DualEncoder
    from vlm_reward.tasks import all_tasks, instruction

    tokenizer = word_tokenizer([instruction(task) for task in all_tasks()], max_length=24)
    tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = SiglipConfig(
        text_config={
            **tower,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 24,
            "projection_size": 32,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config={**tower, "image_size": 32, "patch_size": 16},
    )
    return DualEncoder.from_config(config, tokenizer, seed=seed).eval()
