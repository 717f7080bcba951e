"""The embedded backbone's making: captions, scenes, language, losses, and a real (tiny) run of it all."""

import json
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from training import captions, order, pretrain, probe, scenes
from training.captions import WORDS, facts, rankings, sentences
from training.language import UNTAUGHT, instructions, is_held_out, lessons
from vlm_reward.cameras import WORKSPACE, CameraRig, CameraSpec, project, projections
from vlm_reward.encoder import DualEncoder
from vlm_reward.envs import make_env
from vlm_reward.reward_model import RewardModel
from vlm_reward.tasks import HELD_OUT, INSTRUCTIONS, instruction, train_tasks


def test_every_training_task_has_words_and_no_held_out_one():
    assert set(WORDS) == set(train_tasks())


def test_no_training_sentence_says_what_a_held_out_task_asks_for():
    for task in HELD_OUT:
        assert is_held_out(instruction(task))
    for sentence in (
        "pull the drawer open",
        "please press the red button",
        "slide open the door",
        "hit the button",
    ):
        assert is_held_out(sentence), sentence
    for sentence in ("the drawer is open", "close the green drawer", "push the button on the coffee machine"):
        assert not is_held_out(sentence), sentence
    keys = {key for words in WORDS.values() for key in (words.start[0], words.end[0])}
    said = [s for key in keys for s in sentences(f"state:{key}")] + instructions(3000, 1)
    assert not [s for s in said if is_held_out(s)]
    assert not {INSTRUCTIONS[task] for task in HELD_OUT} & set(said)


def _window(joint: float, hand=(0.0, 0.4, 0.3)) -> tuple[list[str], list[str]]:
    return facts(
        "window-open-v3",
        hand=np.array(hand),
        opening=1.0,
        position=np.array([0.0, 0.7, 0.15]),
        start=np.array([0.0, 0.7, 0.15]),
        goal=np.array([0.2, 0.7, 0.15]),
        joint=joint,
        success=False,
        grasped=False,
        colour="",
        generator=np.random.default_rng(0),
    )


def test_facts_of_a_window():
    true, false = _window(0.0)
    assert "state:window=closed" in true
    assert "state:window=open" in false
    assert "gripper:open" in true
    assert "hand:far window" in true
    true, false = _window(0.2, hand=(0.0, 0.7, 0.17))
    assert "state:window=open" in true
    assert "state:window=closed" in false
    assert "hand:touching window" in true
    true, false = _window(0.1)
    assert "half:window" in true
    assert {"state:window=open", "state:window=closed"} <= set(false)
    assert not set(true) & set(false)


def test_an_instruction_is_a_paraphrase_of_the_state_it_asks_for():
    assert "open the window using the handle" in sentences("state:window=open")
    assert "close the green drawer" in sentences("state:drawer=closed")
    assert "the drawer is open" in sentences("state:drawer=open")
    assert len(sentences("hand:near nut/ring")) == 16


def test_lessons_name_the_outcome_and_that_of_the_opposite():
    taught = lessons(4000, 0)
    assert taught == lessons(4000, 0) != lessons(4000, 1)
    assert not [one for one in taught if is_held_out(one.asked)]
    said = " ".join(s for each in taught for s in each)
    assert not set(said.split()) & (set(UNTAUGHT) - {"switch"})  # one may switch on a lamp, not a switch
    assert "the switch" not in said
    opened = [one for one in lessons(2000, 0, ("box", "pot")) if one.asked == "open the box"]
    assert opened
    for one in opened:
        assert one.outcome in ("the box is open", "the box has been opened")
        assert one.contrary in ("the box is closed", "the box is shut")
        near = (
            "the gripper is at the box",
            "the robot hand has reached the box",
            "the gripper is near the box",
        )
        assert one.there in near
    away = [one for one in taught if one.asked.startswith("stay away from")]
    assert away
    assert all(one.there == one.outcome for one in away)  # the hand is not wanted there


def test_each_task_orders_its_images_by_reward_and_by_state():
    for task in train_tasks():
        first, hand, do, *states = rankings(task)
        assert first == ((f"instruction:{task}", "reward", 1),)
        assert {name for _, name, _ in (*hand, *do)} == {"hand_object"}
        for fact, name, sign in (*hand, *do, *(each for kind in states for each in kind)):
            assert name.removeprefix("asked ") in scenes.STATE
            assert name in order.GAPS
            assert sign in (-1, 1)
            assert sentences(fact)
    assert rankings("window-open-v3")[3] == (
        ("state:window=open", "fraction", 1),
        ("state:window=closed", "fraction", -1),
    )
    assert rankings("window-open-v3")[4] == (
        ("ask:window=open", "asked fraction", 1),
        ("ask:window=closed", "asked fraction", -1),
    )
    assert "close the window using the handle" in sentences("state:window=closed")
    assert sentences("instruction:sweep-v3") == ("sweep the object off the table",)


def test_nobody_asks_for_what_a_held_out_task_wants():
    assert "slide the window open slowly" in sentences("ask:window=open")
    assert {"door=open", "drawer=open"}.isdisjoint(captions.ASKS)
    assert not [s for key in captions.ASKS for s in sentences(f"ask:{key}") if is_held_out(s)]
    assert len(rankings("door-close-v3")[4]) == len(rankings("drawer-close-v3")[4]) == 1


