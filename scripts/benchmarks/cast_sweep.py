"""``casts.py --sweep``: which tiles and how many warps the kernels should have, as lines for
titanlite/quant/kernels/launch.py.

One constant after the other is given each of its candidates, the others what was best before, and the whole cast or
rescaling is timed; the best is the one with the least geometric mean of times over all shapes and layouts, where the
constant of now is 1. What each puts out is compared with the reference. A candidate that cannot be compiled, or is
wrong, drops out, and is named.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import math
import os
import statistics
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import harness
import results
from casts import (
    CASTS,
    OURS,
    RESCALE,
    SWIGLUS,
    Input,
    Kernel,
    bound,
    computed_by,
    fresh,
    inputs_of,
    mismatch,
    over,
    plain,
    shapes,
)


class Constant(NamedTuple):
    """One in launch.py: ``candidates`` for it, and the kernels that it says something about."""

    name: str
    candidates: tuple[Any, ...]
    kernels: list[Kernel]


def _casts(*wanted: tuple[str, str]) -> list[Kernel]:
    return [kernel for kernel in CASTS[:6] if (kernel.kernel, kernel.scales) in wanted]


_TILED = _casts(("cast both", "vector"), ("cast both", "tensor"), ("cast columns", "vector"), ("cast rows", "tensor"))
_Tiles = tuple[tuple[int, int, int], ...]  # rows, columns, warps
_AMAX: _Tiles = ((32, 256, 4), (32, 512, 8), (64, 128, 4), (64, 256, 4), (64, 256, 8), (64, 512, 8), (128, 128, 8))
_AMAX += ((128, 256, 8), (128, 256, 16), (256, 128, 8), (16, 1024, 8))
_CAST: _Tiles = ((64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 64, 4), (128, 64, 8), (128, 128, 4), (128, 128, 8))
_CAST += ((128, 128, 16), (64, 256, 8), (256, 64, 8), (128, 256, 16))
_SWIGLU = (*_CAST, (32, 128, 8), (64, 64, 8), (64, 128, 16))
_RESCALE: _Tiles = ((8, 1024, 4), (16, 256, 4), (16, 512, 4), (32, 128, 4), (32, 256, 4), (32, 256, 8), (64, 128, 4))
_RESCALE += ((64, 256, 8),)

CONSTANTS = (
    Constant("CAST_TILE", _CAST, _TILED),
    Constant("AMAX_TILE", _AMAX, _TILED),
    Constant("ROW_PER_WARP", (256, 512, 1024, 2048, 4096), _casts(("cast rows", "vector"))),
    Constant("RESCALE_TILE", _RESCALE, [RESCALE]),
    Constant("SWIGLU_TILE", _SWIGLU, SWIGLUS[2:]),
)
_TOYS = 2  # candidates of each constant on the CPU, where the interpreter is slow


def check(parser: argparse.ArgumentParser, device: str) -> None:
    """End with status 2 where the kernels cannot run."""
    if importlib.util.find_spec("triton") is None:
        parser.error("--sweep: triton is not installed: pip install triton")
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--sweep --device=cpu: on a CPU the kernels run in Triton's interpreter: set TRITON_INTERPRET=1")


def _launch() -> ModuleType:
    return importlib.import_module("titanlite.quant.kernels.launch")  # which needs triton


@contextlib.contextmanager
def given(name: str, value: Any) -> Iterator[None]:
    """The constant ``name`` of launch.py with another value; a tuple is made a tile."""
    launch = _launch()
    before = getattr(launch, name)
    try:
        setattr(launch, name, launch.Tile(*value) if isinstance(value, tuple) else value)
        yield
    finally:
        setattr(launch, name, before)


def run(kernel: Kernel, i: Input) -> tuple[Any, ...]:
    return computed_by(_launch(), kernel, i)


def candidates(constant: Constant, device: str) -> list[Any]:
    """The value of now first."""
    now = getattr(_launch(), constant.name)
    others = [value for value in constant.candidates if value != now]
    return [now, *(others[: _TOYS - 1] if device == "cpu" else others)]


def refusal(constant: Constant, value: Any, kernel: Kernel, i: Input, expected: tuple[Any, ...]) -> str | None:
    """Why ``value`` is none for ``kernel``; compiles it."""
    try:
        with given(constant.name, value):
            wrong = mismatch(run(kernel, fresh(i)), expected)
    except Exception as e:  # whatever a compiler raises
        return harness.failure(e)
    return f"wrong: {wrong:.3g} of the numbers differ from the reference" if wrong > bound(OURS, kernel) else None


def running(constant: Constant, value: Any, kernel: Kernel, inputs: list[Input]) -> Callable[[], Any]:
    def one(i: Input) -> Any:
        with given(constant.name, value):
            return run(kernel, i)

    return over(inputs, one)


def measure(constant: Constant, args: argparse.Namespace, budget: harness.Budget) -> list[dict[str, Any]]:
    """A row for each candidate: ``relative``, its times over those of the value of now, and their mean."""
    rows: dict[Any, dict[str, Any]] = {}
    for value in candidates(constant, args.device):
        shown = str(tuple(value)) if isinstance(value, tuple) else str(value)
        rows[value] = {"constant": constant.name, "value": shown, "relative": {}}
    cases = {f"{k.kernel}, {k.scales}, {s[0]} x {s[1]}": (s, k) for s in shapes(args) for k in constant.kernels}
    for case in budget.within(cases, lambda case: f"{constant.name}, {case}"):
        shape, kernel = cases[case]
        inputs = inputs_of(*shape, args.device)
        expected = plain(kernel, fresh(inputs[0]))
        for value, row in rows.items():
            if "failed" not in row and (why := refusal(constant, value, kernel, inputs[0], expected)):
                row["failed"] = why
        calls = {v: running(constant, v, kernel, inputs) for v, row in rows.items() if "failed" not in row}
        seconds = harness.time_running(calls, args.device, args.rounds, 2 * len(inputs))
        first = next(iter(seconds.values()))
        for value, taken in seconds.items():
            rows[value]["relative"][case] = taken / first
    for row in rows.values():
        if row["relative"] and "failed" not in row:
            row["mean"] = math.exp(statistics.fmean(map(math.log, row["relative"].values())))
    return [{**row, "key": value} for value, row in rows.items()]


def sweep(args: argparse.Namespace) -> int:
    budget = harness.Budget(args.seconds)
    launch = _launch()
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as settled:
        for done, constant in enumerate(CONSTANTS):
            share = None if args.seconds is None else budget.left() / (len(CONSTANTS) - done)
            trials = measure(constant, args, harness.Budget(share, budget.left_out))
            whole = [row for row in trials if "mean" in row]
            if whole:
                best = min(whole, key=lambda row: row["mean"])
                best["best"] = True
                settled.enter_context(given(constant.name, best["key"]))
            rows += [{key: value for key, value in row.items() if key != "key"} for row in trials]
            results.save("cast_sweep", rows, args, left_out=budget.left_out)
        print(harness.show(rows, ("constant", "value", "mean", "best", "failed")))
        for constant in CONSTANTS:
            cases = {name for row in rows if row["constant"] == constant.name for name in row["relative"]}
            for case in sorted(cases):
                of_case = [r for r in rows if r["constant"] == constant.name and case in r["relative"]]
                first = min(of_case, key=lambda row: row["relative"][case])
                print(f"{constant.name}, {case}: {first['value']} ({first['relative'][case]:.3f})")
        budget.print_left_out()
        print("The best, for titanlite/quant/kernels/launch.py:")
        for constant in CONSTANTS:
            value = getattr(launch, constant.name)
            print(f"{constant.name} = {f'Tile{tuple(value)}' if isinstance(value, tuple) else value}")
    return int(any(row.get("failed", "").startswith("wrong") for row in rows) or not any("mean" in r for r in rows))


if __name__ == "__main__":
    raise SystemExit("part of casts.py: python scripts/benchmarks/casts.py --sweep")
