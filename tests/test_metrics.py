import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from vlm_reward import metrics

FEW_VALUES = st.integers(-5, 5).map(float)  # so that ties are common
VECTORS = st.integers(2, 30).flatmap(lambda n: arrays(np.float64, n, elements=FEW_VALUES))


def test_voc_of_rising_falling_and_constant_scores():
    assert metrics.voc(np.array([0.1, 0.2, 0.9])) == 1
    assert metrics.voc(np.array([0.9, 0.2, 0.1])) == -1
    assert metrics.voc(np.full(7, 0.3)) == 0
    assert metrics.voc(np.array([0.3])) == 0


def test_voc_by_hand():
    # ranks 1 3 2 4 against 1 2 3 4: 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15) = 0.8
    assert metrics.voc(np.array([0, 5, 3, 9])) == pytest.approx(0.8)
    # ties share their places: ranks -.5 -.5 1 against -1 0 1 once centred: 1.5 / sqrt(1.5 * 2)
    assert metrics.voc(np.array([2, 2, 3])) == pytest.approx(1.5 / np.sqrt(3))


def test_ranks_share_the_mean_of_tied_places():
    assert metrics.ranks(np.array([10, 20, 10, 5])).tolist() == [2.5, 4, 2.5, 1]


@given(VECTORS, st.randoms(use_true_random=False))
def test_spearman_equals_scipy(a, random):
    b = np.array([random.randint(-5, 5) for _ in a], dtype=float)
    if len(set(a)) > 1 and len(set(b)) > 1:
        assert metrics.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
    else:
        assert metrics.spearman(a, b) == 0


@given(VECTORS)
def test_voc_ignores_monotone_transforms_and_turns_with_time(scores):
    assert metrics.voc(np.exp(scores) * 3 + 1) == metrics.voc(scores)
    assert metrics.voc(scores[::-1]) == pytest.approx(-metrics.voc(scores), abs=1e-12)


@given(VECTORS, VECTORS)
def test_auc_equals_the_share_of_ordered_pairs(positive, negative):
    wins = positive[:, None] > negative[None]
    ties = positive[:, None] == negative[None]
    assert metrics.auc(positive, negative) == pytest.approx((wins + ties / 2).mean())


def test_top1_of_k_shares_the_credit_of_ties():
    scores = np.array([[3, 1, 2], [1, 3, 2], [2, 2, 1], [0, 0, 0]])
    assert metrics.top1_of_k(scores).tolist() == [1, 0, 0.5, 1 / 3]
    assert metrics.top1_of_k(scores, right=1).tolist() == [0, 1, 0.5, 1 / 3]
    with pytest.raises(ValueError, match="K > right=3"):
        metrics.top1_of_k(scores, right=3)


@given(VECTORS, st.integers(0, 99))
def test_pairs_put_the_higher_reward_first(rewards, seed):
    if len(set(rewards)) == 1:
        with pytest.raises(ValueError, match="no pair of timesteps can be labelled"):
            metrics.consistency_pairs(rewards, n_pairs=50, seed=seed)
        return
    pairs = metrics.consistency_pairs(rewards, n_pairs=50, seed=seed)
    assert pairs.shape == (50, 2)
    assert (rewards[pairs[:, 0]] > rewards[pairs[:, 1]]).all()
    assert (pairs == metrics.consistency_pairs(rewards, n_pairs=50, seed=seed)).all()


def test_pairs_are_uniform_among_those_with_a_label():
    rewards = np.array([0.0, 2.0, 0.0, 1.0, 0.0])
    pairs = metrics.consistency_pairs(rewards, n_pairs=70_000, seed=1)
    drawn, counts = np.unique(pairs, axis=0, return_counts=True)
    assert drawn.tolist() == [[1, 0], [1, 2], [1, 3], [1, 4], [3, 0], [3, 2], [3, 4]]
    assert np.abs(counts - 10_000).max() < 500  # five standard deviations