def test_to_do_something_with_a_thing_the_hand_must_get_there():
    handled = {fact for task in train_tasks() for fact, *_ in rankings(task)[2]}
    said = {sentence for fact in handled for sentence in sentences(fact)}
    assert {"wipe the window", "grab the object", "shake the toaster"} <= said
    assert not [sentence for sentence in said if is_held_out(sentence)]
    unnamed = {noun for sentence in sentences("do:?") for noun in sentence.split(" the ")[1:]}
    assert "toaster" in unnamed
    assert unnamed.isdisjoint({noun for words in WORDS.values() for noun in words.noun})
    assert unnamed.isdisjoint({"button", "drawer", "door"})


def test_who_asks_for_a_state_wants_the_hand_there_too():
    state = np.zeros((2, len(scenes.STATE)), np.float32)
    state[:, scenes.STATE.index("fraction")] = (1.0, 0.25)
    state[:, scenes.STATE.index("hand_object")] = (0.0, 1.5)  # there, and 30 cm off
    assert order.measured(state, "fraction", -1).tolist() == [-1.0, -0.25]
    near = 0.5 * np.exp(-1)
    assert order.measured(state, "asked fraction", 1) == pytest.approx([1, 0.25 + 0.75 * near])
    assert order.measured(state, "asked fraction", -1) == pytest.approx([0.5, 0.75 + 0.25 * near])
    state[:, scenes.STATE.index("object_goal")] = (0.0, 3.0)  # at the goal, and 60 cm off
    assert order.measured(state, "asked object_goal", -1) == pytest.approx([1, near])
    assert order.measured(state, "asked object_goal", 1) == pytest.approx([0.5, 1])


def test_shards_are_complete_and_repeatable(shards):
    again = scenes.make_shard("push-v3", 28, 2, (0, scenes.train_tasks().index("push-v3"), 0))
    with np.load(shards / "000-push-v3.npz") as shard:
        assert shard["frames"].shape == (48, 28, 28, 3)
        assert np.array_equal(shard["frames"], again["frames"])
        assert np.array_equal(shard["state"], again["state"], equal_nan=True)
        assert json.loads(str(shard["header"]))["task"] == "push-v3"
        assert shard["frames"].std() > 10


def test_apart_shows_the_same_moment_with_another_state():
    shard = scenes.make_shard("drawer-close-v3", 28, 2, (5,), apart=True)
    partner, state = shard["partner"], shard["state"]
    paired = np.flatnonzero(partner >= 0)
    assert len(paired) > len(partner) / 2
    assert (partner[partner[paired]] == paired).all()
    one, other = paired, partner[paired]
    names = scenes.STATE
    hand = [names.index(f"hand_{axis}") for axis in "xyz"]
    fraction = names.index("fraction")
    np.testing.assert_allclose(state[one][:, hand], state[other][:, hand], atol=1e-6)
    assert (shard["view"][one] == shard["view"][other]).all()
    gap = np.abs(state[one, fraction] - state[other, fraction])
    assert np.median(gap) > 0.3
    differs = np.abs(shard["frames"][one].astype(int) - shard["frames"][other]).max((1, 2, 3))
    assert np.median(differs) > 30
    plain = scenes.make_shard("drawer-close-v3", 28, 2, (5,))
    assert len(plain["partner"]) == 48
    assert (plain["partner"] == -1).all()


def test_cropped_scenes_show_a_quarter_of_the_image_and_know_where_things_are_in_it():
    whole = scenes.make_shard("push-v3", 64, 1, (5,))
    part = scenes.make_shard("push-v3", 32, 1, (5,), crop=True)
    crops = [WORKSPACE[CameraSpec().cameras[view]] for view in whole["view"]]
    for one, (left, top, side), points, own, near in zip(
        whole["frames"], crops, whole["points"], part["frames"], part["points"], strict=True
    ):
        y, x, size = (round(64 * share) for share in (top, left, side))
        assert np.abs(one[y : y + size, x : x + size].astype(int) - own).mean() < 3
        expected = (points - (2 * left + side - 1, 1 - 2 * top - side)) / side
        seen = np.isfinite(near)
        np.testing.assert_allclose(near[seen], expected[seen], atol=1e-5)
        assert np.array_equal(seen, np.isfinite(expected) & (np.abs(expected) <= 1).all(1, keepdims=True))


def test_a_model_of_whole_images_is_not_trained_on_parts_of_them(shards, tmp_path):
    scenes.main(scenes.Config(tmp_path, 28, 1, 1, crop=True, tasks=("push-v3",), workers=1))
    of_parts = order.Scenes([tmp_path], ["push-v3"])
    assert of_parts.crops == WORKSPACE
    of_parts.check_crop(WORKSPACE)
    with pytest.raises(ValueError, match=r"show the part of .* the model looks at whole"):
        of_parts.check_crop(None)
    with pytest.raises(ValueError, match=r"some scenes in .* show whole images, some parts"):
        order.Scenes([tmp_path, shards], ["push-v3"])


