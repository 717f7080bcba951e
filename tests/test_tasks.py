"""Tasks, splits and instructions are the paper's."""

import pytest
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

from vlm_reward.tasks import HELD_OUT, OPPOSITES, all_tasks, contrary, instruction, opposite, train_tasks


def test_the_fifty_tasks_are_metaworlds():
    assert set(all_tasks()) == set(ALL_V3_ENVIRONMENTS)
    assert len(all_tasks()) == 50


def test_forty_six_instructions_differ():
    assert len({instruction(task) for task in all_tasks()}) == 46


@pytest.mark.parametrize(("split", "count"), [("paper", 44), ("strict", 40)])
def test_splits_leave_out_the_held_out_tasks_and_all_button_presses(split, count):
    tasks = train_tasks(split)
    assert len(tasks) == len(set(tasks)) == count
    assert not set(HELD_OUT) & set(tasks)
    assert not [task for task in tasks if task.startswith("button-press")]


def test_strict_is_part_of_paper_and_drops_the_underlined():
    dropped = set(train_tasks("paper")) - set(train_tasks("strict"))
    assert dropped == {"coffee-button-v3", "coffee-push-v3", "coffee-pull-v3", "door-unlock-v3"}


def test_held_out_sentences():
    said = [instruction(task) for task in HELD_OUT]
    assert said == ["press the button", "open the green drawer", "open the door with a revolving joint"]


def test_opposites_are_training_tasks_with_different_sentences():
    for pair in OPPOSITES:
        assert set(pair) <= set(train_tasks())
        assert instruction(pair[0]) != instruction(pair[1])
        assert (opposite(pair[0]), opposite(pair[1])) == pair[::-1]
    assert opposite("drawer-close-v3") is None  # its opposite is held out
    assert contrary("drawer-open-v3") == "drawer-close-v3"  # which may be said
    assert contrary("window-open-v3") == "window-close-v3"
    assert contrary("button-press-v3") is None
    assert {contrary(task) for task in all_tasks()} <= {None, *train_tasks()}


def test_unknown_names_are_errors_that_help():
    with pytest.raises(
        ValueError, match=r"unknown Meta-World task 'drawer-opn-v3'; did you mean drawer-open-v3"
    ):
        instruction("drawer-opn-v3")
    with pytest.raises(ValueError, match="unknown split 'all'; choose one of paper, strict"):
        train_tasks("all")
