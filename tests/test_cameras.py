"""Frames: upright, the right cameras, the right profile; real rendering."""

import os
import subprocess
import sys

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch

from vlm_reward.cameras import (
    DEFAULT_CAMERAS,
    WORKSPACE,
    CameraRig,
    CameraSpec,
    Crop,
    cut,
    project,
    projections,
)
from vlm_reward.envs import MetaWorldTask, expert_policy, make_env


@pytest.fixture(scope="module")
def env():
    env = make_env("drawer-open-v3")
    env.reset(seed=0)
    yield env
    env.close()


def test_shape_and_dtype(env):
    with CameraRig(env, CameraSpec(("corner", "topview"), height=60, width=80)) as rig:
        frames = rig.render()
    assert frames.shape == (2, 60, 80, 3)
    assert frames.dtype == np.uint8


def test_golden_frames(env):
    """Mean colours of the quarters of each default view, written down once after looking at the pictures."""
    with CameraRig(env) as rig:
        frames = rig.render()
    assert frames.shape == (3, 224, 224, 3)
    quarters = frames.reshape(3, 2, 112, 2, 112, 3).mean((2, 4)).round().astype(int)
    assert np.abs(quarters - GOLDEN).max() <= 3, repr(quarters)


@pytest.mark.parametrize("camera", ["corner", "corner2", "corner3", "corner4"])
def test_rolled_cameras_are_turned_and_not_mirrored(env, camera):
    """Meta-World rolls these by 180 degrees: MuJoCo's own picture, turned, is ours; flipped alone it is not."""
    renderer = mujoco.Renderer(env.unwrapped.model, 64, 64)
    renderer.update_scene(env.unwrapped.data, camera=camera)
    plain = renderer.render().astype(int)
    renderer.close()
    with CameraRig(env, CameraSpec((camera,), 64, 64, "full")) as rig:
        frame = rig.render()[0]
    assert np.abs(plain[::-1, ::-1] - frame).mean() < 1
    assert np.abs(plain[::-1] - frame).mean() > 10
    assert np.abs(plain - frame).mean() > 10


@pytest.mark.parametrize("camera", ["topview", "behindGripper", "gripperPOV"])
def test_other_cameras_are_left_as_they_are(env, camera):
    renderer = mujoco.Renderer(env.unwrapped.model, 64, 64)
    renderer.update_scene(env.unwrapped.data, camera=camera)
    plain = renderer.render()
    renderer.close()
    with CameraRig(env, CameraSpec((camera,), 64, 64, "full")) as rig:
        assert np.array_equal(rig.render()[0], plain)


def test_profiles_differ_in_shadows_alone(env):
    with CameraRig(env, CameraSpec(("corner",), 96, 96, "fast")) as fast:
        plain = fast.render().astype(float)
    with CameraRig(env, CameraSpec(("corner",), 96, 96, "full")) as full:
        shaded = full.render().astype(float)
    difference = np.abs(plain - shaded).mean()
    assert 0.5 < difference < 40
    assert env.unwrapped.model.vis.quality.offsamples == 4  # the model is left as it was


def test_some_views_are_those_of_all(env):
    with CameraRig(env, CameraSpec(height=48, width=48)) as rig:
        assert np.array_equal(rig.render_views([2, 0]), rig.render()[[2, 0]])


def test_each_view_is_cut_to_its_own_part():
    frames = np.zeros((2, 2, 8, 8, 3), np.uint8)
    frames[..., 0], frames[..., 1] = (
        np.arange(8)[:, None],
        np.arange(8),
    )  # red tells the row, green the column
    crops = Crop(0.25, 0.125, 0.5), Crop(0.5, 0.0, 0.5)
    parts = cut(frames, crops)
    assert parts.shape == (2, 2, 4, 4, 3)
    assert parts[1, 0, :, 0, 0].tolist() == [1, 2, 3, 4]
    assert parts[1, 0, 0, :, 1].tolist() == [2, 3, 4, 5]
    assert parts[0, 1, :, 0, 0].tolist() == [0, 1, 2, 3]
    assert parts[0, 1, 0, :, 1].tolist() == [4, 5, 6, 7]
    assert np.array_equal(cut(torch.from_numpy(frames), crops).numpy(), parts)
    assert np.array_equal(cut(frames[0], crops), parts[0])
    with pytest.raises(ValueError, match="frames have 2 views, there are crops of 1"):
        cut(frames, crops[:1])


def test_projections_of_a_camera_by_hand():
    env = make_env("reach-v3")
    env.reset(seed=0)
    model, data = env.unwrapped.model, env.unwrapped.data
    view = data.camera("corner")
    right, up, back = view.xmat.reshape(3, 3).T
    half = 2 * np.tan(np.deg2rad(model.camera("corner").fovy[0]) / 2)  # of what is seen in two metres
    ahead = view.xpos - 2 * back
    points = np.stack([ahead, ahead - half * right, ahead - half / 2 * up, view.xpos + back])
    (whole,) = projections(model, data, ["corner"])  # Meta-World has it upside down: right is left
    np.testing.assert_allclose(project(points, whole), [(0, 0), (1, 0), (0, 0.5), (np.nan,) * 2], atol=1e-9)
    (part,) = projections(model, data, ["corner"], {"corner": Crop(0.5, 0.25, 0.5)})
    np.testing.assert_allclose(
        project(points[:3], part), [(-1, 0), (1, 0), (-1, 1)], atol=1e-9
    )  # its left edge is the image's middle
    env.close()