def test_scenes_of_several_folders_have_their_frames_in_the_order_of_the_shards(shards, tmp_path):
    scenes.main(scenes.Config(tmp_path / "28", 28, 1, 1, tasks=("push-v3",), workers=1))
    file, own = shards / "000-push-v3.npz", tmp_path / "28" / "000-push-v3.npz"
    together = order.Scenes([shards, tmp_path / "28"], ["push-v3"])
    frames = [np.load(each)["frames"] for each in (file, own)]
    np.testing.assert_array_equal(together.frames, np.concatenate(frames))
    scenes.main(scenes.Config(tmp_path / "14", 14, 1, 1, tasks=("push-v3",), workers=1))
    with pytest.raises(
        ValueError, match=r"frames of another size than others, \[14, 28\] pixels: render anew"
    ):
        order.Scenes([shards, tmp_path / "14"], ["push-v3"])


def test_plain_scenes_keep_the_colours():
    shown = {plain: scenes.make_shard("push-v3", 28, 3, (5,), plain=plain)["true"] for plain in (0.0, 1.0)}
    colours = {
        plain: {fact for facts in said for fact in facts if fact.startswith("colour:")}
        for plain, said in shown.items()
    }
    assert colours[1.0] == {"colour:red object/puck/cylinder"}
    assert colours[0.0] - colours[1.0]


def test_visits_go_about_the_object_wherever_it_is():
    names, shards = scenes.STATE, {}
    for visits in (0.0, 1.0):
        state = scenes.make_shard("door-close-v3", 28, 8, (5,), visits=visits)["state"]
        shards[visits] = state[:, names.index("hand_object")] / 5, state[:, names.index("fraction")]
    (beside, _), (about, fraction) = shards[0.0], shards[1.0]
    assert (about < 0.06).mean() > 0.25 > (beside < 0.06).mean()  # the hand is there, metres
    near = fraction[about < 0.08]
    for low, high in ((-1.0, 0.2), (0.3, 0.7), (0.8, 2.0)):
        assert ((low < near) & (near < high)).any()


def test_visits_go_to_the_goal_as_often_as_asked():
    names, near = scenes.STATE, {}
    hand, goal = (slice(names.index(f"{what}_x"), names.index(f"{what}_z") + 1) for what in ("hand", "goal"))
    for goals in (0.0, 1.0):
        state = scenes.make_shard("drawer-close-v3", 28, 3, (5,), visits=1.0, goals=goals)["state"]
        near[goals] = np.linalg.norm(state[:, hand] - state[:, goal], axis=1) / 5
    assert np.median(near[1.0]) < 0.7 * np.median(near[0.0])


def test_far_visits_go_anywhere_within_reach():
    names, shards = scenes.STATE, {}
    for far in (0.0, 1.0):
        state = scenes.make_shard("drawer-close-v3", 28, 4, (5,), visits=1.0, far=far)["state"]
        hand = state[:, [names.index(f"hand_{axis}") for axis in "xyz"]] / 5 + scenes.CENTRE
        shards[far] = state[:, names.index("hand_object")] / 5, hand
    (about, _), (anywhere, hand) = shards[0.0], shards[1.0]
    assert (about > 0.2).mean() < 0.3 < 0.5 < (anywhere > 0.2).mean()  # metres
    low, high = scenes.REACH
    assert (hand > low - 0.05).all()
    assert (hand < high + 0.05).all()
    assert (np.ptp(hand, axis=0) > 0.4 * (high - low)).all()


def test_sight_is_how_often_a_sentence_orders_as_the_simulator_does(shards):
    data = order.Scenes([shards], ["window-open-v3", "push-v3"])
    near, fraction = (data.state[:, scenes.STATE.index(name)] for name in ("hand_object", "fraction"))

    images = np.stack([-near, np.nan_to_num(fraction)], 1)  # embedded as what is so in them

    class Model:  # embeds a sentence as what it asks for
        start_weight = 0.0

        def embed_text(self, said):
            return np.array([[1.0, 0.0] if "near the" in s or "close to" in s else [0.0, 1.0] for s in said])

    found = probe.sight(Model(), data, images)  # pyright: ignore[reportArgumentType]
    assert found["near"] == 100
    # Right of the window from all three cameras; of the object all score 0 under its state, which orders nothing.
    assert found["state"] == 50


