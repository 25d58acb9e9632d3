"""Bad steps: the verdict against plain Python, optimizers that skip without changing a bit, and what is said of it."""

from __future__ import annotations

import json
import math
import random
import statistics
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.forks import ROOT
from titanlite.config.schema import Optimizer, Training
from titanlite.optim import build_optimizer
from titanlite.training.loss_watch import LossWatch, rank_of_claim
from titanlite.training.step_guard import SMALLEST_DEVIATION, WINDOW, StepGuard, StepRecord

CPU = torch.device("cpu")
NAN, INF = math.nan, math.inf


def judged(guard: StepGuard, loss: float, grad_norm: float = 1.0, own_loss: float | None = None) -> StepRecord:
    local_loss = loss if own_loss is None else own_loss
    return StepRecord.of(guard.judge(*(torch.tensor(x, dtype=torch.float64) for x in (local_loss, loss, grad_norm))))


def noisy(count: int = WINDOW, mean: float = 3.0, deviation: float = 0.1, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(mean, deviation) for _ in range(count)]


def full(guard: StepGuard, losses: list[float] | None = None) -> StepGuard:
    for loss in losses or noisy():
        assert not judged(guard, loss).is_bad
    return guard


# ---- the verdict


class Reference:
    """The same in plain Python."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.losses: list[float] = []
        self.skipped = self.in_a_row = 0

    def limit(self) -> float:
        if len(self.losses) < WINDOW or self.training.spike_sigmas == 0:
            return INF
        mean = statistics.fmean(self.losses[-WINDOW:])
        deviation = max(statistics.stdev(self.losses[-WINDOW:]), SMALLEST_DEVIATION * abs(mean))
        return mean + self.training.spike_sigmas * deviation

    def judge(self, loss: float, grad_norm: float) -> tuple[bool, int, int]:
        bad = not math.isfinite(loss) or not math.isfinite(grad_norm) or loss > self.limit()
        if not bad:
            self.losses.append(loss)
        if self.training.on_bad_step == "skip":
            self.skipped += bad
            self.in_a_row = self.in_a_row + 1 if bad else 0
        return bad, self.skipped, self.in_a_row


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    policy=st.sampled_from(["stop", "skip"]),
    sigmas=st.sampled_from([0.0, 1.0, 2.5, 6.0]),
    deviation=st.sampled_from([0.0, 1e-4, 0.05, 1.0]),
    saved_at=st.integers(0, 200),
)
def test_verdicts_are_those_of_plain_python(
    seed: int, policy: Any, sigmas: float, deviation: float, saved_at: int
) -> None:
    """Over runs of 220 steps with spikes and worse among them, saved and continued somewhere."""
    training = Training(on_bad_step=policy, spike_sigmas=sigmas)
    guard, reference, draw = StepGuard(training, CPU), Reference(training), random.Random(seed)
    for step in range(220):
        if step == saved_at:
            saved = json.dumps(guard.state_dict(), allow_nan=False)
            guard = StepGuard(training, CPU)
            guard.load_state_dict(json.loads(saved))
            assert json.dumps(guard.state_dict()) == saved
        loss, grad_norm = draw.gauss(3.0 - step / 200, deviation), 1.0
        kind = draw.random()
        if kind < 0.1:
            loss = draw.choice([NAN, INF, -INF, 50 * loss, 1.3 * loss])
        elif kind < 0.15:
            grad_norm = draw.choice([NAN, INF])
        limit = reference.limit()
        assume(not math.isfinite(limit) or abs(loss - limit) > 1e-9 or math.isnan(loss))
        record = judged(guard, loss, grad_norm)
        assert (record.is_bad, record.skipped, record.in_a_row) == reference.judge(loss, grad_norm)
        if math.isfinite(limit):
            assert record.mean + sigmas * record.deviation == pytest.approx(limit, rel=1e-12)
    assert guard.state_dict()["losses"] == reference.losses[-WINDOW:]


def test_a_state_is_kept_to_the_bit() -> None:
    guard, exact = StepGuard(Training(on_bad_step="skip"), CPU), noisy(200)
    full(guard, exact)
    judged(guard, NAN)
    judged(guard, NAN)
    state = json.loads(json.dumps(guard.state_dict()))
    assert state == {"losses": exact[-WINDOW:], "skipped": 2, "in_a_row": 2}
    again = StepGuard(Training(on_bad_step="skip"), CPU)
    again.load_state_dict(state)
    for loss in (3.1, 3.6, 3.7, 30.0, NAN, 2.9):
        assert str(judged(again, loss)) == str(judged(guard, loss))


def test_nothing_is_a_spike_before_the_window_is_full() -> None:
    guard = full(StepGuard(Training(), CPU), noisy(WINDOW - 1))
    assert not judged(guard, 150.0).is_bad
    guard = full(StepGuard(Training(), CPU), noisy(WINDOW))
    assert judged(guard, 150.0).is_bad


def test_bad_losses_do_not_enter_the_window() -> None:
    guard = full(StepGuard(Training(on_bad_step="skip"), CPU))
    before = guard.state_dict()["losses"]
    records = [judged(guard, loss, norm) for loss, norm in ((150.0, 1.0), (NAN, NAN), (3.0, INF), (150.0, 1.0))]
    assert [r.is_bad for r in records] == [True] * 4
    assert guard.state_dict() == {"losses": before, "skipped": 4, "in_a_row": 4}
    assert not judged(guard, 3.0).is_bad
    assert guard.state_dict() == {"losses": [*before[1:], 3.0], "skipped": 4, "in_a_row": 0}


@pytest.mark.parametrize("mean", [1e-3, 2.5, 1e4])
def test_a_loss_that_hardly_moves_has_room_for_rounding(mean: float) -> None:
    guard = full(StepGuard(Training(), CPU), [mean] * 200)
    assert not judged(guard, mean * (1 + 5.9e-3)).is_bad
    guard = full(StepGuard(Training(), CPU), [mean] * 200)
    assert judged(guard, mean * (1 + 6.1e-3)).is_bad
    assert not judged(full(StepGuard(Training(), CPU), [0.0] * 200), 0.0).is_bad


def test_zero_sigmas_look_for_no_spikes() -> None:
    guard = full(StepGuard(Training(spike_sigmas=0), CPU))
    assert not judged(guard, 150.0).is_bad
    assert judged(guard, NAN).is_bad
    assert not judged(full(StepGuard(Training(spike_sigmas=0), CPU), [0.0] * 200), 1.0).is_bad


def test_healthy_runs_have_no_spikes() -> None:
    """The debug model's, in bfloat16 and every float8 recipe, with three seeds each."""
    parity = json.loads((ROOT / "docs/benchmarks/loss_parity.json").read_text())
    curves = [losses for result in parity["results"] for losses in result["losses"]]
    assert len(curves) >= 4
    for losses in curves:
        assert len(losses) > WINDOW
        full(StepGuard(Training(), CPU), losses)