def test_hands_and_objects_are_in_the_workspace_of_each_camera():
    rng, places = np.random.default_rng(0), {camera: [] for camera in WORKSPACE}
    for task in ("door-close-v3", "hammer-v3", "push-v3", "coffee-pull-v3", "window-open-v3", "sweep-v3"):
        env, policy = MetaWorldTask(task, 0), expert_policy(task)
        observation, _ = env.reset()
        for _ in range(100):
            observation, *_ = env.step(policy(observation) + rng.normal(0, 0.5, 4))
            points = np.stack([env.metaworld.tcp_center, observation[4:7]])
            seen = projections(env.model, env.data, [*WORKSPACE], WORKSPACE)
            for camera, projection in zip(WORKSPACE, seen, strict=True):
                places[camera].append(project(points, projection))
        env.close()
    for camera, found in places.items():
        inside = (np.abs(np.concatenate(found)) <= 1).all(1).mean()
        assert inside > 0.97, camera


def test_any_gymnasium_mujoco_environment():
    env = gym.make("InvertedPendulum-v5")
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"no camera named corner, corner4, .*; it has none: give frames_fn"):
        CameraRig(env)
    ant = gym.make("Ant-v5")
    ant.reset(seed=0)
    with pytest.raises(ValueError, match=r"it has track: give cameras=\('track',\), say"):
        CameraRig(ant)
    with CameraRig(ant, CameraSpec(("track",), 64, 64)) as rig:
        assert rig.render().std() > 5
    env.close()
    ant.close()


def test_not_a_mujoco_environment():
    with pytest.raises(TypeError, match="CameraRig needs a MuJoCo environment"):
        CameraRig(gym.make("CartPole-v1"))


def test_closed_rig_says_so(env):
    rig = CameraRig(env, CameraSpec(("corner",), 32, 32))
    rig.close()
    rig.close()
    with pytest.raises(RuntimeError, match="this CameraRig is closed"):
        rig.render()


def test_specs():
    spec = CameraSpec()
    assert spec.cameras == DEFAULT_CAMERAS
    assert CameraSpec.from_dict(spec.to_dict()) == spec
    assert spec.mismatch(CameraSpec()) == ""
    assert spec.mismatch(CameraSpec(("corner",), 112, 224, "full")) == (
        "cameras: ['corner', 'corner4', 'corner3'] against ['corner']; height: 224 against 112; "
        "profile: fast against full"
    )
    for bad, message in (
        ({"cameras": ()}, "at least one camera"),
        ({"cameras": ("a", "a")}, "cameras must differ"),
        ({"height": 0}, "positive size, got 0 x 224"),
        ({"profile": "pretty"}, "unknown render profile 'pretty'"),
    ):
        with pytest.raises(ValueError, match=message):
            CameraSpec(**bad)
    with pytest.raises(ValueError, match="camera spec needs the fields"):
        CameraSpec.from_dict({"cameras": ["corner"]})


def _run(code: str, **env: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean | env, timeout=60
    )


def test_backend_is_picked_and_an_explicit_one_wins():
    ask = "import os, vlm_reward; print(os.environ['MUJOCO_GL'])"
    assert _run(ask).stdout.strip() in ("egl", "osmesa")
    assert _run(ask, MUJOCO_GL="osmesa").stdout.strip() == "osmesa"


def test_importing_mujoco_first_is_no_trap():
    code = (
        "import warnings; warnings.simplefilter('ignore'); import mujoco\n"
        "from vlm_reward.envs import make_env\n"
        "env = make_env('reach-v3', 0); env.reset(); print(env.render().shape)"
    )
    ran = _run(code)
    assert ran.stdout.strip() == "(224, 224, 3)", ran.stderr


def test_no_renderer_says_what_to_install(env, monkeypatch):
    def broken(*_: object) -> None:
        raise AttributeError("'NoneType' object has no attribute 'glGetError'")

    monkeypatch.setattr(mujoco, "Renderer", broken)
    with pytest.raises(RuntimeError, match=r"MuJoCo cannot render .*apt-get install -y libegl1 libosmesa6"):
        CameraRig(env, CameraSpec(("corner",), 32, 32))


GOLDEN = np.array(
    [  # view, row, column, RGB
        [[[126, 127, 121], [127, 89, 87]], [[106, 98, 88], [107, 87, 80]]],
        [[[128, 95, 92], [137, 134, 127]], [[103, 72, 66], [114, 99, 79]]],
        [[[129, 83, 76], [160, 163, 153]], [[98, 85, 81], [137, 123, 114]]],
    ]
)
