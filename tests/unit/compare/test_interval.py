"""The interval covers the truth as often as it says, whatever the autocorrelation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.support.synthetic_runs import loss_pairs, write_run
from titanlite.compare.comparison import compare
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


@pytest.mark.parametrize("percent", [0.0, 0.5], ids=["no difference", "0.5%"])
@pytest.mark.parametrize("white", [0.0, 2.0])
def test_the_command_gives_these_verdicts(white: float, percent: float, tmp_path: Path) -> None:
    """40 of the pairs are written as run folders; the verdicts at equal steps and at equal tokens are counted."""
    pairs, counts = 40, {"steps": Counter[str](), "tokens": Counter[str]()}
    first, second, truth = loss_pairs(np.random.default_rng(3), pairs, 500, 0.8, percent, white)
    for number in range(pairs):
        names = tmp_path / f"a{number}", tmp_path / f"b{number}"
        comparison = compare([write_run(*run) for run in zip(names, (first[number], second[number]), strict=True)])
        for d in comparison.differences:
            assert d.low is not None
            assert d.high is not None
            counts[d.at]["covered"] += d.low <= truth <= d.high
            counts[d.at][d.verdict] += 1
            assert (d.verdict == "within the noise") == (d.low <= 0 <= d.high)
    for count in counts.values():
        assert count["covered"] >= 36  # 95% of 40 are 38, give or take 1.4
        assert count["lower"] <= 3
        if not percent:
            assert count["within the noise"] == count["covered"]


@pytest.mark.parametrize(("rho", "white"), [(0.0, 0.0), (0.8, 0.0), (0.95, 0.0), (0.95, 1.0), (0.95, 2.0)])
@pytest.mark.parametrize("steps", [16, 40, 100, 250, 700, 2000])
def test_it_covers_the_truth_for_short_runs_and_below_the_noise_of_batches(
    steps: int, rho: float, white: float
) -> None:
    """In 93% or more of the cases; of 400 pairs the share is uncertain by 1.3%. The interval of short runs is wider
    than it need be where the noise is not correlated."""
    assert covered(steps, rho, 0.5, seed=1, white=white) >= 93 - 1.3


@pytest.mark.parametrize(("steps", "log_freq"), [(500, 10), (1000, 5), (5000, 10)])
def test_it_holds_for_runs_that_log_some_steps(steps: int, log_freq: int) -> None:
    assert covered(steps, 0.9, 0.5, seed=1, log_freq=log_freq) >= 92


def test_independent_noise_gives_the_interval_of_students_t() -> None:
    noise = np.random.default_rng(0).standard_normal((200, 4000))
    widths = [i.high - i.low for row in noise if (i := mean_interval(row))]
    # 8 blocks of 125 rows: 2 * 2.365 / sqrt(1000), and 6% for the correlation time that is assumed.
    assert np.median(widths) == pytest.approx(0.159, rel=0.1)


def test_equal_runs_differ_by_nothing() -> None:
    assert mean_interval(np.zeros(100)) == (0, 0, 0)
    assert mean_interval(np.full(100, 0.1)) == pytest.approx((0.1, 0.1, 0.1))


def test_few_rows_give_no_interval() -> None:
    assert mean_interval(np.ones(MIN_ROWS - 1)) is None
    assert mean_interval(np.arange(MIN_ROWS, dtype=float)) is not None


@pytest.mark.parametrize(("rows", "last"), [(1, 1), (20, 10), (200, 100), (400, 100), (4000, 1000)])
def test_the_last_part(rows: int, last: int) -> None:
    assert last_part(rows) == last
