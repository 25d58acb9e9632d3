"""The launcher and its workers: exit statuses, signals, locks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import ROOT, TINY, arguments, command, dotted, environment, run_trainer

LONG = {**TINY, "training.steps": 100000, "metrics.log_freq": 1}


# A converter with which rank 0 hangs after step 3, in a call in C that no signal interrupts.
HANG = """
import os
from torch.distributed.distributed_c10d import _get_default_store
from titanlite.converters import register_converter

@register_converter("hang")
class Hang:
    def __init__(self, config, mesh):
        self.step = 0
    def convert(self, model):
        return "hangs"
    def post_optimizer_hook(self, model):
        self.step += 1
        if self.step == 4 and os.environ["RANK"] == "0":
            print("rank 0 hangs", flush=True)
            _get_default_store().get("a key that nobody sets")
"""


class Started:
    """A run in the background: the launcher, or torchrun with ``torchrun`` as its arguments."""

    def __init__(
        self,
        folder: Path,
        ngpu: int,
        *,
        torchrun: list[str] | None = None,
        run_folder: Path | None = None,
        env: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.log = folder / "output.txt"
        self.folder = run_folder or folder / "run"
        given = command(self.folder, dotted(options), LONG)
        if torchrun is not None:
            rest = arguments(self.folder, dotted(options), LONG)
            given = [sys.executable, "-m", "torch.distributed.run", *torchrun, "-m", "titanlite.train", *rest]
        self.process = subprocess.Popen(
            given,
            env=environment(**{"NGPU": str(ngpu), **(env or {})}),
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str, timeout: float = 90) -> None:
        end = time.monotonic() + timeout
        while text not in self.output():
            assert time.monotonic() < end, f"no {text!r} in:\n{self.output()}"
            time.sleep(0.1)

    def workers(self) -> list[int]:
        """The processes of this run that are alive, beside the one started here."""
        pids = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes().decode().split("\0")
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if f"--job.dump_folder={self.folder}" in words and state != "Z" and int(entry.name) != self.process.pid:
                pids.append(int(entry.name))
        return pids

    def ranks(self) -> dict[int, int]:
        """The processes by rank, of those that were started from here."""
        pids = {}
        for pid in self.workers():
            variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
            parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == self.process.pid:
                pids[int(next(v for v in variables if v.startswith("RANK="))[5:])] = pid
        return pids

    def says_where(self, rank: int) -> bool:
        """Whether the log has this rank's traceback, or the stacks of its threads, under its name."""
        output = self.output()
        traceback = f"titanlite: rank {rank} failed:\nTraceback (most recent call last):\n" in output
        ended = output.partition(f"titanlite: rank {rank} was here when it was ended:\n")[2]
        late = output.partition(f"titanlite: rank {rank} is still there 10 s after SIGTERM, which found it here:\n")[2]
        return traceback or "(most recent call first):\n" in (ended or late)


def start_in(folder: Path) -> Iterator[Any]:
    runs: list[Started] = []

    def start(ngpu: int, **options: Any) -> Started:
        runs.append(Started(folder / f"started-{len(runs)}", ngpu, **options))
        return runs[-1]

    yield start
    for run in runs:
        for pid in run.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.process.kill()  # which knows whether it ended: its number may be another's by now
        run.process.wait()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    yield from start_in(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ngpu", "delay"),
    [(2, 2.5), *(pytest.param(*case, marks=pytest.mark.long) for case in ((1, 1.0), (1, 2.5), (2, 1.0)))],
)
def test_a_signal_during_start_up_ends_the_run_in_order(started: Any, ngpu: int, delay: float) -> None:
    run = started(ngpu)
    time.sleep(delay)
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(timeout=60) == 0
    output = run.log.read_text()
    # How far it is by then depends on the machine.
    assert "stopped before the first step" in output or "asked to stop: ending after step" in output
    assert "Traceback" not in output
    assert run.workers() == []


