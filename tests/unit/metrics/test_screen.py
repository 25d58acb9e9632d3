"""What a run shows on a terminal: its real output, replayed through a terminal emulator."""

from __future__ import annotations

import os
import re
import sys
import threading
from pathlib import Path

import pytest

from tests.support.runs import FORKS, arguments, environment, run_module
from tests.support.screen import Screen, run_on_terminal
from titanlite.launch import launcher

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FORKS, reason="processes are forked"),
]

OPTIONS = {
    "training.steps": 30,
    "metrics.log_freq": 5,
    "validation.enable": "true",
    "validation.interval": 15,
    "validation.steps": 1,
    "sample.enable": "true",
    "sample.max_new_tokens": 8,
    "checkpoint.keep_model": "true",
}
STATUS = re.compile(r"tok/s|setting up|making the first step|validating,|writing a sample,|[━─#]{4}")
LOGGED = re.compile(
    r"step +(\d+)  loss +[\d.]+  mean +[\d.]+  grad_norm +[\d.]+  tps [\d,]+(  mfu [\d.]+%)?(  [\d.]+ GiB)?"
    r"(  tflops .*)?"
)


class Watched:
    """Looks at the screen after each piece of output."""

    def __init__(self, resized: dict[int, int] | None = None) -> None:
        self.resized = dict(resized or {})
        self.most = 0
        self.statuses: set[str] = set()

    def __call__(self, screen: Screen) -> int | None:
        shown = [line for line in screen.visible() if STATUS.search(line) and not LOGGED.fullmatch(line)]
        self.most = max(self.most, len(shown))
        self.statuses |= {*shown}
        steps = [int(match[1]) for line in screen.visible() if (match := LOGGED.match(line))]
        for step in [step for step in self.resized if steps and steps[-1] >= step]:
            return self.resized.pop(step)
        return None


def show(tmp_path: Path, columns: int, watched: Watched, **env: str) -> Screen:
    place = environment(TERM="xterm-256color", PYTHONIOENCODING="utf-8", **env)
    argv = arguments(tmp_path / "run", OPTIONS)
    status, screen = run_on_terminal(tmp_path, place, columns, run_module, "titanlite.train", argv, seen=watched)
    assert status == 0, "\n".join(screen.lines())
    return screen


def check(screen: Screen, watched: Watched) -> None:
    """One status at a time, none of it left, and every logged step on a line of its own."""
    lines = screen.lines()
    assert watched.most == 1
    assert [line for line in lines if STATUS.search(line) and not line.startswith(("step", "writing"))] == []
    steps = [int(match[1]) for line in lines if (match := LOGGED.fullmatch(line))]
    assert steps == [1, 5, 10, 15, 20, 25, 30]
    assert len([line for line in lines if line.startswith("step ")]) == len(steps)
    assert screen.cursor[1] == 0
    assert screen.visible()[screen.cursor[0]] == ""


@pytest.mark.parametrize(
    ("columns", "colored"),
    [(80, True), (120, False), *(pytest.param(*case, marks=pytest.mark.long) for case in ((80, False), (120, True)))],
)
def test_a_run_on_a_terminal(columns: int, colored: bool, tmp_path: Path) -> None:
    env: dict[str, str] = {} if colored else {"NO_COLOR": "1"}
    watched = Watched()
    screen = show(tmp_path, columns, watched, **env)
    check(screen, watched)
    assert bool(screen.colors()) == colored
    assert (b"\x1b[3" in screen.raw) == colored
    assert not re.search(rb"\x1b(?!\[\d*m|\[J|\[\?7[lh]|\[A)", screen.raw)  # nothing else is asked of the terminal
    # What is broken is broken by the run, between words: a full line is one that the terminal has broken.
    paths = [line for line in screen.lines() if len(line) == columns]
    assert all(str(tmp_path)[:10] in line or "/" in line for line in paths)
    assert any("left  mean loss" in status and "tok/s" in status for status in watched.statuses)


def test_a_terminal_that_is_resized(tmp_path: Path) -> None:
    """Narrower, so that the status is longer than a line, and wider again."""
    watched = Watched({5: 76, 15: 130})
    screen = show(tmp_path, 120, watched)
    assert watched.resized == {}
    assert watched.most == 1
    check(screen, watched)


FOREIGN = "[W1130 12:00:00 ProcessGroup.cpp:1] a warning of C++"


def warned(argv: list[str]) -> None:
    """Train, while lines that do not pass the logger are written too."""
    ended = threading.Event()

    def warn() -> None:
        while not ended.wait(0.6):  # the status is drawn four times in a second
            os.write(1, f"{FOREIGN}\n".encode())

    thread = threading.Thread(target=warn)
    thread.start()
    try:
        run_module("titanlite.train", argv)
    finally:
        ended.set()
        thread.join()


def test_lines_of_others_stand_alone(tmp_path: Path) -> None:
    watched, place = Watched(), environment(TERM="xterm-256color", PYTHONIOENCODING="utf-8")
    status, screen = run_on_terminal(tmp_path, place, 100, warned, arguments(tmp_path / "run", OPTIONS), seen=watched)
    assert status == 0
    check(screen, watched)
    lines = [line for line in screen.lines() if "warning of C++" in line]
    assert len(lines) >= 3
    assert {*lines} == {FOREIGN}


def test_an_error_leaves_no_status(tmp_path: Path) -> None:
    place = environment(TERM="xterm")
    argv = arguments(tmp_path / "run", {"training.steps": 20, "optimizer.lr": 0.3, "lr_scheduler.warmup_steps": 1})
    watched = Watched()
    status, screen = run_on_terminal(tmp_path, place, 80, run_module, "titanlite.train", argv, seen=watched)
    text = "\n".join(screen.lines())
    assert "THE RUN DIVERGES" in text
    assert "WARNING: step" in text
    assert [line for line in screen.lines() if STATUS.search(line) and not line.startswith("step")] == []
    assert status in (0, 1)


@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"TERM": ""}], ids=["dumb", "unset"])
def test_no_terminal_features_where_there_are_none(env: dict[str, str], tmp_path: Path) -> None:
    """A dumb terminal has torchtitan's lines, as a pipe has."""
    argv = arguments(tmp_path / "run", {"training.steps": 2})
    status, screen = run_on_terminal(tmp_path, environment(**env), 200, run_module, "titanlite.train", argv)
    assert status == 0
    if env["TERM"] == "dumb":
        assert b"\x1b" not in screen.raw
        assert any(re.match(r"\[rank0\]:\[titan\] .* - INFO - step:  2  loss: ", line) for line in screen.lines())


@pytest.mark.long
def test_two_processes_share_a_terminal(tmp_path: Path) -> None:
    """The launcher's own workers, of which the first one alone shows a status."""
    place = environment(TERM="xterm-256color", PYTHONIOENCODING="utf-8", NGPU="2")
    argv = arguments(tmp_path / "run", OPTIONS)
    watched = Watched()
    status, screen = run_on_terminal(tmp_path, place, 100, launch, argv, seen=watched)
    assert status == 0, "\n".join(screen.lines())
    check(screen, watched)


def launch(argv: list[str]) -> None:
    sys.exit(launcher.main(argv))