def test_half_of_a_group_are_partners_of_the_other(shards, tmp_path):
    shard = scenes.make_shard("window-open-v3", 28, 2, (5,), apart=True)
    facts = sorted({fact for key in ("true", "false") for row in shard[key] for fact in row})
    for key in ("true", "false"):
        shard[key] = np.array([[facts.index(row[0])] for row in shard[key]], np.int16)
    header = {"task": "window-open-v3", "facts": facts, "size": 28}
    np.savez(tmp_path / "000-window-open-v3.npz", header=np.array(json.dumps(header)), **shard)
    data = order.Scenes([shards, tmp_path], ["window-open-v3"])  # the first folder's have none
    assert (data.partner[:48] == -1).all()
    paired = np.flatnonzero(data.partner >= 0)
    assert paired.min() >= 48
    assert (data.partner[data.partner[paired]] == paired).all()
    rng = np.random.default_rng(0)
    orders = order.Orders(data)
    found = 0
    for _ in range(12):
        drawn, ranked = orders.draw(2, 8, rng)
        drawn = drawn.reshape(2, 8)
        for group in drawn:  # of one camera
            assert any(np.isin(group, rows).all() for rows in data.of_view[0])
        halves = data.partner[drawn[:, :4]]
        assert ((halves == drawn[:, 4:]) | (halves < 0)).all()
        assert [one.group for one in ranked] == [0] * 5 + [
            1
        ] * 5  # own, hand, do; then states, and who asks for one
        for number, one in enumerate(ranked):
            of = data.partner[drawn[one.group]]
            moved = (of >= 0) & (of < drawn[one.group])
            if number % 5 != 3 or not moved.any():  # all but statements of a state
                assert one.pairs is None
                continue
            assert one.pairs is not None
            for i, j in np.ndindex(8, 8):
                partners = of[i] == drawn[one.group][j]
                assert one.pairs[i, j] == ((moved[i] and moved[j]) or partners)
            found += 1
    assert found > 3


def test_only_training_tasks_are_rendered(tmp_path):
    with pytest.raises(ValueError, match="training tasks alone, got drawer-open-v3"):
        scenes.main(scenes.Config(tmp_path, tasks=("drawer-open-v3",)))
    for wrong, message in (
        ({"visits": 1.5}, "--visits is a share of the rollouts, from 0 to 1, got 1.5"),
        ({"plain": -0.1}, "--plain is a share"),
        ({"goals": 2.0}, "--goals is a share of the visits"),
        ({"far": -1.0}, "--far is a share of the visits"),
        ({"visits": 0.5, "actions": (tmp_path / "a.npz",)}, "no room for --visits"),
    ):
        with pytest.raises(ValueError, match=message):
            scenes.main(scenes.Config(tmp_path, **wrong))


def test_projection_finds_the_hand_in_the_picture():
    """Hide the hand's neighbourhood in world space: the pixels that change surround the projected point."""
    env = make_env("reach-v3")
    env.reset(seed=0)
    task = env.unwrapped
    for camera in ("corner", "corner3"):
        with CameraRig(env, CameraSpec((camera,), 96, 96)) as rig:
            before = rig.render()[0].astype(int)
            pads = [
                task.model.geom(i).id for i in range(task.model.ngeom) if "pad" in task.model.geom(i).name
            ]
            claws = [
                i
                for i in range(task.model.ngeom)
                if "claw" in task.model.body(task.model.geom_bodyid[i]).name
            ]
            own = task.model.geom_rgba.copy()
            task.model.geom_matid[pads + claws] = -1
            task.model.geom_rgba[pads + claws] = (1, 0, 1, 1)
            changed = np.abs(rig.render()[0] - before).sum(-1) > 60
            task.model.geom_rgba[:] = own
        (projection,) = projections(task.model, task.data, [camera])
        ((u, v),) = project(task.metaworld.tcp_center[None], projection)
        rows, columns = np.nonzero(changed)
        assert abs(columns.mean() - (u + 1) / 2 * 96) < 8
        assert abs(rows.mean() - (1 - v) / 2 * 96) < 8
    env.close()


def test_known_facts(shards):
    data = order.Scenes([shards], ["window-open-v3", "push-v3"])
    assert len(data) == 96
    window, push = data.task == 0, data.task == 1
    open_ = data.facts.index("state:window=open")
    assert (data.known[push, open_] == -1).all()  # there is no window to be open
    closed = data.facts.index("state:window=closed")
    assert ((data.known[window, open_] > 0) <= (data.known[window, closed] < 0)).all()
    row = int(np.flatnonzero(window)[0])
    assert all(data.known[row, fact] == -1 for fact in data.own_false(row))
    with pytest.raises(FileNotFoundError, match="no scenes of sweep-v3"):
        order.Scenes([shards], ["sweep-v3"])


def test_sigmoid_loss_by_hand():
    # The true one: log(1 + e^-2) = .126928; the false one: log(1 + e^1) = 1.313262; the unknown: nothing.
    loss = pretrain.sigmoid_loss(torch.tensor([[2.0, 1.0, 5.0]]), torch.tensor([[1.0, -1.0, 0.0]]))
    assert loss.item() == pytest.approx(0.126928 + 1.313262, abs=1e-5)


def test_order_loss_by_hand():
    # 1 > 0 in value, .2 < .5 in score: log(1 + e^(5 * .3)) = 1.701413; the third lies within the gap of both.
    scores, nan = torch.tensor([[0.2, 0.5, 0.9]]), float("nan")
    loss = order.order_loss(scores, torch.tensor([[1.0, 0.0, nan]]), torch.tensor([0.1]))
    assert loss.item() == pytest.approx(1.701413, abs=1e-5)
    assert order.order_loss(scores, torch.tensor([[1.0, 0.95, 0.9]]), torch.tensor([0.2])).item() == 0
    # Both pairs that differ: (0 over 1) as above, (0 over 2): log(1 + e^(5 * .7)) = 3.529751.
    loss = order.order_loss(scores, torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([0.1]))
    assert loss.item() == pytest.approx((1.701413 + 3.529751) / 2, abs=1e-5)
    # Of these only the second may be compared; a second sentence, with that pair alone, weighs the same, not less
    # for its fewer pairs; a third orders nothing and does not count.
    values = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, nan], [nan, nan, nan]])
    three, gaps = scores.expand(3, 3), torch.full((3,), 0.1)
    loss = order.order_loss(three, values, gaps)
    assert loss.item() == pytest.approx(((1.701413 + 3.529751) / 2 + 1.701413) / 2, abs=1e-5)
    pairs = torch.zeros(3, 3, 3, dtype=torch.bool)
    pairs[:2, 0, 2] = True
    assert order.order_loss(three, values, gaps, pairs).item() == pytest.approx(3.529751, abs=1e-5)


