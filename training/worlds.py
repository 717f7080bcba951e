# mujoco ships no type stubs
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
"""Scenes that no task has: several things on Meta-World's table, built anew for each, with what is true of each.

    python -m training.worlds --output out/worlds --crop
    python -m training.pretrain --start siglip2-tiny-zoom --scenes out/near out/worlds --group 16

The training tasks show some twenty things, one at a time, so what a noun means there need not be read: it is the
one thing. Here a *world* has two or three things (`--fewest 1`: one, too) of eight families (what is pushed in,
slides, swings, turns, or just lies there), of drawn shapes, sizes, colours and names, beside the mark of a goal.
The hand goes from one to the other whatever their states, with `--far` oftener to where nothing is, and sentences
about each order the same pictures: "the gripper is near the red lever", "the cupboard is open", "shut the blue
chest". None asks for what a held-out task asks for (`training.language.is_held_out`), and no world has a model
of a held-out task. They stand beside the shards of `training.scenes` and are read with them.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import metaworld
import mujoco
import numpy as np
import tyro

from training.captions import PALETTE, Thing, facts_of_things
from training.scenes import CENTRE, STATE, VIEWS, Shard, Variation, depth, write_shard
from vlm_reward._jobs import keep_settings
from vlm_reward._parallel import run_jobs
from vlm_reward.cameras import CameraRig, CameraSpec

THINGS = 4
"""The most things of a world, the mark of the goal among them."""
_ROOM = Path(metaworld.__file__).parent / "assets" / "sawyer_xyz" / "sawyer_reach_v3.xml"
_SUBSTEPS = 5
_RECORDS = 12
"""Moments recorded of an episode."""
_FINGER = 0.015
"""Half the width of a fingertip's pad, metres: its middle comes no nearer to what it pushes sideways."""
_GOAL = "goal"
_HINGE, _SLIDE = mujoco.mjtJoint.mjJNT_HINGE, mujoco.mjtJoint.mjJNT_SLIDE
_BOX, _CYLINDER, _SPHERE, _CAPSULE = (
    mujoco.mjtGeom.mjGEOM_BOX,
    mujoco.mjtGeom.mjGEOM_CYLINDER,
    mujoco.mjtGeom.mjGEOM_SPHERE,
    mujoco.mjtGeom.mjGEOM_CAPSULE,
)


@dataclass(frozen=True)
class Config:
    """Render scenes of things that no task has."""

    output: Path = Path("out/worlds")
    """Folder of the shards, one a world; those already there are kept, and must be made with the same settings."""
    size: int = 112
    """Side of the stored frames, pixels."""
    worlds: int = 100
    """How many."""
    episodes: int = 10
    """Episodes of each, with all things put elsewhere (48 images each)."""
    plain: float = 0.3
    """Share of the episodes that keep Meta-World's lights and cameras; of the others they are varied."""
    fewest: int = 2
    """The fewest things of a world, 1 to 3: from so many to three are drawn."""
    far: float = 0.15
    """Share of the places the hand is sent to that are anywhere within reach, not about a thing."""
    crop: bool = False
    """Keep of each image the part where hands and objects are (vlm_reward.cameras.WORKSPACE)."""
    workers: int = 2
    """Processes."""
    seed: int = 0
    """World k draws from (seed, k)."""


@dataclass(frozen=True)
class Built:
    """A thing, and what its builder knows.

    Args:
        thing: its names.
        travel: of its joint, from where the second outcome of its kind holds to where the first does.
        radius: the room that it needs about itself, metres.
    """

    thing: Thing
    travel: float
    radius: float