# ---- the update


class Waits(TorchDispatchMode):
    """Counts the times that the host asks for the value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


ADAMS = [(name, implementation) for name in ("AdamW", "Adam") for implementation in ("fused", "foreach", "for-loop")]
OPTIMIZERS = [*ADAMS, ("SGD", "fused")]


def made(name: str, implementation: str) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in ((7, 5), (3,))]
    if name == "SGD":  # of somebody else's, with the protocol of torch.amp.GradScaler
        return params, torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True)
    return params, build_optimizer(zip("ab", params), Optimizer(name=name, implementation=implementation))  # type: ignore[arg-type]


def bits(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[bytes]:
    state = [x for param in params for x in optimizer.state[param].values() if isinstance(x, Tensor)]
    return [x.detach().numpy().tobytes() for x in (*params, *state)]


@pytest.mark.parametrize("value", [NAN, INF, 1e3])
@pytest.mark.parametrize("skipped", [{1}, {4}, {1, 2, 5}])
@pytest.mark.parametrize(("name", "implementation"), OPTIMIZERS)
def test_a_skipped_update_changes_no_bit(name: str, implementation: str, skipped: set[int], value: float) -> None:
    """Of a run that skips steps, and of one that never had them."""
    guard = StepGuard(Training(on_bad_step="skip"), CPU)
    guard.load_state_dict({"losses": noisy(), "skipped": 0, "in_a_row": 0})
    params, optimizer = made(name, implementation)
    others, reference = made(name, implementation)
    for step in range(1, 7):
        gradients = [torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) for p in params]
        bad = step in skipped
        for param, other, grad in zip(params, others, gradients, strict=True):
            param.grad, other.grad = grad * value if bad else grad.clone(), grad
        before = bits(params, optimizer)
        loss = torch.tensor(150.0 if bad and value == 1e3 else 3.0)
        norm = torch.tensor(value if bad else 1.0)
        assert StepRecord.of(guard.step(optimizer, loss, loss, norm, torch.tensor(1.0))).is_bad == bad
        if bad:
            after = bits(params, optimizer)
            assert after[: len(before)] == before  # a first step that is skipped may add a state of zeros
            assert not any(any(new) for new in after[len(before) :])
        else:
            reference.step()
            assert bits(params, optimizer) == bits(others, reference)
            assert bits(params, optimizer) != before
    assert not hasattr(optimizer, "found_inf")
    assert not hasattr(optimizer, "grad_scale")


def waits(name: str, implementation: str, policy: Any) -> list[int]:
    """Of two good steps and a bad one."""
    guard = StepGuard(Training(on_bad_step=policy), CPU)
    params, optimizer = made(name, implementation)
    counts = []
    for loss in (1.0, 1.0, NAN):
        for param in params:
            param.grad = torch.ones_like(param)
        with Waits() as counted:
            guard.step(optimizer, *(torch.tensor(x) for x in (loss, loss, 1.0, 1.0)))
        counts.append(counted.count)
    return counts


@pytest.mark.parametrize(("name", "implementation"), OPTIMIZERS)
def test_only_optimizers_that_cannot_skip_by_themselves_wait(name: str, implementation: str) -> None:
    counts = waits(name, implementation, "stop")  # torch's own, which on the CPU read their step counts
    assert counts[0] == 0 or implementation != "fused"
    expected = (
        counts
        if (name, implementation) in (("AdamW", "fused"), ("Adam", "fused"))
        else [counts[0] + 1, counts[1] + 1, 1]
    )
    assert waits(name, implementation, "skip") == expected


def test_stop_lets_the_update_go_ahead() -> None:
    """The verdict comes after it: the run ends anyway, and nothing is before the optimizer."""
    guard = StepGuard(Training(), CPU)
    params, optimizer = made("AdamW", "fused")
    for param in params:
        param.grad = torch.full_like(param, NAN)
    record = StepRecord.of(guard.step(optimizer, *(torch.tensor(x) for x in (1.0, 1.0, NAN, 1.0))))
    assert (record.is_bad, record.skipped, record.in_a_row) == (True, 0, 0)
    assert all(param.isnan().all() for param in params)


# ---- what is said of it


class Watched:
    """A guard with the watch that looks at what it says."""

    def __init__(self, rank: int = 0, **options: Any) -> None:
        self.training = Training(**options)
        self.guard, self.watch = StepGuard(self.training, CPU), LossWatch(self.training, rank)

    def add(self, step: int, loss: float, grad_norm: float = 1.0, own_loss: float | None = None) -> None:
        local_loss = loss if own_loss is None else own_loss
        self.watch.add(step, self.guard.judge(*(torch.tensor(x) for x in (local_loss, loss, grad_norm))))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["loss", "grad_norm"])
def test_the_first_bad_step_and_the_last_good_one_before_it(
    bad: float, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = Watched()
    made.add(1, 3.0)
    made.add(2, 2.5, 0.5)
    assert made.watch.last_good is not None
    assert made.watch.last_good[0] == 2
    assert made.watch.bad is None
    assert made.watch.claim() == 0
    values = {"loss": 2.0, "grad_norm": 0.25, where: bad}
    made.add(3, **values)
    made.add(4, NAN)
    made.add(5, 1.0)
    made.watch.drain()
    rank = ", rank 0" if where == "loss" else ""
    shown = f"step 3{rank}: loss {values['loss']}, grad_norm {values['grad_norm']} is not finite; "
    said = made.watch.describe()
    assert said.startswith(f"{shown}the last good values were loss 2.5000, grad_norm 0.5000 at step 2. Lower optimizer")
    assert "--training.on_bad_step=skip" in said
    assert not caplog.messages


class Arrival:
    """An event of a device that is seen ``after`` a step, or when somebody waits for it."""

    def __init__(self, after: int) -> None:
        self.after, self.now = after, 0

    def query(self) -> bool:
        return self.now >= self.after

    def synchronize(self) -> None: ...


@pytest.mark.parametrize(("losses", "stops"), [([3.0] * 9, 4), ([3.0, 3.0, 3.0, NAN, *[3.0] * 5], None)])
def test_all_ranks_agree_after_the_same_step_whenever_the_records_arrive(
    losses: list[float], stops: int | None
) -> None:
    """A request to stop, or a bad step, is step 4's. On the CPU all see it then, on a GPU each sees it by step 6."""
    called = []
    for late in (None, 0, 1, 2, 5):
        guard, watch = StepGuard(Training(), CPU), LossWatch(Training(), 0)
        calls, pending = [], []
        for step, loss in enumerate(losses, 1):
            asked = torch.tensor(float(stops is not None and step >= stops))
            record = guard.judge(*(torch.tensor(x) for x in (loss, loss, 1.0)), asked)
            if late is None:
                watch.add(step, record)
            else:
                pending.append(Arrival(step + late))
                for event in pending:
                    event.now = step
                watch.add_arriving(step, record, pending[-1])
            calls += [step] if watch.calls(step) else []
        called.append(calls[0])
    assert called == [4, 6, 6, 6, 6]


