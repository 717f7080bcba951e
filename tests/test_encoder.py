import json
import shutil
import time
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from conftest import word_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from transformers import AutoModel, BertConfig, SiglipConfig

from vlm_reward import encoder as module
from vlm_reward.encoder import DualEncoder, locate, portable_name, write_folder
from vlm_reward.preprocess import preprocess
from vlm_reward.reward_model import auto_dtype

SENTENCES = ["open the green drawer", "close the door", "press the button"]
peft_warns = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def pixels(frames) -> torch.Tensor:
    return preprocess(frames, size=32, mean=(0.5,) * 3, std=(0.5,) * 3)  # [6, 3, 32, 32]


def shake(encoder: DualEncoder) -> None:
    """Move LoRA away from its start, where it changes nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)


def copy(source: Path, target: Path) -> Path:
    """A copy of a checkpoint's files, without the folders inside it."""
    target.mkdir()
    for file in source.iterdir():
        if file.is_file():
            shutil.copy(file, target)
    return target


# Embeddings


def test_embeddings_are_unit_float32_and_depend_on_the_input(tiny_encoder, pixels):
    images, texts = tiny_encoder(pixels, SENTENCES)
    assert images.shape == (6, tiny_encoder.embedding_dim)
    assert texts.shape == (3, tiny_encoder.embedding_dim)
    for embeddings in (images, texts):
        assert embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(len(embeddings)))
        cosines = embeddings @ embeddings.T
        assert (cosines - torch.eye(len(embeddings))).max() < 0.999


def test_pooling_in_bfloat16_makes_no_copy_of_its_weights_for_each_position(tiny_encoder, pixels):
    attention = tiny_encoder.model.vision_model.head.attention
    expected = tiny_encoder.encode_images(pixels)

    def copied(shape: list[int]) -> bool:
        return shape[1:] == [attention.embed_dim, 2 * attention.embed_dim]

    def embed() -> tuple[torch.Tensor, list[list[int]]]:
        with (
            torch.no_grad(),
            torch.autocast("cpu", torch.bfloat16),
            torch.profiler.profile(record_shapes=True) as profile,
        ):
            images = tiny_encoder.encode_images(pixels)
        shapes = [event.input_shapes[0] for event in profile.events() or () if event.name == "aten::copy_"]
        return images, [shape for shape in shapes if copied(shape)]

    images, copies = embed()
    assert not copies
    assert (images * expected).sum(-1).min() > 0.999
    attention._forward_pre_hooks.clear()
    if auto_dtype("cpu") != torch.bfloat16:
        pytest.skip("without bfloat16 in hardware torch makes no copies that the hook could spare")
    if not embed()[1]:
        pytest.fail("torch no longer copies the weights: DualEncoder's pre-hook of the pooling head can go")


def test_one_forward_gives_what_many_give(tiny_encoder, pixels):
    together = tiny_encoder.encode_images(pixels)
    torch.testing.assert_close(together, torch.cat([tiny_encoder.encode_images(p[None]) for p in pixels]))


def test_text_is_lower_cased_and_padded_to_the_full_length(tiny_encoder):
    tiny_encoder.tokenizer.backend_tokenizer.normalizer = normalizers.NFC()  # leaves capitals to us
    tokens = tiny_encoder.tokenize(["Close the DOOR", "close the door"])
    assert set(tokens) == {"input_ids"}  # SigLIP was trained without an attention mask
    ids = tokens["input_ids"]
    assert ids.shape == (2, 24)
    assert ids[0].tolist() == ids[1].tolist()
    assert ids[0, 3:].tolist() == [1] + [0] * 20  # three words, [EOS], padding on the right


def test_text_is_padded_on_the_right_whatever_the_tokenizer_prefers(tiny_encoder):
    tiny_encoder.tokenizer.padding_side = "left"  # the default of Gemma's, which SigLIP2 uses
    encoder = DualEncoder(tiny_encoder.model, tiny_encoder.tokenizer)
    assert encoder.tokenize(["close the door"])["input_ids"][0, 3:].tolist() == [1] + [0] * 20


def test_text_embedding_is_the_last_position_of_the_padded_text(tiny_encoder):
    model = tiny_encoder.model
    hidden = model.text_model(**tiny_encoder.tokenize(SENTENCES)).last_hidden_state
    expected = torch.nn.functional.normalize(model.text_model.head(hidden[:, -1]), dim=-1)
    torch.testing.assert_close(tiny_encoder.encode_text(SENTENCES), expected)