class _Builder:
    """Adds the geoms, joint and part of one thing to its body; x is its width, -y its front, z up."""

    def __init__(self, spec: Any, number: int, rng: np.random.Generator) -> None:
        self.spec, self.rng, self.number = spec, rng, number
        self.root = spec.worldbody.add_body(name=f"thing{number}")
        self.colour = str(rng.choice(list(PALETTE))) if rng.random() < 0.7 else ""
        self.rgba = self.paint(self.colour)

    def paint(self, colour: str) -> np.ndarray:
        """A shade of a colour, or one that has no name here."""
        if colour:
            return np.append(np.clip(np.array(PALETTE[colour]) * self.rng.uniform(0.85, 1.15), 0, 1), 1)
        return np.append(np.clip(self.rng.uniform(0.2, 0.8) + self.rng.normal(0, 0.04, 3), 0, 1), 1)

    def other(self) -> np.ndarray:
        """The colour of a second part: another, or a grey."""
        return self.paint(str(self.rng.choice(list(PALETTE))) if self.rng.random() < 0.4 else "")

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def geom(self, body: Any, kind: Any, size: tuple, place: tuple, rgba: np.ndarray, **more: Any) -> None:
        size = (*size, *[0.0] * (3 - len(size)))
        body.add_geom(type=kind, size=list(size), pos=list(place), rgba=rgba.tolist(), **more)

    def moving(self, kind: Any, axis: tuple, place: tuple, travel: float) -> Any:
        """A body with the joint; where it is not held it stays."""
        body = self.root.add_body(name=f"moving{self.number}", pos=list(place))
        # MuJoCo lets what hangs on the world collide with it, and a cap would be pushed out of its housing.
        self.spec.add_exclude(bodyname1=self.root.name, bodyname2=body.name)
        body.gravcomp = 1  # nothing falls in by its weight
        body.mass, body.inertia, body.explicitinertial = 0.3, [1e-3] * 3, True
        low, high = sorted((0.0, travel))
        body.add_joint(
            name=f"joint{self.number}", type=kind, axis=list(axis), damping=2.0, frictionloss=0.5,
            armature=0.01, limited=True, range=[low, high],
        )  # fmt: skip
        return body

    def part(self, body: Any, place: tuple) -> None:
        """Where a hand takes it."""
        body.add_site(name=f"part{self.number}", pos=list(place), size=[0.001] * 3, rgba=[0, 0, 0, 0])

    def grip(self, body: Any, place: np.ndarray, rgba: np.ndarray) -> None:
        """A knob or a bar that stands off by some centimetres; the hand takes it there."""
        off = self.between(0.02, 0.045)
        out = tuple(place - (0, off, 0))
        kind = self.rng.integers(3)
        if kind == 0:
            self.geom(body, _SPHERE, (self.between(0.01, 0.02),), out, rgba)
        else:
            half, thick = self.between(0.02, 0.05), self.between(0.005, 0.01)
            across = np.array((half, 0, 0) if kind == 1 else (0, 0, half))
            ends = np.hstack([out - across, out + across]).tolist()
            self.geom(body, _CAPSULE, (thick,), (0, 0, 0), rgba, fromto=ends)
        stem = np.hstack([place, out]).tolist()
        self.geom(body, _CAPSULE, (0.005,), (0, 0, 0), rgba, fromto=stem)
        self.part(body, out)

    def made(self, noun: str, kind: str = "", travel: float = 0.0, radius: float = 0.1) -> Built:
        return Built(Thing(noun, self.colour, kind), travel, radius)


