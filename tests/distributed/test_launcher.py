"""The launcher and its workers: exit statuses, signals, locks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY, command, environment

LONG = {**TINY, "training.steps": 100000, "metrics.log_freq": 1}


class Started:
    """A run in the background."""

    def __init__(self, folder: Path, ngpu: int) -> None:
        self.log = folder / "output.txt"
        self.folder = folder / "run"
        folder.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            command(self.folder, {}, LONG),
            env=environment(NGPU=str(ngpu)),
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_for(self, text: str, timeout: float = 90) -> None:
        end = time.monotonic() + timeout
        while text not in self.log.read_text():
            assert time.monotonic() < end, f"no {text!r} in:\n{self.log.read_text()}"
            time.sleep(0.1)

    def workers(self) -> list[int]:
        """The processes of this run that are alive, beside the one started here."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes().decode().split("\0")
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if f"--job.dump_folder={self.folder}" in words and state != "Z" and int(entry.name) != self.process.pid:
                found.append(int(entry.name))
        return found


@pytest.fixture
def started(tmp_path: Path) -> Any:
    runs: list[Started] = []

    def start(ngpu: int) -> Started:
        runs.append(Started(tmp_path / f"started-{len(runs)}", ngpu))
        return runs[-1]

    yield start
    for run in runs:
        for pid in [*run.workers(), run.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.process.wait()


@pytest.mark.parametrize("ngpu", [1, 2])
@pytest.mark.parametrize("delay", [1.0, 2.5])
def test_a_signal_during_start_up_ends_the_run_in_order(started: Any, ngpu: int, delay: float) -> None:
    run = started(ngpu)
    time.sleep(delay)
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(timeout=60) == 0
    output = run.log.read_text()
    assert "stopped before the first step" in output
    assert "Traceback" not in output
    assert run.workers() == []


@pytest.mark.parametrize("ngpu", [1, 2])
def test_nohup_survives_the_terminal(started: Any, ngpu: int) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = started(ngpu)
    finally:
        signal.signal(signal.SIGHUP, before)
    run.wait_for("step:  2")
    for pid in [run.process.pid, *run.workers()]:
        os.kill(pid, signal.SIGHUP)
    run.wait_for("step: 10")
    assert run.process.poll() is None


@pytest.mark.parametrize("ngpu", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_in_order(started: Any, ngpu: int, number: signal.Signals) -> None:
    run = started(ngpu)
    run.wait_for("step:  2")
    run.process.send_signal(number)
    assert run.process.wait(timeout=30) == 0
    output = run.log.read_text()
    assert "asked to stop: ending after step" in output
    assert "training stopped early" in output
    assert "Traceback" not in output
    assert run.workers() == []


def test_a_second_signal_ends_even_a_rank_that_hangs(started: Any) -> None:
    run = started(2)
    run.wait_for("step:  2")
    os.kill(max(run.workers()), signal.SIGSTOP)  # the other one now waits in a collective
    run.process.send_signal(signal.SIGTERM)
    run.wait_for("send it again")
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(timeout=10) == 128 + signal.SIGKILL
    assert run.workers() == []


def test_a_killed_launcher_leaves_no_worker(started: Any) -> None:
    run = started(2)
    run.wait_for("step:  2")
    assert len(run.workers()) == 2
    run.process.kill()
    run.process.wait()
    end = time.monotonic() + 10
    while run.workers():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_killed_worker_ends_the_others_and_is_named(started: Any) -> None:
    run = started(2)
    run.wait_for("step:  2")
    victim = max(run.workers())
    os.kill(victim, signal.SIGKILL)
    assert run.process.wait(timeout=60) == 1
    assert f"(process {victim}) ended with SIGKILL; the others were ended" in run.log.read_text()
    assert run.workers() == []


@pytest.mark.parametrize("ngpu", [1, 2])
def test_a_run_folder_in_use_is_refused(started: Any, ngpu: int) -> None:
    run = started(1)
    run.wait_for("step:  2")
    second = subprocess.run(
        command(run.folder, {}), env=environment(NGPU=str(ngpu)), capture_output=True, text=True, timeout=120
    )
    assert second.returncode == 2
    assert f"another run (process {run.process.pid}) is writing to this folder" in second.stderr
    assert "Traceback" not in second.stderr
    assert run.process.poll() is None


def test_torchrun_alone_works(tmp_path: Path) -> None:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "titanlite.train",
    ]
    done = subprocess.run(
        [*torchrun, *command(tmp_path / "run", {})[3:]], env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 3
