"""The intervals cover the truth as often as they say, and equal those of the textbooks where these have one."""

import doctest
import math

import numpy as np
import pytest
from scipy import stats

from mmcoconut import statistics
from mmcoconut.statistics import Estimate, bootstrap_difference, bootstrap_mean, bootstrap_runs, exact_bound


def bounds(estimate: Estimate) -> tuple[float, float]:
    return estimate.low, estimate.high


def coin_flips(share: float, *shape: int, seed: int = 0) -> np.ndarray:
    """0/1 scores whose share of ones is `share` on average."""
    return (np.random.default_rng(seed).random(shape) < share).astype(float)


def test_docstring_examples_are_true():
    assert doctest.testmod(statistics).failed == 0


@pytest.mark.parametrize(
    ("interval", "truth", "draw"),
    [
        (bootstrap_mean, 0.7, lambda rng: rng.random(200) < 0.7),
        (
            bootstrap_mean,
            0.53,
            lambda rng: rng.choice([0.0, 0.3, 0.6, 0.9, 1.0], p=[0.3, 0.1, 0.2, 0.2, 0.2], size=150),
        ),
        # Pairs that depend on each other: the second run is right where the first is, and on a fifth of the rest.
        (
            lambda pair: bootstrap_difference(*pair),
            0.1,
            lambda rng: (lambda first, more: (first | more, first))(rng.random(200) < 0.5, rng.random(200) < 0.2),
        ),
    ],
    ids=["binomial", "vqa accuracy", "paired difference"],
)
def test_interval_covers_the_truth_nineteen_times_in_twenty(monkeypatch, interval, truth, draw):
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", 2000)
    rng, repeats = np.random.default_rng(0), 600
    estimates = [interval(draw(rng)) for _ in range(repeats)]
    covering = sum(estimate.low <= truth <= estimate.high for estimate in estimates)
    # Of 600 intervals that cover with a probability of 95 %, so many do, but for one time in a thousand.
    least, most = stats.binom.ppf([0.0005, 0.9995], repeats, 0.95)
    assert least <= covering <= most


def test_interval_over_few_runs_is_too_narrow_as_its_docstring_says(monkeypatch):
    """Three runs whose true accuracies vary by 10 points: of 300 intervals about three in four hold the mean."""
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", 1000)
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        truths = np.clip(rng.normal(0.6, 0.1, size=3), 0, 1)
        estimate = bootstrap_runs(rng.random((3, 500)) < truths[:, None])
        held += estimate.low <= 0.6 <= estimate.high
    least, most = stats.binom.ppf([0.0005, 0.9995], 300, 0.76)
    assert least <= held <= most


def test_interval_of_many_examples_is_the_normal_one():
    scores = coin_flips(0.3, 20_000)
    share = scores.mean()
    half = 1.96 * math.sqrt(share * (1 - share) / scores.size)  # 0.0063
    estimate = bootstrap_mean(scores)
    assert estimate.mean == share
    assert bounds(estimate) == pytest.approx((share - half, share + half), abs=3e-4)