def _pushed(b: _Builder) -> Built:
    """A cap on the front, the top or a side of a housing, or on a plate, that goes in."""
    w, d, h = b.between(0.03, 0.1), b.between(0.01, 0.09), b.between(0.04, 0.1)
    lift = b.between(0, 0.1) if b.rng.random() < 0.3 else 0.0
    b.geom(b.root, _BOX, (w, d, h), (0, 0, h + lift), b.other())
    if lift:
        b.geom(b.root, _CYLINDER, (0.015, (h + lift) / 2), (0, 0, (h + lift) / 2), b.other())
    radius, half = b.between(0.015, min(w, h, 0.04)), b.between(0.012, 0.03)
    face = b.rng.choice(["front", "top", "side"], p=[0.5, 0.35, 0.15])
    at = {"front": (0, -d, h + lift), "top": (0, 0, 2 * h + lift), "side": (-w, 0, h + lift)}[str(face)]
    out = np.array({"front": (0, -1, 0), "top": (0, 0, 1), "side": (-1, 0, 0)}[str(face)], float)
    travel = half * b.between(1.0, 1.8)
    cap = b.moving(_SLIDE, tuple(-out), tuple(np.array(at) + half * out), travel)
    if b.rng.random() < 0.75:
        b.geom(cap, _CYLINDER, (radius, half), (0, 0, 0), b.rgba, quat=_turned(out))
    else:
        b.geom(cap, _BOX, tuple(np.where(out != 0, half, radius)), (0, 0, 0), b.rgba)
    # Where the fingertips are once it is pressed; on its face the hand would be as near before.
    finger = _FINGER if face != "top" else 0.0
    b.part(b.root, tuple(np.array(at) + (2 * half - travel + finger) * out))
    noun = str(b.rng.choice(["button", "bell", "key", "knob"], p=[0.4, 0.2, 0.2, 0.2]))
    return b.made(noun, "press", travel, max(w, d) + 0.05)


def _turned(axis: np.ndarray) -> list[float]:
    """The quaternion that turns z to an axis."""
    quaternion = np.empty(4)
    mujoco.mju_quatZ2Vec(quaternion, axis)
    return quaternion.tolist()


def _case(b: _Builder, w: float, d: float, h: float, bottom: float, rgba: np.ndarray) -> None:
    """A box with an open front."""
    t = 0.006
    for place, size in (
        ((0, d - t, bottom + h), (w, t, h)),
        ((w - t, 0, bottom + h), (t, d, h)),
        ((t - w, 0, bottom + h), (t, d, h)),
        ((0, 0, bottom + t), (w, d, t)),
        ((0, 0, bottom + 2 * h - t), (w, d, t)),
    ):
        b.geom(b.root, _BOX, size, place, rgba)


def _drawer(b: _Builder) -> Built:
    """A case out of which a tray slides to the front."""
    w, d, h = b.between(0.06, 0.13), b.between(0.06, 0.1), b.between(0.025, 0.06)
    bottom = 0.0 if b.rng.random() < 0.5 else b.between(0.02, 0.12)
    case = b.rgba if b.rng.random() < 0.6 else b.other()
    _case(b, w, d, h, bottom, case)
    if bottom:
        b.geom(b.root, _BOX, (w, d, bottom / 2), (0, 0, bottom / 2), b.other())
    travel = d * b.between(1.0, 1.8)
    tray = b.moving(_SLIDE, (0, -1, 0), (0, 0, bottom + h), travel)
    inner, t = (w - 0.014, d - 0.008, h - 0.014), 0.004
    b.geom(tray, _BOX, (inner[0], t, inner[2]), (0, -d, 0), b.rgba)
    b.geom(tray, _BOX, (inner[0], inner[1], t), (0, 0, t - inner[2]), b.rgba)
    for side in (-1, 1):
        b.geom(tray, _BOX, (t, inner[1], inner[2] * 0.7), (side * inner[0], 0, -0.3 * inner[2]), b.rgba)
    b.geom(tray, _BOX, (inner[0], t, inner[2] * 0.7), (0, inner[1], -0.3 * inner[2]), b.rgba)
    b.grip(tray, np.array((0, -d, b.between(-0.3, 0.3) * h)), b.other())
    return b.made(str(b.rng.choice(["drawer", "tray"], p=[0.8, 0.2])), "open", travel, max(w, d) + 0.07)


