"""Every family of backbones goes the whole way: a folder as published, training, the adapter, the same scores.

The folders have the files, names and settings of google/siglip-base-patch16-224, google/siglip2-base-patch16-224,
google/siglip2-base-patch16-naflex and openai/clip-vit-base-patch32, with small random weights and vocabularies.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from conftest import word_tokenizer
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoImageProcessor,
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    PretrainedConfig,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

from tests.synthetic import SPEC, TEXTS, write_dataset
from training.config import TrainConfig
from training.train import train
from vlm_reward.encoder import DualEncoder
from vlm_reward.reward_model import RewardModel

SIDE, PATCH, LENGTH = 32, 16, 16  # pixels, pixels, tokens
TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VISION = {**TOWER, "image_size": SIDE, "patch_size": PATCH}
NORMALISED = {"do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 1 / 255}
HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def words(folder: Path) -> int:
    """In the place of SentencePiece, which reads the vocabulary of the first SigLIP."""
    tokenizer = word_tokenizer(list(TEXTS), max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def gemma(folder: Path) -> int:
    """Byte-pair encoding as Gemma's, which SigLIP2 reads: bytes for what is unknown, <eos> at the end."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # type: ignore[assignment]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    settings = {"add_bos_token": False, "add_eos_token": True, "tokenizer_class": "GemmaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | settings | {"padding_side": "left"}))
    return tokenizer.get_vocab_size()


def clip(folder: Path) -> int:
    """CLIP's own tokenizer; the end of a text has the highest number, by which the text tower finds it."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(TEXTS, trainer)
    model = json.loads(learner.to_str())["model"]
    vocab = model["vocab"]
    for token in (*(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"):
        vocab.setdefault(token, len(vocab))
    merges = [tuple(merge) for merge in model["merges"]]
    CLIPTokenizer(vocab=vocab, merges=merges).save_pretrained(folder)  # type: ignore[arg-type]
    assert vocab["<|endoftext|>"] == len(vocab) - 1
    return len(vocab)


def siglip_text(vocabulary: int) -> dict[str, Any]:
    ids = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    return {**TOWER, "vocab_size": vocabulary, "max_position_embeddings": LENGTH, "projection_size": 32} | ids


@dataclass(frozen=True)
class Family:
    """What differs: the model's class and config, the settings of its image processor, its tokenizer."""

    model: type
    config: Callable[[int], PretrainedConfig]
    processor: dict[str, Any]
    tokenizer: Callable[[Path], int]
    resample: str


