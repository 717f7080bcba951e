"""The average of adapters is the mean of their weights, exactly, and is refused where it would mean nothing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.synthetic import SPEC
from training.average import average, average_backbones, main
from vlm_reward.encoder import ADAPTER_WEIGHTS, DualEncoder
from vlm_reward.reward_model import RewardModel


def make(folder: Path, backbone: Path, seed: int, start_weight: float = 0.5, **lora) -> str:
    """An adapter that changes every layer."""
    encoder = DualEncoder.from_pretrained(backbone)
    encoder.add_lora(**{"r": 2, "alpha": 8, "seed": seed, **lora})
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # B starts at 0
        for parameter in encoder.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    facts = {"objective": "triplet", "train_tasks": [f"task-{seed}"]}
    RewardModel(encoder, camera_spec=SPEC, start_weight=start_weight, metadata=facts).save_pretrained(folder)
    return str(folder)


def test_weights_are_the_mean_whatever_rank_scale_and_head(tiny_backbone_dir, tmp_path):
    names = [
        make(tmp_path / "one", tiny_backbone_dir, 1),
        make(tmp_path / "two", tiny_backbone_dir, 2, r=3, alpha=3),
        make(tmp_path / "three", tiny_backbone_dir, 3, head=True),
    ]
    average(names).save_pretrained(tmp_path / "mean")
    exact = {"dtype": torch.float32}  # where bfloat16 is in hardware, merged weights are rounded to it
    found = RewardModel.from_pretrained(tmp_path / "mean", **exact)
    theirs = [RewardModel.from_pretrained(name, **exact).encoder.model.state_dict() for name in names]
    for name, weight in found.encoder.model.state_dict().items():
        torch.testing.assert_close(
            weight, sum(each[name] for each in theirs) / 3, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not torch.equal(
        theirs[0]["vision_model.head.attention.in_proj_weight"],
        theirs[2]["vision_model.head.attention.in_proj_weight"],
    )
    assert {len(w) for n, w in load_file(tmp_path / "mean" / ADAPTER_WEIGHTS).items() if "lora_A" in n} == {7}
    assert found.start_weight == 0.5
    assert found.metadata["averaged"] == names
    assert found.metadata["train_tasks"] == ["task-1", "task-2", "task-3"]
    assert "The mean of the weights of" in (tmp_path / "mean" / "README.md").read_text()


def test_what_has_no_average(tiny_backbone_dir, tmp_path):
    one = make(tmp_path / "one", tiny_backbone_dir, 1)
    with pytest.raises(ValueError, match=r"needs two adapters or more, got .*one"):
        average([one])
    with pytest.raises(ValueError, match="tiny is no adapter, and others here are"):
        average([one, tiny_backbone_dir])
    other = make(tmp_path / "other", tiny_backbone_dir, 2, start_weight=0.75)
    with pytest.raises(
        ValueError, match=r"different start weights \(.*one 0.5, .*other 0.75\).*--start-weight"
    ):
        average([one, other])
    assert average([one, other], 0.6).start_weight == 0.6
    asked = RewardModel.from_pretrained(one).with_approach_weight(0.5)
    asked.save_pretrained(tmp_path / "asked")
    with pytest.raises(ValueError, match=r"different approach weights \(.*one 0.0, .*asked 0.5\)"):
        average([one, tmp_path / "asked"])
    assert average([tmp_path / "asked", tmp_path / "asked"]).approach_weight == 0.5
    mlp = make(tmp_path / "mlp", tiny_backbone_dir, 3, targets=("mlp",))
    with pytest.raises(ValueError, match="different layers"):
        average([one, mlp])
    model = RewardModel.from_pretrained(one)
    RewardModel(model.encoder, start_weight=0.5).save_pretrained(tmp_path / "any")
    with pytest.raises(ValueError, match="different cameras"):
        average([one, tmp_path / "any"])


def test_the_command_keeps_what_is_there(tiny_backbone_dir, tmp_path, monkeypatch, capsys):
    names = [make(tmp_path / name, tiny_backbone_dir, seed) for seed, name in enumerate(("one", "two"))]
    words = ["average", *names, "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", words)
    main()
    assert "average of 2 adapters" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds an adapter already; --overwrite"):
        main()
    monkeypatch.setattr("sys.argv", [*words, "--overwrite"])
    main()


def backbone(folder: Path, of: Path, seed: int, tasks: list[str], **changed) -> str:
    """A backbone of `training.pretrain`, to whose weights noise was added."""
    encoder = DualEncoder.from_pretrained(of)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    RewardModel(encoder, camera_spec=SPEC, **changed).save_pretrained(folder)
    facts = {"start": "other", "width": 8, "stand_ins": ["task-2"], "train_tasks": tasks}
    (folder / "pretraining.json").write_text(json.dumps(facts))
    return str(folder)


def test_backbones_average_to_a_backbone(tiny_backbone_dir, tmp_path, monkeypatch, capsys):
    names = [backbone(tmp_path / f"b{seed}", tiny_backbone_dir, seed, [f"task-{seed}"]) for seed in range(3)]
    words = ["average", *names, "--output", str(tmp_path / "soup")]
    monkeypatch.setattr("sys.argv", words)
    main()
    assert "average of 3 backbones" in capsys.readouterr().out
    theirs = [load_file(Path(name, "model.safetensors")) for name in names]
    for key, weight in load_file(tmp_path / "soup" / "model.safetensors").items():
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(
            weight.float(), sum(each[key].float() for each in theirs) / 3, atol=2e-3, rtol=1e-2
        )
    found = RewardModel.from_pretrained(tmp_path / "soup")
    assert not found.encoder.has_adapter
    assert found.camera_spec == SPEC
    facts = json.loads((tmp_path / "soup" / "pretraining.json").read_text())
    assert facts["averaged"] == names
    assert facts["train_tasks"] == ["task-0", "task-1", "task-2"]
    assert facts["stand_ins"] == []  # one of them has learned from it
    assert facts["width"] == 8
    with pytest.raises(SystemExit, match="holds a backbone already; --overwrite"):
        main()
    monkeypatch.setattr("sys.argv", [*words, "--start-weight", "0.5"])
    with pytest.raises(SystemExit, match="a backbone already"):
        main()
    monkeypatch.setattr("sys.argv", [*words, "--start-weight", "0.5", "--overwrite"])
    with pytest.raises(SystemExit, match="backbones have no start weight"):
        main()


def test_backbones_without_an_average(tiny_backbone_dir, tmp_path):
    one = backbone(tmp_path / "one", tiny_backbone_dir, 1, ["task-1"])
    with pytest.raises(ValueError, match="needs two backbones or more"):
        average_backbones([one])
    adapter = make(tmp_path / "adapter", tiny_backbone_dir, 1)
    with pytest.raises(ValueError, match="adapter is no backbone, and others here are"):
        average_backbones([one, adapter])
    foreign = Path(backbone(tmp_path / "foreign", tiny_backbone_dir, 2, []))
    (foreign / "pretraining.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no backbone of training.pretrain: it has no pretraining"):
        average_backbones([one, foreign])
    crops = dict.fromkeys(SPEC.cameras, (0.25, 0.25, 0.5))
    parts = backbone(tmp_path / "parts", tiny_backbone_dir, 2, ["task-1"], crops=crops)
    with pytest.raises(ValueError, match="different crops"):
        average_backbones([one, parts])