def test_order_loss_with_a_margin_wants_more_score_for_more_value():
    # A score that rises by .1 a unit meets a margin of .1: log 2 for each pair, far or near.
    values = torch.tensor([[0.0, 1.0, 6.0, float("nan")]])
    met = order.order_loss(0.1 * values.nan_to_num(), values, torch.tensor([0.5]), margin=0.1)
    assert met.item() == pytest.approx(0.693147, abs=1e-5)
    # 6 over 1 scored .2 higher, .5 wanted: log(1 + e^(5 * .3)) = 1.701413, where the order alone asks for
    # log(1 + e^(-5 * .2)) = .313262.
    scores, values = torch.tensor([[0.4, 0.2]], requires_grad=True), torch.tensor([[6.0, 1.0]])
    loss = order.order_loss(scores, values, torch.tensor([0.5]), margin=0.1)
    assert loss.item() == pytest.approx(1.701413, abs=1e-5)
    assert order.order_loss(scores, values, torch.tensor([0.5])).item() == pytest.approx(0.313262, abs=1e-5)
    loss.backward()  # d/ds: -5 * sigmoid(1.5) = -4.087872
    assert scores.grad is not None
    assert scores.grad[0].tolist() == pytest.approx([-4.087872, 4.087872], abs=1e-5)


def test_forwards_knows_each_demonstrations_own_frames_alone():
    first, second = (SimpleNamespace(start=start, length=4) for start in (0, 4))
    values = order.forwards(np.array([1, 3, 4]), [first, second])  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(values, [[0.25, 0.75, np.nan], [np.nan, np.nan, 0.0]])
    # Of the first, frame 3 after frame 1, scored .4 against .5: log(1 + e^(5 * .1)) = .974077; the second has
    # a single frame and orders nothing.
    scores = torch.tensor([[0.5, 0.4, 0.9], [0.1, 0.2, 0.3]])
    loss = order.order_loss(scores, torch.from_numpy(values), torch.zeros(2))
    assert loss.item() == pytest.approx(0.974077, abs=1e-5)


def test_contrasts_order_a_group_by_a_sentence_and_its_contrary(shards):
    scenes = order.Scenes([shards], ["window-open-v3", "push-v3"])
    rows, plain = order.Orders(scenes).draw(2, 8, np.random.default_rng(0))
    assert all(one.against is None for one in plain)
    rows, ranked = order.Orders(scenes, contrast=True).draw(2, 8, np.random.default_rng(0))
    window = int(np.flatnonzero(scenes.task[rows[::8]] == 0)[0])
    fraction = scenes.state[rows, order.STATE.index("fraction")].reshape(2, 8)[window]
    asked = order.split_sentences("ask:window=open")[0], order.split_sentences("ask:window=closed")[0]
    found = [one for one in ranked if one.group == window and one.against in asked[0] + asked[1]]
    assert len(found) == 1
    # Who asks for an open window less who asks for a closed one: both want the hand there, the state decides.
    wanted = order.measured(scenes.state[rows[window * 8 :][:8]], "asked fraction", 1)
    unwanted = order.measured(scenes.state[rows[window * 8 :][:8]], "asked fraction", -1)
    sign = 1 if found[0].sentence in asked[0] else -1
    assert found[0].against in asked[1 if sign > 0 else 0]
    np.testing.assert_allclose(found[0].values, sign * (wanted - unwanted))
    assert np.corrcoef(found[0].values, sign * fraction)[0, 1] > 0.9
    # Without a contrary, such as the task's own sentence, there is none.
    assert not [
        one for one in ranked if one.against and one.sentence in order.sentences("instruction:push-v3")
    ]


def test_lesson_loss_by_hand():
    # One instruction at cosine 1 to its outcome, 0 to the contrary: log(1 + e^-10) = 4.5399e-5.
    one, zero = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert pretrain.lesson_loss(one, one, zero).item() == pytest.approx(4.5399e-5, rel=1e-2)
    assert pretrain.lesson_loss(one, one, one).item() == pytest.approx(0.693147, abs=1e-5)


def test_masked_huber_by_hand():
    # |.1| < .3: .5 * .01 / .3 = .016667; |1| > .3: 1 - .15 = .85; mean .433333
    loss = pretrain.masked_huber(torch.tensor([0.1, 1.0, 9.0]), torch.tensor([0.0, 0.0, torch.nan]))
    assert loss.item() == pytest.approx(0.433333, abs=1e-5)