def test_a_rank_without_the_last_stage_shows_the_loss_of_all() -> None:
    """Under pipeline parallelism rank 0, which speaks for all where no loss is the cause, has no loss of its own."""
    made = Watched()
    made.add(1, 2.5, 0.5, own_loss=0.0)
    made.add(2, 3.0, INF, own_loss=0.0)
    said = "step 2: loss 3.0, grad_norm inf is not finite; the last good values were loss 2.5000, grad_norm 0.5000 at"
    assert made.watch.describe().startswith(said)


def test_a_bad_first_step_has_nothing_good_before_it() -> None:
    made = Watched()
    assert made.watch.describe() == ""
    made.add(1, NAN)
    assert "; no good step came before it since the start. Lower" in made.watch.describe()


def test_a_spike_is_described_by_its_numbers() -> None:
    made = Watched()
    made.guard.load_state_dict({"losses": [2.9, 3.1] * 64, "skipped": 0, "in_a_row": 0})
    made.add(7, 3.2)
    made.add(8, 12.0, own_loss=11.0)
    assert made.watch.describe().startswith(
        "step 8: loss 12.0000 is a spike, 88.6 standard deviations above the mean of the last 128 good steps (mean "
        "3.0023, standard deviation 0.1015, training.spike_sigmas = 6); the last good values were loss 3.2000"
    )
    assert "--training.on_bad_step=skip" in made.watch.describe()
    assert "--training.spike_sigmas=0" in made.watch.describe()