def test_consistency_of_oracle_inverse_constant_and_random_scores():
    rng = np.random.default_rng(0)
    rewards = rng.random(500)
    pairs = metrics.consistency_pairs(rewards, n_pairs=10_000, seed=0)
    assert metrics.consistency(rewards, pairs) == 1
    assert metrics.consistency(-rewards, pairs) == 0
    assert metrics.consistency(np.zeros(500), pairs) == 0.5
    assert metrics.consistency(rng.random(500), pairs) == pytest.approx(0.5, abs=0.05)


@given(VECTORS, st.integers(0, 9))
def test_consistency_is_a_share_that_negation_mirrors(scores, seed):
    pairs = metrics.consistency_pairs(np.arange(len(scores)), n_pairs=40, seed=seed)
    share = metrics.consistency(scores, pairs)
    assert 0 <= share <= 1
    assert metrics.consistency(-scores, pairs) == pytest.approx(1 - share)


def test_consistency_estimate_by_hand():
    # two trajectories of two timesteps: one pair within the first (right), two across (one right, one tied)
    scores = np.array([1.0, 2.0, 2.0, 3.0])
    groups = np.array([0, 0, 1, 1])
    pairs = np.array([[1, 0], [3, 1], [1, 2]])
    weights = np.array([[1, 1], [2, 0], [0, 2]])
    estimate = metrics.consistency_estimate(scores, pairs, groups, weights)
    assert estimate.mean == pytest.approx(2.5 / 3)
    assert estimate.n == 3
    assert estimate.std == pytest.approx(np.std([2.5 / 3, 1.5 / 2], ddof=1))
    # all three; the pair within the first alone; no pair at all
    np.testing.assert_allclose(estimate.replicates, [2.5 / 3, 1, np.nan])


def test_bootstrap_resamples_trajectories():
    values = np.random.default_rng(3).normal(size=60)
    low, high = metrics.bootstrap_interval(values, seed=0)
    error = values.std() / np.sqrt(60)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)
    assert metrics.bootstrap_interval(values, seed=0) == (low, high)
    narrow = metrics.bootstrap_interval(values, seed=0, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert metrics.bootstrap_interval(np.array([0.4]), seed=0) == (0.4, 0.4)


def test_consistency_interval_grows_when_frames_are_repeated_within_a_trajectory():
    """Frames of one trajectory that resemble each other are no independent evidence."""
    rng = np.random.default_rng(0)
    rewards = np.repeat(rng.random(20), 10)  # 20 trajectories of 10 alike timesteps
    scores = rewards + np.repeat(rng.normal(size=20), 10)
    pairs = metrics.consistency_pairs(rewards, n_pairs=5000, seed=0)

    def width(groups):
        weights = metrics.bootstrap_weights(groups.max() + 1, seed=0, n=300)
        estimate = metrics.consistency_estimate(scores, pairs, groups, weights)
        low, high = estimate.interval()
        assert low <= estimate.mean <= high
        return high - low

    assert width(np.repeat(np.arange(20), 10)) > 2 * width(np.arange(200))


def test_average_estimate_averages_means_stds_and_replicates():
    one = metrics.Estimate(0.2, 0.1, 50, np.array([0.1, 0.3]))
    two = metrics.Estimate(0.6, 0.3, 50, np.array([0.5, 0.9]))
    average = metrics.average_estimate([one, two])
    assert (average.mean, average.std, average.n) == (pytest.approx(0.4), pytest.approx(0.2), 2)
    assert average.replicates.tolist() == pytest.approx([0.3, 0.6])


def test_multi_view_is_the_mean_of_the_views():
    assert metrics.multi_view(np.array([[1.0, 2.0], [0.0, -4.0]])).tolist() == [[1, 2, 1.5], [0, -4, -2]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.voc(np.array([])), "at least one value"),
        (lambda: metrics.voc(np.array([1, np.nan])), "1 NaN of 2"),
        (lambda: metrics.spearman(np.arange(3), np.arange(4)), "got 3 and 4"),
        (lambda: metrics.consistency(np.arange(3), np.zeros((0, 2), int)), r"pairs must be \[P, 2\]"),
        (lambda: metrics.bootstrap_weights(0, seed=0), "a trajectory to resample"),
    ],
)
def test_bad_input_says_what_was_given(call, message):
    with pytest.raises(ValueError, match=message):
        call()
