"""Batches hold each image and sentence once, samples keep the order of time, draws depend on their place."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.objectives import OBJECTIVES
from training.samplers import Batch, GroupedSampler, PaperSampler
from vlm_reward.recording import EpisodeInfo


def episodes(*lengths: int, texts: int = 2) -> tuple[EpisodeInfo, ...]:
    starts = np.cumsum((0, *lengths)).tolist()
    return tuple(
        EpisodeInfo(start, length, f"task-{i % texts}", f"do {i % texts}", "expert", i, True)
        for i, (start, length) in enumerate(zip(starts, lengths, strict=False))
    )


def timesteps(batch: Batch, infos: tuple[EpisodeInfo, ...]) -> dict[str, np.ndarray]:
    starts = np.array([infos[number].start for number in batch.trajectory])
    return {name: batch.rows[index.numpy()] - starts for name, index in batch.frames.items()}


def same(a: Batch, b: Batch) -> bool:
    return (
        np.array_equal(a.rows, b.rows)
        and np.array_equal(a.views, b.views)
        and a.texts == b.texts
        and torch.equal(a.text, b.text)
        and all(torch.equal(a.frames[name], b.frames[name]) for name in a.frames)
        and a.seed == b.seed
    )


@pytest.mark.parametrize("sampler", [PaperSampler, GroupedSampler])
@pytest.mark.parametrize("preset", ["paper", "official"])
@given(
    objective=st.sampled_from(sorted(OBJECTIVES)),
    lengths=st.lists(st.integers(2, 12), min_size=1, max_size=6),
    views=st.integers(1, 3),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
@settings(max_examples=25, deadline=None)
def test_samples_lie_in_one_trajectory_in_order_and_images_are_unique(
    sampler, preset: str, objective: str, lengths: list[int], views: int, seed: int, epoch: int
) -> None:
    infos, rule = episodes(*lengths), OBJECTIVES[objective]
    made = sampler(rule, infos, views, samples=40, preset=preset, seed=seed)
    batch = made.batch(epoch, made.batches_per_epoch - 1)
    images = list(zip(batch.rows.tolist(), batch.views.tolist(), strict=True))
    assert len(set(images)) == len(images)
    assert len(set(batch.texts)) == len(batch.texts)
    assert batch.views.max() < views
    used = torch.cat(list(batch.frames.values()))
    assert set(used.tolist()) == set(range(len(images)))  # nothing is encoded in vain
    at = timesteps(batch, infos)
    assert tuple(at) == rule.frames
    length = np.array([infos[number].length for number in batch.trajectory])
    for number, text in zip(batch.trajectory.tolist(), batch.text.tolist(), strict=True):
        assert batch.texts[text] == infos[number].instruction
    for earlier, later in zip(rule.frames, rule.frames[1:], strict=False):
        assert (at[earlier] <= at[later]).all()
    if "late" in at:
        assert (at["early"] < at["late"]).all()
    if "next" in at:
        assert (at["next"] == at["current"] + 1).all()
        assert (at["initial"] == 0).all()
    if "goal" in at:
        assert (at["goal"] == length - 1).all()
    assert all((steps >= 0).all() and (steps < length).all() for steps in at.values())


@pytest.mark.parametrize("sampler", [PaperSampler, GroupedSampler])
def test_a_batch_depends_on_seed_epoch_and_index_alone(sampler) -> None:
    infos, rule = episodes(20, 30, 25, 40), OBJECTIVES["r3m"]
    first = sampler(rule, infos, 3, samples=256, seed=1)
    wanted = first.batch(2, 1)
    other = sampler(rule, infos, 3, samples=256, seed=1)
    for index in range(other.batches_per_epoch):  # draws before it change nothing
        other.batch(0, index)
    assert same(wanted, other.batch(2, 1))
    assert not same(wanted, other.batch(2, 0))
    assert not same(wanted, other.batch(1, 1))
    assert not same(wanted, sampler(rule, infos, 3, samples=256, seed=2).batch(2, 1))


def test_paper_sampler_keeps_timesteps_over_epochs_and_redraws_views() -> None:
    infos = episodes(50, 60, 70)
    sampler = PaperSampler(OBJECTIVES["triplet"], infos, 3, samples=96, batch_size=32, seed=0)
    assert sampler.batches_per_epoch == 3

    def epoch(number: int) -> tuple[list, list]:
        pairs, with_views = [], []
        for index in range(3):
            batch = sampler.batch(number, index)
            pairs += zip(batch.rows[batch.frames["early"]], batch.rows[batch.frames["late"]], strict=True)
            with_views += zip(*(batch.views[batch.frames[name]] for name in ("early", "late")), strict=True)
        order = sorted(range(96), key=lambda i: pairs[i])
        return [pairs[i] for i in order], [with_views[i] for i in order]

    (pairs, views), (pairs_again, views_again) = epoch(0), epoch(1)
    assert pairs == pairs_again
    assert views != views_again
    drawn = np.array(views)
    assert np.bincount(drawn[:, 0], minlength=3).min() > 15  # 32 each on average
    assert (drawn[:, 0] != drawn[:, 1]).mean() == pytest.approx(2 / 3, abs=0.15)  # each frame has its own


def test_paper_sampler_spreads_samples_evenly_over_trajectories() -> None:
    sampler = PaperSampler(OBJECTIVES["liv"], episodes(9, 90, 30), 2, samples=50, batch_size=10)
    assert np.bincount(sampler.trajectories).tolist() == [17, 17, 16]
    seen = torch.cat([sampler.batch(4, index).trajectory for index in range(5)])
    assert torch.bincount(seen).tolist() == [17, 17, 16]


def test_paper_sampler_drops_an_incomplete_batch_but_not_the_only_one() -> None:
    rule = OBJECTIVES["triplet"]
    assert PaperSampler(rule, episodes(9, 9), 1, samples=70, batch_size=32).batches_per_epoch == 2
    few = PaperSampler(rule, episodes(9, 9), 1, samples=5, batch_size=32)
    assert (few.batches_per_epoch, len(few.batch(0, 0))) == (1, 5)


def test_eight_groups_of_eight_frames_make_224_pairs_of_64_images() -> None:
    sampler = GroupedSampler(OBJECTIVES["triplet"], episodes(*[30] * 16), 3, samples=640)
    batch = sampler.batch(0, 0)
    assert (len(batch.rows), len(batch), sampler.batches_per_epoch) == (64, 8 * 8 * 7 // 2, 10)
    assert len(set(batch.trajectory.tolist())) == 8


def test_grouped_sampler_passes_over_all_trajectories_before_it_repeats_one() -> None:
    sampler = GroupedSampler(
        OBJECTIVES["triplet"], episodes(*[10] * 12), 1, samples=48, trajectories=4, frames=4
    )
    assert sampler.batches_per_epoch == 3
    for epoch in range(2):
        seen = [set(sampler.batch(epoch, index).trajectory.tolist()) for index in range(3)]
        assert set.union(*seen) == set(range(12))
        assert sum(map(len, seen)) == 12


@pytest.mark.parametrize("sampler", [PaperSampler, GroupedSampler])
def test_nothing_to_sample_is_refused(sampler) -> None:
    rule = OBJECTIVES["triplet"]
    with pytest.raises(ValueError, match="trajectory to sample from"):
        sampler(rule, (), 3)
    with pytest.raises(ValueError, match="view"):
        sampler(rule, episodes(5), 0)
    with pytest.raises(ValueError, match="at least 1"):
        sampler(rule, episodes(5), 1, samples=0)
    with pytest.raises(ValueError, match="at least 2 frames"):
        sampler(rule, episodes(1), 1).batch(0, 0)


def test_group_too_small_for_the_objective_is_refused() -> None:
    with pytest.raises(ValueError, match=r"liv needs .* at least 4 frames \(initial, current, next, goal\)"):
        GroupedSampler(OBJECTIVES["liv"], episodes(9), 1, frames=3)


@pytest.mark.parametrize("sampler", [PaperSampler, GroupedSampler])
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_with_starts_each_sample_has_one_view_and_the_first_frame_of_its_trajectory(sampler, name) -> None:
    infos = episodes(20, 30, 25, 40)
    batch = sampler(OBJECTIVES[name], infos, 3, samples=256, seed=1, starts=True).batch(1, 0)
    assert batch.starts is not None
    starts = np.array([infos[number].start for number in batch.trajectory])
    np.testing.assert_array_equal(batch.rows[batch.starts], starts)
    for index in batch.frames.values():
        np.testing.assert_array_equal(batch.views[index], batch.views[batch.starts])
    used = torch.cat([*batch.frames.values(), batch.starts])
    assert set(used.tolist()) == set(range(len(batch.rows)))
    assert len(set(batch.views.tolist())) > 1
    assert sampler(OBJECTIVES[name], infos, 3, samples=256, seed=1).batch(1, 0).starts is None