def test_text_of_full_length_is_taken_and_one_token_more_refused(tiny_encoder):
    assert tiny_encoder.encode_text(["door " * 23]).shape == (1, 32)
    with pytest.raises(ValueError, match="at most 24 tokens, got 25: shorten"):
        tiny_encoder.encode_text(["press the button", "door " * 24])


@pytest.mark.parametrize("texts", [[], "open", ["open", 3]])
def test_texts_must_be_a_list_of_strings(tiny_encoder, texts):
    with pytest.raises(ValueError, match="non-empty list of strings"):
        tiny_encoder.encode_text(texts)


def test_empty_text_is_refused(tiny_encoder):
    with pytest.raises(ValueError, match="a text is empty"):
        tiny_encoder.encode_text(["open the drawer", " \n"])


def test_pixels_of_another_size_are_refused(tiny_encoder):
    with pytest.raises(ValueError, match=r"\[M, 3, 32, 32\], got \(2, 3, 16, 16\)"):
        tiny_encoder.encode_images(torch.zeros(2, 3, 16, 16))


def test_same_seed_same_model_and_no_global_randomness_used(make_tiny_encoder):
    before = torch.random.get_rng_state()
    one, same, other = make_tiny_encoder(0), make_tiny_encoder(0), make_tiny_encoder(1)
    one.add_lora(seed=3)
    same.add_lora(seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    for (name, a), b in zip(one.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(one.encode_text(SENTENCES), other.encode_text(SENTENCES))


# LoRA


def test_lora_sits_on_attention_and_mlp_of_both_towers_and_starts_without_effect(tiny_encoder, pixels):
    before = tiny_encoder(pixels, SENTENCES)
    tiny_encoder.add_lora(r=16, alpha=32)
    for a, b in zip(before, tiny_encoder(pixels, SENTENCES), strict=True):
        torch.testing.assert_close(a, b)
    trained = {name for name, p in tiny_encoder.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    layers = {name.split(".lora_")[0].removeprefix("model.base_model.model.") for name in trained}
    block = [f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    assert layers == {
        f"{tower}_model.encoder.layers.0.{x}" for tower in ("text", "vision") for x in block
    } | {
        "vision_model.head.mlp.fc1",
        "vision_model.head.mlp.fc2",
    }
    # 8 square layers of width 32 and 6 between 32 and 64 wide, each with A [16, in] and B [out, 16]
    assert sum(p.numel() for p in tiny_encoder.trainable_parameters()) == 16 * (8 * (32 + 32) + 6 * (32 + 64))


def test_a_model_without_a_pooling_head_has_none_to_train(tiny_encoder, monkeypatch):
    monkeypatch.setattr(tiny_encoder, "_siglip", False)  # as CLIP's
    with pytest.raises(ValueError, match="which has no pooling head to train"):
        tiny_encoder.add_lora(head=True)


def test_lora_targets_can_be_chosen(tiny_encoder):
    tiny_encoder.add_lora(r=1, targets=("attention",))
    assert sum(p.numel() for p in tiny_encoder.trainable_parameters()) == 8 * (32 + 32)


def test_lora_trains_both_towers(tiny_encoder, pixels):
    tiny_encoder.add_lora()
    parameters = tiny_encoder.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(5):
        images, texts = tiny_encoder(pixels[:3], SENTENCES)
        loss = -(images * texts).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)


def test_merged_and_unmerged_agree_and_both_save_the_same_adapter(tiny_encoder, pixels, tmp_path):
    tiny_encoder.add_lora(r=4)
    plain = tiny_encoder.encode_images(pixels)
    shake(tiny_encoder)
    images, texts = tiny_encoder(pixels, SENTENCES)
    assert (images - plain).abs().max() > 0.01  # the adapter matters
    tiny_encoder.save_adapter(tmp_path / "unmerged")
    tiny_encoder.merge_lora()
    torch.testing.assert_close(tiny_encoder.encode_images(pixels), images, atol=1e-5, rtol=0)
    torch.testing.assert_close(tiny_encoder.encode_text(SENTENCES), texts, atol=1e-5, rtol=0)
    assert tiny_encoder.trainable_parameters() == []
    tiny_encoder.save_adapter(tmp_path / "merged")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "unmerged" / name).read_bytes()


@peft_warns
def test_adapter_is_read_by_plain_peft(tiny_backbone_dir, pixels, tmp_path):
    encoder = DualEncoder.from_pretrained(tiny_backbone_dir)
    encoder.add_lora(r=4)
    shake(encoder)
    encoder.save_adapter(tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    model = peft.PeftModel.from_pretrained(
        AutoModel.from_pretrained(tiny_backbone_dir), str(tmp_path / "adapter")
    )
    features = model.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(torch.nn.functional.normalize(features, dim=-1), encoder.encode_images(pixels))


@peft_warns
@pytest.mark.parametrize("anew", [True, False])
def test_an_adapter_may_hold_the_pooling_attention(
    anew, tiny_backbone_dir, tiny_adapter_dir, pixels, tmp_path
):
    encoder, before = (DualEncoder.from_pretrained(tiny_backbone_dir) for _ in range(2))
    if anew:
        encoder.add_lora(r=4, head=True)
    else:
        encoder.load_adapter(tiny_adapter_dir, trainable=True, head=True)
        before.load_adapter(tiny_adapter_dir)
    torch.testing.assert_close(encoder.encode_images(pixels), before.encode_images(pixels))
    (weight,) = (p for n, p in encoder.named_parameters() if p.requires_grad and "in_proj_weight" in n)
    optimizer = torch.optim.SGD(encoder.trainable_parameters(), lr=1.0)
    encoder.encode_images(pixels)[:, 0].sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    optimizer.step()
    images = encoder.encode_images(pixels).detach()
    assert (images - before.encode_images(pixels)).abs().max() > 0.01
    encoder.save_adapter(tmp_path / "adapter")
    merged, again = (DualEncoder.from_pretrained(tiny_backbone_dir) for _ in range(2))
    merged.load_adapter(tmp_path / "adapter")
    merged.merge_lora()
    merged.save_adapter(tmp_path / "merged")
    again.load_adapter(tmp_path / "merged", trainable=True, head=True)
    for other in (merged, again):
        torch.testing.assert_close(other.encode_images(pixels), images, atol=1e-5, rtol=0)
    plain = peft.PeftModel.from_pretrained(
        AutoModel.from_pretrained(tiny_backbone_dir), str(tmp_path / "adapter")
    )
    features = plain.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(torch.nn.functional.normalize(features, dim=-1), images)


@peft_warns
def test_adapter_of_plain_peft_is_read(tiny_backbone_dir, pixels, tmp_path):
    model = peft.get_peft_model(
        AutoModel.from_pretrained(tiny_backbone_dir),
        peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False),
    )
    model.save_pretrained(str(tmp_path))
    encoder = DualEncoder.from_pretrained(tiny_backbone_dir)
    encoder.load_adapter(tmp_path)
    features = model.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(encoder.encode_images(pixels), torch.nn.functional.normalize(features, dim=-1))


def test_loaded_adapter_goes_on_training_only_when_asked(tiny_backbone_dir, tiny_adapter_dir):
    for trainable in (False, True):
        encoder = DualEncoder.from_pretrained(tiny_backbone_dir)
        encoder.load_adapter(tiny_adapter_dir, trainable=trainable)
        assert bool(encoder.trainable_parameters()) == trainable


def test_lora_misuse_is_refused(tiny_encoder, tmp_path):
    with pytest.raises(ValueError, match=r"among \('attention', 'mlp'\), got \('heads',\)"):
        tiny_encoder.add_lora(targets=("heads",))
    with pytest.raises(ValueError, match="no LoRA to merge"):
        tiny_encoder.merge_lora()
    with pytest.raises(ValueError, match="no adapter to save"):
        tiny_encoder.save_adapter(tmp_path / "x")
    tiny_encoder.add_lora()
    with pytest.raises(ValueError, match="merge_lora"):
        tiny_encoder.save_pretrained(tmp_path / "x")
    with pytest.raises(ValueError, match="has an adapter already"):
        tiny_encoder.add_lora()
    assert list(tmp_path.iterdir()) == []


# Files


def test_saved_backbone_gives_the_same_embeddings(tiny_encoder, tiny_backbone_dir, pixels):
    again = DualEncoder.from_pretrained(tiny_backbone_dir)
    assert not again.training
    assert (again.image_mean, again.image_std, again.resample) == ((0.5,) * 3, (0.5,) * 3, "bilinear")
    assert again.name == str(tiny_backbone_dir)
    assert torch.equal(again.encode_images(pixels), tiny_encoder.encode_images(pixels))
    assert torch.equal(again.encode_text(SENTENCES), tiny_encoder.encode_text(SENTENCES))
    names = {path.name for path in tiny_backbone_dir.iterdir() if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= names


def test_names_are_a_folder_then_a_checkpoint_then_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints" / "siglip2-tiny" / "triplet").mkdir(parents=True)
    assert locate("siglip2-tiny/triplet") == tmp_path / "checkpoints" / "siglip2-tiny" / "triplet"
    (tmp_path / "siglip2-tiny").mkdir()
    assert locate("siglip2-tiny") == Path("siglip2-tiny")
    calls = []
    monkeypatch.setattr(module, "snapshot_download", lambda name, **kw: calls.append((name, kw)) or "cached")
    assert locate("google/siglip2-base-patch16-224", revision="main") == Path("cached")
    name, options = calls[0]
    assert (name, options["revision"]) == ("google/siglip2-base-patch16-224", "main")
    assert not any("bin" in pattern or "py" in pattern for pattern in options["allow_patterns"])


@pytest.mark.parametrize("name", ["google/no-such-model", "nothing", "a/b/c", "/no/such/folder", ""])
def test_missing_model_says_what_was_tried_within_seconds(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError, match=r"no model .*: neither a folder"):
        DualEncoder.from_pretrained(name)
    assert time.perf_counter() - start < 2


def test_backbones_are_named_so_that_folders_can_move(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHECKPOINTS", tmp_path / "checkpoints")
    tiny, other = tmp_path / "checkpoints" / "tiny", tmp_path / "other"
    tiny.mkdir(parents=True)
    other.mkdir()
    assert (
        portable_name("google/siglip2-base-patch16-224", tmp_path / "run")
        == "google/siglip2-base-patch16-224"
    )
    assert portable_name(str(tiny), tmp_path / "run") == "tiny"
    assert portable_name(str(other), other / "triplet") == "other"
    assert portable_name(str(other), tmp_path / "run") == str(other)


def test_truncated_weights(tiny_backbone_dir, tmp_path):
    folder = copy(tiny_backbone_dir, tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="damaged or of another model; copy or download it again"):
        DualEncoder.from_pretrained(folder)


def test_missing_weights_are_never_made_up(tiny_backbone_dir, tmp_path):
    folder = copy(tiny_backbone_dir, tmp_path / "partial")
    state = load_file(folder / "model.safetensors")
    state.pop("vision_model.head.probe")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing \(vision_model.head.probe"):
        DualEncoder.from_pretrained(folder)


def test_pickled_weights_are_refused(tiny_backbone_dir, tmp_path):
    folder = copy(tiny_backbone_dir, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pickled weights \(pytorch_model.bin\).*refused"):
        DualEncoder.from_pretrained(folder)


def test_model_with_one_tower_is_refused(tmp_path):
    BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="is a BertModel, which has no get_image_features"):
        DualEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("config.json", "has neither config.json"),
        ("model.safetensors", r"has no \*.safetensors"),
        ("tokenizer.json", "no usable tokenizer"),
        ("preprocessor_config.json", "no usable tokenizer or preprocessor_config.json"),
    ],
)
def test_missing_file(tiny_backbone_dir, tmp_path, lost, message):
    folder = copy(tiny_backbone_dir, tmp_path / "lost")
    (folder / lost).unlink()
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        DualEncoder.from_pretrained(folder)


def test_a_tokenizer_that_needs_another_package_says_which(tiny_backbone_dir, monkeypatch):
    class Siglip:
        @staticmethod
        def from_pretrained(*_, **__):
            raise ImportError("SiglipTokenizer requires the SentencePiece library")

    monkeypatch.setattr(module, "_tokenizer_class", lambda folder: Siglip)
    with pytest.raises(ValueError, match=r"pip install sentencepiece.*requires the SentencePiece library"):
        DualEncoder.from_pretrained(tiny_backbone_dir)


def test_config_that_is_no_json_or_asks_for_remote_code(tiny_backbone_dir, tmp_path):
    folder = copy(tiny_backbone_dir, tmp_path / "odd")
    for text in ("{", json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "evil.Config"}})):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"transformers cannot read its config.json"):
            DualEncoder.from_pretrained(folder)


