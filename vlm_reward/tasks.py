"""The 50 Meta-World tasks, their instructions, and the splits of the paper (arXiv 2512.20675, section 3.2)."""

from difflib import get_close_matches
from typing import Literal, get_args

INSTRUCTIONS: dict[str, str] = {
    "assembly-v3": "pick up a nut and place it onto a peg",
    "basketball-v3": "dunk the basketball into the basket",
    "bin-picking-v3": "grasp the green object from its bin and place it into the other bin",
    "box-close-v3": "grasp the cover and close the box with it",
    "button-press-topdown-v3": "press the button on the box",
    "button-press-topdown-wall-v3": "bypass the wall and press the button on the box",
    "button-press-v3": "press the button",
    "button-press-wall-v3": "bypass the wall and press the button",
    "coffee-button-v3": "push the button on the coffee machine",
    "dial-turn-v3": "rotate the dial 180 degrees",
    "disassemble-v3": "pick the nut out of a peg",
    "door-close-v3": "close the door with a revolving joint",
    "door-lock-v3": "lock the door by rotating the lock clockwise",
    "door-open-v3": "open the door with a revolving joint",
    "door-unlock-v3": "unlock the door by rotating the lock counter-clockwise",
    "hand-insert-v3": "insert the gripper into the hole",
    "faucet-open-v3": "turn on faucet",
    "faucet-close-v3": "turn off faucet",
    "hammer-v3": "hammer the screw on the wall",
    "handle-press-side-v3": "press the handle down",
    "handle-press-v3": "press the handle down",
    "handle-pull-side-v3": "pull the handle up",
    "handle-pull-v3": "pull the handle up",
    "lever-pull-v3": "pull the lever down 90 degrees",
    "pick-place-wall-v3": "pick the red object, bypass the wall and place the object on the target",
    "pick-out-of-hole-v3": "pick up the object from the hole",
    "pick-place-v3": "pick and place the red object to the goal",
    "plate-slide-v3": "slide the puck into the hockey net",
    "plate-slide-side-v3": "slide the puck into the hockey net",
    "plate-slide-back-v3": "get the puck from the hockey net",
    "plate-slide-back-side-v3": "get the puck from the hockey net",
    "peg-insert-side-v3": "insert the peg in the hole",
    "peg-unplug-side-v3": "unplug the peg from the hole",
    "soccer-v3": "kick the soccer ball into the goal",
    "stick-push-v3": "grasp the blue stick and push the box using the stick",
    "stick-pull-v3": "grasp the blue stick and pull the box using the stick",
    "push-v3": "push the red object to the green objective",
    "push-wall-v3": "bypass the wall and push the object behind the wall",
    "push-back-v3": "push the red object back to the green objective",
    "reach-v3": "reach the red goal position",
    "reach-wall-v3": "bypass the wall and reach the red goal position",
    "shelf-place-v3": "pick up the blue object and place it onto the shelf",
    "sweep-into-v3": "sweep the object into the hole",
    "sweep-v3": "sweep the object off the table",
    "window-open-v3": "open the window using the handle",
    "window-close-v3": "close the window using the handle",
    "drawer-close-v3": "close the green drawer",
    "drawer-open-v3": "open the green drawer",
    "coffee-push-v3": "push the mug to the red goal under the coffee machine",
    "coffee-pull-v3": "pull the mug to the green goal",
}
"""Task -> instruction, as in the paper's Table 4. Only 46 of the 50 sentences differ."""

HELD_OUT: tuple[str, ...] = ("button-press-v3", "drawer-open-v3", "door-open-v3")
"""The test tasks. No demonstration, image or sentence of theirs is ever used for training."""

_BUTTON_VARIANTS = ("button-press-topdown-v3", "button-press-topdown-wall-v3", "button-press-wall-v3")
_UNDERLINED = ("coffee-button-v3", "coffee-push-v3", "coffee-pull-v3", "door-unlock-v3")

OPPOSITES: tuple[tuple[str, str], ...] = (
    ("window-open-v3", "window-close-v3"),
    ("faucet-open-v3", "faucet-close-v3"),
    ("door-lock-v3", "door-unlock-v3"),
    ("handle-press-v3", "handle-pull-v3"),
    ("handle-press-side-v3", "handle-pull-side-v3"),
    ("plate-slide-v3", "plate-slide-back-v3"),
    ("plate-slide-side-v3", "plate-slide-back-side-v3"),
    ("push-v3", "push-back-v3"),
    ("stick-push-v3", "stick-pull-v3"),
    ("coffee-push-v3", "coffee-pull-v3"),
    ("peg-insert-side-v3", "peg-unplug-side-v3"),
    ("assembly-v3", "disassemble-v3"),
)
"""Pairs of training tasks that share a scene and ask for opposites: they test whether a reward listens."""
_OPPOSITE = {task: other for pair in OPPOSITES for task, other in (pair, pair[::-1])}
_CONTRARY = _OPPOSITE | {"drawer-open-v3": "drawer-close-v3", "door-open-v3": "door-close-v3"}

Split = Literal["paper", "strict"]
SPLITS: tuple[str, ...] = get_args(Split)


def all_tasks() -> tuple[str, ...]:
    """The names of the 50 tasks, in the order of the paper's Table 4."""
    return tuple(INSTRUCTIONS)


def check_task(task: str) -> str:
    """Return `task`, or raise ValueError with the nearest known names."""
    if task not in INSTRUCTIONS:
        raise ValueError(unknown_task(task))
    return task


def unknown_task(task: str) -> str:
    """What to say of a name that is no task: the nearest known names."""
    near = get_close_matches(task, INSTRUCTIONS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else "see vlm_reward.tasks.all_tasks()"
    return f"unknown Meta-World task {task!r}; {hint}"


def instruction(task: str) -> str:
    """The sentence that tells the robot to do `task`, e.g. `drawer-open-v3` -> `open the green drawer`."""
    return INSTRUCTIONS[check_task(task)]


def opposite(task: str) -> str | None:
    """The other task of its pair in `OPPOSITES`, e.g. `window-open-v3` -> `window-close-v3`; None if unpaired."""
    return _OPPOSITE.get(check_task(task))


def contrary(task: str) -> str | None:
    """The training task that undoes `task`, to score against: `opposite`, and for held-out tasks, too; or None."""
    return _CONTRARY.get(check_task(task))


def train_tasks(split: str = "paper") -> tuple[str, ...]:
    """The training tasks of a split.

    `paper`: 44 tasks, i.e. all but the three held-out ones and the other three button-press variants (132
    demonstrations at 3 a task, as in the paper's section 3.2). `strict`: 40 tasks, without the other
    tasks that the paper's Table 4 underlines (coffee-button, coffee-push, coffee-pull, door-unlock).
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    left_out = HELD_OUT + _BUTTON_VARIANTS + (_UNDERLINED if split == "strict" else ())
    return tuple(task for task in INSTRUCTIONS if task not in left_out)
