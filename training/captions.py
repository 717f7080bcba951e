"""Captions from simulator state: which sentences are true of a frame, and which are false.

A *fact* is a short key such as `window=open` or `hand~nut=near`. `facts` lists the keys that hold in a
frame and those of the same scene that do not; `sentences` gives the paraphrases of a key. An instruction is
a paraphrase of the state it asks for ("open the window" of `window=open`), for training tasks alone: nothing
here says or paraphrases what a held-out task asks for. That the drawer *is open* is a state of the training
task drawer-close.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from training.language import OUTCOMES, ways_to_ask, ways_to_handle, ways_to_name_it
from vlm_reward.tasks import instruction, train_tasks


@dataclass(frozen=True)
class Words:
    """How to speak of one task's scene.

    Args:
        noun: the main object, with synonyms.
        body: MuJoCo body whose subtree is the object; it may be recoloured.
        start: fact that holds at the start, and its sentences.
        end: fact that holds at success, and its sentences (statements, then other ways to ask for it).
        goal: noun phrase of where the object belongs; empty for mechanisms.
        joint: the mechanism's joint (name, value at `start`, value at `end`), None for a free object.
        colour: the object's colour in Meta-World, if it has one.
    """

    noun: tuple[str, ...]
    body: str
    start: tuple[str, ...]
    end: tuple[str, ...]
    goal: str = ""
    joint: tuple[str, float, float] | None = None
    colour: str = ""


@dataclass(frozen=True)
class Thing:
    """One of several things of a scene that belongs to no task (`training.worlds`).

    Args:
        noun: what it is called.
        colour: a name of PALETTE, or "" where it has none.
        kind: of `training.language.OUTCOMES`, which says its states; "" where it has none.
    """

    noun: str
    colour: str = ""
    kind: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """What sentences call it."""
        return (self.noun, f"{self.colour} {self.noun}") if self.colour else (self.noun,)


_LOCKED = (
    "lock=locked",
    "the door lock is locked",
    "the lock is turned clockwise",
    "turn the lock clockwise",
)
_UNLOCKED = (
    "lock=unlocked",
    "the door lock is unlocked",
    "the lock is turned counter-clockwise",
    "turn the lock counter-clockwise",
)
_WINDOW_OPEN = ("window=open", "the window is open", "the window has been slid open", "slide the window open")
_WINDOW_CLOSED = ("window=closed", "the window is closed", "the window is shut", "slide the window shut")
_UP = ("handle=up", "the handle is up", "the handle is raised", "raise the handle", "lift the handle up")
_DOWN = (
    "handle=down",
    "the handle is down",
    "the handle is pressed down",
    "push the handle down",
    "lower the handle",
)
_TAP_NEUTRAL = ("faucet=middle", "the faucet handle is in the middle", "the faucet has not been turned")
_TAP_ON = ("faucet=on", "the faucet is on", "the tap is turned on", "turn the tap on", "open the faucet")
_TAP_OFF = (
    "faucet=off",
    "the faucet is off",
    "the tap is turned off",
    "turn the tap off",
    "close the faucet",
)
_NUT_ON = ("nut=on peg", "the nut is on the peg", "the ring sits around the peg", "put the nut on the peg")
_NUT_OFF = ("nut=off peg", "the nut is off the peg", "the ring is not on the peg", "take the nut off the peg")
_PUCK_IN = (
    "puck=in net",
    "the puck is in the hockey net",
    "the puck is inside the net",
    "push the puck into the net",
)
_PUCK_OUT = (
    "puck=outside net",
    "the puck is outside the hockey net",
    "the puck is not in the net",
    "pull the puck out of the net",
)
_PEG_OUT = (
    "peg=out of hole",
    "the peg is out of the hole",
    "the plug is unplugged",
    "pull the peg out of the hole",
)
_PEG_IN = ("peg=in hole", "the peg is in the hole", "the plug is plugged in", "push the peg into the hole")
_AT_GOAL = ("object=at goal", "the object is at the goal", "the object has reached its target")
_OFF_GOAL = ("object=not at goal", "the object is not at the goal", "the object is away from its target")
_MUG_UNDER = (
    "mug=under machine",
    "the mug is under the coffee machine",
    "slide the mug under the coffee machine",
)
_MUG_AWAY = (
    "mug=away from machine",
    "the mug is away from the coffee machine",
    "the mug is not under the coffee machine",
    "pull the mug away from the coffee machine",
)
_BOX_MOVED = ("box=moved", "the box has been moved", "the box has left its place")
_BOX_STILL = ("box=not moved", "the box stands where it was", "the box has not been moved")
_OBJ = ("object", "puck", "cylinder")

_REACH = Words(
    _OBJ,
    "obj",
    ("hand=not at goal", "the gripper is not at the goal", "the robot hand is away from the target"),
    (
        "hand=at goal",
        "the gripper is at the goal",
        "the robot hand has reached the target",
        "move to the target",
    ),
    "the goal",
    colour="red",
)

WORDS: dict[str, Words] = {
    "assembly-v3": Words(("nut", "ring"), "RoundNut", _NUT_OFF, _NUT_ON, "the peg"),
    "basketball-v3": Words(
        ("basketball", "ball"),
        "bsktball",
        ("ball=out of basket", "the ball is not in the basket", "the basketball is outside the hoop"),
        (
            "ball=in basket",
            "the ball is in the basket",
            "the basketball is in the hoop",
            "put the ball in the hoop",
        ),
        "the basket",
    ),
    "bin-picking-v3": Words(
        ("object", "cube", "block"),
        "obj",
        ("object=in first bin", "the object is in its first bin", "the cube has not left its bin"),
        ("object=in other bin", "the object is in the other bin", "move the cube to the other bin"),
        "the other bin",
        colour="green",
    ),
    "box-close-v3": Words(
        ("cover", "lid"),
        "boxbodytop",
        ("box=open", "the box is open", "the box has no cover on it", "the lid is off the box"),
        ("box=closed", "the box is closed", "the lid is on the box", "put the lid on the box"),
        "the box",
    ),
    "coffee-button-v3": Words(
        ("coffee machine button", "button on the coffee machine"),
        "coffee_machine",
        (
            "coffee button=out",
            "the button on the coffee machine is not pressed",
            "the coffee button sticks out",
        ),
        ("coffee button=in", "the button on the coffee machine is pressed", "the coffee button is pushed in"),
        joint=("goal_slidey", 0.0, 0.013),
    ),
    "dial-turn-v3": Words(
        ("dial", "knob"),
        "dial",
        ("dial=not turned", "the dial has not been turned", "the knob is in its first position"),
        ("dial=turned", "the dial has been turned", "the knob is rotated", "turn the knob", "turn the dial"),
        joint=("knob_Joint_1", 0.0, -1.48),
    ),
    "disassemble-v3": Words(("nut", "ring"), "RoundNut", _NUT_ON, _NUT_OFF, "a place off the peg"),
    "door-close-v3": Words(
        ("door",),
        "door",
        ("door=open", "the door is open", "a door that is open", "an open door"),
        (
            "door=closed",
            "the door is closed",
            "the door is shut",
            "a closed door",
            "shut the door",
            "push the door shut",
        ),
        joint=("doorjoint", -1.571, 0.0),
    ),
    "door-lock-v3": Words(("door lock", "lock"), "door", _UNLOCKED, _LOCKED, joint=("", 0.0, 1.25)),
    "door-unlock-v3": Words(("door lock", "lock"), "door", _LOCKED, _UNLOCKED, joint=("", 1.25, 0.0)),
    "hand-insert-v3": Words(
        ("object", "block"),
        "obj",
        ("hand=outside hole", "the gripper is outside the hole", "the robot hand is not in the hole"),
        (
            "hand=in hole",
            "the gripper is in the hole",
            "the robot hand is inside the hole",
            "put the hand in the hole",
        ),
        "the hole",
    ),
    "faucet-open-v3": Words(
        ("faucet", "tap"), "faucetBase", _TAP_NEUTRAL, _TAP_ON, joint=("knob_Joint_1", 0.0, 1.4)
    ),
    "faucet-close-v3": Words(
        ("faucet", "tap"), "faucetBase", _TAP_NEUTRAL, _TAP_OFF, joint=("knob_Joint_1", 0.0, -1.3)
    ),
    "hammer-v3": Words(
        ("hammer",),
        "hammerbody",
        ("nail=out", "the screw sticks out of the wall", "the nail has not been hammered in"),
        (
            "nail=in",
            "the screw is driven into the wall",
            "the nail is hammered in",
            "hit the nail with the hammer",
        ),
        joint=("NailSlideJoint", 0.0, 0.095),
    ),
    "handle-press-side-v3": Words(("handle",), "box", _UP, _DOWN, joint=("", 0.0, -0.09)),
    "handle-press-v3": Words(("handle",), "box", _UP, _DOWN, joint=("", 0.0, -0.09)),
    "handle-pull-side-v3": Words(("handle",), "box", _DOWN, _UP, joint=("", -0.1, -0.02)),
    "handle-pull-v3": Words(("handle",), "box", _DOWN, _UP, joint=("", -0.1, -0.02)),
    "lever-pull-v3": Words(
        ("lever",),
        "lever",
        ("lever=not pulled", "the lever has not been pulled", "the lever is in its first position"),
        ("lever=pulled", "the lever is pulled", "the lever has been turned by 90 degrees", "pull the lever"),
        joint=("LeverAxis", 0.0, -1.45),
    ),
    "pick-place-wall-v3": Words(_OBJ, "obj", _OFF_GOAL, _AT_GOAL, "the goal", colour="red"),
    "pick-out-of-hole-v3": Words(
        ("object", "block"),
        "obj",
        ("object=in hole", "the object is in the hole", "the block is down in the hole"),
        ("object=out of hole", "the object is out of the hole", "lift the object out of the hole"),
        "the goal",
    ),
    "pick-place-v3": Words(_OBJ, "obj", _OFF_GOAL, _AT_GOAL, "the goal", colour="red"),
    "plate-slide-v3": Words(("puck",), "puck_channel", _PUCK_OUT, _PUCK_IN, "the net"),
    "plate-slide-side-v3": Words(("puck",), "puck_channel", _PUCK_OUT, _PUCK_IN, "the net"),
    "plate-slide-back-v3": Words(("puck",), "puck_channel", _PUCK_IN, _PUCK_OUT, "the goal"),
    "plate-slide-back-side-v3": Words(("puck",), "puck_channel", _PUCK_IN, _PUCK_OUT, "the goal"),
    "peg-insert-side-v3": Words(("peg", "stick"), "peg", _PEG_OUT, _PEG_IN, "the hole"),
    "peg-unplug-side-v3": Words(("peg", "plug"), "plug1", _PEG_IN, _PEG_OUT, "a place outside the hole"),
    "soccer-v3": Words(
        ("soccer ball", "ball", "football"),
        "soccer_ball",
        ("soccer=out", "the soccer ball is not in the goal", "the football is outside the goal"),
        ("soccer=in", "the soccer ball is in the goal", "push the ball into the goal", "score a goal"),
        "the goal",
    ),
    "stick-push-v3": Words(
        ("stick", "blue stick"), "stick", _BOX_STILL, _BOX_MOVED, "the box", colour="blue"
    ),
    "stick-pull-v3": Words(
        ("stick", "blue stick"), "stick", _BOX_STILL, _BOX_MOVED, "the box", colour="blue"
    ),
    "push-v3": Words(_OBJ, "obj", _OFF_GOAL, _AT_GOAL, "the goal", colour="red"),
    "push-wall-v3": Words(_OBJ, "obj", _OFF_GOAL, _AT_GOAL, "the goal", colour="red"),
    "push-back-v3": Words(_OBJ, "obj", _OFF_GOAL, _AT_GOAL, "the goal", colour="red"),
    "reach-v3": _REACH,
    "reach-wall-v3": _REACH,
    "shelf-place-v3": Words(
        ("object", "cube", "block"),
        "obj",
        ("object=not on shelf", "the object is not on the shelf", "the shelf is empty"),
        (
            "object=on shelf",
            "the object is on the shelf",
            "the cube stands on the shelf",
            "put the cube on the shelf",
        ),
        "the shelf",
        colour="blue",
    ),
    "sweep-into-v3": Words(
        ("object", "block"),
        "obj",
        ("object=on table", "the object is on the table", "the block has not been swept away"),
        (
            "object=swept into hole",
            "the object has been swept into the hole",
            "sweep the block into the hole",
        ),
        "the hole",
    ),
    "sweep-v3": Words(
        ("object", "block"),
        "obj",
        ("object=on table", "the object is on the table", "the block has not been swept away"),
        ("object=off table", "the object is off the table", "sweep the block from the table"),
        "the edge of the table",
    ),
    "window-open-v3": Words(
        ("window",), "window", _WINDOW_CLOSED, _WINDOW_OPEN, joint=("window_slide", 0.0, 0.2)
    ),
    "window-close-v3": Words(
        ("window",), "window", _WINDOW_OPEN, _WINDOW_CLOSED, joint=("window_slide", 0.2, 0.0)
    ),
    "drawer-close-v3": Words(
        ("drawer",),
        "drawer",
        ("drawer=open", "the drawer is open", "the drawer sticks out of its case", "an open drawer"),
        (
            "drawer=closed",
            "the drawer is closed",
            "the drawer is shut",
            "a closed drawer",
            "push the drawer in",
        ),
        joint=("goal_slidey", -0.15, 0.0),
        colour="green",
    ),
    "coffee-push-v3": Words(("mug", "cup"), "obj", _MUG_AWAY, _MUG_UNDER, "the coffee machine"),
    "coffee-pull-v3": Words(("mug", "cup"), "obj", _MUG_UNDER, _MUG_AWAY, "the goal"),
}

ASKS: dict[str, tuple[str, bool, tuple[str, ...]]] = {
    "window=open": ("open", False, ("window",)),
    "window=closed": ("open", True, ("window",)),
    "door=closed": ("open", True, ("door",)),
    "drawer=closed": ("open", True, ("drawer",)),
    "box=closed": ("open", True, ("box",)),
    "box=open": ("open", False, ("box",)),
    "faucet=on": ("on", False, ("faucet",)),
    "faucet=off": ("on", True, ("faucet",)),
    "lock=locked": ("lock", False, ("door",)),
    "lock=unlocked": ("lock", True, ("door",)),
    "handle=up": ("up", False, ("handle",)),
    "handle=down": ("up", True, ("handle",)),
    "coffee button=in": ("press", False, ("coffee machine button",)),
    "dial=turned": ("turn", False, ("dial",)),
    "nut=on peg": ("onto", False, ("nut", "peg")),
    "nut=off peg": ("onto", True, ("nut", "peg")),
    "puck=in net": ("in", False, ("puck", "net")),
    "puck=outside net": ("in", True, ("puck", "net")),
    "peg=in hole": ("in", False, ("peg", "hole")),
    "peg=out of hole": ("in", True, ("peg", "hole")),
    "ball=in basket": ("in", False, ("ball", "basket")),
    "soccer=in": ("in", False, ("ball", "goal")),
    "object=on shelf": ("onto", False, ("cube", "shelf")),
    "object=out of hole": ("in", True, ("object", "hole")),
    "object=swept into hole": ("in", False, ("object", "hole")),
    "object=at goal": ("to", False, ("object", "goal")),
    "mug=under machine": ("to", False, ("mug", "coffee machine")),
    "mug=away from machine": ("to", True, ("mug", "coffee machine")),
}
"""State -> how to ask for it: `training.language.ways_to_ask`. Nobody asks for what a held-out task wants."""

PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.8, 0.1, 0.1),
    "green": (0.2, 0.7, 0.2),
    "blue": (0.1, 0.2, 0.8),
    "yellow": (0.9, 0.85, 0.1),
    "orange": (0.95, 0.5, 0.05),
    "purple": (0.5, 0.1, 0.6),
    "white": (0.95, 0.95, 0.95),
    "black": (0.08, 0.08, 0.08),
    "brown": (0.45, 0.27, 0.1),
    "pink": (0.95, 0.5, 0.7),
}

ALIKE: tuple[tuple[str, ...], ...] = (
    ("button", "bell", "key", "knob"),
    ("drawer", "tray"),
    ("door", "cupboard", "fridge", "safe", "flap"),
    ("chest", "box", "trunk", "suitcase"),
    ("lever", "handle", "brake"),
    ("window", "gate", "curtain"),
    ("bolt", "latch", "slider", "lock"),
    ("dial", "wheel", "valve", "knob"),
    ("ball", "basketball", "football", "orange"),
    ("cube", "block"),
    ("can", "glass", "mug", "cup", "cylinder"),
    ("plate", "puck"),
    ("book", "phone"),
    ("stick", "rod", "peg"),
)
"""Names of things that look alike: of what is called one of them nobody knows that it is not another."""
_ANYWHERE = ("object", "goal", "handle", "knob")
"""What may be there whatever else is: the mark of the goal, and parts of other things."""

_HELD_OUT_NOUNS = ("button", "drawer", "door")
_LET_BE = ("leave ", "do not ", "let go ", "release ")
"""How instructions begin that want no hand there."""
_HANDS = ("the gripper", "the robot hand", "the robot gripper", "the arm")


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def present(nouns: Sequence[str]) -> frozenset[str]:
    """Words for what may be in a scene where such is spoken of, by any name.

    >>> "trunk" in present(["red chest"])
    True
    """
    words = {word for noun in nouns for word in noun.split()}
    return frozenset(words.union(_ANYWHERE, *(names for names in ALIKE if words & {*names})))


def spoken_of(fact: str) -> frozenset[str]:
    """The nouns of a fact, each without what describes it; none where it is of the gripper alone."""
    kind, _, rest = fact.partition(":")
    if kind in ("gripper", "height"):
        return frozenset()
    if kind == "state":
        rest = rest.partition("=")[0]
    elif kind in ("hand", "colour"):
        rest = rest.partition(" ")[2]
    elif kind == "object":
        rest = rest.split("|")[1]
    elif kind in ("thing", "want"):
        rest = rest.rpartition("|")[2]
    return frozenset(noun.split()[-1] for noun in rest.split("/"))


def _nouns() -> tuple[str, ...]:
    return tuple(sorted({words.noun[0] for words in WORDS.values()}))


@cache
def sentences(fact: str) -> tuple[str, ...]:
    """The paraphrases of a fact, lower case."""
    kind, _, rest = fact.partition(":")
    if kind == "state":
        return _state_sentences()[rest]
    if kind == "instruction":
        return (instruction(rest),)
    if kind == "ask":
        return ways_to_ask(*ASKS[rest])
    if kind == "do":
        if rest != "?":
            return ways_to_handle(tuple(rest.split("/")))
        named = {part for words in WORDS.values() for noun in words.noun for part in noun.split()}
        return ways_to_name_it((*named, *_HELD_OUT_NOUNS))
    if kind in ("thing", "want"):
        outcome, holds, noun = rest.split("|")
        if kind == "want":
            asked = ways_to_ask(outcome, holds == "0", (noun,))
            return tuple(said for said in asked if not said.startswith(_LET_BE))
        return tuple(said.format(f"the {noun}") for said in OUTCOMES[outcome][1 if holds == "1" else 3])
    if kind == "half":
        return tuple(
            f"the {noun} is {how}"
            for noun in rest.split("/")
            for how in (
                ("half open", "ajar")
                if noun.split()[-1] in ("door", "drawer", "window")
                else ("half way", "partly moved")
            )
        )
    if kind == "scene":
        return tuple(
            f"{a}{_a(noun)}{b}"
            for noun in rest.split("/")
            for a in ("a robot arm and ", "", "there is ")
            for b in ("", " on a table")
        )
    if kind == "colour":
        colour, noun = rest.split(" ", 1)
        return tuple(
            f"{a} {colour} {n}" for n in noun.split("/") for a in ("the", "a robot and the")
        ) + tuple(f"the {n} is {colour}" for n in noun.split("/"))
    if kind == "gripper":
        return tuple(
            f"{hand} is {rest}" for hand in ("the gripper", "the robot's claw", "the hand of the robot")
        )
    if kind == "height":
        return tuple(f"{hand} is {rest}" for hand in _HANDS)
    if kind == "hand":
        relation, noun = rest.split(" ", 1)
        verb = {
            "touching": ("is touching", "is at", "has reached"),
            "near": ("is near", "is close to"),
            "far": ("is far from", "is far away from"),
            "above": ("is above", "is over"),
            "holding": ("holds", "is holding", "has grasped"),
        }[relation]
        return tuple(f"{hand} {v} the {n}" for hand in _HANDS for v in verb for n in noun.split("/"))
    if kind == "object":
        relation, noun, goal = rest.split("|")
        return tuple(
            f"the {n} is {v}"
            for n in noun.split("/")
            for v in {
                "lifted": ("lifted off the table", "in the air"),
                "down": ("lying on the table", "not lifted"),
                "near": (f"near {goal}", f"close to {goal}"),
                "far": (f"far from {goal}", f"far away from {goal}"),
            }[relation]
        )
    raise ValueError(f"unknown fact {fact!r}")


@cache
def _state_sentences() -> dict[str, tuple[str, ...]]:
    table: dict[str, list[str]] = {}
    for task in train_tasks():
        words = WORDS[task]
        for key, *said in (words.start, words.end):
            known = table.setdefault(key, [])
            known += [s for s in said if s not in known]
        # The task's own instruction, twice: it is what users will say.
        if words.end[0] != "object=at goal":
            table[words.end[0]] += [instruction(task)] * 2
    for task in ("push-v3", "pick-place-v3", "push-back-v3"):
        table["object=at goal"].append(instruction(task))
    return {key: tuple(said) for key, said in table.items()}


Ranking = tuple[str, str, int]
"""A fact, the number of the state vector that says how true it is, +1 where it grows, -1 where it falls."""


def rankings(task: str) -> tuple[tuple[Ranking, ...], ...]:
    """Sentences that are more or less true, in groups.

    First the fact `instruction:<task>`, the task's own sentence, which the simulator's reward orders; then
    the hand's way to the object; then instructions to do something with it, or with what nobody here has a
    name for, which want the hand there, too; then the states: `window=open` grows with the fraction that the
    window is open, `window=closed` falls with it; then those who ask for a state, who also want the hand to
    be there (numbers named `asked ...`).
    """
    words = WORDS[task]
    noun = "/".join(words.noun)
    own = ((f"instruction:{task}", "reward", 1),)
    hand = ((f"hand:near {noun}", "hand_object", -1), (f"hand:far {noun}", "hand_object", 1))
    do = ((f"do:{noun}/object", "hand_object", -1), ("do:?", "hand_object", -1))
    end, start = f"state:{words.end[0]}", f"state:{words.start[0]}"
    states: tuple[tuple[str, str, int], ...] = ()
    if words.joint is not None:
        states = ((end, "fraction", 1), (start, "fraction", -1))
    elif _has_place(task):
        near, far = (f"object:{how}|{noun}|{words.goal}" for how in ("near", "far"))
        states = tuple(
            (fact, "object_goal", sign) for fact, sign in ((end, -1), (near, -1), (start, 1), (far, 1))
        )
    asks = tuple(
        (f"ask:{key}", f"asked {name}", sign)
        for fact, name, sign in states
        if (key := fact.removeprefix("state:")) in ASKS
    )
    return tuple(group for group in (own, hand, do, states, asks) if group)


def rankings_of(thing: Thing) -> tuple[tuple[Ranking, ...], ...]:
    """The same of one of several things: the way to it, doing something with it, its states, asking for them.

    Of a thing of which nobody may ask for the one state, for a held-out task does, nobody asks for the other:
    a model would learn that whoever speaks of doors wants them closed.
    """
    names = thing.names
    hand = [
        (f"hand:{how} {n}", "hand_object", sign) for n in names for how, sign in (("near", -1), ("far", 1))
    ]
    do = [(f"do:{n}", "hand_object", -1) for n in names]
    groups: list[list[Ranking]] = [hand, do]
    if thing.kind:
        both = [(f"{thing.kind}|{holds}|{n}", sign) for n in names for holds, sign in ((1, 1), (0, -1))]
        groups.append([(f"thing:{rest}", "fraction", sign) for rest, sign in both])
        if all(sentences(f"want:{rest}") for rest, _ in both):
            groups.append([(f"want:{rest}", "asked fraction", sign) for rest, sign in both])
    return tuple(tuple(group) for group in groups)


class _Known:
    """Facts that hold and facts that do not, in the making."""

    def __init__(self) -> None:
        self.true: list[str] = []
        self.false: list[str] = []

    def either(self, holds: bool, key: str, other: str | None = None) -> None:
        """A fact holds or does not; of the `other`, where there is one, the contrary is so."""
        (self.true if holds else self.false).append(key)
        if other:
            (self.false if holds else self.true).append(other)

    def of_hand(self, hand: np.ndarray, opening: float) -> None:
        """Of a gripper, [3] metres and 0 (closed) to 1, wherever it is."""
        if opening > 0.75 or opening < 0.45:
            self.either(opening > 0.75, "gripper:open", "gripper:closed")
        if hand[2] > 0.25 or hand[2] < 0.12:
            self.either(hand[2] > 0.25, "height:high up", "height:low over the table")

    def of_distance(self, distance: float, noun: str) -> None:
        """Of the way from the hand to a thing, metres."""
        self.either(distance < 0.05, f"hand:touching {noun}")
        if distance < 0.1 or distance > 0.2:
            self.either(distance < 0.1, f"hand:near {noun}", f"hand:far {noun}")

    def of_colour(self, colour: str, noun: str, generator: np.random.Generator) -> None:
        """Of a thing's colour, and of two that it has not; nothing where it has none to name."""
        if colour:
            self.true.append(f"colour:{colour} {noun}")
            others = [c for c in PALETTE if c != colour]
            self.false += [f"colour:{c} {noun}" for c in generator.choice(others, 2, replace=False)]