def test_skipped_steps_are_warnings_of_the_first_rank(caplog: pytest.LogCaptureFixture) -> None:
    ranks = [Watched(rank, on_bad_step="skip") for rank in range(2)]
    for made in ranks:
        made.guard.load_state_dict({"losses": [2.9, 3.1] * 64, "skipped": 2, "in_a_row": 0})
        for step, values in enumerate([(NAN,), (3.0, INF), (3.0,), (150.0,)], 17):
            made.add(step, *values)
        assert made.watch.claim() == 0
        assert made.watch.latest is not None
        assert made.watch.latest.skipped == 5
    said = caplog.messages
    assert said[:2] == [
        "step 17 skipped: loss nan is not finite (skipped 3, 1 in a row)",
        "step 18 skipped: grad_norm inf is not finite (skipped 4, 2 in a row)",
    ]
    assert said[2].startswith("step 20 skipped: loss 150.0000 is a spike, 1")
    assert said[2].endswith("training.spike_sigmas = 6) (skipped 5, 1 in a row)")
    assert len(said) == 3


def test_too_many_in_a_row_are_an_error(caplog: pytest.LogCaptureFixture) -> None:
    made = Watched(on_bad_step="skip", max_skipped_in_a_row=3)
    for step, loss in enumerate([NAN, NAN, 2.0, NAN, NAN], 1):
        made.add(step, loss)
        assert made.watch.claim() == 0
    made.add(6, INF)
    assert made.watch.claim() > 0
    made.add(7, NAN)
    assert made.watch.describe().startswith(
        "step 6: 3 skipped steps in a row, and training.max_skipped_in_a_row = 3; this one for loss inf is not "
        "finite; the last good values were loss 2.0000, grad_norm 1.0000 at step 3. Lower optimizer.lr"
    )
    assert len(caplog.messages) == 5


