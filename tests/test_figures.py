from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from eval import figures
from vlm_reward import curves
from vlm_reward.cameras import CameraSpec
from vlm_reward.frame_cache import EpisodeInfo, FrameCache

BLUE = np.array([0x00, 0x72, 0xB2])  # the first curve
CURVES = {"expert": np.linspace(0, 1, 20), "failed": np.full(30, 0.2), "random": np.zeros(30)}


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def count(image, color):
    return int((np.abs(image.astype(int) - color).max(axis=-1) <= 3).sum())


def test_normalise_is_min_max_over_all_curves_together():
    both = figures.normalise({"a": np.array([2.0, 4.0]), "b": np.array([1.0, 5.0])})
    assert {label: curve.tolist() for label, curve in both.items()} == {"a": [0.25, 0.75], "b": [0, 1]}
    assert figures.normalise({"a": np.full(3, 7.0)})["a"].tolist() == [0, 0, 0]


def test_frames_lie_over_the_curves(tmp_path):
    path = tmp_path / "new" / "strip.png"
    frames = np.zeros((4, 16, 16, 3), np.uint8)
    frames[:] = (200, 30, 180)
    curves.frames_over_curves(frames, [0, 6, 12, 19], CURVES, path, title="open the green drawer")
    image = pixels(path)
    assert image.shape[1] == 1350  # 9 inches at 150 dpi
    found = np.abs(image.astype(int) - (200, 30, 180)).max(axis=-1) <= 1
    upper, lower = np.split(found, [image.shape[0] // 2])
    assert upper.sum() > 100_000  # four frames of some 300 x 300
    assert not lower.any()
    assert count(image[image.shape[0] // 2 :], BLUE) > 500
    assert not list(path.parent.glob(".*.tmp"))


def test_one_strip_for_each_of_several_trajectories(tmp_path):
    colors = {"expert": (200, 30, 180), "random": (20, 220, 40)}
    frames = {label: np.full((3, 16, 16, 3), color, np.uint8) for label, color in colors.items()}
    times = {"expert": [0, 9, 19], "random": [0, 15, 29]}
    curves.frames_over_curves(frames, times, CURVES, tmp_path / "strips.png")
    image = pixels(tmp_path / "strips.png")
    rows = {}
    for label, color in colors.items():
        found = np.abs(image.astype(int) - color).max(axis=-1) <= 1
        rows[label] = np.flatnonzero(found.any(axis=1))
    assert rows["expert"].max() < rows["random"].min()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": np.zeros((2, 8, 8, 3))}, r"uint8 \[K, H, W, 3\], got float64 \(2, 8, 8, 3\)"),
        ({"frames": np.zeros((0, 8, 8, 3), np.uint8)}, r"uint8 \[K, H, W, 3\]"),
        ({"times": [0]}, r"'expert' needs 2 times from 0 to 19, got \[0\]"),
        ({"times": [0, 20]}, r"from 0 to 19, got \[0, 20\]"),
        ({"frames": {"other": np.zeros((2, 8, 8, 3), np.uint8)}}, "'other' have no curve"),
    ],
)
def test_bad_strips_are_refused(tmp_path, changes, message):
    good = {"frames": np.zeros((2, 8, 8, 3), np.uint8), "times": [0, 5], "curves": CURVES}
    with pytest.raises(ValueError, match=message):
        curves.frames_over_curves(**(good | changes), path=tmp_path / "strip.png")
    assert not list(tmp_path.iterdir())


def test_a_curve_in_text_is_drawn_in_the_range_that_is_given():
    assert curves.blocks(np.array([0.0, 1.0]), 0, 1) == "▁█"
    assert curves.blocks(np.array([0.5, 0.5]), 0, 1) in ("▅▅", "▄▄")
    assert curves.blocks(np.zeros(3), 0, 0) == "▁▁▁"
    assert len(curves.blocks(np.arange(1000.0), 0, 999)) == 60


def test_curves_of_every_tenth_frame_are_drawn_where_the_frames_are():
    ax = Figure().add_subplot()
    curves.draw(ax, {"a": np.array([1.0, 2.0, 3.0])}, every=10)
    assert ax.lines[0].get_xydata().tolist() == [[0, 1], [10, 2], [20, 3]]


def test_reward_curves_draw_each_checkpoint_and_view(tmp_path):
    scores = {label: np.stack([curve] * 3, axis=1) for label, curve in CURVES.items()}
    for n in (1, 2):
        checkpoints = {f"checkpoint-{i}": scores for i in range(n)}
        figures.reward_curves(
            checkpoints, ("corner", "corner4"), tmp_path / f"{n}.png", title="drawer-open-v3"
        )
    one, two = pixels(tmp_path / "1.png"), pixels(tmp_path / "2.png")
    assert one.shape[1] == two.shape[1] == round(2.6 * 3 * 150)
    assert two.shape[0] - one.shape[0] == 300
    for column in np.split(one[:, : one.shape[1] // 3 * 3], 3, axis=1):
        assert count(column, BLUE) > 100


def test_trajectories_are_the_first_expert_failed_and_random_of_the_task():
    def cache(*episodes):
        infos = tuple(
            EpisodeInfo(4 * i, 4, task, "text", kind, i, success)
            for i, (task, kind, success) in enumerate(episodes)
        )
        empty = np.zeros(0)
        spec = CameraSpec(cameras=("a",))
        return FrameCache(empty, empty, empty, empty, infos, spec, "test/set-v0", figures.Path())

    expert = cache(("b", "expert", True), ("a", "expert", True))
    rollouts = cache(
        ("a", "noisy", True), ("b", "noisy", False), ("a", "random", False), ("a", "mixed", False)
    )
    found = figures.trajectories(expert, rollouts, "a")
    assert [(label, info.seed) for label, _, info in found] == [("expert", 1), ("failed", 3), ("random", 2)]
    without = replace(rollouts, episodes=rollouts.episodes[:3])
    with pytest.raises(ValueError, match="test/set-v0 has no failed trajectory of 'a'"):
        figures.trajectories(expert, without, "a")