def test_damaged_and_foreign_adapters(tiny_backbone_dir, tiny_adapter_dir, tmp_path):
    def broken(name: str) -> Path:
        return copy(tiny_adapter_dir, tmp_path / name)

    cut, gone, pickled, wide, foreign, ia3 = map(broken, ("cut", "gone", "pickled", "wide", "foreign", "ia3"))
    weights, config = "adapter_model.safetensors", "adapter_config.json"
    (cut / weights).write_bytes((cut / weights).read_bytes()[:500])
    (gone / weights).unlink()
    (pickled / weights).rename(pickled / "adapter_model.bin")
    fields = json.loads((wide / config).read_text())
    (wide / config).write_text(json.dumps(fields | {"r": 8}))
    (foreign / config).write_text(json.dumps(fields | {"target_modules": ["query", "value"]}))
    (ia3 / config).write_text(json.dumps(fields | {"peft_type": "IA3"}))
    expected = [
        (cut, ValueError, "truncated or damaged"),
        (gone, FileNotFoundError, "has no adapter_model.safetensors"),
        (pickled, ValueError, "pickled weights"),
        (wide, ValueError, "does not fit the backbone"),
        (foreign, ValueError, "does not fit the backbone"),
        (ia3, ValueError, "only LORA is supported"),
        (tmp_path, FileNotFoundError, "so it is no adapter"),
    ]
    encoder = DualEncoder.from_pretrained(tiny_backbone_dir)
    for folder, error, message in expected:
        with pytest.raises(error, match=message):
            encoder.load_adapter(folder)
    encoder.load_adapter(tiny_adapter_dir)  # the failures left nothing behind
    with pytest.raises(FileNotFoundError, match="is an adapter, no backbone: load it with RewardModel"):
        DualEncoder.from_pretrained(tiny_adapter_dir)


