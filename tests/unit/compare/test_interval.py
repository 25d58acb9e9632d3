"""The interval covers the truth as often as it says, whatever the autocorrelation."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.synthetic_runs import loss_pairs
from titanlite.compare.interval import MIN_ROWS, mean_interval
from titanlite.metrics.last_part import last_part

PAIRS = 400


def covered(steps: int, rho: float, percent: float, seed: int, white: float = 0.0, log_freq: int = 1) -> float:
    """The share of pairs, in percent, whose interval has the true difference in it."""
    first, second, truth = loss_pairs(np.random.default_rng(seed), PAIRS, steps, rho, percent, white)
    rows = slice(log_freq - 1, None, log_freq)
    intervals = (mean_interval((b - a)[rows]) for a, b in zip(first, second, strict=True))
    return 100 * float(np.mean([i is not None and i.low <= truth <= i.high for i in intervals]))


@pytest.mark.parametrize("percent", [0.0, 0.5], ids=["no difference", "0.5%"])
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("steps", [500, 5000])
def test_it_covers_the_truth_in_95_percent(steps: int, rho: float, percent: float) -> None:
    """Without a difference, so many pairs are called noise."""
    assert covered(steps, rho, percent, seed=steps + int(percent > 0)) == pytest.approx(95, abs=3)


@pytest.mark.parametrize(("steps", "log_freq"), [(500, 10), (1000, 10), (5000, 10), (1000, 5)])
def test_it_holds_for_runs_that_log_some_steps(steps: int, log_freq: int) -> None:
    assert covered(steps, 0.9, 0.5, seed=1, log_freq=log_freq) == pytest.approx(95, abs=3)


def test_it_sees_a_slow_drift_below_the_noise_of_batches() -> None:
    """The correlation of neighbours alone says little of it: such intervals would cover 83%."""
    assert covered(2000, 0.95, 0.5, seed=2, white=1.0) == pytest.approx(95, abs=3)


def test_independent_noise_gives_the_interval_of_students_t() -> None:
    noise = np.random.default_rng(0).standard_normal((200, 400))
    widths = [i.high - i.low for row in noise if (i := mean_interval(row))]
    # 12 blocks of 100 rows: 2 * 2.201 / sqrt(100), if it were not for the estimate of the correlation.
    assert np.median(widths) == pytest.approx(0.44, rel=0.1)


def test_equal_runs_differ_by_nothing() -> None:
    assert mean_interval(np.zeros(100)) == (0, 0, 0)
    assert mean_interval(np.full(100, 0.1)) == pytest.approx((0.1, 0.1, 0.1))


def test_few_rows_give_no_interval() -> None:
    assert mean_interval(np.ones(MIN_ROWS - 1)) is None
    assert mean_interval(np.arange(MIN_ROWS, dtype=float)) is not None


@pytest.mark.parametrize(("rows", "last"), [(1, 1), (20, 10), (200, 100), (400, 100), (4000, 1000)])
def test_the_last_part(rows: int, last: int) -> None:
    assert last_part(rows) == last
