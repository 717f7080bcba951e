"""The sentence that asks for the hand at what an instruction names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_reward.instructions import approach
from vlm_reward.tasks import all_tasks, instruction

COLOURS = st.sampled_from(["", "red ", "small green "])
THINGS = st.sampled_from(["drawer", "coffee machine", "door lock", "mug"])
VERBS = st.sampled_from(["open", "pick up", "gently push", "turn off", "Rotate"])
TAILS = st.sampled_from(["", " by its handle", " into the net", " 180 degrees", " and lift it", "."])


@pytest.mark.parametrize(
    ("said", "there"),
    [
        ("open the green drawer", "touch the green drawer"),
        ("press the button on the box", "touch the button"),
        ("bypass the wall and press the button", "touch the button"),
        ("pick up a nut and place it onto a peg", "touch the nut"),
        ("turn on faucet", "touch the faucet"),
        ("Pull the lever down 90 degrees", "touch the lever"),
        ("the drawer is open", None),
        ("a robot arm at a table", None),
        ("there is a mug on a table", None),
        ("jump", None),
        ("", None),
    ],
)
def test_the_hand_is_wanted_at_what_is_named_first(said, there):
    assert approach(said) == there


def test_each_of_the_fifty_tasks_names_a_thing():
    named = {task: approach(instruction(task)) for task in all_tasks()}
    assert all(named.values())
    assert named["door-open-v3"] == named["door-close-v3"] == "touch the door"
    assert named["stick-push-v3"] == "touch the blue stick"


@given(verb=VERBS, colour=COLOURS, thing=THINGS, tail=TAILS)
def test_verb_and_tail_do_not_count(verb, colour, thing, tail):
    assert approach(f"{verb} the {colour}{thing}{tail}") == f"touch the {colour}{thing}"
