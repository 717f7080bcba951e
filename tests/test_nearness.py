"""The score that follows the hand in worlds that nobody saw: real worlds, real rendering."""

import re
import sys

import numpy as np
import pytest

from training import nearness as module
from training.nearness import Config, main, nearness, visit
from training.worlds import World
from vlm_reward.cameras import CameraRig, CameraSpec


def test_the_hand_goes_to_places_about_the_thing():
    world = World(np.random.default_rng(3), fewest=1)
    world.begin()
    before = world.moment()
    with CameraRig(world, CameraSpec(("corner", "corner3"), 24, 24)) as rig:
        frames, far = visit(world, rig, 0, 5, np.random.default_rng(0))
    assert (frames.shape, far.shape) == ((5, 2, 24, 24, 3), (5,))
    assert far[0] < 0.05  # the thing itself
    assert far.max() < module.FAR + 0.1
    assert len({frame.tobytes() for frame in frames}) == 5
    for was, now in zip(before, world.moment(), strict=True):
        np.testing.assert_array_equal(was, now)


class Told:
    """Scores by the true distance, or by nothing."""

    camera_spec = CameraSpec(("corner",), 16, 16)

    def __init__(self, far: list[np.ndarray], sign: float) -> None:
        self.far, self.sign = far, sign

    def score(self, frames, text, start):
        assert text.startswith("touch the ")
        assert start.shape == frames.shape[1:]
        return self.sign * self.far[-1][:, None]


@pytest.mark.parametrize(("sign", "correlation"), [(-1, 1), (1, -1)])
def test_correlation_and_the_best_place(sign, correlation, monkeypatch, capsys):
    far: list[np.ndarray] = []

    def seen(*arguments):
        frames, metres = visit(*arguments)
        far.append(metres)
        return frames, metres

    monkeypatch.setattr(module, "visit", seen)
    monkeypatch.setattr(module.RewardModel, "from_pretrained", lambda *_, **__: Told(far, sign))
    found = nearness(Config("x", worlds=2, places=4))
    np.testing.assert_allclose(found["all"]["correlation"], correlation)
    best = [metres.min() if sign < 0 else metres.max() for metres in far]
    np.testing.assert_allclose(found["all"]["metres"], best)
    monkeypatch.setattr(sys, "argv", ["nearness", "--checkpoint", "x", "--worlds", "1", "--places", "3"])
    main()
    assert f"rank correlation {100 * correlation:5.1f}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="1 world and 2 places at least, got 0 and 28"):
        Config("x", worlds=0)


def test_of_a_model_that_says_where_things_are_it_measures_how_far_off_that_is(monkeypatch, capsys):
    arguments = ["--checkpoint", "siglip2-tiny-soup/reach+finder", "--cameras", "corner", "corner3"]
    monkeypatch.setattr(
        sys, "argv", ["nearness", *arguments, "--worlds", "1", "--places", "2", "--seed", "7"]
    )
    main()
    told = re.findall(r"place off by ([\d.]+) cm", capsys.readouterr().out)
    assert told
    assert all(float(metres) < 40 for metres in told)  # a place drawn at random is off by half a metre