def _swinging(b: _Builder) -> Built:
    """A case whose front swings about an upright edge, or down about the lower one."""
    w, d, h = b.between(0.06, 0.14), b.between(0.03, 0.09), b.between(0.06, 0.13)
    _case(b, w, d, h, 0.0, b.rgba if b.rng.random() < 0.5 else b.other())
    travel = b.between(1.2, 1.8)
    t = b.between(0.005, 0.01)
    if b.rng.random() < 0.8:
        side = float(b.rng.choice([-1, 1]))
        axis = (0, 0, side)  # outwards, to the front
        panel = b.moving(_HINGE, axis, (side * w, -d - t, h), travel)
        b.geom(panel, _BOX, (w, t, h), (-side * w, 0, 0), b.rgba)
        b.grip(panel, np.array((-side * 1.75 * w, -t, b.between(-0.4, 0.4) * h)), b.other())
        noun = b.rng.choice(["door", "cupboard", "fridge", "safe"], p=[0.4, *[0.2] * 3])
    else:
        low = 0.05  # room for the handle where it is down
        panel = b.moving(_HINGE, (1, 0, 0), (0, -d - t, low), min(travel, 1.5))
        b.geom(panel, _BOX, (w, t, h - low / 2), (0, 0, h - low / 2), b.rgba)
        b.grip(panel, np.array((0, -t, 1.75 * (h - low / 2))), b.other())
        travel, noun = min(travel, 1.5), "flap"
    return b.made(str(noun), "open", travel, max(w, d) + 0.06)


def _lidded(b: _Builder) -> Built:
    """A box, or a flat one, whose lid swings up about its back edge."""
    w, d = b.between(0.05, 0.12), b.between(0.05, 0.1)
    h = b.between(0.008, 0.015) if b.rng.random() < 0.3 else b.between(0.03, 0.07)
    b.geom(b.root, _BOX, (w, d, h), (0, 0, h), b.rgba if b.rng.random() < 0.5 else b.other())
    t, travel = b.between(0.004, 0.01), b.between(1.2, 1.9)
    lid = b.moving(_HINGE, (-1, 0, 0), (0, d, 2 * h + t), travel)
    b.geom(lid, _BOX, (w, d, t), (0, -d, 0), b.rgba)
    b.part(lid, (0, -2 * d, 0))
    if b.rng.random() < 0.4:
        b.geom(lid, _SPHERE, (b.between(0.008, 0.015),), (0, -1.9 * d, t + 0.01), b.other())
    return b.made("suitcase" if h < 0.02 else str(b.rng.choice(["chest", "box", "trunk"])), "open", travel)


def _levered(b: _Builder) -> Built:
    """A stick on a base, to the front or to the side, that swings up and down."""
    w, h, long = b.between(0.02, 0.06), b.between(0.03, 0.12), b.between(0.06, 0.14)
    b.geom(b.root, _BOX, (w, b.between(0.02, 0.06), h), (0, 0, h), b.other())
    travel, thick = b.between(0.6, 1.2), b.between(0.006, 0.012)
    front = b.rng.random() < 0.7
    axis = (-1, 0, 0) if front else (0, 1, 0)
    stick = b.moving(_HINGE, axis, (0, 0, 2 * h), travel)
    way = np.array((0, -1, 0) if front else (-1, 0, 0), float)
    low = -travel / 2  # where the joint is 0: as far below the level as it will be above
    end = long * (np.cos(low) * way + np.array((0, 0, np.sin(low))))
    b.geom(stick, _CAPSULE, (thick,), (0, 0, 0), b.rgba, fromto=np.hstack([np.zeros(3), end]).tolist())
    if b.rng.random() < 0.5:
        b.geom(stick, _SPHERE, (thick * 2,), tuple(end), b.other())
    b.part(stick, tuple(end))
    return b.made(str(b.rng.choice(["lever", "handle", "brake"])), "up", travel, long + 0.03)


