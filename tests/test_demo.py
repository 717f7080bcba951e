"""The demo, on a tiny model: real rollouts, a picture and a film."""

import av
import numpy as np
import pytest
from PIL import Image

from eval import demo
from eval.demo import DemoConfig, curve, roll_out
from vlm_reward.cameras import CameraSpec


def test_demo_writes_a_picture_and_a_film(tiny_adapter_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "STEPS", 24)
    demo.main(DemoConfig(str(tiny_adapter_dir), "drawer-close-v3", "push the drawer", tmp_path))
    said = capsys.readouterr().out
    assert 'drawer-close-v3 (a training task) with "push the drawer"' in said
    assert "VOC of the expert (chance 0)" in said
    assert np.asarray(Image.open(tmp_path / "drawer-close-v3.png").convert("RGB")).std() > 10
    with av.open(str(tmp_path / "drawer-close-v3.mp4")) as film:
        stream = film.streams.video[0]
        assert (stream.width, stream.height) == (512, 512)
        assert sum(1 for _ in film.decode(stream)) == 39  # 3 x 25 frames, every second one
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".mp4", ".png"]


def test_rollouts_are_the_seeds():
    spec = CameraSpec(("corner",), 32, 32)
    first, rewards = roll_out("drawer-close-v3", "mixed", 3, spec)
    again, _ = roll_out("drawer-close-v3", "mixed", 3, spec)
    assert first.shape == (len(rewards) + 1, 1, 32, 32, 3)
    assert np.array_equal(first, again)


def test_curve_shares_its_range():
    scores = {"a": np.array([[0.0], [1.0]]), "b": np.array([[0.5], [0.5]])}
    assert curve(scores, "a") == "▁█"
    assert curve(scores, "b") in ("▅▅", "▄▄")


def test_an_unknown_checkpoint_says_so(tmp_path):
    with pytest.raises((ValueError, OSError), match="no-such-model"):
        demo.main(DemoConfig("no-such-model", out=tmp_path))