def facts_of_things(
    things: Sequence[Thing],
    distances: np.ndarray,
    fractions: np.ndarray,
    *,
    hand: np.ndarray,
    opening: float,
    generator: np.random.Generator,
) -> tuple[list[str], list[str]]:
    """`facts` of a scene of several things.

    Args:
        things: T of them.
        distances: of each from the hand, metres [T].
        fractions: how far the first outcome of its kind holds, [T] in [0, 1], NaN where it has none.
        hand: gripper position, metres [3]. opening: of the gripper, 0 (closed) to 1.
        generator: draws which absent nouns and colours are listed as false.
    """
    nouns = [thing.noun for thing in things]
    others = [n for n in _nouns() if not any(n in noun or noun in n for noun in nouns)]
    known = _Known()
    known.of_hand(hand, opening)
    known.true += [f"scene:{noun}" for noun in nouns]
    known.false += [f"scene:{n}" for n in generator.choice(others, 2, replace=False)]
    for thing, distance, fraction in zip(things, distances, fractions, strict=True):
        known.of_colour(thing.colour, thing.noun, generator)
        for name in thing.names:
            known.of_distance(float(distance), name)
            yes, no = (f"thing:{thing.kind}|{holds}|{name}" for holds in (1, 0))
            if fraction > 0.85 or fraction < 0.15:
                known.either(fraction > 0.85, yes, no)
                known.false.append(f"half:{name}")
            elif 0.3 < fraction < 0.7:
                known.true.append(f"half:{name}")
                known.false += [yes, no]
    return known.true, known.false


