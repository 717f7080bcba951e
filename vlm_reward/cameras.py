# mujoco ships no type stubs
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
"""Frames from the cameras of any Gymnasium MuJoCo environment: upright uint8 [V, H, W, 3]."""

import atexit
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import gymnasium as gym
import mujoco
import numpy as np
import torch

from vlm_reward._rendering import INSTALL_HINT

DEFAULT_CAMERAS: tuple[str, ...] = ("corner", "corner4", "corner3")
DEFAULT_SIZE = 224

Profile = Literal["fast", "full", "recorded"]


class Crop(NamedTuple):
    """The square part of a camera's image that a model looks at, in shares of its width and height."""

    left: float
    top: float
    side: float


WORKSPACE = {
    "corner": Crop(8 / 32, 6 / 32, 16 / 32),
    "corner4": Crop(10 / 32, 9 / 32, 16 / 32),
    "corner3": Crop(8 / 32, 3 / 32, 16 / 32),
}
"""The part of Meta-World's images where hands and objects are, by camera: a quarter of the image, so that a model
sees it twice as large. It holds over 97 % of the places of hands and objects in noisy experts' rollouts of the
training tasks (`tests/test_cameras.py`)."""


def named_crops(crops: Mapping[str, Sequence[float]] | None) -> dict[str, Crop] | None:
    """Crops by camera, of what JSON made of them; None for whole images."""
    return None if crops is None else {name: Crop(*crop) for name, crop in crops.items()}


def cut(frames: Any, crops: Sequence[Crop]) -> Any:
    """The part of each view's image that a model looks at.

    Args:
        frames: uint8 [..., V, H, W, 3], array or tensor.
        crops: one of each of the V views, of one and the same side.

    Returns:
        uint8 [..., V, side * H, side * W, 3], rounded to whole pixels, of the type that was given.

    Raises:
        ValueError: another number of views than crops.
    """
    *_, views, height, width, _ = frames.shape
    if views != len(crops):
        raise ValueError(f"frames have {views} views, there are crops of {len(crops)}")
    parts = []
    for view, (left, top, side) in enumerate(crops):
        y, x = round(top * height), round(left * width)
        parts.append(frames[..., view, y : y + round(side * height), x : x + round(side * width), :])
    stack: Any = np.stack if isinstance(frames, np.ndarray) else torch.stack
    return stack(parts, -4)