def test_soft_argmax_finds_a_patch():
    heads = pretrain.Heads(4, 16)
    with torch.no_grad():
        heads.offset.weight.zero_()
        heads.offset.bias.zero_()
        heads.attention.weight.fill_(1.0)
    patches = torch.zeros(1, 16, 4)
    patches[0, 6] = 20.0  # row 1, column 2 of 4: x = .25, y = +.25
    where = heads.points(patches)[0, 0]
    assert where.tolist() == pytest.approx([0.25, 0.25], abs=1e-4)


def test_the_patch_of_what_a_sentence_names_by_hand():
    heads = pretrain.Heads(4, 16)
    with torch.no_grad():
        for linear in (heads.asked, heads.shown):
            linear.weight.copy_(torch.eye(4))
            linear.bias.zero_()
    texts = torch.eye(4)[:3]
    groups = [1, 0, 1]
    spots = torch.full((3, 1, 2), torch.nan)
    spots[0, 0] = torch.tensor((0.25, 0.25))  # the centre of patch 6 of 4 x 4
    patches = torch.zeros(2, 16, 4)
    # The target at d squared of 0, .25, .5, ... is exp(-8 d^2) of its sum: 16 equal logits miss its entropy.
    target = np.exp(-8 * ((heads.centres.numpy() - 0.25) ** 2).sum(1))
    target /= target.sum()
    assert target[6] == pytest.approx(0.619, abs=1e-3)
    loss = heads.grounding_loss(patches, texts, groups, spots)
    assert loss.item() == pytest.approx(np.log(16) + (target * np.log(target)).sum(), abs=1e-5)
    # Patches of its own group that look like the sentence where it is, as much as the target says.
    patches[1, :, 0] = 2 * torch.from_numpy(np.log(target)).float()  # over the root of 4
    assert heads.grounding_loss(patches, texts, groups, spots).item() == pytest.approx(0, abs=1e-5)
    assert heads.grounding_loss(patches, texts, [0, 0, 0], spots).item() == pytest.approx(loss.item())
    assert heads.grounding_loss(patches, texts, groups, torch.full((3, 1, 2), torch.nan)).item() == 0


class TinyTeacher:
    """Stands in for all-MiniLM-L6-v2, which is installed for pretraining alone: a fixed random table."""

    vocabulary = (
        "[PAD]",
        "[UNK]",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
        *sorted(set(" ".join(sentences("state:window=open") + sentences("state:window=closed")).split())),
    )

    def __init__(self) -> None:
        self.word_embeddings = torch.randn(
            len(self.vocabulary), 384, generator=torch.Generator().manual_seed(0)
        )
        self.tokenizer = self

    def tokenize(self, sentence: str) -> list[str]:
        return [word for word in sentence.split() if word in self.vocabulary]

    def embed(self, said: list[str]) -> torch.Tensor:
        rows = [[self.vocabulary.index(w) for w in self.tokenize(s)] or [1] for s in said]
        return torch.nn.functional.normalize(
            torch.stack([self.word_embeddings[row].mean(0) for row in rows]), dim=-1
        )