def test_interval_of_few_examples_is_scipys():
    scores = np.array([0.0, 0.3, 1.0, 0.9, 0.6, 0.0, 1.0, 0.3, 0.25, 0.8, 0.1, 0.45])
    theirs = stats.bootstrap(
        [scores], np.mean, n_resamples=50_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert bounds(bootstrap_mean(scores)) == pytest.approx((theirs.low, theirs.high), abs=0.01)
    other = np.array([0.1, 0.3, 0.7, 1.0, 0.2, 0.4, 1.0, 0.0, 0.25, 0.4, 0.3, 0.2])
    theirs = stats.bootstrap(
        [scores - other], np.mean, n_resamples=50_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert bounds(bootstrap_difference(scores, other)) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_drawing_equal_examples_together_is_drawing_each_alone():
    """The spread of runs and examples drawn anew, against tables that are really put together."""
    scores = np.stack([coin_flips(share, 30, seed=seed) for seed, share in enumerate((0.4, 0.6, 0.9))])
    rng = np.random.default_rng(2)
    runs, examples = rng.integers(3, size=(20_000, 3)), rng.integers(30, size=(20_000, 30))
    means = scores[runs[:, :, None], examples[:, None, :]].mean(axis=(1, 2))
    assert bounds(bootstrap_runs(scores)) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.012)


def test_memory_limit_does_not_change_how_many_means_are_drawn(monkeypatch):
    scores = np.linspace(0, 1, 40)
    whole = bootstrap_mean(scores)
    monkeypatch.setattr(statistics, "MAX_DRAWN", 40 * 300)  # 33 batches of 300, and one of 100
    assert len(statistics.resampled_means(scores[None], seed=0)) == 10_000
    assert bounds(bootstrap_mean(scores)) == pytest.approx(bounds(whole), abs=0.005)


def test_same_seed_gives_the_same_interval_and_another_one_another():
    scores = coin_flips(0.5, 50) * np.linspace(0.1, 1, 50)
    assert bootstrap_mean(scores, seed=3) == bootstrap_mean(scores, seed=3)
    assert bootstrap_mean(scores, seed=3) != bootstrap_mean(scores, seed=4)


def test_pairing_narrows_the_interval_of_a_difference():
    scores = coin_flips(0.6, 400)
    baseline = scores.copy()
    baseline[:4] = 1 - baseline[:4]
    paired, apart = bootstrap_difference(scores, baseline), bootstrap_difference(scores, np.roll(baseline, 1))
    assert paired.high - paired.low < 0.03 < 0.1 < apart.high - apart.low
    assert paired.mean == pytest.approx(scores.mean() - baseline.mean())


def test_difference_turns_with_its_sides():
    scores, baseline = coin_flips(0.8, 60), coin_flips(0.5, 60, seed=1)
    there, back = bootstrap_difference(scores, baseline), bootstrap_difference(baseline, scores)
    assert there.mean == -back.mean
    assert bounds(there) == pytest.approx((-back.high, -back.low), abs=0.02)


@pytest.mark.parametrize("shape", [(40,), (3, 40)])
def test_difference_of_identical_scores_is_zero_with_the_exact_bound(shape):
    scores = coin_flips(0.5, *shape)
    bound = 1 - 0.025 ** (1 / 40)
    assert bootstrap_difference(scores, scores) == Estimate(0.0, -bound, bound)


@pytest.mark.parametrize("num_examples", [1, 5, 20, 500])
def test_interval_of_equal_scores_is_clopper_and_pearsons(num_examples):
    all_right = bootstrap_mean([1.0] * num_examples)
    assert all_right.high == 1.0
    assert all_right.low == pytest.approx(stats.beta.ppf(0.025, num_examples, 1))  # n of n right
    all_wrong = bootstrap_mean([0.0] * num_examples)
    assert all_wrong.low == 0.0
    assert all_wrong.high == pytest.approx(stats.beta.ppf(0.975, 1, num_examples))  # none right
    assert exact_bound(num_examples) == pytest.approx(all_wrong.high)


def test_runs_that_are_all_right_count_as_one():
    """Three runs on the same twenty examples know no more of the next example than one."""
    assert bootstrap_runs([[1.0] * 20] * 3) == bootstrap_mean([1.0] * 20)


def test_difference_of_always_right_to_always_wrong_stays_inside_its_range():
    estimate = bootstrap_difference([1.0] * 20, [0.0] * 20)
    assert (estimate.mean, estimate.high) == (1.0, 1.0)
    assert estimate.low == pytest.approx(1 - 2 * exact_bound(20))


def test_interval_over_runs_and_examples_is_wider_than_over_pooled_scores():
    scores = np.stack([coin_flips(share, 300, seed=seed) for seed, share in enumerate((0.5, 0.7, 0.9))])
    over_runs, pooled = bootstrap_runs(scores), bootstrap_mean(scores.ravel())
    assert over_runs.mean == pooled.mean
    assert over_runs.high - over_runs.low > 3 * (pooled.high - pooled.low)


def test_interval_of_one_run_is_that_of_its_examples():
    scores = coin_flips(0.7, 60)
    assert bootstrap_runs(scores[None]) == bootstrap_mean(scores)


def test_identical_runs_do_not_narrow_the_interval():
    scores = coin_flips(0.7, 200)
    one, four = bootstrap_mean(scores), bootstrap_runs(np.stack([scores] * 4))
    assert bounds(four) == pytest.approx(bounds(one), abs=0.01)


def test_estimate_is_written_in_percent():
    assert str(Estimate(-0.0312, -0.1, 0.0375)) == "-3.1 % [-10.0, 3.8]"
    assert Estimate(0.5, 0.25, 0.75).asdict() == {"mean": 0.5, "low": 0.25, "high": 0.75}


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([], r"shape \(1, 0\) have no mean"),
        ([[]], r"shape \(1, 0\) have no mean"),
        (np.zeros((2, 2, 2)), r"shape \(2, 2, 2\) have no mean. Give \(examples,\) or \(runs, examples\)"),
        ([[1.0, 0.0], [1.0]], "not a table of numbers .*evaluate all runs on the same rows"),
        (["right"], "not a table of numbers .*'right'"),
        ([1.0, None, float("inf")], "2 of 3 scores are not finite. Score every row"),
        ([80.0, 90.0], "Scores from 80 to 90 are not between 0 and 1. Give fractions"),
        ([0.5, -0.5], "Scores from -0.5 to 0.5 are not between 0 and 1"),
    ],
)
def test_scores_without_an_interval_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_runs(scores)


def test_scores_that_are_no_pairs_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(1, 3\) and baseline \(2, 3\) are not paired"):
        bootstrap_difference([1, 0, 1], [[1, 0, 1], [0, 0, 1]])