@dataclass(frozen=True)
class CameraSpec:
    """What frames look like. Stored with each dataset and checkpoint, so that a mismatch is refused.

    Args:
        cameras: names of the model's cameras, in the order of the view axis V.
        height: pixels, > 0.
        width: pixels, > 0.
        profile: `fast` renders without shadows, reflections and multisampling (about 10x the rate of
            software rendering with them), `full` with MuJoCo's own settings; `recorded` are frames that came
            from elsewhere, such as real cameras.
    """

    cameras: tuple[str, ...] = DEFAULT_CAMERAS
    height: int = DEFAULT_SIZE
    width: int = DEFAULT_SIZE
    profile: str = "fast"

    def __post_init__(self) -> None:
        if isinstance(self.cameras, str):
            raise TypeError(
                f"cameras are a tuple of names, such as ({self.cameras!r},); got {self.cameras!r}"
            )
        object.__setattr__(self, "cameras", tuple(self.cameras))
        if not self.cameras:
            raise ValueError("a CameraSpec needs at least one camera name, got none")
        if len(set(self.cameras)) < len(self.cameras):
            raise ValueError(f"cameras must differ, got {self.cameras}")
        if self.height <= 0 or self.width <= 0:
            raise ValueError(f"frames need a positive size, got {self.height} x {self.width}")
        if self.profile not in get_args(Profile):
            raise ValueError(f"unknown render profile {self.profile!r}; choose one of {get_args(Profile)}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self) | {"cameras": list(self.cameras)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "CameraSpec":
        """The inverse of `to_dict`; ValueError names missing or unknown fields."""
        known = set(cls.__dataclass_fields__)
        if set(fields) != known:
            raise ValueError(f"camera spec needs the fields {sorted(known)}, got {sorted(fields)}")
        return cls(**fields)

    def mismatch(self, other: "CameraSpec") -> str:
        """Which fields differ, as text; empty when the two specs give the same frames."""
        mine, theirs = self.to_dict(), other.to_dict()
        return "; ".join(
            f"{key}: {mine[key]} against {theirs[key]}" for key in mine if mine[key] != theirs[key]
        )


def projections(
    model: mujoco.MjModel,
    data: mujoco.MjData,
    cameras: Sequence[str],
    crops: Mapping[str, Crop] | None = None,
) -> np.ndarray:
    """What takes a point of the world to where it is in the upright image of each camera, or in a crop of it.

    Args:
        model: with the cameras.
        data: after `mj_forward`.
        cameras: V names.
        crops: by camera; None for whole images.

    Returns:
        float64 [V, 3, 4]: of a point (x, y, z) in metres, P @ (x, y, z, 1) is (u w, v w, w), with u to the right
        and v up, both in [-1, 1] in the image, and w above 0 before the camera, its depth in metres (Hartley and
        Zisserman, "Multiple View Geometry in Computer Vision", chapter 6).
    """
    matrices = []
    for name in cameras:
        view = data.camera(name)
        turn = view.xmat.reshape(3, 3).T * np.array((1, 1, -1))[:, None]  # right, up, ahead
        if view.xmat.reshape(3, 3)[2, 1] < -0.1:  # as CameraRig turns it upright
            turn[:2] *= -1
        turn[:2] /= np.tan(np.deg2rad(model.camera(name).fovy[0]) / 2)
        left, top, side = (crops or {}).get(name, Crop(0, 0, 1))
        turn[:2] -= np.outer((2 * left + side - 1, 1 - 2 * top - side), turn[2])
        turn[:2] /= side
        matrices.append(np.hstack([turn, -turn @ view.xpos[:, None]]))
    return np.stack(matrices)


def project(points: np.ndarray, projection: np.ndarray) -> np.ndarray:
    """Points of the world [P, 3] -> where they are in an image, [P, 2] in [-1, 1] (right, up); NaN if behind.

    Args:
        points: metres.
        projection: [3, 4], one of `projections`.
    """
    seen = points @ projection[:, :3].T + projection[:, 3]
    depth = seen[:, 2:]
    return np.where(depth > 0.01, seen[:, :2] / np.maximum(depth, 0.01), np.nan)


class CameraRig:
    """Renders all views of a `CameraSpec` with one renderer.

    Cameras whose image is upside down in the world (Meta-World rolls its `corner*` cameras by 180 degrees)
    are turned upright.

    Args:
        env: a Gymnasium environment whose `unwrapped` has MuJoCo's `model` and `data`.
        spec: which cameras, which size, which profile.

    Raises:
        TypeError: the environment is not a MuJoCo one.
        ValueError: a camera is not in the model (MuJoCo itself would silently show the free camera), or the
            frames are `recorded` ones.
        RuntimeError: no rendering backend works; the message says what to install.
    """

    def __init__(self, env: gym.Env, spec: CameraSpec | None = None) -> None:
        self.spec = spec = spec or CameraSpec()
        if spec.profile == "recorded":
            raise ValueError(
                f"frames of {', '.join(spec.cameras)} were recorded elsewhere, MuJoCo cannot render them: give "
                "frames_fn"
            )
        self._env: Any = env.unwrapped
        model = getattr(self._env, "model", None)
        if not isinstance(model, mujoco.MjModel):
            raise TypeError(f"CameraRig needs a MuJoCo environment (with .model and .data), got {env}")
        known = [model.camera(i).name for i in range(model.ncam)]
        missing = [name for name in spec.cameras if name not in known]
        if missing:
            raise ValueError(
                f"no camera named {', '.join(missing)} in {env}; it has {', '.join(known) or 'none'}: "
                + (f"give cameras=({known[0]!r},), say" if known else "give frames_fn")
            )
        # The size of the off-screen buffer and its samples are read when the renderer is made.
        buffer = model.vis.global_
        buffer.offwidth, buffer.offheight = (
            max(buffer.offwidth, spec.width),
            max(buffer.offheight, spec.height),
        )
        samples = model.vis.quality.offsamples
        if spec.profile == "fast":
            model.vis.quality.offsamples = 0
        try:
            self._renderer = mujoco.Renderer(model, spec.height, spec.width)
        except Exception as error:  # mujoco raises whatever its backend does, AttributeError among others
            raise RuntimeError(f"MuJoCo cannot render ({error}): {INSTALL_HINT}") from error
        finally:
            model.vis.quality.offsamples = samples
        if spec.profile == "fast":
            self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
            self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        _OPEN.add(self)
        # Exit handlers run last in, first out: ours has to come before EGL's own, which making a first
        # renderer registers, or freeing the context fails with a traceback.
        atexit.unregister(_close_all)
        atexit.register(_close_all)

    def render(self) -> np.ndarray:
        """The current state seen by each camera: uint8 [V, H, W, 3], upright."""
        return self.render_views(range(len(self.spec.cameras)))

    def render_views(self, views: Sequence[int] | np.ndarray) -> np.ndarray:
        """Some of the cameras, by their index in the spec: uint8 [len(views), H, W, 3], upright."""
        if self not in _OPEN:
            raise RuntimeError("this CameraRig is closed; make a new one")
        data = self._env.data
        frames = np.empty((len(views), self.spec.height, self.spec.width, 3), np.uint8)
        for view, name in enumerate(self.spec.cameras[i] for i in views):
            self._renderer.update_scene(data, camera=name)
            frame = self._renderer.render()
            up = data.camera(name).xmat.reshape(3, 3)[2, 1]  # z of the image's upward axis
            frames[view] = frame[::-1, ::-1] if up < -0.1 else frame
        return frames

    def close(self) -> None:
        """Free the GL context (130-250 MB). Safe to call twice."""
        if self in _OPEN:
            _OPEN.discard(self)
            self._renderer.close()

    def __enter__(self) -> "CameraRig":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_OPEN: weakref.WeakSet[CameraRig] = weakref.WeakSet()


def _close_all() -> None:
    for rig in list(_OPEN):
        rig.close()
