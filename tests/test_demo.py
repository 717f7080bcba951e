"""The demo, on a tiny model: real rollouts, a picture and a film."""

import av
import numpy as np
import pytest
from PIL import Image

from vlm_reward import demo as module
from vlm_reward.__main__ import main
from vlm_reward.cameras import CameraSpec
from vlm_reward.demo import demo, roll_out


def test_demo_writes_a_picture_and_a_film(tiny_adapter_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 24)
    demo(str(tiny_adapter_dir), "drawer-close-v3", "push the drawer", out=tmp_path)
    said = capsys.readouterr().out
    assert 'drawer-close-v3 (a training task) with "push the drawer"' in said
    assert "VOC of the expert (chance 0)" in said
    (ordered,) = (line for line in said.splitlines() if "consistency, other two" in line)
    assert ("worse than by chance" in said) == (float(ordered.split()[-1]) < 50)
    assert np.asarray(Image.open(tmp_path / "drawer-close-v3.png").convert("RGB")).std() > 10
    with av.open(str(tmp_path / "drawer-close-v3.mp4")) as film:
        stream = film.streams.video[0]
        assert (stream.width, stream.height) == (512, 512)
        assert sum(1 for _ in film.decode(stream)) == 39  # 3 x 25 frames, every second one
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".mp4", ".png"]
    with pytest.raises(ValueError, match="text is empty"):
        demo(str(tiny_adapter_dir), "drawer-close-v3", "", out=tmp_path)


def test_rollouts_are_the_seeds():
    spec = CameraSpec(("corner",), 32, 32)
    first, rewards = roll_out("drawer-close-v3", "mixed", 3, spec)
    again, _ = roll_out("drawer-close-v3", "mixed", 3, spec)
    assert first.shape == (len(rewards) + 1, 1, 32, 32, 3)
    assert np.array_equal(first, again)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such-model"], "no model 'no-such-model'"),
        (["--task", "drawer-opn-v3"], "unknown Meta-World task 'drawer-opn-v3'; did you mean drawer-open-v3"),
    ],
)
def test_what_is_unknown_is_said(tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(["demo", *arguments, "--out", str(tmp_path / "demo")])
    assert not list(tmp_path.iterdir())
