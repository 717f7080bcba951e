# mujoco ships no type stubs
# pyright: reportAttributeAccessIssue=false
"""Scenes that no task has: things that move as their kind says, and sentences that know which is which."""

import json

import numpy as np
import pytest

from training import order, worlds
from training.captions import Thing, facts_of_things, present, rankings_of, sentences, spoken_of
from training.language import is_held_out
from training.scenes import STATE, make_shard, write_shard
from vlm_reward.cameras import WORKSPACE

FRACTION, NEAR = STATE.index("fraction"), STATE.index("hand_object")


@pytest.fixture(scope="module")
def world():
    world = worlds.World(np.random.default_rng(3))
    world.begin()
    return world


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two worlds and a training task as shards."""
    folder = tmp_path_factory.mktemp("worlds")
    worlds.main(worlds.Config(folder, size=28, worlds=2, episodes=1, crop=True, workers=1))
    header = {"task": "window-open-v3", "seed": (0,), "size": 28, "crop": True}
    write_shard(
        folder / "000-window-open-v3.npz", header, make_shard("window-open-v3", 28, 1, (0,), crop=True)
    )
    return folder


def _alone(family, seed: int) -> worlds.World:
    """A world whose first thing is of a family."""
    rng = np.random.default_rng(seed)
    number = worlds.FAMILIES.index(family)
    while True:
        state = rng.bit_generator.state
        chosen = rng.choice(len(worlds.FAMILIES), int(rng.integers(2, worlds.THINGS)), replace=False)
        if chosen[0] == number:
            rng.bit_generator.state = state
            return worlds.World(rng)


@pytest.mark.parametrize("family", worlds.FAMILIES, ids=lambda family: family.__name__)
def test_things_move_as_far_as_their_state_says(family):
    for seed in range(3):
        world = _alone(family, seed)
        world.set_places()
        thing = world.things[0]
        if not thing.kind:
            assert np.isnan(world.fractions()[0])
            continue
        joint = world.model.joint("joint0")
        low, high = sorted((0.0, world._built[0].travel))
        np.testing.assert_allclose(joint.range, [low, high])
        parts = []
        for fraction in (0.0, 0.5, 1.0):
            world.data.qpos[int(joint.qposadr[0])] = fraction * world._built[0].travel
            worlds.mujoco.mj_forward(world.model, world.data)
            assert world.fractions()[0] == pytest.approx(fraction)
            parts.append(world.parts()[0])
        moved = np.linalg.norm(parts[2] - parts[0])
        if thing.kind == "press":
            assert moved == 0  # the hand is to press it, not to be on it
            continue
        assert moved > 0.01  # seen in the image: where a hand takes it is elsewhere
        if joint.type[0] == worlds._SLIDE:
            assert moved == pytest.approx(world._built[0].travel)
        if thing.kind == "up":
            assert parts[2][2] > parts[0][2] or parts[2][2] == pytest.approx(parts[0][2])


def test_the_part_of_a_button_is_where_fingertips_are_when_it_is_pressed():
    pad = worlds.mujoco.MjModel.from_xml_path(str(worlds._ROOM)).geom("rightpad_geom")
    np.testing.assert_allclose(pad.size[2], worlds._FINGER)
    directions = set()
    for seed in range(6):
        world = _alone(worlds._pushed, seed)
        joint, cap = world.model.joint("joint0"), world.model.body("moving0")
        world.data.qpos[int(joint.qposadr[0])] = world._built[0].travel
        worlds.mujoco.mj_forward(world.model, world.data)
        out = -world.data.body("thing0").xmat.reshape(3, 3) @ joint.axis
        (geom,) = range(cap.geomadr[0], cap.geomadr[0] + cap.geomnum[0])
        half = world.model.geom_aabb[geom][3:] @ np.abs(world.data.geom_xmat[geom].reshape(3, 3).T @ out)
        face = world.data.geom_xpos[geom] + half * out
        finger = worlds._FINGER * (1 - out[2])  # not from above, where the tips are the lowest of the pads
        np.testing.assert_allclose(world.parts()[0], face + finger * out, atol=1e-6)
        directions.add(round(out[2]))
    assert directions == {0, 1}


@pytest.mark.parametrize("family", worlds.FAMILIES, ids=lambda family: family.__name__)
def test_what_is_not_held_stays_as_it_is(family):
    for seed in range(4):
        world = _alone(family, seed)
        world.begin()
        for number in range(len(world.things) - 1):  # out of each other's and the hand's reach
            world.model.body_pos[world.model.body(f"thing{number}").id] = (3 + number, 0, 0)
        joint = int(world.model.joint("joint0").qposadr[0]) if world.things[0].kind else None
        for fraction in (0.0, 0.5, 1.0) if joint is not None else ():
            world.data.qpos[joint] = fraction * world._built[0].travel
            world.data.qvel[:] = 0
            for _ in range(30):
                world._simulate(-1.0)
            assert world.fractions()[0] == pytest.approx(fraction, abs=0.02)


def test_the_mark_of_the_goal_is_anywhere_on_the_table():
    world = worlds.World(np.random.default_rng(0))
    marks = []
    for _ in range(40):
        world.set_places()
        marks.append(world.parts()[-1])
    low, high = np.min(marks, axis=0), np.max(marks, axis=0)
    assert low[0] < -0.15
    assert high[0] > 0.15
    assert low[2] >= 0.02


def test_a_drawer_comes_out_to_the_front_and_a_lid_goes_up():
    for family, axis, way in ((worlds._drawer, 1, -1), (worlds._lidded, 2, 1)):
        world = _alone(family, 0)
        world.model.body_quat[world.model.body("thing0").id] = (1, 0, 0, 0)
        address = int(world.model.joint("joint0").qposadr[0])
        ends = []
        for fraction in (0.0, 0.5):
            world.data.qpos[address] = fraction * world._built[0].travel
            worlds.mujoco.mj_forward(world.model, world.data)
            ends.append(world.parts()[0][axis])
        assert way * (ends[1] - ends[0]) > 0.02


def test_worlds_name_things_apart_and_stand_apart():
    for seed in range(8):
        world = worlds.World(np.random.default_rng(seed))
        assert 3 <= len(world.things) <= worlds.THINGS
        assert world.things[-1].noun == "goal"
        assert len({thing.noun for thing in world.things}) == len(world.things)
        bodies = [world.model.body(f"thing{number}").id for number in range(len(world.things) - 1)]
        world.set_places()
        places = world.model.body_pos[bodies]
        assert (places[:, :2] >= (-0.32, 0.52)).all()
        assert (places[:, :2] <= (0.32, 0.88)).all()


def test_worlds_of_one_thing_are_worlds_too():
    counts = [len(worlds.World(np.random.default_rng(seed), fewest=1).things) - 1 for seed in range(12)]
    assert set(counts) == {1, 2, 3}
    assert all(len(worlds.World(np.random.default_rng(seed), fewest=3).things) == 4 for seed in range(2))


def test_hands_sent_far_are_farther_from_the_thing():
    def nearest(far: float) -> float:
        _, shard = worlds.make_world(28, 2, (3, 4), far=far)
        return float(np.median(np.nanmin(shard["things"][:, :-1, NEAR], axis=1)))

    assert nearest(1.0) > 1.5 * nearest(0.0)


def test_the_hand_goes_where_it_is_sent(world):
    target = np.array((0.1, 0.6, 0.35))  # above all things
    for _ in range(60):
        world.move(target - world.hand(), -1.0)
    np.testing.assert_allclose(world.hand(), target, atol=0.02)


def test_a_moment_is_shown_again_and_elsewhere_moves_things_but_not_the_hand(world):
    moment, before, hand = world.moment(), world.states(), world.hand()
    assert world.elsewhere()
    np.testing.assert_allclose(world.hand(), hand, atol=1e-9)
    assert np.nanmax(np.abs(world.states() - before)) > 0.1
    world.again(moment)
    np.testing.assert_array_equal(world.states(), before)


def test_state_vectors_have_each_thing_as_the_object(world):
    states, parts, hand = world.states(), world.parts(), world.hand()
    np.testing.assert_allclose(states[:, NEAR] / 5, np.linalg.norm(parts - hand, axis=1), rtol=1e-5)
    np.testing.assert_allclose(states[:, FRACTION], world.fractions(), rtol=1e-5)
    assert np.isnan(states[:, STATE.index("reward")]).all()


def test_a_world_is_complete_and_repeatable():
    things, shard = worlds.make_world(28, 1, (0, 5))
    again, same = worlds.make_world(28, 1, (0, 5))
    assert things == again
    np.testing.assert_array_equal(shard["frames"], same["frames"])
    count = len(shard["frames"])
    assert 24 <= count <= 48
    assert shard["frames"].shape[1:] == (28, 28, 3)
    assert shard["things"].shape == (count, worlds.THINGS, len(STATE))
    assert np.isnan(shard["things"][:, len(things) :]).all()
    assert np.isfinite(shard["things"][:, : len(things), NEAR]).all()
    assert np.isnan(shard["state"][:, NEAR]).all()
    assert np.isfinite(shard["state"][:, 0]).all()
    assert shard["spots"].shape == (count, worlds.THINGS, 2)
    np.testing.assert_array_equal(shard["spots"][:, len(things) - 1], shard["points"][:, 2])  # of the goal
    inside = np.isfinite(shard["spots"][:, : len(things)]).all(-1)
    assert inside.mean() > 0.5
    partner = shard["partner"]
    first = np.flatnonzero(partner > np.arange(count))
    np.testing.assert_array_equal(partner[partner[first]], first)
    np.testing.assert_allclose(shard["state"][first, :3], shard["state"][partner[first], :3], atol=1e-5)
    assert len(shard["true"]) == len(shard["false"]) == count


def test_what_is_said_of_things_by_hand():
    things = (Thing("chest", "red", "open"), Thing("ball"))
    rng = np.random.default_rng(0)
    where = {"hand": np.array((0.0, 0.6, 0.1)), "opening": 1.0}
    near, far = np.array((0.04, 0.15)), np.array((0.9, np.nan))
    true, false = facts_of_things(things, near, far, **where, generator=rng)
    assert {"gripper:open", "height:low over the table"} <= set(true)
    assert {"gripper:closed", "height:high up", "half:red chest"} <= set(false)
    assert {"scene:chest", "scene:ball", "colour:red chest"} <= set(true)
    assert {"hand:touching chest", "hand:near red chest", "thing:open|1|red chest"} <= set(true)
    assert {"thing:open|0|chest", "hand:far chest", "hand:touching ball"} <= set(false)
    assert not any(fact.startswith(("hand:near ball", "hand:far ball")) for fact in true + false)
    assert sentences("thing:open|0|chest") == ("the chest is closed", "the chest is shut")
    assert sentences("want:open|1|red chest")[0] == "open the red chest"
    assert "shut the red chest" in sentences("want:open|0|red chest")


def test_rankings_of_a_thing_by_hand():
    hand, do, states, asks = rankings_of(Thing("chest", "red", "open"))
    assert hand[0] == ("hand:near chest", "hand_object", -1)
    assert do[1] == ("do:red chest", "hand_object", -1)
    assert states[2] == ("thing:open|1|red chest", "fraction", 1)
    assert ("want:open|0|chest", "asked fraction", -1) in asks
    for one in (Thing("drawer", "", "open"), Thing("door", "blue", "open"), Thing("button", "", "press")):
        assert (
            len(rankings_of(one)) == 3
        )  # a held-out task asks for the one state, so nobody asks for the other
    assert len(rankings_of(Thing("goal"))) == 2


def test_no_sentence_about_things_says_what_a_held_out_task_asks_for():
    named = {}
    for family in worlds.FAMILIES:
        for seed in range(12):
            thing = _alone(family, seed).things[0]
            named[thing.noun] = thing
    assert {"button", "drawer", "door"} <= set(named)
    assert len(named) > 20
    for thing in named.values():
        for group in rankings_of(Thing(thing.noun, "green", thing.kind)):
            for fact, *_ in group:
                assert not any(is_held_out(said) for said in sentences(fact)), fact


def test_scenes_read_worlds_beside_tasks(written):
    data = order.Scenes([written], ["window-open-v3"])
    assert data.tasks == ("window-open-v3", "world-000-of-0", "world-001-of-0")
    assert data.crops == WORKSPACE
    assert len(data.things_of) == 2
    own = data.rows[0]
    np.testing.assert_array_equal(data.things[own, 0], data.state[own])
    assert np.isnan(data.things[own, 1:]).all()
    np.testing.assert_array_equal(data.spots[own, 0], data.points[own, 1])
    assert np.isnan(data.spots[own, 1:]).all()
    with np.load(written / "000-world-001.npz") as shard:
        header = json.loads(str(shard["header"]))
        np.testing.assert_array_equal(data.things[data.rows[2]], shard["things"])
        np.testing.assert_array_equal(data.spots[data.rows[2]], shard["spots"])
    assert [Thing(**one) for one in header["things"]] == list(data.things_of["world-001-of-0"])

    orders = order.Orders(data)
    groups, ranked = 60, []
    for seed in range(groups):
        rows, drawn = orders.draw(1, 8, np.random.default_rng(seed))
        world = data.tasks[data.task[rows[0]]]
        ranked.append(world in data.things_of)
        assert (data.task[rows] == data.task[rows[0]]).all()
        if not ranked[-1]:
            assert len(drawn) == 5
            continue
        things = data.things_of[world]
        assert len(drawn) == sum(len(rankings_of(thing)) for thing in things)
        for one in drawn:
            (number,) = (t for t, thing in enumerate(things) if thing.noun in one.sentence)
            np.testing.assert_array_equal(one.spots, data.spots[rows, number])
            if " far from " in one.sentence:
                np.testing.assert_array_equal(one.values, data.things[rows, number, NEAR])
    assert 0.3 < np.mean(ranked) < 0.7  # half of the groups, whatever the number of worlds


def test_no_sentence_is_both_true_and_false_of_an_image(written):
    data = order.Scenes([written], ["window-open-v3"])
    said = [set(sentences(fact)) for fact in data.facts]
    for row in range(0, len(data), 7):
        holds = set().union(*(said[fact] for fact in np.flatnonzero(data.known[row] > 0)))
        fails = set().union(*(said[fact] for fact in np.flatnonzero(data.known[row] < 0)))
        assert not holds & fails


def test_what_goes_by_another_name_is_not_called_absent(written):
    data = order.Scenes([written], ["window-open-v3"])
    for name, things in data.things_of.items():
        own = data.rows[data.tasks.index(name)]
        nouns = {thing.noun for thing in things}
        for fact in data.facts:
            said = data.known[own, data.facts.index(fact)]
            if spoken_of(fact) & {"object", "goal", "handle"} and not spoken_of(fact) & nouns:
                assert (said == 0).all(), (name, fact)
    # There is a mark of a goal before the window, too; there is no lever.
    known = data.known[data.rows[0]]
    assert (known[:, data.facts.index("scene:goal")] == 0).all()
    absent = [f for f in data.facts if f.startswith("scene:") and not spoken_of(f) & present(["window"])]
    assert (known[:, [data.facts.index(f) for f in absent]] == -1).all()
    assert absent


def test_nobody_taps_a_button_or_is_to_leave_something_alone():
    for said in ("tap the button", "squeeze the red button", "use the button"):
        assert is_held_out(said)
        assert said not in sentences("do:button") + sentences("do:red button")
    assert set(sentences("want:turn|0|dial")) >= {"turn the dial back"}
    for fact in ("want:turn|0|dial", "want:press|0|bell"):
        assert not any(s.startswith(("leave", "do not", "let go", "release")) for s in sentences(fact))
        assert sentences(fact)


def test_nobody_asks_of_a_thing_for_what_a_left_out_task_wants(written):
    data = order.Scenes([written], ["window-open-v3"])
    data.things_of["world-000-of-0"] = (Thing("window", "red", "open"),)
    data.tasks = ("window-close-v3", *data.tasks[1:])
    wanted = {fact for fact in order.Orders(data).said if fact.startswith("want:open") and "window" in fact}
    assert "want:open|1|red window" in wanted
    kept = order.Orders(data, ("window-open-v3",)).said
    assert not [fact for fact in kept if fact.startswith("want:open") and "window" in fact]


def test_folders_without_scenes_say_so(tmp_path):
    (tmp_path / "000-world-000.partial").write_bytes(b"cut")
    with pytest.raises(FileNotFoundError, match=r"has no scenes; run python -m training.scenes"):
        order.Scenes([tmp_path], [])


def test_shares_are_checked(tmp_path):
    with pytest.raises(ValueError, match="--plain is a share of the episodes, from 0 to 1, got 2"):
        worlds.main(worlds.Config(tmp_path, plain=2.0))
    worlds.main(worlds.Config(tmp_path / "none", worlds=0, size=28, workers=1))
    worlds.main(worlds.Config(tmp_path / "none", worlds=0, size=28, seed=1))
    with pytest.raises(
        ValueError, match=r"none holds scenes made otherwise \(size: 28 then, 56 now\); give another"
    ):
        worlds.main(worlds.Config(tmp_path / "none", worlds=0, size=56))
    with pytest.raises(ValueError, match="--far is a share of the places, from 0 to 1, got -1"):
        worlds.main(worlds.Config(tmp_path, far=-1.0))
    with pytest.raises(ValueError, match="--fewest is 1 to 3 things, got 4"):
        worlds.main(worlds.Config(tmp_path, fewest=4))
