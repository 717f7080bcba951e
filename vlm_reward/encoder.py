"""Pixels and sentences to unit embeddings: SigLIP, SigLIP2, CLIP, with or without LoRA."""

import contextlib
import difflib
import hashlib
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import RevisionNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from vlm_reward.preprocess import Resample, preprocess

_PACKED = Path(__file__).resolve().parent / "checkpoints"
CHECKPOINTS = _PACKED if _PACKED.is_dir() else _PACKED.parent.parent / "checkpoints"
"""The embedded models, of the wheel or of the checkout; names such as `siglip2-tiny` are looked up here."""

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

LORA_TARGETS = {
    "attention": r"self_attn\.(q_proj|k_proj|v_proj|out_proj)",
    "mlp": r"mlp\.(fc1|fc2)",
}
"""Linear layers of both towers, by the names that SigLIP, SigLIP2 and CLIP share.

`mlp` includes the MLP of SigLIP's pooling head. The attention of that head is left alone: torch keeps its
projections in one parameter (`nn.MultiheadAttention.in_proj_weight`), which is no linear layer. `HEAD` is for it.
"""
HEAD = "head.attention"
"""SigLIP's pooling attention, which decides what of an image its embedding tells; an adapter may hold it whole."""

# Printing any SigLIP config makes transformers 5.23 warn about the token ids of its own default config.
logging.getLogger("transformers.configuration_utils").addFilter(
    lambda record: "between 0 and 31999), got 4940" not in record.getMessage()
)

_RESAMPLE: dict[int, Resample] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_BOTH_TOWERS = ("get_image_features", "get_text_features")