def test_write_folder_moves_all_files_or_none(tmp_path):
    path = tmp_path / "new" / "folder"
    with write_folder(path) as folder:
        (folder / "a").write_text("1")
        assert not path.exists()
    (path / "kept").write_text("0")

    def interrupted() -> None:
        with write_folder(path) as folder:
            (folder / "a").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {file.name: file.read_text() for file in path.iterdir()} == {"a": "1", "kept": "0"}
    with write_folder(path) as folder:
        (folder / "a").write_text("3")
    assert {file.name: file.read_text() for file in path.iterdir()} == {"a": "3", "kept": "0"}
    assert [p.name for p in path.parent.iterdir()] == ["folder"]


# The real size


def test_base_size_attaches_lora_trains_a_step_and_scores():
    """google/siglip2-base-patch16-224's config, random weights; the vocabulary is cut to 1,000 of 256,000."""
    tokenizer = word_tokenizer(SENTENCES, max_length=64)
    tower = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    }
    config = SiglipConfig(
        text_config={
            **tower,
            "vocab_size": 1000,
            "max_position_embeddings": 64,
            "projection_size": 768,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config={**tower, "image_size": 224, "patch_size": 16},
    )
    encoder = DualEncoder.from_config(config, tokenizer)
    assert (encoder.image_size, encoder.embedding_dim, encoder.max_text_length) == (224, 768, 64)
    encoder.add_lora(r=16, alpha=32)
    per_block = 16 * (4 * (768 + 768) + 2 * (768 + 3072))
    parameters = encoder.trainable_parameters()
    assert sum(p.numel() for p in parameters) == 24 * per_block + 16 * 2 * (
        768 + 3072
    )  # and the pooling head's

    frames = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    pixels = preprocess(frames, size=224, mean=(0.5,) * 3, std=(0.5,) * 3)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        images, texts = encoder(pixels, SENTENCES[:2])
    before = (images * texts).sum(-1)
    (-before.mean()).backward()
    optimizer.step()
    encoder.merge_lora()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        images, texts = encoder(pixels, SENTENCES[:2])
    after = (images * texts).sum(-1)
    assert after.mean() > before.mean()
    assert after.abs().max() <= 1 + 1e-5


@pytest.mark.network
def test_google_siglip2_base_by_name():
    encoder = DualEncoder.from_pretrained("google/siglip2-base-patch16-224")
    assert (encoder.image_size, encoder.embedding_dim, encoder.max_text_length) == (224, 768, 64)
    assert encoder.resample == "bilinear"
    ids = encoder.tokenize(["Press the button"])["input_ids"][0].tolist()
    words = ids.index(encoder.tokenizer.eos_token_id)
    assert words >= 3
    assert ids[words + 1 :] == [encoder.tokenizer.pad_token_id] * (63 - words)
    red, green = np.zeros((2, 1, 224, 224, 3), np.uint8)
    red[..., 0] = green[..., 1] = 255
    pixels = preprocess(
        np.concatenate([red, green]), size=224, mean=encoder.image_mean, std=encoder.image_std
    )
    images, texts = encoder(pixels, ["a red picture", "a green picture"])
    assert (images @ texts.T).argmax(1).tolist() == [0, 1]