def _has_place(task: str) -> bool:
    """Whether the object itself must get to the goal."""
    return bool(WORDS[task].goal) and not task.startswith(("reach", "hand-insert", "stick"))


def facts(
    task: str,
    *,
    hand: np.ndarray,
    opening: float,
    position: np.ndarray,
    start: np.ndarray,
    goal: np.ndarray,
    joint: float | None,
    success: bool,
    grasped: bool,
    colour: str,
    generator: np.random.Generator,
) -> tuple[list[str], list[str]]:
    """Facts that hold in a frame, and facts of the same scene that do not.

    Args:
        task: a training task.
        hand: gripper position, metres [3]. position: the object's, now. start: the object's, at reset.
        goal: where it belongs. joint: the mechanism's value, None for a free object.
        opening: of the gripper, 0 (closed) to 1.
        success: the task's own predicate. grasped: both fingers press on the object.
        colour: the object's colour name, or "" if it has none to name.
        generator: draws which absent nouns and colours are listed as false.
    """
    words = WORDS[task]
    noun = "/".join(words.noun)
    known = _Known()
    true, false, either = known.true, known.false, known.either
    true.append(f"scene:{noun}")
    others = [n for n in _nouns() if n not in words.noun and not any(n in w or w in n for w in words.noun)]
    false += [f"scene:{n}" for n in generator.choice(others, 2, replace=False)]

    known.of_hand(hand, opening)
    distance = float(np.linalg.norm(hand - position))
    known.of_distance(distance, noun)
    lateral = float(np.linalg.norm((hand - position)[:2]))
    either(lateral < 0.05 and hand[2] - position[2] > 0.05, f"hand:above {noun}")
    known.of_colour(colour, noun, generator)
    if words.joint is not None:
        if joint is None:
            raise ValueError(f"{task} has a mechanism: its joint value is needed")
        _, low, high = words.joint
        fraction = (joint - low) / (high - low)
        if fraction < 0.15 or fraction > 0.8:
            either(fraction > 0.8, f"state:{words.end[0]}", f"state:{words.start[0]}")
            false.append(f"half:{noun}")
        elif 0.3 < fraction < 0.7:
            true.append(f"half:{noun}")
            false += [f"state:{words.end[0]}", f"state:{words.start[0]}"]
        return true, false
    either(grasped and distance < 0.08, f"hand:holding {noun}")
    if words.body != "puck_channel" and abs(position[2] - start[2]) < 0.3:
        either(position[2] - start[2] > 0.04, f"object:lifted|{noun}|", f"object:down|{noun}|")
    moved = float(np.linalg.norm(position - start))
    if success:
        true.append(f"state:{words.end[0]}")
        false.append(f"state:{words.start[0]}")
    elif moved < 0.04 or words.start[0].split("=")[1].startswith(("not", "out", "off", "away")):
        true.append(f"state:{words.start[0]}")
        false.append(f"state:{words.end[0]}")
    else:
        false.append(f"state:{words.end[0]}")
    reach, whole = float(np.linalg.norm(position - goal)), float(np.linalg.norm(start - goal))
    if _has_place(task) and whole > 0.1:
        if reach < 0.3 * whole:
            either(True, f"object:near|{noun}|{words.goal}", f"object:far|{noun}|{words.goal}")
        elif reach > 0.7 * whole:
            either(False, f"object:near|{noun}|{words.goal}", f"object:far|{noun}|{words.goal}")
    return true, false