def _sliding(b: _Builder) -> Built:
    """A panel in a frame, or a block on a rail, that slides from left to right."""
    w, h = b.between(0.08, 0.14), b.between(0.05, 0.11)
    travel = w * b.between(0.8, 1.0)
    if b.rng.random() < 0.6:
        for z in (0.006, 2 * h + 0.018):
            b.geom(b.root, _BOX, (w, 0.012, 0.006), (0, 0, z), b.other())
        for side in (-1, 1):
            b.geom(b.root, _BOX, (0.006, 0.012, h + 0.012), (side * w, 0, h + 0.012), b.other())
        # A panel that stays, behind which the other goes.
        b.geom(b.root, _BOX, (w / 2, 0.004, h), (w / 2, 0.008, h + 0.012), b.other())
        panel = b.moving(_SLIDE, (1, 0, 0), (-w / 2, -0.008, h + 0.012), travel)
        b.geom(panel, _BOX, (w / 2, 0.004, h), (0, 0, 0), b.rgba)
        b.grip(panel, np.array((0, 0, 0)), b.other())
        return b.made(str(b.rng.choice(["window", "gate", "curtain"])), "open", travel, w + 0.03)
    b.geom(b.root, _BOX, (w, 0.015, 0.01), (0, 0, 0.01), b.other())
    # Where it catches.
    b.geom(b.root, _BOX, (0.01, 0.02, h / 3 + 0.01), (w + 0.01, 0, h / 3 + 0.01), b.other())
    block = b.moving(_SLIDE, (1, 0, 0), (-travel / 2, 0, 0.02 + h / 3), travel)
    b.geom(block, _BOX, (b.between(0.015, 0.03), 0.015, h / 3), (0, 0, 0), b.rgba)
    b.part(block, (0, 0, h / 3))
    return b.made(str(b.rng.choice(["bolt", "latch", "slider"])), "lock", travel, w + 0.02)


def _turning(b: _Builder) -> Built:
    """A wheel with a pointer, upright or lying, that turns about its axis."""
    radius, half = b.between(0.025, 0.06), b.between(0.008, 0.02)
    front = b.rng.random() < 0.5
    axis = np.array((0, -1, 0) if front else (0, 0, 1), float)
    long = radius * b.between(0.9, 1.6)
    w, h = b.between(0.04, 0.09), long + b.between(0.01, 0.05) if front else b.between(0.005, 0.06)
    b.geom(b.root, _BOX, (w, 0.02 if front else w, h), (0, 0, h), b.other())
    at = (0, -0.02 - half, h) if front else (0, 0, 2 * h + half)
    travel = b.between(1.2, 2.6)
    wheel = b.moving(_HINGE, tuple(axis), at, travel)
    b.geom(wheel, _CYLINDER, (radius, half), (0, 0, 0), b.rgba, quat=_turned(axis))
    out = half * axis
    tip = out + np.array((-long, 0, 0))
    b.geom(wheel, _CAPSULE, (0.007,), (0, 0, 0), b.other(), fromto=np.hstack([out, tip]).tolist())
    b.part(wheel, tuple(tip))
    return b.made(str(b.rng.choice(["dial", "wheel", "valve"])), "turn", travel)


def _lying(b: _Builder) -> Built:
    """Something that has no parts."""
    r, h = b.between(0.015, 0.035), b.between(0.02, 0.07)
    noun, kind, size = {
        0: (b.rng.choice(["ball", "orange"]), _SPHERE, (r,)),
        1: (b.rng.choice(["cube", "block"]), _BOX, (r, r, r)),
        2: (b.rng.choice(["can", "glass"]), _CYLINDER, (r, h)),
        3: (b.rng.choice(["plate", "puck"]), _CYLINDER, (r * 1.5, 0.01)),
        4: (b.rng.choice(["book", "phone"]), _BOX, (r * 1.6, r * 2, 0.01)),
        5: (b.rng.choice(["stick", "rod"]), _BOX, (h * 1.5, 0.01, 0.01)),
    }[int(b.rng.integers(6))]
    high = {_SPHERE: size[0], _CYLINDER: size[-1], _BOX: size[-1]}[kind]
    lift = b.between(0.02, 0.15) if b.rng.random() < 0.3 else 0.0
    if lift:
        stand = (b.between(0.03, 0.07), b.between(0.03, 0.07), lift / 2)
        b.geom(b.root, _BOX, stand, (0, 0, lift / 2), b.other())
    b.geom(b.root, kind, size, (0, 0, lift + high), b.rgba)
    b.part(b.root, (0, 0, lift + high))
    return b.made(str(noun), radius=0.07)


