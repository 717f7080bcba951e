"""The three measurements run on tiny fakes and report what they should; the ratios' arithmetic is exact."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import eval.throughput
from eval.throughput import (
    BATCH,
    CPU,
    ENVIRONMENTS,
    Figure,
    ThroughputConfig,
    compare,
    main,
    noise,
    plain_image,
    plain_text,
    plain_training,
    rate,
    run_training,
    save,
    table,
    take_turns,
    write_fresh_adapter,
)
from vlm_reward.cameras import CameraSpec
from vlm_reward.encoder import DualEncoder
from vlm_reward.preprocess import preprocess
from vlm_reward.tasks import instruction


def config(tmp_path: Path, backbone: Path | str, **changes) -> ThroughputConfig:
    quick = {"seconds": 0, "turns": 1, "train_steps": 2, "out": tmp_path / "results" / "throughput.json"}
    return ThroughputConfig(backbone=str(backbone), **(quick | changes))


def test_turns_alternate_for_the_time_or_number_asked_for() -> None:
    order: list[str] = []
    clock = {"a": iter([10.0, 30.0, 20.0]), "b": iter([5.0, 5.0, 2.0])}
    ways = {name: lambda name=name: order.append(name) or {"x/s": next(clock[name])} for name in "ab"}
    rates = take_turns(ways, seconds=0, turns=3)
    assert order == ["a", "b", "a", "b", "a", "b"]
    np.testing.assert_array_equal(rates["a", "x/s"], [10, 30, 20])

    # Ratios of neighbouring turns are 2, 6, 10: their median is not the ratio of the medians (20 / 5).
    figure = compare("name", "x/s", rates, "a", "b", target=6.0)
    assert figure == Figure("name", "x/s", 20, 5, 6, 2, 10, None, 3, 6.0)

    order.clear()
    take_turns({"a": lambda: order.append("a") or {}}, seconds=0.05, turns=1)
    assert len(order) > 1


def test_rate_warms_up_once_and_counts_items_of_the_timed_calls() -> None:
    calls: list[int] = []
    measure = rate(lambda: calls.append(sum(range(1000))), items=12, unit="x/s", least=0.05)
    assert len(calls) == 1
    rates = measure()
    timed = len(calls) - 1
    assert timed > 10
    assert 0 < rates["x/s"] <= 12 * timed / 0.05
    # No thread but this one works here, so no more processor time is used than passes.
    assert rates[CPU] > 0.9 * rates["x/s"]


def test_table_says_which_targets_are_reached() -> None:
    common = {"fast": 90.0, "plain": 9.0, "low": 8.5, "high": 12.25, "cpu_ratio": 11.0, "turns": 3}
    text = table(
        [
            Figure(figure="render", unit="views/s", ratio=10.0, target=8.0, **common),
            Figure(figure="score", unit="frames/s", ratio=5.9, target=6.0, **common),
            Figure(figure="train/grouped", unit="images/s", ratio=4.0, target=None, **common),
        ]
    ).splitlines()
    assert re.split(r"\s{2,}", text[1]) == [
        *("render", "views/s", "90.0", "9.0", "10.0x", "8.5 and 12.2", "11.0x", "8x reached")
    ]
    assert text[2].endswith("6x missed")
    assert text[3].endswith("11.0x")


def test_fast_rendering_is_at_least_twice_as_fast(tmp_path: Path) -> None:
    result = main(config(tmp_path, "needs no backbone", figures=("render",), turns=2))
    (figure,) = result["figures"]
    assert (figure["figure"], figure["unit"], figure["target"]) == ("render", "views/s", 8.0)
    # Of processor time: the ratio of seconds hangs on what else the machine does.
    assert figure["cpu_ratio"] > 2
    assert 0 < figure["low"] <= figure["ratio"] <= figure["high"]


def test_steps_of_the_wrappers_are_measured(
    tmp_path: Path, tiny_backbone_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.throughput.ENVIRONMENTS", 2)
    result = main(config(tmp_path, tiny_backbone_dir, figures=("wrap", "vector")))
    figures = {figure["figure"]: figure for figure in result["figures"]}
    assert {name: figure["target"] for name, figure in figures.items()} == {
        "wrap": 0.9,
        "vector/one": 1.5,
        "vector/apart": 2.5,
    }
    # Of processor time, for both work in this process; much lower if frames were rendered or scored twice.
    assert 0.6 < figures["wrap"]["cpu_ratio"] < 1.6
    assert figures["vector/one"]["fast"] == figures["vector/apart"]["fast"] > 0


def test_score_and_train_are_measured_and_written(
    tmp_path: Path, tiny_backbone_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(tmp_path, tiny_backbone_dir, figures=("score", "train"))
    result = main(cfg)
    assert json.loads(cfg.out.read_text()) == result
    assert [file.name for file in cfg.out.parent.iterdir()] == ["throughput.json"]
    figures = {(figure["figure"], figure["unit"]): figure for figure in result["figures"]}
    assert {key: figure["target"] for key, figure in figures.items()} == {
        ("score", "frames/s"): 6.0,
        ("train/paper", "samples/s"): 3.0,
        ("train/paper", "images/s"): None,
        ("train/grouped", "samples/s"): None,
        ("train/grouped", "images/s"): None,
    }
    for figure in figures.values():
        assert figure["turns"] == 1
        assert figure["fast"] / figure["plain"] == pytest.approx(figure["ratio"])
        assert 0 < figure["low"] == figure["ratio"] == figure["high"] < math.inf
    # 8 trajectories x 8 frames are 64 images and 28 pairs of each: 3.5 pairs an image; the loop has 0.5.
    grouped = {unit: figures["train/grouped", unit] for unit in ("samples/s", "images/s")}
    assert grouped["samples/s"]["fast"] / grouped["images/s"]["fast"] == pytest.approx(3.5)
    assert grouped["samples/s"]["ratio"] / grouped["images/s"]["ratio"] == pytest.approx(7)
    assert figures["train/paper", "images/s"]["ratio"] <= figures["train/paper", "samples/s"]["ratio"]

    facts = result["facts"]
    assert (facts["score"]["environments"], facts["score"]["views"]) == (ENVIRONMENTS, 3)
    assert facts["score"]["largest_difference_of_scores"] < 0.02  # bfloat16; both ways score the same thing
    assert facts["train"]["paper"]["steps"] == facts["train"]["grouped"]["steps"] == 2
    assert result["hardware"]["threads"] == 1
    assert result["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", result["date"])
    out = capsys.readouterr().out
    assert "train/paper" in out
    assert str(cfg.out) in out


def test_plain_way_embeds_what_the_fast_way_does(tiny_adapter_dir: Path, tiny_backbone_dir: Path) -> None:
    from transformers import AutoImageProcessor

    encoder = DualEncoder.from_pretrained(tiny_backbone_dir)
    encoder.load_adapter(tiny_adapter_dir)
    processor = AutoImageProcessor.from_pretrained(tiny_backbone_dir, backend="pil")
    frame = noise(1, 1, 32)[0, 0]
    text = instruction("push-v3")
    with torch.inference_mode():
        image = F.normalize(plain_image(encoder, processor, frame), dim=-1)
        sentence = F.normalize(plain_text(encoder, text), dim=-1)
        pixels = preprocess(frame, size=32, mean=encoder.image_mean, std=encoder.image_std)
        torch.testing.assert_close(image, encoder.encode_images(pixels), atol=1e-5, rtol=0)
        torch.testing.assert_close(sentence, encoder.encode_text([text]), atol=1e-5, rtol=0)


def test_plain_training_learns_from_32_samples_a_step(tmp_path: Path, tiny_backbone_dir: Path) -> None:
    write_fresh_adapter(tiny_backbone_dir, tmp_path / "adapter")
    encoder = DualEncoder.from_pretrained(tiny_backbone_dir)
    encoder.load_adapter(tmp_path / "adapter", trainable=True)
    before = [parameter.detach().clone() for parameter in encoder.trainable_parameters()]
    forwards = {"vision_model": 0, "text_model": 0}
    for name, module in encoder.named_modules():
        if (tower := name.rpartition(".")[2]) in forwards:
            module.register_forward_hook(
                lambda *_, tower=tower: forwards.update({tower: forwards[tower] + 1})
            )
    step = plain_training(encoder, tiny_backbone_dir, ["push-v3", "reach-v3"], [noise(4, 2, 32)] * 2)
    step()
    assert forwards == {"vision_model": 2 * BATCH, "text_model": BATCH}
    after = encoder.trainable_parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in after)


def test_bad_input_is_refused_with_what_to_do(
    tmp_path: Path, tiny_backbone_dir: Path, make_tiny_encoder, tiny_adapter_dir: Path
) -> None:
    with pytest.raises(ValueError, match="figures"):
        config(tmp_path, tiny_backbone_dir, figures=())
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        config(tmp_path, tiny_backbone_dir, threads=0)
    with pytest.raises(ValueError, match="seconds"):
        config(tmp_path, tiny_backbone_dir, seconds=math.nan)
    with pytest.raises(FileNotFoundError, match="no model 'no such'"):
        main(config(tmp_path, "no such", figures=("score",)))
    with pytest.raises(ValueError, match="not an adapter"):
        main(config(tmp_path, tiny_backbone_dir, figures=("score",), adapter=str(tiny_backbone_dir)))
    make_tiny_encoder(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="belongs to"):
        main(config(tmp_path, tmp_path / "other", figures=("score",), adapter=str(tiny_adapter_dir)))
    assert not (tmp_path / "results").exists()


def test_training_that_fails_says_why(
    tmp_path: Path, tiny_backbone_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "train.py").write_text("raise SystemExit('error: the disk is full')")
    monkeypatch.setattr(eval.throughput, "ROOT", tmp_path)
    with pytest.raises(RuntimeError, match=r"(?s)--sampler paper.*the disk is full"):
        run_training(config(tmp_path, tiny_backbone_dir), tiny_backbone_dir, CameraSpec(), "paper", tmp_path)


def test_failed_write_leaves_the_last_result(tmp_path: Path) -> None:
    out = tmp_path / "throughput.json"
    save({"figures": []}, out)
    with pytest.raises(ValueError, match="JSON"):
        save({"figures": [math.nan]}, out)
    assert json.loads(out.read_text()) == {"figures": []}
    assert list(tmp_path.iterdir()) == [out]
