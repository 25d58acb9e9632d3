"""Learning rates, against tables and an independent closed form."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from titanlite.config.schema import LRScheduler
from titanlite.errors import ConfigError
from titanlite.optim import build_schedule

DECAYS = ("linear", "sqrt", "cosine")


def learning_rates(steps: int, peak: float = 1.0, **options: object) -> list[float]:
    schedule = build_schedule(LRScheduler(**options), peak, steps)  # type: ignore[arg-type]
    return [schedule.lr(step) for step in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("steps", "options", "expected"),
    [
        (4, {"warmup_steps": 0, "decay_ratio": 0.0}, [1, 1, 1, 1]),
        (4, {"warmup_steps": 0}, [1, 3 / 4, 2 / 4, 1 / 4]),
        (4, {"warmup_steps": 0, "decay_ratio": 1.0}, [1, 3 / 4, 2 / 4, 1 / 4]),
        (4, {"warmup_steps": 0, "lr_min": 0.5}, [1, 7 / 8, 6 / 8, 5 / 8]),
        (4, {"warmup_steps": 0, "lr_min": 1.0}, [1, 1, 1, 1]),
        (6, {"warmup_steps": 2}, [1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        (6, {"warmup_steps": 2, "decay_ratio": 0.5}, [1 / 2, 1, 1, 1, 2 / 3, 1 / 3]),
        (6, {"warmup_steps": 2, "decay_ratio": 0.0}, [1 / 2, 1, 1, 1, 1, 1]),
        (6, {"warmup_steps": 2, "decay_ratio": 1.0}, [1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        (3, {"warmup_steps": 4}, [1 / 3, 2 / 3, 1]),
        (3, {"warmup_steps": 4, "decay_ratio": 1.0}, [1 / 3, 2 / 3, 1]),
        (1, {"warmup_steps": 200, "decay_ratio": 0.5}, [1]),
        (3, {"warmup_steps": 3}, [1 / 3, 2 / 3, 1]),
        (1, {"warmup_steps": 0}, [1]),
        (4, {"warmup_steps": 0, "decay_type": "cosine"}, [1, (2 + math.sqrt(2)) / 4, 1 / 2, (2 - math.sqrt(2)) / 4]),
        (4, {"warmup_steps": 0, "decay_type": "sqrt"}, [1, 1 / 2, 1 - math.sqrt(2) / 2, 1 - math.sqrt(3) / 2]),
        (
            4,
            {"warmup_steps": 0, "decay_type": "cosine", "lr_min": 0.2},
            [1, 0.2 + 0.2 * (2 + math.sqrt(2)), 0.6, 0.2 + 0.2 * (2 - math.sqrt(2))],
        ),
    ],
)
def test_tables(steps: int, options: dict[str, object], expected: list[float]) -> None:
    assert learning_rates(steps, peak=3e-4, **options) == pytest.approx([3e-4 * value for value in expected], rel=1e-12)


def factor_of_torchtitan(index: int, steps: int, warmup: int, ratio: float | None, kind: str, floor: float) -> float:
    """The factor of step ``index``, counted from 0, as torchtitan describes it since 11 June 2025: a warm-up of at most
    the whole run; a decay over what is left, or over ``ratio`` of the run if that is less; between them a plateau, one
    step longer than the rest, so that the last step has not decayed fully."""
    warmup = min(warmup, steps)
    decay = steps - warmup if ratio is None else min(round(steps * ratio), steps - warmup)
    plateau = steps + 1 - warmup - decay
    if index < warmup:
        return (index + 1) / warmup
    if index < warmup + plateau:
        return 1.0
    progress = (index + 1 - warmup - plateau) / decay
    fallen = {"linear": progress, "sqrt": progress**0.5, "cosine": math.sin(math.pi * progress / 2) ** 2}[kind]
    return floor + (1 - floor) * (1 - fallen)


@given(
    steps=st.integers(1, 200),
    warmup=st.integers(0, 250),
    ratio=st.none() | st.floats(0, 1),
    kind=st.sampled_from(DECAYS),
    floor=st.floats(0, 1),
)
def test_every_step_is_as_torchtitan_has_it(
    steps: int, warmup: int, ratio: float | None, kind: str, floor: float
) -> None:
    rates = learning_rates(steps, warmup_steps=warmup, decay_ratio=ratio, decay_type=kind, lr_min=floor)
    theirs = [factor_of_torchtitan(index, steps, warmup, ratio, kind, floor) for index in range(steps)]
    assert rates == pytest.approx(theirs, rel=1e-9)
    assert warmup == 0 or max(rates) == 1.0


@given(
    steps=st.integers(1, 200),
    warmup=st.integers(0, 250),
    ratio=st.none() | st.floats(0, 1),
    kind=st.sampled_from(DECAYS),
    floor=st.floats(0, 1),
    peak=st.floats(1e-6, 1.0),
)
def test_shape(steps: int, warmup: int, ratio: float | None, kind: str, floor: float, peak: float) -> None:
    rates = learning_rates(steps, peak, warmup_steps=warmup, decay_ratio=ratio, decay_type=kind, lr_min=floor)
    warmup = min(warmup, steps)
    after = steps - warmup
    decaying = after if ratio is None else min(round(ratio * steps), after)
    start = max(warmup, steps + 1 - decaying)
    rising, flat, falling = rates[:warmup], rates[warmup:start], rates[start:]
    assert rising == pytest.approx([peak * (i + 1) / warmup for i in range(warmup)], rel=1e-12)
    assert flat == [peak] * len(flat)
    for i, rate in enumerate(falling, 1):
        x = i / decaying
        left = {"linear": 1 - x, "sqrt": 1 - x**0.5, "cosine": math.cos(math.pi * x / 2) ** 2}[kind]
        assert rate == pytest.approx(peak * (floor + (1 - floor) * left), rel=1e-9)
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates)
    assert all(a < b for a, b in itertools.pairwise(rising))
    if floor < 0.9:
        assert all(a > b for a, b in itertools.pairwise([peak, *falling]))
        assert all(rate > peak * floor for rate in falling)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": 10}, "warmup_steps = 10"),
        ({"warmup_steps": 200, "decay_ratio": 0.8}, "warmup_steps = 200"),
        ({"warmup_steps": 5, "decay_ratio": 0.9}, "decay over 5"),
    ],
)
def test_a_schedule_that_does_not_fit_is_said(
    options: dict[str, object], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    learning_rates(10, **options)
    assert message in caplog.text
    assert len(caplog.records) == 1


def test_a_schedule_that_fits_is_not_remarked_upon(caplog: pytest.LogCaptureFixture) -> None:
    learning_rates(10, warmup_steps=5, decay_ratio=0.5)
    assert not caplog.text


def test_apply_sets_every_group() -> None:
    layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    optimizer = torch.optim.AdamW([{"params": layer.parameters(), "lr": 9.0} for layer in layers])
    schedule = build_schedule(LRScheduler(warmup_steps=4), 1e-2, 10)
    assert schedule.apply(optimizer, 2) == pytest.approx(5e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [schedule.lr(2)] * 2


def test_unknown_decay_lists_the_known() -> None:
    with pytest.raises(
        ConfigError, match=r'lr_scheduler.decay_type = "cosin": .*"cosine".*known: cosine, linear, sqrt'
    ):
        build_schedule(LRScheduler(decay_type="cosin"), 1.0, 10)
