"""Bootstrap intervals of scores: over examples, over runs and examples, and of paired differences.

Shapes: S runs (seeds), n examples. The intervals should contain the true value in 95 of 100 cases, and do so over
examples; over two or three runs they are too narrow, and contain it in about three of four (tests/test_statistics.py).
Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile intervals).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np


LEVEL = 0.95
NUM_RESAMPLES = 10_000
MAX_DRAWN = 10_000_000  # numbers in memory at a time


def percent(share: float) -> str:
    """Format a fraction from 0 to 1 as text: `50.0 %`."""
    return f"{100 * share:.1f} %"


def points(difference: "Estimate") -> str:
    """Format a difference of fractions as text, in percentage points.

    >>> points(Estimate(-0.5, -0.6, -0.4))
    '-50.0 points [-60.0, -40.0]'
    """
    return f"{100 * difference.mean:+.1f} points [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval.

    >>> print(Estimate(0.5, 0.4, 0.6))
    50.0 % [40.0, 60.0]
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, record: Mapping) -> "Estimate":
        """Return the estimate in a record, ignoring other keys."""
        return cls(record["mean"], record["low"], record["high"])

    def asdict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{percent(self.mean)} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def as_runs(scores) -> np.ndarray:
    """Return scores (n,) or (S, n) as (S, n), all finite.

    Raises:
        ValueError: no scores, rows of different lengths, or a score that is not a number.
    """
    try:
        scores = np.atleast_2d(np.asarray(scores, dtype=float))
    except ValueError as error:
        raise ValueError(
            f"The scores are not a table of numbers ({error}). Give each example a number, and evaluate all runs "
            "on the same rows."
        ) from None
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(f"Scores of shape {scores.shape} have no mean. Give (examples,) or (runs, examples).")
    if not np.isfinite(scores).all():
        raise ValueError(f"{(~np.isfinite(scores)).sum()} of {scores.size} scores are not finite. Score every row.")
    return scores


def resampled_means(scores: np.ndarray, seed: int) -> np.ndarray:
    """Return means (NUM_RESAMPLES,) of (S, n) with resampled runs and examples; all runs share the examples drawn.

    Examples with the same scores are drawn together, as m kinds: for scores 0 and 1 there are at most 2^S kinds.
    """
    rng = np.random.default_rng(seed)
    num_runs, num_examples = scores.shape
    kinds, counts = np.unique(scores, axis=1, return_counts=True)  # (S, m), (m,)
    means, at_once = [], max(1, MAX_DRAWN // counts.size)
    for start in range(0, NUM_RESAMPLES, at_once):
        size = min(at_once, NUM_RESAMPLES - start)
        # Counts of each run and each kind; the mean is then a product of the two, not a copy of the table.
        runs = rng.multinomial(num_runs, np.full(num_runs, 1 / num_runs), size=size)  # (size, S)
        examples = rng.multinomial(num_examples, counts / num_examples, size=size)  # (size, m)
        means.append(((runs @ kinds) * examples).sum(axis=1) / scores.size)  # (size,)
    return np.concatenate(means)


def sign_test(num_up: int, num_down: int) -> float:
    """Return the exact two-sided p-value for numbers of rising and falling pairs, equally likely (McNemar's test).

    >>> sign_test(0, 4), round(sign_test(0, 6), 3), sign_test(3, 3)
    (0.125, 0.031, 1.0)
    """
    num_pairs = num_up + num_down
    tail = sum(math.comb(num_pairs, k) for k in range(min(num_up, num_down) + 1))
    return min(1.0, 2 * tail / 2**num_pairs)


def exact_bound(num_examples: int) -> float:
    """Return the largest distance of a 0/1 score's mean from n equal ones (Clopper-Pearson: [(α/2)^(1/n), 1]).

    >>> round(exact_bound(500), 4)
    0.0074
    """
    return 1 - ((1 - LEVEL) / 2) ** (1 / num_examples)


def bootstrap_runs(scores, *, seed: int = 0, low: float = 0.0, high: float = 1.0) -> Estimate:
    """Return the mean of scores (S, n) between `low` and `high`, and the percentile interval over runs and examples.

    If all scores are equal no resample can differ, so the interval is that of `exact_bound` for one run.

    Raises:
        ValueError: a score outside the range; see also `as_runs`.
    """
    scores = as_runs(scores)
    if scores.min() < low or scores.max() > high:
        raise ValueError(
            f"Scores from {scores.min():g} to {scores.max():g} are not between {low:g} and {high:g}. Give fractions, "
            "not percent."
        )
    mean = float(scores.mean())
    if (scores == scores.flat[0]).all():
        bound = exact_bound(scores.shape[1]) * (high - low)
        return Estimate(mean, max(low, mean - bound), min(high, mean + bound))
    tail = 100 * (1 - LEVEL) / 2
    bounds = np.percentile(resampled_means(scores, seed), [tail, 100 - tail])
    return Estimate(mean, float(bounds[0]), float(bounds[1]))


def bootstrap_mean(scores, *, seed: int = 0) -> Estimate:
    """Return the mean of one run's scores (n,), each from 0 to 1, and its interval over examples."""
    return bootstrap_runs(scores, seed=seed)


def bootstrap_difference(scores, baseline, *, seed: int = 0) -> Estimate:
    """Return the mean of scores - baseline, paired by example (and run), each (n,) or (S, n), and its interval.

    Raises:
        ValueError: the tables have different shapes, so there are no pairs.
    """
    scores, baseline = as_runs(scores), as_runs(baseline)
    if scores.shape != baseline.shape:
        raise ValueError(
            f"Scores {scores.shape} and baseline {baseline.shape} are not paired. Use the same rows and runs."
        )
    difference = scores - baseline
    if (difference == 0).all():  # an example may differ in either direction
        bound = exact_bound(difference.shape[1])
        return Estimate(0.0, -bound, bound)
    return bootstrap_runs(difference, seed=seed, low=-1.0)