FAMILIES: tuple[Callable[[_Builder], Built], ...] = (
    _pushed,
    _drawer,
    _swinging,
    _lidded,
    _levered,
    _sliding,
    _turning,
    _lying,
)
"""How to build things, each with another way to move."""


class World(gym.Env):
    """A table with a robot and up to three things that are built anew, and the mark of a goal.

    Args:
        rng: of all that is drawn.
        fewest: from so many things to three.
    """

    def __init__(self, rng: np.random.Generator, fewest: int = 2) -> None:
        spec = mujoco.MjSpec.from_file(str(_ROOM))
        spec.detach_body(spec.body("obj"))
        chosen = rng.choice(len(FAMILIES), int(rng.integers(fewest, THINGS)), replace=False)
        self._built = [FAMILIES[family](_Builder(spec, number, rng)) for number, family in enumerate(chosen)]
        colour = str(rng.choice(["red", "green", "blue", "yellow"]))
        goal = spec.site("goal")
        goal.rgba, goal.size = [*PALETTE[colour], 1], [rng.uniform(0.015, 0.025)] * 3
        self.things = (*(built.thing for built in self._built), Thing(_GOAL, colour))
        self.rng = rng
        self.model = spec.compile()
        # How Meta-World's hand follows the mocap body.
        self.model.eq_data[:] = [0] * 6 + [-1] + [0] * 3 + [5]
        self.data = mujoco.MjData(self.model)

    def _joint(self, number: int) -> int:
        return int(self.model.joint(f"joint{number}").qposadr[0])

    def parts(self) -> np.ndarray:
        """Where a hand takes each thing: [T, 3], metres."""
        names = [f"part{number}" for number in range(len(self.things) - 1)]
        return np.stack([self.data.site(name).xpos for name in (*names, _GOAL)])

    def hand(self) -> np.ndarray:
        """Between the fingertips, [3], metres."""
        return (self.data.site("rightEndEffector").xpos + self.data.site("leftEndEffector").xpos) / 2

    def fractions(self) -> np.ndarray:
        """How far each thing's first outcome holds, [T] in [0, 1]; NaN where it has none."""
        values = np.full(len(self.things), np.nan)
        for number, built in enumerate(self._built):
            if built.thing.kind:
                values[number] = np.clip(self.data.qpos[self._joint(number)] / built.travel, 0, 1)
        return values

    def set_states(self) -> None:
        """Draw how far each thing is open, up or pressed."""
        for number, built in enumerate(self._built):
            if built.thing.kind:
                fraction = self.rng.choice([0.0, 1.0, self.rng.random()], p=[0.3, 0.3, 0.4])
                self.data.qpos[self._joint(number)] = built.travel * fraction
        self.data.qvel[:] = 0
        mujoco.mj_forward(self.model, self.data)

    def set_places(self) -> None:
        """Draw where all things are, and the mark: half of the time where some thing's part is or could be."""
        rng, placed = self.rng, []
        for number, built in enumerate(self._built):
            for _ in range(100):
                place = rng.uniform((-0.32, 0.52), (0.32, 0.88))
                if all(np.linalg.norm(place - other) > built.radius + radius for other, radius in placed):
                    break
            placed.append((place, built.radius))
            turn = rng.choice([0.0, rng.uniform(-1.2, 1.2)], p=[0.4, 0.6])
            body = self.model.body(f"thing{number}").id
            self.model.body_pos[body] = (*place, 0)
            self.model.body_quat[body] = (np.cos(turn / 2), 0, 0, np.sin(turn / 2))
        self.set_states()
        mark = rng.uniform((-0.3, 0.5, 0.03), (0.3, 0.9, 0.3))
        if rng.random() < 0.5:
            mark = self.parts()[rng.integers(len(self.things) - 1)] + rng.normal(0, 0.08, 3)
        self.model.site_pos[self.model.site(_GOAL).id] = (*mark[:2], max(mark[2], 0.02))
        mujoco.mj_forward(self.model, self.data)

    def begin(self) -> None:
        """All things elsewhere, the hand somewhere above them."""
        mujoco.mj_resetData(self.model, self.data)
        self.set_places()
        start = self.rng.uniform((-0.3, 0.45, 0.2), (0.3, 0.8, 0.4))
        for _ in range(50):
            self.data.mocap_pos[0], self.data.mocap_quat[0] = start, (1, 0, 1, 0)
            self._simulate(-1.0)

    def move(self, way: np.ndarray, grip: float) -> None:
        """The hand goes up to a centimetre along each axis."""
        low, high = (-0.5, 0.4, 0.05), (0.5, 1.0, 0.5)
        self.data.mocap_pos[0] = np.clip(self.data.mocap_pos[0] + np.clip(way, -0.01, 0.01), low, high)
        self.data.mocap_quat[0] = (1, 0, 1, 0)
        self._simulate(grip)

    def _simulate(self, grip: float) -> None:
        self.data.ctrl[:] = (grip, -grip)
        mujoco.mj_step(self.model, self.data, nstep=_SUBSTEPS)
        mujoco.mj_forward(self.model, self.data)

    def _shown(self) -> tuple[np.ndarray, ...]:
        model, data = self.model, self.data
        return data.qpos, data.qvel, data.mocap_pos, model.body_pos, model.body_quat, model.site_pos

    def moment(self) -> tuple[np.ndarray, ...]:
        """What shows this moment again."""
        return tuple(each.copy() for each in self._shown())

    def again(self, moment: tuple[np.ndarray, ...]) -> None:
        """Show a moment again."""
        for each, value in zip(self._shown(), moment, strict=True):
            each[:] = value
        mujoco.mj_forward(self.model, self.data)

    def elsewhere(self, tries: int = 4) -> bool:
        """Other states, or other places, where the hand leaves room for them. Returns whether it did."""
        moment, deep = self.moment(), depth(self.data) + 0.005
        for _ in range(tries):
            (self.set_states if self.rng.random() < 0.6 else self.set_places)()
            if depth(self.data) <= deep:
                return True
            self.again(moment)
        return False

    def states(self) -> np.ndarray:
        """A state vector of each thing, as `training.scenes.STATE`: float32 [T, len(STATE)]."""
        hand, data = self.hand(), self.data
        fingers = data.body("rightclaw").xpos - data.body("leftclaw").xpos
        rows = np.full((len(self.things), len(STATE)), np.nan)
        rows[:, :3], rows[:, 3] = (hand - CENTRE) * 5, np.clip(np.linalg.norm(fingers) / 0.1, 0, 1)
        parts, goal = self.parts(), data.site(_GOAL).xpos
        rows[:, 4:7], rows[:, 7:10] = (parts - CENTRE) * 5, (goal - CENTRE) * 5
        rows[:, 10:13] = (parts - hand) * 5
        rows[:, 13] = np.linalg.norm(parts - hand, axis=1) * 5
        rows[:, STATE.index("fraction")] = self.fractions()
        return np.clip(rows, -8, 8).astype(np.float32)


