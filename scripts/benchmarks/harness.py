"""The parts that benchmarks share: options, a budget of time, timing in turn, child processes under a limit, tables.

torch is imported where it is used: the summary of scripts/gpu_suite.sh, which is written after each section, has no
need of it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parents[2]
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
CONFIGS = ("bf16", *RECIPES)
K = TypeVar("K", bound=Hashable)
_FLUSH = 256 << 20  # bytes: several times the second-level cache of any GPU so far
_CLOCK = 2e9  # Hz: no GPU of now runs faster, so that a wait is not shorter than meant


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the option that every benchmark has; the description is the module's docstring."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", "--output", type=Path, metavar="FILE", help="write the results here, as JSON")
    return made


def gpu_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark for a GPU has."""
    made = parser(doc)
    made.add_argument("--seconds", type=float, metavar="BUDGET", help="begin nothing that would end after this time")
    made.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: toy sizes, to see that the benchmark works"
    )
    return made


def words(text: str) -> list[str]:
    return text.split(",")


def numbers(text: str) -> list[int]:
    """Parse the value of an option: whole numbers from 1, separated by commas."""
    if not all(word.isdecimal() and int(word) for word in words(text)):
        raise argparse.ArgumentTypeError(f"{text} must be whole numbers from 1, separated by commas")
    return [int(word) for word in words(text)]


def check_known(given: argparse.ArgumentParser, args: argparse.Namespace, **options: Sequence[str]) -> None:
    """End with status 2 where one of the words of an option is none of those that there are."""
    for key, known in options.items():
        if unknown := set(getattr(args, key)) - set(known):
            given.error(f"--{key}: {', '.join(unknown)} is not one of {', '.join(known)}")


def check_device(given: argparse.ArgumentParser, device: str) -> None:
    """End with status 2 where ``device`` is not there."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        given.error("there is no GPU here; --device=cpu runs toy sizes on the CPU")


@dataclass
class Budget:
    """``seconds`` from now on, without end if None; ``left_out`` names what there was no time for."""

    seconds: float | None
    left_out: list[str] = field(default_factory=list)
    begin: float = field(default_factory=time.perf_counter)

    def left(self) -> float:
        return float("inf") if self.seconds is None else self.seconds - (time.perf_counter() - self.begin)

    def print_left_out(self) -> None:
        if self.left_out:
            print(f"left out, no time: {'; '.join(self.left_out)}")

    def within(
        self,
        cases: Iterable[K],
        name: Callable[[K], str],
        kind: Callable[[K], Hashable] = lambda _: None,
        share: float = 1.0,
    ) -> Iterator[K]:
        """The cases, each as long as there is as much time as the longest of its kind took.

        Args:
            name: of a case, for ``left_out``.
            share: the part of a case's time that the next one of its kind is expected to take.
        """
        longest: dict[Hashable, float] = {}
        for case in cases:
            before = self.left()
            if before < longest.get(kind(case), 0.0):
                self.left_out.append(name(case))
                continue
            yield case
            if self.seconds is not None:
                longest[kind(case)] = max(longest.get(kind(case), 0.0), share * (before - self.left()))


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], object], device: str) -> float:
    """Seconds of one call; on a GPU by events."""
    import torch

    if device != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def time_in_turn(
    functions: Mapping[K, Callable[[], object]], device: str, rounds: int, warmup: int = 3
) -> dict[K, float]:
    """Median seconds of each function, called one after the other, ``rounds`` times over, so that what changes with
    time, such as the clock, changes for all. On a GPU by events, with the cache emptied before each call."""
    import torch

    seconds: dict[K, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        for _ in range(warmup):
            function()
    flush = torch.empty(_FLUSH, dtype=torch.int8, device=device) if device == "cuda" else None
    for _, (name, function) in itertools.product(range(rounds), functions.items()):
        if flush is not None:
            flush.zero_()  # it also covers the time that the host needs to launch what follows
        seconds[name].append(seconds_of(function, device))
    return {name: statistics.median(values) for name, values in seconds.items()}


def time_running(
    functions: Mapping[K, Callable[[], object]], device: str, rounds: int, calls: int, ahead: bool = True
) -> dict[K, float]:
    """Median seconds of one call of each function, where ``calls`` of them run one right after the other, as in
    training; in turn, ``rounds`` times over. Nothing is emptied in between: what must not lie in the cache has to be
    another tensor in each call.

    Args:
        ahead: on a GPU, launch them while it waits, so that its own time alone counts. Otherwise the host's time
            counts, too, where it is the longer one.
    """
    import torch

    host: dict[K, float] = {}
    for name, function in functions.items():
        for _ in range(3):  # compile, allocate
            function()
        synchronize()
        start = time.perf_counter()
        repeat(function, calls)
        host[name] = time.perf_counter() - start
        synchronize()
    seconds: dict[K, list[float]] = {name: [] for name in functions}
    for _, (name, function) in itertools.product(range(rounds), functions.items()):
        if device == "cuda" and ahead:
            torch.cuda._sleep(int((1.5 * host[name] + 5e-4) * _CLOCK))
        seconds[name].append(seconds_of(functools.partial(repeat, function, calls), device) / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def repeat(function: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        function()


def time_in_pairs(
    ours: Callable[[], object], theirs: Callable[[], object], pairs: int, block: int
) -> list[tuple[float, float]]:
    """Seconds per step of both, for each pair of neighbouring blocks of steps, after a block of each as warm-up. Who
    begins changes from pair to pair."""
    repeat(ours, block)
    repeat(theirs, block)
    timings = []
    for i in range(pairs):
        seconds = {}
        for step in (ours, theirs) if i % 2 == 0 else (theirs, ours):
            synchronize()
            start = time.perf_counter()
            repeat(step, block)
            synchronize()
            seconds[step] = (time.perf_counter() - start) / block
        timings.append((seconds[ours], seconds[theirs]))
    return timings


@dataclass
class Child:
    """A child process that has ended.

    Attributes:
        status: its exit status; None where it was stopped at its limit.
        output: standard output and error, together.
        seconds: how long it ran.
    """

    status: int | None
    output: str
    seconds: float

    def why(self) -> str:
        """Why it failed, in a few lines."""
        if self.status is None:
            return f"stopped at its limit, after {self.seconds:.0f} s"
        lines = [line for line in self.output.splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line or "out of memory" in line]
        return f"status {self.status}: " + " | ".join((errors or lines)[-2:])[-600:]


def run(command: Sequence[str], limit: float | None, env: Mapping[str, str] | None = None) -> Child:
    """Run ``command`` in the repository for at most ``limit`` seconds; then it ends, with all that it started. So it
    does where this process is asked to end: what a GPU's memory is full of must not outlive its parent."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return _run(command, limit, {} if env is None else env)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(command: Sequence[str], limit: float | None, env: Mapping[str, str]) -> Child:
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path_of_children(), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    status: int | None
    try:
        output, _ = process.communicate(timeout=limit)
        status = process.returncode
    except subprocess.TimeoutExpired:
        _kill(process)
        output, _ = process.communicate()
        status = None
    except BaseException:
        _kill(process)
        raise
    return Child(status, output, time.perf_counter() - start)


