"""Average adapters of one backbone, or backbones of one line, into one that generalises better and is no slower.

    python -m training.average siglip2-tiny/triplet+order+start siglip2-tiny/triplet+order+wrong+start \\
        --start-weight 0.5 --output runs/warm
    python -m training.average siglip2-tiny-zoom siglip2-tiny-worlds out/things --output out/soup

What several runs agree on stays; what one of them alone overrates is divided by their number. The average of
adapters is exact: LoRA's factors side by side, so that its rank is the sum of theirs; merged when loaded, it costs
what one costs. Backbones have an average where each was trained on from another of them (training.pretrain
--start); of those that were trained apart it is noise.

References: Ramé et al., "WARM: On the Benefits of Weight Averaged Reward Models", ICML 2024 (arXiv 2401.12187);
Wortsman et al., "Model soups", ICML 2022 (arXiv 2203.05482).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from training.pretrain import PRETRAINING, facts_of
from vlm_reward._jobs import replacing
from vlm_reward.encoder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, DualEncoder, locate
from vlm_reward.ensemble import Ensemble
from vlm_reward.reward_model import RewardModel

OTHERWISE = "; training.ensemble asks them at once and averages their scores"
HELD = {ADAPTER_CONFIG: "an adapter", "config.json": "a backbone"}


@dataclass(frozen=True)
class AverageConfig:
    """Average the weights of adapters, or of backbones."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Two or more adapters of the same backbone, cameras and layers, or backbones of which each was
    trained on from another: names under checkpoints/, folders or Hub ids."""
    output: Path
    """Folder of their average."""
    start_weight: float | None = None
    """How much the average of adapters counts that a frame is unlike the first of its episode
    (vlm_reward.similarity.toward); as they do when not given and all do the same."""
    overwrite: bool = False
    """Replace an average in `output`."""


def average(adapters: Sequence[str | Path], start_weight: float | None = None) -> RewardModel:
    """The reward model whose weights are the mean of those of `adapters`, which all count the same.

    A judge is not averaged: give the average one of its own (`training.judge`).

    Raises:
        ValueError: fewer than two; a backbone among them; other backbones, cameras or layers, or start weights
            that differ where none is given.
        FileNotFoundError: no such adapter, or its backbone is missing.
    """
    names, models = _load(adapters, bare=False)
    same("backbones", names, [model.encoder.name for model in models])
    same("approach weights", names, [model.approach_weight for model in models])
    if start_weight is None:
        same("start weights", names, [model.start_weight for model in models], "; give --start-weight")
    parts = [model.encoder.adapter_state() for model in models]
    same("layers", names, [config.target_modules for config, _ in parts])
    encoder = DualEncoder.from_pretrained(models[0].encoder.name)
    state = mean(parts, encoder.model.state_dict())
    config, rank = parts[0][0], sum(config.r for config, _ in parts)
    config.r = config.lora_alpha = rank
    config.modules_to_save = next((one.modules_to_save for one, _ in parts if one.modules_to_save), None)
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        save_file(state, Path(folder, ADAPTER_WEIGHTS))
        encoder.load_adapter(folder)
    encoder.merge_lora()
    facts: dict[str, Any] = {"objective": "warm", "preset": "", "seed": None, "averaged": names}
    facts["train_tasks"] = sorted({t for model in models for t in model.metadata.get("train_tasks", [])})
    weight = models[0].start_weight if start_weight is None else start_weight
    like = {name: getattr(models[0], name) for name in ("camera_spec", "crops", "approach_weight")}
    return RewardModel(encoder, **like, start_weight=weight, metadata=facts)


def average_backbones(backbones: Sequence[str | Path]) -> tuple[RewardModel, dict[str, Any]]:
    """The backbone whose weights are the mean of those of `backbones`, which all count the same, in bfloat16.

    Returns:
        It, and what `training.pretrain --start` needs beside it to go on from it.

    Raises:
        ValueError: fewer than two; an adapter among them; other sizes, sentences' pieces or crops.
        FileNotFoundError: no such backbone, or one that is not `training.pretrain`'s.
    """
    names, models = _load(backbones, bare=True)
    facts = [facts_of(locate(name)) for name in names]
    states = [model.encoder.model.state_dict() for model in models]
    same("sizes", names, [{key: tuple(value.shape) for key, value in state.items()} for state in states])
    same("pixels", names, [model.image_size for model in models])
    same("pieces of words", names, [model.encoder.tokenizer.get_vocab() for model in models])
    state = {key: torch.stack([one[key].float() for one in states]).mean(0) for key in states[0]}
    encoder = models[0].encoder
    encoder.model.load_state_dict(state)
    encoder.model.to(torch.bfloat16)
    tasks = sorted({task for fact in facts for task in fact["train_tasks"]})
    unseen = [task for task in facts[0]["stand_ins"] if task not in tasks]
    made = facts[0] | {"start": None, "averaged": names, "stand_ins": unseen, "train_tasks": tasks}
    return RewardModel(encoder, camera_spec=models[0].camera_spec, crops=models[0].crops), made


def _load(models: Sequence[str | Path], *, bare: bool) -> tuple[list[str], list[RewardModel]]:
    """Names and models of what is to be averaged: two or more of one kind, of the same cameras and crops."""
    names, kind = [str(model) for model in models], "backbone" if bare else "adapter"
    if len(names) < 2:
        raise ValueError(f"an average needs two {kind}s or more, got {', '.join(names) or 'none'}")
    loaded = [RewardModel.from_pretrained(name, dtype=torch.float32 if bare else None) for name in names]
    if several := [name for name, model in zip(names, loaded, strict=True) if isinstance(model, Ensemble)]:
        raise ValueError(
            f"{', '.join(several)} is an ensemble: average its members, one backbone's at a time"
        )
    if others := [n for n, model in zip(names, loaded, strict=True) if model.encoder.has_adapter == bare]:
        raise ValueError(f"{', '.join(others)} is no {kind}, and others here are")
    same("cameras", names, [model.camera_spec for model in loaded])
    same("crops", names, [model.crops for model in loaded])
    return names, loaded


def mean(
    parts: Sequence[tuple[LoraConfig, Mapping[str, Tensor]]], backbone: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """One adapter's weights, by PEFT's names, whose change to the backbone is the mean of theirs.

    Args:
        parts: settings and weights of each, as `DualEncoder.adapter_state` gives them.
        backbone: its weights, in the place of those that one adapter holds whole and another does not.

    Returns:
        Factors of LoRA for rank and alpha both the sum of the ranks, and the mean of what is held whole.
    """
    state = {}
    for name in dict.fromkeys(name for _, weights in parts for name in weights):
        if "lora_A" in name:
            state[name] = torch.cat([weights[name] for _, weights in parts])
        elif "lora_B" in name:
            shares = [config.lora_alpha / config.r / len(parts) for config, _ in parts]
            state[name] = torch.cat(
                [share * weights[name] for share, (_, weights) in zip(shares, parts, strict=True)], 1
            )
        else:
            own = backbone[name.removeprefix("base_model.model.")]
            state[name] = torch.stack([weights.get(name, own) for _, weights in parts]).mean(0)
    return state


def same(what: str, names: Sequence[str], values: Sequence[object], hint: str = "") -> None:
    """ValueError unless all have the same."""
    if any(value != values[0] for value in values):
        listed = ", ".join(f"{name} {str(value)[:80]}" for name, value in zip(names, values, strict=True))
        raise ValueError(
            f"these have different {what} ({listed}), so their weights have no average{hint or OTHERWISE}"
        )


def main() -> None:
    """Read the command line, average, and say where it is."""
    config = tyro.cli(AverageConfig, prog="python -m training.average", description=__doc__)
    kind = next((kind for name, kind in HELD.items() if (config.output / name).exists()), None)
    if kind and not config.overwrite:
        raise SystemExit(f"error: {config.output} holds {kind} already; --overwrite it, or take another")
    try:
        bare = bool(config.models) and (locate(config.models[0]) / "config.json").exists()
        if bare and config.start_weight is not None:
            raise ValueError("backbones have no start weight: leave --start-weight out")
        if bare:
            model, facts = average_backbones(config.models)
        else:
            model, facts = average(config.models, config.start_weight), None
        if config.overwrite:
            (config.output / "README.md").unlink(missing_ok=True)  # the card of what is replaced
        model.save_pretrained(config.output)
        if facts:
            with replacing(config.output / PRETRAINING) as fresh:
                fresh.write_text(json.dumps(facts, indent=1))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"average of {len(config.models)} {'backbones' if bare else 'adapters'}: {config.output}")


if __name__ == "__main__":
    main()