def make_world(
    size: int,
    episodes: int,
    seed: tuple[int, ...],
    plain: float = 0.3,
    crop: bool = False,
    *,
    fewest: int = 2,
    far: float = 0.15,
) -> tuple[tuple[Thing, ...], dict[str, Any]]:
    """Render one world.

    Args:
        size: side of the frames, pixels.
        episodes: each with all things put elsewhere.
        seed: of all that is drawn.
        plain: share of the episodes that keep Meta-World's lights and cameras.
        crop: keep the part of each image where hands and objects are.
        fewest: from so many things to three.
        far: share of the places the hand is sent to that are anywhere within reach.

    Returns:
        Its things, and what `training.scenes.make_shard` returns, with `state` NaN where it is of a thing, and
        `things` float32 [N, THINGS, len(STATE)], the state vector with each thing as the object, NaN past them,
        and `spots` float32 [N, THINGS, 2], where in the image each is, hidden or not, NaN where outside of it.
    """
    rng = np.random.default_rng(seed)
    world = World(rng, fewest)
    variation = Variation(world.model)

    def show(episode: int, views: np.ndarray) -> None:
        states = world.states()
        count = len(states)
        things, places = np.full((THINGS, len(STATE)), np.nan, np.float32), np.full((THINGS, 3), np.nan)
        things[:count], places[:count] = states, world.parts()
        state = states[0].copy()
        state[4:7] = state[10:] = np.nan  # what is said of an object: there are several
        true, false = facts_of_things(
            world.things,
            states[:, STATE.index("hand_object")] / 5,
            world.fractions(),
            hand=world.hand(),
            opening=float(state[STATE.index("opening")]),
            generator=rng,
        )
        points = np.stack([world.hand(), np.full(3, np.nan), world.data.site(_GOAL).xpos])
        shard.add(views, points, state, places, episode=episode, true=true, false=false, things=things)

    with CameraRig(world, CameraSpec()) as rig:
        shard = Shard(rig, world, size, crop)
        for episode in range(episodes):
            variation.apply(rng, plain)
            world.begin()
            for _ in range(_RECORDS):
                if rng.random() < 0.3:
                    world.elsewhere()
                parts = world.parts()
                place = parts[rng.integers(len(parts))] + rng.normal(0, rng.choice([0.01, 0.04, 0.12]), 3)
                if rng.random() < far:
                    place = rng.uniform((-0.35, 0.45, 0.03), (0.35, 0.9, 0.35))
                grip = float(rng.choice([-1, 1]))
                for _ in range(int(rng.integers(8, 30))):
                    world.move(place - world.hand(), grip)
                views = rng.choice(len(rig.spec.cameras), VIEWS, replace=False)
                show(episode, views)
                moment = world.moment()
                if world.elsewhere():
                    show(episode, views)
                    shard.pair(VIEWS)
                    world.again(moment)
    return world.things, shard.packed()