@pytest.mark.parametrize(
    ("ngpu", "number"), [(1, signal.SIGINT), pytest.param(2, signal.SIGTERM, marks=pytest.mark.long)]
)
@pytest.mark.slow
def test_a_run_survives_the_terminal_keeps_its_folder_and_ends_in_order(
    started: Any, ngpu: int, number: signal.Signals
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts it
    try:
        run = started(ngpu)
    finally:
        signal.signal(signal.SIGHUP, before)
    run.wait_for("step:  2")
    for pid in [run.process.pid, *run.workers()]:
        os.kill(pid, signal.SIGHUP)
    holder = run.process.pid if ngpu == 1 else run.ranks()[0]
    for other in (1, 2):
        second = run_trainer(run.folder.parent, other, name=run.folder.name)
        assert second.status == 2
        assert f"another run (process {holder}) is writing to this folder" in second.output
        assert "Traceback" not in second.output
    assert run.process.poll() is None
    run.process.send_signal(number)
    assert run.process.wait(timeout=30) == 0
    output = run.log.read_text()
    assert "asked to stop: ending after step" in output
    assert "training stopped early" in output
    assert "Traceback" not in output
    assert run.workers() == []


@pytest.mark.slow
def test_a_second_signal_ends_even_a_rank_that_hangs(started: Any) -> None:
    run = started(2)
    run.wait_for("step:  2")
    os.kill(max(run.workers()), signal.SIGSTOP)  # the other one now waits in a collective
    run.process.send_signal(signal.SIGTERM)
    run.wait_for("send it again")
    (notice,) = [line for line in run.output().splitlines() if "send it again" in line]
    assert len(notice) < 80  # columns of a terminal
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


@pytest.mark.slow
def test_a_signal_to_the_launcher_and_its_workers_is_one_request(started: Any) -> None:
    """As Slurm and systemd send it."""
    run = started(2)
    run.wait_for("step:  2")
    for pid in [run.process.pid, *run.workers()]:
        os.kill(pid, signal.SIGTERM)
    assert run.process.wait(timeout=30) == 0
    assert "training stopped early" in run.output()
    assert "most recent call" not in run.output()


@pytest.mark.parametrize(
    ("ngpu", "victim"), [(2, 1), *(pytest.param(*case, marks=pytest.mark.long) for case in ((2, 0), (4, 2)))]
)
def test_a_killed_worker_ends_the_others_and_is_named(started: Any, ngpu: int, victim: int) -> None:
    run = started(ngpu, comm__train_timeout_seconds=60)
    run.wait_for("step:  2")
    pids = run.ranks()
    os.kill(pids[victim], signal.SIGKILL)
    assert run.process.wait(timeout=60) == 1
    error = f"titanlite: error: rank {victim} (process {pids[victim]}) ended with SIGKILL; the others were ended\n"
    assert run.output().endswith(error)
    assert [rank for rank in pids if run.says_where(rank)] == [rank for rank in pids if rank != victim]
    assert run.workers() == []


@pytest.mark.slow
def test_a_crash_shows_where(started: Any) -> None:
    run = started(2, comm__train_timeout_seconds=60)
    run.wait_for("step:  2")
    pids = run.ranks()
    os.kill(pids[1], signal.SIGABRT)  # as NCCL's watchdog ends a process
    assert run.process.wait(timeout=60) == 1
    assert f"rank 1 (process {pids[1]}) ended with SIGABRT" in run.output()
    assert run.says_where(0)
    assert run.says_where(1)


@pytest.mark.long  # torch's agent waits 30 s before it kills
def test_a_survivor_that_hangs_shows_where(started: Any, tmp_path: Path) -> None:
    (tmp_path / "hang.py").write_text(HANG)
    path = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    run = started(2, env=path, experimental__custom_import="hang", model__converters="hang")
    run.wait_for("rank 0 hangs")
    pids = run.ranks()
    os.kill(pids[1], signal.SIGKILL)
    assert run.process.wait(timeout=60) == 1
    assert f"rank 1 (process {pids[1]}) ended with SIGKILL; the others were ended" in run.output()
    assert f"rank 0 (process {pids[0]}) had not ended 30 s after SIGTERM and was killed" in run.output()
    assert run.says_where(0)
    assert "in post_optimizer_hook" in run.output()


@pytest.mark.long
def test_a_worker_that_is_stopped_ends_the_others_in_time(started: Any) -> None:
    run = started(2, comm__train_timeout_seconds=5)
    run.wait_for("step:  2")
    pids = run.ranks()
    os.kill(pids[1], signal.SIGSTOP)
    run.wait_for("titanlite: rank 0 failed:", timeout=15)
    assert run.process.wait(timeout=60) == 1
    assert "Timed out waiting 5000ms" in run.output()
    assert f"rank 1 (process {pids[1]}) had not ended 30 s after SIGTERM and was killed: it hung" in run.output()
    assert f"titanlite: error: rank 0 (process {pids[0]}) ended with status 1" in run.output()
    assert run.workers() == []


TORCHRUN = ["--standalone", "--nproc-per-node=2"]


@pytest.mark.slow
def test_torchrun_alone_ends_when_a_worker_is_killed(started: Any) -> None:
    run = started(2, torchrun=TORCHRUN, comm__train_timeout_seconds=60)
    run.wait_for("step:  2")
    os.kill(run.ranks()[1], signal.SIGKILL)
    assert run.process.wait(timeout=60) == 1
    assert run.says_where(0)
    assert run.workers() == []


@pytest.mark.long
def test_a_survivor_that_hangs_under_torchrun_alone_shows_where(started: Any, tmp_path: Path) -> None:
    (tmp_path / "hang.py").write_text(HANG)
    path = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    run = started(2, torchrun=TORCHRUN, env=path, experimental__custom_import="hang", model__converters="hang")
    run.wait_for("rank 0 hangs")
    os.kill(run.ranks()[1], signal.SIGKILL)
    assert run.process.wait(timeout=60) == 1
    assert run.says_where(0)
    assert "in post_optimizer_hook" in run.output()