def test_a_tiny_backbone_is_pretrained_resumed_and_loaded(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "Teacher", TinyTeacher)
    monkeypatch.setattr(pretrain, "train_tasks", lambda: ("window-open-v3", "push-v3"))
    monkeypatch.setattr(pretrain, "instructions", lambda n, seed: instructions(60, seed))
    monkeypatch.setattr(pretrain, "words", lambda n, seed, vocabulary: ["open window"])
    common: dict = {"scenes": (shards,), "width": 48, "vision_layers": 1, "text_layers": 1, "image_size": 28}
    common |= {"patch_size": 14, "batch": 16, "text_batch": 8, "text_steps": 3, "steps": 3, "threads": 1}
    common |= {"order_steps": 2, "group": 4, "save_every": 4}
    pretrain.pretrain(pretrain.Config(output=tmp_path / "whole", work=tmp_path / "a", **common))
    encoder = DualEncoder.from_pretrained(tmp_path / "whole")
    assert encoder.image_size == 28
    assert encoder.encode_text(["open the window"]).norm().item() == pytest.approx(1, abs=1e-3)

    with pytest.raises(FileExistsError, match="holds a backbone already; --overwrite replaces it"):
        pretrain.pretrain(pretrain.Config(output=tmp_path / "whole", work=tmp_path / "a", **common))

    with pytest.raises(FileNotFoundError, match="nothing to resume: there is no"):
        pretrain.pretrain(
            pretrain.Config(output=tmp_path / "new", work=tmp_path / "new", resume=True, **common)
        )

    work = tmp_path / "b"  # stopped after the state of step 4, resumed to the end: the same weights
    real = pretrain.step_losses
    monkeypatch.setattr(pretrain, "step_losses", _interrupt_at(real, 3))
    pretrain.pretrain(pretrain.Config(output=tmp_path / "part", work=work, **common))
    monkeypatch.setattr(pretrain, "step_losses", real)
    pretrain.pretrain(pretrain.Config(output=tmp_path / "part", work=work, resume=True, **common))
    other = DualEncoder.from_pretrained(tmp_path / "part")
    for a, b in zip(encoder.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert json.loads((tmp_path / "part" / "pretraining.json").read_text())["steps_done"] == 8

    # Going on from it: its sizes, the third stage alone, and after a step of next to nothing its weights.
    on: dict = {"scenes": (shards,), "batch": 16, "group": 4, "order_steps": 1, "threads": 1}
    on |= {"start": str(tmp_path / "whole"), "learning_rate": 1e-9, "output": tmp_path / "on"}
    pretrain.pretrain(pretrain.Config(work=tmp_path / "c", **on))
    for a, b in zip(
        encoder.parameters(), DualEncoder.from_pretrained(tmp_path / "on").parameters(), strict=True
    ):
        assert torch.equal(a, b)
    facts = json.loads((tmp_path / "on" / "pretraining.json").read_text())
    assert (facts["steps_done"], facts["text_steps"], facts["width"]) == (1, 0, 48)
    with pytest.raises(FileNotFoundError, match="is no backbone of training"):
        pretrain.pretrain(pretrain.Config(start=str(shards), output=tmp_path / "no"))

    # With the text tower left alone only the images' learns.
    locked = on | {"learning_rate": 1e-2, "text_rate": 0.0, "cover": 1.0, "output": tmp_path / "locked"}
    pretrain.pretrain(pretrain.Config(work=tmp_path / "d", **locked))
    found = dict(DualEncoder.from_pretrained(tmp_path / "locked").named_parameters())
    for name, value in encoder.named_parameters():
        if "vision" in name and name.endswith("fc1.weight"):
            assert not torch.equal(found[name], value)
        if "text" in name:
            assert torch.equal(found[name], value)
    # Resumed, its sentences are embedded by the tower of the state, and not by one that has just been made.
    longer = locked | {"order_steps": 3, "overwrite": True}
    pretrain.pretrain(pretrain.Config(work=tmp_path / "f", **longer))
    whole = DualEncoder.from_pretrained(tmp_path / "locked").state_dict()
    monkeypatch.setattr(pretrain, "step_losses", _interrupt_at(real, 2))
    pretrain.pretrain(pretrain.Config(work=tmp_path / "g", **longer))
    monkeypatch.setattr(pretrain, "step_losses", real)
    pretrain.pretrain(pretrain.Config(work=tmp_path / "g", resume=True, **longer))
    for name, value in DualEncoder.from_pretrained(tmp_path / "locked").state_dict().items():
        assert torch.equal(whole[name], value)
    with pytest.raises(ValueError, match="--text-rate is a share, at least 0, got -1"):
        pretrain.pretrain(pretrain.Config(text_rate=-1.0, output=tmp_path / "no"))
    with pytest.raises(ValueError, match=r"--cover is a share, from 0 to 1, got 1\.5"):
        pretrain.pretrain(pretrain.Config(cover=1.5, output=tmp_path / "no"))
    with pytest.raises(ValueError, match="leaves the text tower as it is in --start, which is not given"):
        pretrain.pretrain(pretrain.Config(text_rate=0.0, output=tmp_path / "no"))

    # Of parts of the images: what it looks at goes where the reward model reads it.
    two = ("window-open-v3", "push-v3")
    scenes.main(scenes.Config(tmp_path / "parts", 28, 1, 1, crop=True, workers=1, tasks=two))
    cropped = on | {"output": tmp_path / "cropped", "scenes": (tmp_path / "parts",)}
    pretrain.pretrain(pretrain.Config(work=tmp_path / "e", **cropped))
    model = RewardModel.from_pretrained(tmp_path / "cropped")
    assert model.crops == WORKSPACE
    assert model.camera_spec == CameraSpec()
    assert not (tmp_path / "on" / "vlm_reward.json").exists()

    # Finer images: four times the patches, whose position embeddings are those of the coarse grid, stretched.
    finer = on | {"output": tmp_path / "finer", "image_size": 56}
    pretrain.pretrain(pretrain.Config(work=tmp_path / "d", **finer))
    fine = DualEncoder.from_pretrained(tmp_path / "finer")
    assert fine.image_size == 56
    coarse, grown = (
        one.model.vision_model.embeddings.position_embedding.weight.mean(0) for one in (encoder, fine)
    )
    torch.testing.assert_close(grown, coarse, atol=0.02, rtol=0)


def test_position_embeddings_are_stretched_in_rows_and_columns():
    row, column = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    coarse = torch.stack([row, column], -1).reshape(16, 2)
    assert torch.equal(pretrain.stretched(coarse, 16), coarse)
    fine = pretrain.stretched(coarse, 64).reshape(8, 8, 2)
    # Patch 3 of 8 lies at 1.25 of 4, patch 4 at 1.75; bicubic is linear only nearly.
    torch.testing.assert_close(fine[3, 4], torch.tensor([1.25, 1.75]), atol=0.1, rtol=0)
    torch.testing.assert_close(fine[4, 3], torch.tensor([1.75, 1.25]), atol=0.1, rtol=0)


def _interrupt_at(function, call):
    calls = []

    def wrapped(*args, **settings):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return function(*args, **settings)

    return wrapped


def test_each_image_of_a_group_has_its_own_patch():
    heads = pretrain.Heads(6, 4)
    generator = torch.Generator().manual_seed(0)
    patches, texts = torch.randn(6, 4, 6, generator=generator), torch.randn(3, 6, generator=generator)
    groups, spots = [2, 0, 2], torch.rand(3, 2, 2, generator=generator) * 2 - 1
    missed = []
    for r, group in enumerate(groups):
        for g in range(2):
            logits = heads.shown(patches[2 * group + g]) @ heads.asked(texts[r]) / 6**0.5
            away = (spots[r, g] - heads.centres).square().sum(-1)
            target = torch.softmax(-away / (2 * 0.5**2), 0)  # half a patch of 2 x 2 is .5
            missed.append((target * (target.log() - logits.log_softmax(0))).sum().item())
    loss = heads.grounding_loss(patches, texts, groups, spots).item()
    assert loss == pytest.approx(np.mean(missed), abs=1e-5)
    assert np.std(missed) > 0.05


def test_pairs_without_the_first_leave_those_given_as_they_are():
    pairs = np.ones((3, 3), bool)
    one = order.Ranked(0, "", np.arange(3.0), 0.1, np.zeros((3, 2)), pairs)
    kept = order.without_first(one)
    assert kept.sum() == 4
    assert kept[1:, 1:].all()
    assert pairs.all()


def test_sight_against_a_first_frame_counts_what_is_unlike_it(shards):
    data = order.Scenes([shards], ["window-open-v3", "push-v3"])
    near = data.state[:, scenes.STATE.index("hand_object")]
    images = np.stack([-near, near**2], 1).astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)

    class Model:
        start_weight = 0.0

        def embed_text(self, said):
            return np.tile(np.float32((1, 0)), (len(said), 1))

    plain = probe.sight(Model(), data, images)["near"]  # pyright: ignore[reportArgumentType]
    Model.start_weight = 1000.0  # nothing but being unlike the first: whoever is further off, either way
    against = probe.sight(Model(), data, images)["near"]  # pyright: ignore[reportArgumentType]
    assert abs(plain - against) > 5