def _write(job: tuple[Path, int, Config]) -> None:
    path, number, config = job
    seed = (config.seed, number)
    things, shard = make_world(
        config.size,
        config.episodes,
        seed,
        config.plain,
        config.crop,
        fewest=config.fewest,
        far=config.far,
    )
    known = [asdict(thing) for thing in things]
    header = {"task": path.stem.partition("-")[2], "things": known, "seed": seed, "size": config.size}
    write_shard(path, header | {"crop": config.crop}, shard)


def main(config: Config) -> None:
    """Render all worlds that are not there yet."""
    if not 0 <= config.plain <= 1:
        raise ValueError(f"--plain is a share of the episodes, from 0 to 1, got {config.plain}")
    if not 0 <= config.far <= 1:
        raise ValueError(f"--far is a share of the places, from 0 to 1, got {config.far}")
    if not 1 <= config.fewest < THINGS:
        raise ValueError(f"--fewest is 1 to {THINGS - 1} things, got {config.fewest}")
    keep_settings(config, "worlds", "seed", otherwise="holds scenes made otherwise")
    paths = [(config.output / f"{config.seed:03d}-world-{k:03d}.npz", k) for k in range(config.worlds)]
    jobs = [(path, number, config) for path, number in paths if not path.exists()]
    run_jobs(_write, jobs, workers=config.workers, unit="world", done=len(paths) - len(jobs))


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, prog="python -m training.worlds", description=__doc__))
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