SQUARE = NORMALISED | {
    "size": {"height": SIDE, "width": SIDE},
    "image_processor_type": "SiglipImageProcessor",
}
FAMILIES = {
    "siglip": Family(
        SiglipModel,
        lambda n: SiglipConfig(text_config=siglip_text(n), vision_config=VISION),
        SQUARE | HALVES | {"resample": 3, "processor_class": "SiglipProcessor"},
        words,
        "bicubic",
    ),
    "siglip2": Family(
        SiglipModel,
        lambda n: SiglipConfig(text_config=siglip_text(n), vision_config=VISION),
        SQUARE | HALVES | {"resample": 2, "processor_class": "SiglipProcessor", "do_convert_rgb": None},
        gemma,
        "bilinear",
    ),
    "siglip2-naflex": Family(
        Siglip2Model,
        lambda n: Siglip2Config(
            text_config=siglip_text(n),
            vision_config={**TOWER, "num_patches": (SIDE // PATCH) ** 2, "patch_size": PATCH},
        ),
        NORMALISED
        | HALVES
        | {"resample": 2, "patch_size": PATCH, "max_num_patches": (SIDE // PATCH) ** 2}
        | {"image_processor_type": "Siglip2ImageProcessor", "processor_class": "Siglip2Processor"},
        gemma,
        "bilinear",
    ),
    "clip": Family(
        CLIPModel,
        lambda n: CLIPConfig(
            text_config={**TOWER, "vocab_size": n, "max_position_embeddings": LENGTH, "eos_token_id": 2},
            vision_config=VISION,
            projection_dim=24,
        ),
        {"do_normalize": True, "do_resize": True, "size": SIDE, "do_center_crop": True, "crop_size": SIDE}
        | {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3}
        | {"feature_extractor_type": "CLIPFeatureExtractor"},
        clip,
        "bicubic",
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def published(request, tmp_path_factory) -> tuple[Path, Family]:
    """A folder as on the Hub, and what is in it."""
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("hub") / request.param
    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(family.config(family.tokenizer(folder))).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(family.processor))
    return folder, family


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("demonstrations")
    write_dataset(root, episodes=12)
    return root


@pytest.fixture(scope="module")
def trained(published, demonstrations, tmp_path_factory):
    """The adapter after 30 steps of training, and the result of the training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(demonstrations))
        config = TrainConfig(
            backbone=str(published[0]),
            dataset="test/squares-v0",
            cameras=SPEC,
            cache=demonstrations / "cache",
            output=tmp_path_factory.mktemp("adapter") / "triplet",
            sampler="grouped",
            group_trajectories=4,
            group_frames=4,
            max_steps=30,
            learning_rate=3e-3,
            lora_rank=4,
            dtype="float32",
            device="cpu",
            tensorboard=False,
        )
        return train(config)


@pytest.fixture
def scenes() -> np.ndarray:
    """uint8 [5, 2, 32, 32, 3]."""
    return np.random.default_rng(0).integers(0, 256, (5, 2, SIDE, SIDE, 3), dtype=np.uint8)


def reference(model: Any, folder: Path, tokenizer: Any, frames: np.ndarray, text: str) -> np.ndarray:
    """The cosines [N, V] by transformers alone: its image processor, its tokenizer, its forward."""
    images = AutoImageProcessor.from_pretrained(folder)(
        list(frames.reshape(-1, SIDE, SIDE, 3)), return_tensors="pt"
    )
    tokens = tokenizer([text], padding="max_length", max_length=LENGTH, return_tensors="pt")
    if "CLIP" not in type(tokenizer).__name__:  # SigLIP was trained without
        tokens.pop("attention_mask")
    with torch.inference_mode():
        out = model.eval()(**images, **{key: tokens[key] for key in tokens if key != "token_type_ids"})
    return (out.image_embeds @ out.text_embeds.T).reshape(frames.shape[:2]).numpy()


def test_scores_are_those_of_transformers_alone(published, scenes):
    folder, family = published
    model = RewardModel.from_pretrained(folder, dtype=torch.float32)
    encoder = model.encoder
    assert type(encoder.model) is family.model
    assert (encoder.image_size, encoder.max_text_length, encoder.resample) == (SIDE, LENGTH, family.resample)
    expected = reference(
        AutoModel.from_pretrained(folder), folder, encoder.tokenizer, scenes, "turn on faucet"
    )
    np.testing.assert_allclose(model.score(scenes, "turn on faucet"), expected, atol=1e-5)
    np.testing.assert_array_equal(
        model.score(scenes, "Turn ON faucet"), model.score(scenes, "turn on faucet")
    )
    assert np.abs(expected - model.score(scenes, "close the green drawer")).max() > 1e-3


def test_training_lowers_the_loss_and_moves_every_layer_of_both_towers(trained):
    assert trained.steps == 30
    before, after = trained.history[0], trained.best
    assert after["val_loss"] < before["val_loss"]
    assert after["val_voc"] > before["val_voc"]
    state = load_file(trained.folder / "adapter_model.safetensors")
    moved = {name.split(".lora_B")[0] for name, value in state.items() if "lora_B" in name and value.any()}
    assert moved == {name.split(".lora_")[0] for name in state}
    for tower in ("vision", "text"):
        for layer in (0, 1):
            prefix = f"base_model.model.{tower}_model.encoder.layers.{layer}."
            names = {name.removeprefix(prefix) for name in moved if name.startswith(prefix)}
            attention = {f"self_attn.{projection}_proj" for projection in ("q", "k", "v", "out")}
            assert names == attention | {"mlp.fc1", "mlp.fc2"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_saved_adapter_scores_the_same_loaded_here_by_peft_and_once_more(
    published, trained, scenes, tmp_path
):
    folder, text = published[0], TEXTS[0]
    model = RewardModel.from_pretrained(trained.folder, dtype=torch.float32)
    scores = model.score(scenes, text)
    zero_shot = RewardModel.from_pretrained(folder, dtype=torch.float32)
    assert np.abs(scores - zero_shot.score(scenes, text)).max() > 0.01

    plain = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(folder), str(trained.folder))
    expected = reference(plain, folder, model.encoder.tokenizer, scenes, text)
    np.testing.assert_allclose(scores, expected, atol=1e-5)

    model.save_pretrained(tmp_path / "again")
    again = RewardModel.from_pretrained(tmp_path / "again", dtype=torch.float32)
    np.testing.assert_array_equal(again.score(scenes, text), scores)

    whole = DualEncoder.from_pretrained(folder)
    whole.load_adapter(trained.folder)
    whole.merge_lora()
    whole.save_pretrained(tmp_path / "whole")  # a backbone with the adapter in its weights
    merged = RewardModel.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    assert merged.encoder.resample == published[1].resample
    np.testing.assert_allclose(merged.score(scenes, text), scores, atol=1e-6)


def test_an_adapter_of_another_family_is_refused(published, tiny_adapter_dir):
    encoder = DualEncoder.from_pretrained(published[0])
    with pytest.raises(ValueError, match=r"does not fit the backbone"):
        encoder.load_adapter(tiny_adapter_dir)