class DualEncoder(nn.Module):
    """An image tower and a text tower that meet in one space. Weights stay float32 unless asked otherwise.

    Make one with `from_pretrained` or `from_config`.

    Attributes:
        name: what it was loaded by: a folder or a Hub id.
        revision: the commit on the Hub that it was loaded from, or None; adapters note it.
        image_size: S, the side of its input in pixels.
        image_mean, image_std: for `preprocess`.
        resample: for `preprocess`.
        max_text_length: L, in tokens.
        embedding_dim: D.

    Example:
        >>> encoder = DualEncoder.from_pretrained("siglip2-tiny")
        >>> encoder.encode_text(["open the window"]) @ encoder.encode_images(pixels).T  # [1, M]
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        resample: Resample = "bilinear",
        name: str = "",
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.name, self.revision = name, revision
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.resample: Resample = resample
        config: Any = model.config
        vision, text = config.vision_config, config.text_config
        self._family: str = config.model_type
        self._patch: int = vision.patch_size
        # SigLIP2's NaFlex variants take patches of any grid; ours is the square one they were trained with.
        naflex = self._family == "siglip2"
        self.image_size: int = math.isqrt(vision.num_patches) * self._patch if naflex else vision.image_size
        self.max_text_length: int = text.max_position_embeddings
        self.embedding_dim: int = (
            config.projection_dim if hasattr(config, "projection_dim") else vision.hidden_size
        )
        self._siglip = self._family.startswith("siglip")
        if self._siglip:
            tokenizer.padding_side = "right"  # as it was trained; the text embedding is the last position
            self.model.vision_model.head.attention.register_forward_pre_hook(_positions_first)
        self._adapter: tuple[LoraConfig, dict[str, torch.Tensor]] | None = None  # kept when merged

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> "DualEncoder":
        """Load a backbone in evaluation mode: safetensors only, never remote code.

        Args:
            name_or_path: a folder, a name under `checkpoints/`, or a Hub id.
            device: where to.
            dtype: of the weights.
            revision: branch, tag or commit on the Hub.
            local_files_only: never ask the Hub.

        Raises:
            FileNotFoundError: nothing is there, or a file of it is missing.
            ValueError: it is no dual encoder, its weights are damaged, incomplete or not safetensors; this
                machine has no such device.
        """
        check_device(device)
        folder = locate(name_or_path, revision=revision, local_files_only=local_files_only)
        what = f"{name_or_path} ({folder})"
        if not (folder / "config.json").is_file():
            if (folder / ADAPTER_CONFIG).is_file():
                raise FileNotFoundError(f"{what} is an adapter, no backbone: load it with RewardModel")
            raise FileNotFoundError(
                f"{what} has neither config.json (a backbone) nor {ADAPTER_CONFIG} (an adapter); "
                "copy or download it again"
            )
        options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        try:
            config = AutoConfig.from_pretrained(folder, **options)
            with torch.device("meta"):
                skeleton = AutoModel.from_config(config)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{what}: transformers cannot read its config.json: {error}") from error
        if not all(hasattr(skeleton, method) for method in _BOTH_TOWERS):
            raise ValueError(
                f"{what} is a {type(skeleton).__name__}, which has no {' and '.join(_BOTH_TOWERS)}; "
                "give a dual encoder: SigLIP, SigLIP2 or CLIP"
            )
        if not any(folder.glob("*.safetensors")):
            pickles = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
            if pickles:
                raise ValueError(
                    f"{what} has only pickled weights ({', '.join(pickles)}), which can run code: refused. "
                    "Convert them to safetensors, or take a revision that has them"
                )
            raise FileNotFoundError(f"{what} has no *.safetensors weights; copy or download it again")
        try:
            with _no_progress_bar():
                model, report = AutoModel.from_pretrained(
                    folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
                )
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{what}: its weights are damaged or of another model; copy or download it again: {error}"
            ) from error
        if report["missing_keys"]:
            some = ", ".join(sorted(report["missing_keys"])[:3])
            count = len(report["missing_keys"])
            raise ValueError(f"{what}: {count} weights are missing ({some}, ...); copy or download it again")
        try:
            tokenizer = _tokenizer_class(folder).from_pretrained(folder, **options)
            processor = AutoImageProcessor.from_pretrained(folder, **options)
        except ImportError as error:
            raise ValueError(
                f"{what}: its tokenizer or image processor needs a package that is not installed; that of the "
                f"first SigLIP: pip install sentencepiece. ({' '.join(str(error).split())})"
            ) from error
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{what} has no usable tokenizer or preprocessor_config.json; copy it again: {error}"
            ) from error
        resample = _RESAMPLE.get(int(processor.resample))
        if resample is None:
            raise ValueError(
                f"{what} resizes by Pillow's filter {processor.resample}; known: bilinear, bicubic"
            )
        encoder = cls(
            model,
            tokenizer,
            image_mean=processor.image_mean,
            image_std=processor.image_std,
            resample=resample,
            name=str(name_or_path if _is_hub_id(name_or_path) else folder),
            revision=folder.name if _is_hub_id(name_or_path) else None,  # the Hub's cache names it so
        )
        return encoder.to(device).eval()

    @classmethod
    def from_config(
        cls,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int = 0,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        resample: Resample = "bilinear",
        name: str = "",
    ) -> "DualEncoder":
        """A model with random weights, the same for the same seed; on the CPU, in training mode."""
        with _seeded(seed):
            model = AutoModel.from_config(config)
        return cls(
            model.train(), tokenizer, image_mean=image_mean, image_std=image_std, resample=resample, name=name
        )

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def logit_scale(self) -> torch.Tensor:
        """The model's own parameter: the log of what multiplies cosines in its image-text loss."""
        return self.model.logit_scale

    @property
    def logit_bias(self) -> torch.Tensor | None:
        """The model's own parameter: what its sigmoid loss adds (SigLIP; None for CLIP)."""
        return getattr(self.model, "logit_bias", None)

    @property
    def has_adapter(self) -> bool:
        """Whether there is LoRA to save, merged or not."""
        return self._adapter is not None or isinstance(self.model, PeftModel)

    def forward(self, pixels: torch.Tensor, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Both towers in one call, which distributed wrappers need: ([M, D], [T, D])."""
        return self.encode_images(pixels), self.encode_text(texts)

    def preprocess(self, frames: Any) -> torch.Tensor:
        """Frames of any size, uint8 [..., H, W, 3], as `encode_images` takes them (vlm_reward.preprocess):
        float32 [M, 3, S, S] on the encoder's device; leading axes are flattened into M.
        """
        return preprocess(
            frames,
            size=self.image_size,
            mean=self.image_mean,
            std=self.image_std,
            resample=self.resample,
            device=self.device,
        )

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed images in one forward.

        Args:
            pixels: float [M, 3, S, S], from `preprocess`.

        Returns:
            float32 [M, D], unit norm.

        Raises:
            ValueError: another shape.
        """
        size = self.image_size
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, size, size):
            raise ValueError(f"pixels must be [M, 3, {size}, {size}], got {tuple(pixels.shape)}")
        if self._family == "siglip2":
            grid = size // self._patch
            patches = pixels.reshape(-1, 3, grid, self._patch, grid, self._patch).permute(0, 2, 4, 3, 5, 1)
            patches = patches.reshape(len(pixels), grid * grid, -1)
            features = self.model.get_image_features(
                pixel_values=patches,
                pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.int32, device=pixels.device),
                spatial_shapes=torch.tensor([[grid, grid]] * len(pixels), device=pixels.device),
            )
        else:
            features = self.model.get_image_features(pixel_values=pixels)
        return _unit(features)

    def encode_patches(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `encode_images` gives and, of the same forward, what each patch says before they are pooled.

        Args:
            pixels: float [M, 3, S, S], from `preprocess`.

        Returns:
            float32 [M, D], unit norm, and [M, P, W], row by row from the upper left.

        Raises:
            ValueError: another model than a SigLIP of fixed resolution.
        """
        self._check_patches()
        seen = self.model.vision_model(pixel_values=pixels)
        return _unit(seen.pooler_output), seen.last_hidden_state

    @property
    def patches(self) -> int:
        """P of `encode_patches`."""
        self._check_patches()
        return (self.image_size // self._patch) ** 2

    @property
    def patch_width(self) -> int:
        """W of `encode_patches`."""
        return self.model.config.vision_config.hidden_size

    def _check_patches(self) -> None:
        if self._family != "siglip":
            raise ValueError(f"patches are read of SigLIP models of fixed resolution, this is {self._family}")

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed sentences, each as often as it is given.

        Args:
            texts: T sentences; lower-cased for SigLIP, which was trained so.

        Returns:
            float32 [T, D], unit norm.

        Raises:
            ValueError: no text, an empty one, or one that would be truncated.
        """
        return _unit(self.model.get_text_features(**self.tokenize(texts)))

    def tokenize(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Sentences to int64 [T, L] on the model's device; the errors are those of `encode_text`.

        SigLIP reads no attention mask: it was trained with padding to L and without one.
        """
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"texts must be a non-empty list of strings, got {texts!r}")
        if not all(text.strip() for text in texts):
            raise ValueError(f"a text is empty: got {list(texts)!r}")
        if self._siglip:
            texts = [text.lower() for text in texts]
        tokens = self.tokenizer(list(texts), padding="max_length", max_length=self.max_text_length)
        for text, ids in zip(texts, tokens["input_ids"], strict=True):
            if len(ids) > self.max_text_length:
                raise ValueError(
                    f"the model reads at most {self.max_text_length} tokens, got {len(ids)}: shorten {text!r}"
                )
        names = ("input_ids",) if self._siglip else ("input_ids", "attention_mask")
        return {name: torch.tensor(tokens[name], device=self.device) for name in names}

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What an optimizer gets."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def add_lora(
        self,
        r: int = 16,
        alpha: int = 32,
        dropout: float = 0.0,
        targets: Sequence[str] = ("attention", "mlp"),
        seed: int = 0,
        head: bool = False,
    ) -> None:
        r"""Freeze the backbone and train $\frac{\alpha}{r} B A$ beside the linear layers of both towers.

        The output does not change at first, for B starts at 0. A is the same for the same seed.

        Args:
            r: rank.
            alpha: scale.
            dropout: on the input of A, in training mode.
            targets: keys of `LORA_TARGETS`.
            seed: of A.
            head: train SigLIP's pooling attention, too: the adapter then holds a copy of it.

        Raises:
            ValueError: unknown target, no such head (CLIP), or there is an adapter already.

        Reference:
            Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021 (arXiv 2106.09685).
        """
        unknown = [target for target in targets if target not in LORA_TARGETS]
        if unknown or not targets:
            raise ValueError(f"LoRA targets must be among {tuple(LORA_TARGETS)}, got {tuple(targets)}")
        self._refuse_second_adapter()
        config = LoraConfig(
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=rf".*\.({'|'.join(LORA_TARGETS[target] for target in targets)})",
            modules_to_save=self._head() if head else None,
        )
        with _seeded(seed), _quiet_peft():
            self.model = get_peft_model(self.model, config)

    def merge_lora(self) -> None:
        """Fold the adapter into the weights, for speed. It can still be saved, but no longer trained.

        Raises:
            ValueError: there is none, or it is merged already.
        """
        if not isinstance(self.model, PeftModel):
            raise ValueError("no LoRA to merge: call add_lora or load_adapter first")
        self._adapter = self.adapter_state()
        self.model = self.model.merge_and_unload().requires_grad_(False)

    def save_adapter(self, path: str | Path) -> None:
        """Write a PEFT adapter folder that `peft.PeftModel.from_pretrained(base, path)` reads, too.

        Raises:
            ValueError: there is no adapter, or the folder holds a backbone.
            OSError: it could not be written; what was there before is as it was.
        """
        with write_folder(path) as folder:
            self._write_adapter(folder, Path(path))

    def load_adapter(self, path: str | Path, trainable: bool = False, head: bool = False) -> None:
        """Attach a LoRA adapter from a folder.

        Args:
            path: a folder with `adapter_config.json` and `adapter_model.safetensors`.
            trainable: whether its weights get gradients.
            head: add SigLIP's pooling attention to what it holds, as `add_lora` does, if it is not there.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: damaged, pickled, not LoRA, made for another model, no such head, or there is an adapter
                already.
        """
        self._refuse_second_adapter()
        folder = Path(path)
        config = read_adapter_config(folder)
        if not (folder / ADAPTER_WEIGHTS).is_file():
            if (folder / "adapter_model.bin").is_file():
                raise ValueError(f"{folder} has pickled weights, which can run code: save it as safetensors")
            raise FileNotFoundError(f"adapter {folder} has no {ADAPTER_WEIGHTS}; copy or train it again")
        try:
            state = load_file(folder / ADAPTER_WEIGHTS)
        except SafetensorError as error:
            raise ValueError(
                f"{folder / ADAPTER_WEIGHTS} is truncated or damaged ({error}); copy or train it again"
            ) from error
        config.inference_mode = not trainable
        base = self.model
        if head and not config.modules_to_save:
            config.modules_to_save = self._head()
            own = base.named_parameters()
            state |= {f"base_model.model.{name}": weight.detach() for name, weight in own if HEAD in name}
        try:
            with _seeded(0), _quiet_peft():  # random before they are loaded
                self.model = PeftModel(base, config)
            result = set_peft_model_state_dict(self.model, state)
            kinds = ("lora_", "modules_to_save")
            lost = [key for key in result.missing_keys if any(kind in key for kind in kinds)]
            lost += result.unexpected_keys
            if lost:
                raise ValueError(f"{len(lost)} weights do not match, {lost[0]} among them")
        except (ValueError, RuntimeError, KeyError) as error:
            if isinstance(self.model, PeftModel):
                self.model.unload()
            self.model = base
            raise ValueError(
                f"adapter {folder} does not fit the backbone {self.name!r} (it names "
                f"{config.base_model_name_or_path!r}): {error}"
            ) from error

    def save_pretrained(self, path: str | Path) -> None:
        """Write a stand-alone backbone: model, tokenizer and preprocessor config. Merged LoRA is in it.

        Raises:
            ValueError: LoRA is not merged, or the folder holds an adapter.
            OSError: it could not be written; what was there before is as it was.
        """
        with write_folder(path) as folder:
            self._write_backbone(folder, Path(path))

    def _write_backbone(self, folder: Path, final: Path) -> None:
        if isinstance(self.model, PeftModel):
            raise ValueError("merge_lora() before saving a stand-alone backbone, or use save_adapter")
        if (final / ADAPTER_CONFIG).exists():
            raise ValueError(f"{final} holds an adapter; save the backbone to a folder of its own")
        with _no_progress_bar():
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        processor = {
            "image_processor_type": "CLIPImageProcessor"
            if self._family == "clip"
            else "SiglipImageProcessor",
            "do_resize": True,
            "size": {"height": self.image_size, "width": self.image_size},
            "resample": next(code for code, filter_ in _RESAMPLE.items() if filter_ == self.resample),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "do_convert_rgb": True,
        }
        if self._family == "clip":
            processor["do_center_crop"] = False
        (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")

    def _write_adapter(self, folder: Path, final: Path) -> None:
        if (final / "config.json").exists():
            raise ValueError(
                f"{final} holds a backbone; save the adapter to a folder of its own, inside or not"
            )
        config, state = self.adapter_state()
        config.base_model_name_or_path = portable_name(self.name, final)
        config.revision = self.revision
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
        config.save_pretrained(str(folder), auto_mapping_dict=mapping)  # for peft.AutoPeftModel
        save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})

    def adapter_state(self) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
        """The adapter, merged or not: its settings, and its weights on the CPU by PEFT's names.

        Raises:
            ValueError: there is none.
        """
        if self._adapter is not None:
            return self._adapter
        if not isinstance(self.model, PeftModel):
            raise ValueError("no adapter to save: call add_lora or load_adapter first")
        state = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        config: Any = self.model.peft_config["default"]
        return config, {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}

    def _head(self) -> list[str]:
        if not self._siglip:
            raise ValueError(f"{self.name!r} is a {self._family} model, which has no pooling head to train")
        return [HEAD]

    def _refuse_second_adapter(self) -> None:
        if self.has_adapter:
            raise ValueError("this encoder has an adapter already; load the backbone anew for another one")


def check_device(device: str | torch.device) -> None:
    """ValueError when this machine does not have the device; it says which there are."""
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is none that PyTorch knows ({error})") from error
    accelerator = torch.accelerator.current_accelerator()
    kind = accelerator.type if accelerator else ""
    there = ["cpu", *(f"{kind}:{i}" for i in range(torch.accelerator.device_count()))]
    if wanted.type != "cpu" and f"{wanted.type}:{wanted.index or 0}" not in there:
        raise ValueError(f"this machine has no device {device}; it has {', '.join(there)}")


def weights_digest(*folders: Path) -> str:
    """Hex SHA-256 of all safetensors in some folders: what was trained again has another."""
    digest = hashlib.sha256()
    for file in sorted({file for folder in folders for file in folder.glob("*.safetensors")}):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _positions_first(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Lay keys of the pooling head [M, P, D] out by position, in which order `nn.MultiheadAttention` reads them.

    Else torch multiplies each position on its own in bfloat16 on the CPU, with a copy of the weights for each:
    a quarter of the time of scoring three images with `siglip2-tiny`.
    """
    probe, keys, *_ = args
    keys = keys.transpose(0, 1).contiguous().transpose(0, 1)
    return probe, keys, keys


def locate(name: str | Path, *, revision: str | None = None, local_files_only: bool = False) -> Path:
    """The folder behind a name: an existing folder, else `checkpoints/<name>`, else a snapshot from the Hub.

    Raises:
        FileNotFoundError: none of the three; says what was tried.
    """
    if folder := local_folder(name):
        return folder
    if not _is_hub_id(name):
        raise FileNotFoundError(f"{_absent(name)}, nor the name of a Hub repository (owner/name)")
    offline, why = local_files_only or constants.HF_HUB_OFFLINE, None
    try:
        if not offline:
            try:  # one request that fails at once without a network; the download of a commit retries for long
                revision = HfApi().model_info(str(name), revision=revision, timeout=10).sha
            except RevisionNotFoundError:
                raise
            except Exception as error:  # which is the HTTP library's, and that has changed three times
                offline, why = True, error
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
        return Path(
            snapshot_download(str(name), revision=revision, local_files_only=offline, allow_patterns=patterns)
        )
    except Exception as error:
        at = f" at revision {revision}" if revision else ""
        if local_files_only or constants.HF_HUB_OFFLINE:
            asked = "local_files_only" if local_files_only else "HF_HUB_OFFLINE is set"
            said = f", nor in the cache {constants.HF_HUB_CACHE}{at} ({asked}): download it once online"
        else:
            said = f", nor could it be had from the Hugging Face Hub{at}: check the name and the network"
        details = " ".join(str(why or error).split())
        raise FileNotFoundError(f"{_absent(name)}{said}, or give a folder. ({details})") from error


def local_folder(name: str | Path) -> Path | None:
    """An existing folder, else `checkpoints/<name>`; None when there is neither."""
    folders = (folder for folder in (Path(name), CHECKPOINTS / name) if name and folder.is_dir())
    return next(folders, None)


def _absent(name: str | Path) -> str:
    """Where a model was looked for, and the embedded ones that are called nearly so."""
    names = sorted({file.parent.relative_to(CHECKPOINTS).as_posix() for file in CHECKPOINTS.rglob("*.json")})
    backbone, slash, _ = str(name).partition("/")
    own = [one for one in names if slash and one.startswith(f"{backbone}/") and one.count("/") == 1]
    close = difflib.get_close_matches(str(name), own or names, cutoff=0.0 if own else 0.6)
    near = " or ".join(map(repr, close))
    hint = f" (did you mean {near}?)" if near else ""
    return f"no model {str(name)!r}{hint}: neither a folder, nor one under {CHECKPOINTS}"


def portable_name(name: str, adapter: Path) -> str:
    """How an adapter saved at `adapter` should name its backbone, so that both can be moved together."""
    folder = Path(name)
    if not name or not folder.is_dir():
        return name
    folder = folder.resolve()
    if folder in adapter.resolve().parents[:2]:  # a judge lies within an adapter
        return folder.name
    if folder.is_relative_to(CHECKPOINTS):
        return folder.relative_to(CHECKPOINTS).as_posix()
    return str(folder)


def read_adapter_config(folder: Path) -> LoraConfig:
    """Raises FileNotFoundError without `adapter_config.json`, ValueError when it is no LoRA config."""
    if not (folder / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {ADAPTER_CONFIG}, so it is no adapter")
    try:
        fields = json.loads((folder / ADAPTER_CONFIG).read_text())
        if fields["peft_type"] != "LORA":
            raise ValueError(f"its peft_type is {fields['peft_type']}, only LORA is supported")
        return LoraConfig(**{key: value for key, value in fields.items() if key in _LORA_FIELDS})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / ADAPTER_CONFIG} is no LoRA config: {error!r}") from error


@contextlib.contextmanager
def write_folder(path: str | Path) -> Iterator[Path]:
    """Write a folder's files all at once: yields an empty folder beside it, moved when the block ends.

    If the block fails, is interrupted or the disk is full, what was at `path` stays as it was. Files of
    `path` that the block did not write stay, too.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
        for file in fresh.iterdir():  # safetensors writes files that only their owner can read
            file.chmod(fresh.stat().st_mode & 0o666)
        if path.exists():
            for file in sorted(fresh.iterdir()):
                os.replace(file, path / file.name)
        else:
            os.replace(fresh, path)
    except (OSError, SafetensorError) as error:  # the latter is how safetensors reports a full disk
        raise OSError(f"could not write {path}: {error}; what was there is unchanged") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


_LORA_FIELDS = frozenset(LoraConfig.__dataclass_fields__)


def _is_hub_id(name: str | Path) -> bool:
    if isinstance(name, Path) or local_folder(name):
        return False
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1 and bool(name)


def _tokenizer_class(folder: Path) -> Any:
    """A tokenizer saved without a class of its own is its tokenizer.json, whatever the model is.

    AutoTokenizer of transformers 5.23 would take the model's class for it, and every word would be unknown.
    """
    path = folder / "tokenizer_config.json"
    name = json.loads(path.read_text()).get("tokenizer_class") if path.is_file() else None
    return (
        PreTrainedTokenizerFast if name in ("TokenizersBackend", "PreTrainedTokenizerFast") else AutoTokenizer
    )


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Without transformers' bars for a block: they last milliseconds for models of this size."""
    shown = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.logging.enable_progress_bar()


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The CPU's generator at `seed`, then as it was: PEFT and transformers take no generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextlib.contextmanager
def _quiet_peft() -> Iterator[None]:
    """PEFT 0.21 asks for an attribute that transformers 5.23 has renamed; neither concerns our users."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _unit(features: Any) -> torch.Tensor:
    """Unit rows in float32, from a tensor or from transformers' output object."""
    tensor = features if isinstance(features, torch.Tensor) else features.pooler_output
    return F.normalize(tensor.float(), dim=-1)