def test_what_an_image_shows_moves_with_it():
    frame = np.zeros((1, 20, 20, 3), np.uint8)
    frame[0, 6, 12] = 255  # at x = .25, y = +.35
    for seed in range(4):
        shown, (move,) = order.shifted(frame, np.random.default_rng(seed))
        ((y, x),) = np.argwhere(shown[0, ..., 0])
        np.testing.assert_allclose(
            np.add((0.25, 0.35), move), ((x + 0.5) / 10 - 1, 1 - (y + 0.5) / 10), atol=1e-6
        )
    np.testing.assert_array_equal(
        scenes.inside(np.array([[0.5, -1.0], [0.5, 1.01]])), np.float32([[0.5, -1], [np.nan, np.nan]])
    )


def test_what_covers_an_image_leaves_its_points():
    rng = np.random.default_rng(0)
    frames = np.broadcast_to(np.arange(1, 65, dtype=np.uint8)[:, None, None, None], (64, 48, 48, 3)).copy()
    points = rng.uniform(-1, 1, (64, 2, 2))
    points[::2, 1] = np.nan
    before = frames.copy()
    shown = order.covered(frames, points, 0.75, rng)
    np.testing.assert_array_equal(frames, before)
    for frame, own, there in zip(shown, frames, points, strict=True):
        for x, y in there[~np.isnan(there).any(-1)]:
            row, column = int((0.5 - y / 2) * 48), int((0.5 + x / 2) * 48)
            assert (frame[row, column] == own[0, 0]).all()
    changed = (shown != frames).any(-1)
    share = changed.any((1, 2)).mean()
    assert 0.5 < share <= 0.75  # where each lies over a point, or is cut from one, none is put
    assert 0.02 < changed.mean() < 0.25
    grey = (shown[..., :1] == shown).all(-1) & changed  # cut from another frame, each of one grey here
    assert 0.3 < grey.sum() / changed.sum() < 0.7
    assert set(shown[grey][:, 0].tolist()) <= set(range(1, 65))
    np.testing.assert_array_equal(order.covered(frames, points, 0.0, rng), frames)


def test_what_is_spoken_of_and_what_may_be_there_by_another_name():
    for fact, nouns in {
        "hand:near red chest": {"chest"},
        "scene:coffee machine button/button on the coffee machine": {"button", "machine"},
        "colour:green goal": {"goal"},
        "thing:open|1|red chest": {"chest"},
        "object:near|puck/disc|the goal": {"puck", "disc"},
        "state:coffee button=in": {"button"},
        "half:window": {"window"},
        "gripper:open": set(),
    }.items():
        assert captions.spoken_of(fact) == nouns
    may = captions.present(["red chest", "dial"])
    assert {"red", "chest", "trunk", "box", "dial", "knob", "wheel", "goal", "object"} <= may
    assert not may & {"button", "lever", "drawer"}


def test_palette_names_are_colours():
    assert all(len(rgb) == 3 and 0 <= min(rgb) <= max(rgb) <= 1 for rgb in captions.PALETTE.values())