def path_of_children() -> str:
    """PYTHONPATH with the repository and this folder first."""
    return os.pathsep.join([str(ROOT), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def device_env(device: str) -> dict[str, str]:
    """For children that are to run on ``device``: the CPU is what is left where no GPU is visible."""
    return {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}


@contextlib.contextmanager
def trained(options: Sequence[str], limit: float | None = None, device: str = "cuda") -> Iterator[tuple[Child, Path]]:
    """A run of the trainer in a process of its own, which has ended, and its run folder, which is deleted on exit."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "titanlite.train", f"--job.dump_folder={folder}/run", *options]
        yield run(command, limit, device_env(device)), Path(folder, "run")


def metrics_of(run_folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def failure(error: Exception) -> str:
    """Its type and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


def pyplot() -> Any:
    """matplotlib's pyplot, for files; None where it is not installed, after saying so."""
    try:
        import matplotlib
    except ImportError:
        print("no matplotlib, no picture: pip install matplotlib")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def report(rows: Sequence[Mapping[str, Any]], case: Sequence[str], columns: Sequence[str], budget: Budget) -> None:
    """Print a table of the rows, why some failed, and what was left out. ``case``: the columns that name a row."""
    print(show(rows, (*case, *columns)))
    for row in rows:
        if "failed" in row:
            print(", ".join(f"{row[key]}" for key in case), row["failed"], sep=": ")
    budget.print_left_out()


def show(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A table in plain text; numbers to the right, nothing where a row has no value."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        return "" if value is None else str(value)

    cells = [list(columns), *([cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    numeric = [all(isinstance(r.get(c), (int, float, type(None))) for r in rows) for c in columns]
    return "\n".join(
        "  ".join(
            text.rjust(width) if right else text.ljust(width) for text, width, right in zip(line, widths, numeric)
        )
        for line in cells
    )