def test_the_rank_that_explains_the_failure_best_wins() -> None:
    def watch(rank: int, step: int, own_loss: float, grad_norm: float) -> LossWatch:
        made = Watched(rank)
        made.add(step, NAN if math.isnan(grad_norm) else own_loss, grad_norm, own_loss)
        return made.watch

    for winner, ranks in (
        (None, [(5, 1.0, 1.0), (5, 1.0, 1.0)]),
        (1, [(5, 1.0, NAN), (5, NAN, NAN), (5, NAN, NAN)]),
        (2, [(6, NAN, NAN), (6, NAN, NAN), (5, 1.0, NAN)]),
        (0, [(7, 1.0, NAN), (7, 1.0, NAN)]),
    ):
        watches = [watch(rank, *values) for rank, values in enumerate(ranks)]
        claims = [w.claim() for w in watches]
        if winner is None:
            assert claims == [0, 0]
        else:
            assert rank_of_claim(max(claims)) == winner
            step, own_loss, _ = ranks[winner]
            expected = f"step {step}, rank {winner}: loss nan" if math.isnan(own_loss) else f"step {step}: loss"
            assert watches[winner].describe().startswith(expected)


# ---- a loss that rises


@pytest.mark.parametrize(
    ("losses", "warned"),
    [
        ([7.7, 8.0, 9.7, 12.0, 20.0], [3]),  # worse than guessing, from the second step on
        ([7.7, 60.0], [2]),
        ([7.7, 9.0, 7.6, 7.0, 6.0], []),  # one batch
        ([1.0, 0.9, 1.3, 0.8, 1.1, 1.5, 1.6, 1.7, 1.6, 1.5], [10]),  # far below guessing: five in a row
        ([0.7, 1.3, 0.9, 1.2, 0.8, *[1.2, 1.4, 1.1, 1.3] * 20], []),  # the first batch was an easy one
        ([7.7, 6.0, 5.0, 4.0, 3.0, *[9.6] * 9, *[3.0] * 5, *[9.6] * 9], [6, 20]),  # it comes back, and rises again
    ],
)
def test_a_run_that_diverges_is_warned_of(losses: list[float], warned: list[int], caplog: Any) -> None:
    guard = StepGuard(Training(), CPU)
    for rank in (0, 1):  # the first one alone speaks
        watch = LossWatch(Training(), rank, uniform=7.6)
        for step, loss in enumerate(losses, 1):
            watch.add(step, guard.judge(*(torch.tensor(x) for x in (loss, loss, 1.0))))
    assert [int(m.split(":")[0].removeprefix("step ")) for m in caplog.messages] == warned
    assert all("THE RUN DIVERGES" in message and "lower optimizer.lr" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("losses", "warned"),
    [
        ([40.0, 39.0, 38.0, 38.0, 38.0, 38.0, 37.0], ["step 1: loss 40.0000 is far above the 7.6000 of guessing"]),
        # It recovers, and diverges later from what it had reached.
        ([40.0, 7.7, *[5.0] * 5, 9.9], ["step 1: loss 40.0000", "step 8: THE RUN DIVERGES: loss 9.9000"]),
        ([12, 11.5, 11, 10.5, 10, *[5.0] * 5, 9.9], ["step 1: loss 12.0000", "step 11: THE RUN DIVERGES: loss 9.9000"]),
        ([9.5, 50.0, 200.0, 1e3], ["step 1: loss 9.5000", "step 2: THE RUN DIVERGES: loss 50.0000"]),
        ([8.4, 8.3], []),
    ],
)
def test_the_first_loss_is_held_against_guessing(losses: list[float], warned: list[str], caplog: Any) -> None:
    guard, watch = StepGuard(Training(), CPU), LossWatch(Training(), 0, uniform=7.6)
    for step, loss in enumerate(losses, 1):
        watch.add(step, guard.judge(*(torch.tensor(x) for x in (loss, loss, 1.0))))
    assert len(caplog.messages) == len(warned)
    assert all(message.startswith(start) for message, start in zip(caplog.messages, warned, strict=True))


def test_a_run_that_continued_is_held_against_its_first_losses(caplog: Any) -> None:
    watch = LossWatch(Training(), 0, [3.0, 2.9, 3.1], start=2.0, uniform=7.6)
    guard = StepGuard(Training(), CPU)
    for step, loss in enumerate([3.0, *[3.5] * 5], 101):
        watch.add(step, guard.judge(*(torch.tensor(x) for x in (loss, loss, 1.0))))
    watch = LossWatch(Training(), 0, [5.0, 4.9], start=12.0, uniform=7.6)  # it began above guessing
    watch.add(201, guard.judge(*(torch.tensor(x) for x in (9.9, 9.9, 1.0))))
    first, second = caplog.messages
    assert first.startswith("step 106: THE RUN DIVERGES: loss 3.5000 is above the 3.1000 of its first steps")
    assert second.startswith("step 201: THE RUN DIVERGES: loss 9.9000 is above the 7.6000 of its first steps")
