"""Text that fits a terminal, and the live status."""

from __future__ import annotations

import re
import shlex
import time

import pytest

from titanlite.metrics.progress import Progress, duration
from titanlite.metrics.terminal import fitted, joined, length, paint


def test_long_lines_break_between_words() -> None:
    text = "a title\n    name         one two three four\n    x  " + "y" * 50
    assert fitted(text, 34).splitlines() == [
        "a title",
        "    name         one two three",
        "                 four",
        "    x  " + "y" * 50,  # a word is never broken
    ]
    assert fitted("这是 一个 描述", 10) == "这是 一个\n    描述"  # of two columns each
    assert fitted("one two three", 9) == "one two\n    three"
    assert fitted(text, 80) == text


@pytest.mark.parametrize("before", ["        ", "    run it again  ", ""])
def test_a_broken_command_can_be_pasted(before: str) -> None:
    command = "CONFIG_FILE=a/config.toml ./run_train.sh --job.dump_folder='my text' --training.steps=100"
    lines = fitted(f"{before}{command}", 60).removeprefix(before)
    assert max(map(len, lines.splitlines())) <= 60
    assert lines.count(" \\\n") in (1, 2)
    assert shlex.split(lines.replace("\\\n", "")) == shlex.split(command)  # as a shell reads it


def test_fields_without_room_are_left_out() -> None:
    assert joined(["one", "two", "three"], 9) == "one  two"
    assert joined(["one", "twelve", "two"], 9) == "one  two"
    painted = joined([paint("one", "red", True), "two"], 8)
    assert (length(painted), paint("one", "red", False)) == (8, "one")


@pytest.mark.parametrize(("seconds", "text"), [(0.9, "0s"), (61, "1m01s"), (3599.9, "59m59s"), (83 * 60, "1h23m")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def status(width: int, steps: int = 30, **options: bool) -> str:
    progress = Progress(200, 50, **options)
    progress.begin(0, "compiling")
    progress.losses = [9.0] * 10 + [5.0] * 10 + [3.0] * 10
    for step in range(1, steps + 1):
        progress.step_done(step, 1000.0)
        time.sleep(0.001)
    return progress.line(width)


def test_the_status() -> None:
    match = re.fullmatch(
        r"(━+)(─+)  step 30/200  0s left  mean loss 4\.0000  [\d,]+ tok/s  checkpoint at 50", status(119)
    )  # the mean of 20 steps
    assert match is not None
    assert len(match[1]) / len(match[1] + match[2]) == pytest.approx(30 / 200, abs=0.03)
    assert "compiling" in status(80, steps=0)
    assert "tok/s" not in status(80, steps=1)  # one step has no duration yet


@pytest.mark.parametrize("width", [*range(10, 140, 7), 79, 119])
def test_the_status_fits_every_width(width: int) -> None:
    plain = status(width, unicode=False)
    assert len(plain) <= width
    assert plain.isascii()
    colored = status(width, colored=True)
    assert length(colored) <= width
    assert ("\033" in colored) == ("━" in colored)


def test_a_pause_is_no_time_of_a_step() -> None:
    progress = Progress(100)
    for step in (1, 2):
        progress.step_done(step, 10.0)
    with progress.doing("validating"):
        assert progress.line(80).startswith(("━", "─"))
        assert "validating, 0s" in progress.line(80)
        time.sleep(0.2)
    progress.step_done(3, 10.0)
    assert "validating" not in progress.line(80)
    (speed,) = re.findall(r"([\d,]+) tok/s", progress.line(80))
    assert int(speed.replace(",", "")) > 10 / 0.1


def test_what_it_costs() -> None:
    """Less than 0.5% of a step of the debug model, which takes 100 ms: four drawings in a second, and a
    count in each step."""

    def cost(repetitions: int) -> float:
        start = time.thread_time()
        for step in range(repetitions):
            progress.step_done(step, 1000.0)
            progress.line(119)
        return (time.thread_time() - start) / repetitions

    progress = Progress(10_000, 50, colored=True)
    progress.losses = [5.0] * 128
    drawing_and_step = min(cost(200) for _ in range(5))
    step_s = 0.1
    assert drawing_and_step * (4 * step_s + 1) < 0.005 * step_s
