"""The stacks that a worker leaves: of all its threads, and never at the price of the process."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support.runs import environment
from titanlite.environment import LAUNCH_DIR

BUSY = """
import signal, sys, threading, time
from titanlite.launch.stacks import keep_stacks

def work():
    exec("def f(n): return n and g(n - 1)\\ndef g(n): return n and f(n - 1)\\nf(60)", {})

def work_on():  # new functions, in new threads: most of what a stack is read from is soon gone
    while True:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

signal.signal(signal.SIGTERM, lambda *_: None)
keep_stacks()
for _ in range(2):
    threading.Thread(target=work_on, daemon=True).start()
print("ready", flush=True)
while True:
    time.sleep(0.01)
"""
WAITING = """
import ctypes, signal, threading
from titanlite.launch.stacks import keep_stacks

def wait(library):  # for good, in C, whatever signals come
    mutex = ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)

signal.signal(signal.SIGTERM, lambda *_: None)
keep_stacks()
threading.Thread(target=wait, args=(ctypes.CDLL(None),), name="other", daemon=True).start()
print("ready", flush=True)
wait(ctypes.{library}(None))
"""


def started(program: str, folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment(**{LAUNCH_DIR: str(folder)}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def stacks_after(process: subprocess.Popen[str], folder: Path, enough: str) -> str:
    time.sleep(0.5)  # until its threads wait
    process.send_signal(signal.SIGTERM)
    give_up = time.monotonic() + 10
    while enough not in (folder / "stacks-0").read_text() and time.monotonic() < give_up:
        time.sleep(0.05)
    time.sleep(0.2)  # until all of it is written
    process.kill()
    return (folder / "stacks-0").read_text()


def test_signals_do_not_crash_what_runs_python_in_threads(tmp_path: Path) -> None:
    process = started(BUSY, tmp_path)
    for _ in range(1000):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.001)
    assert process.poll() is None, process.communicate()[0] + (tmp_path / "stacks-0").read_text()
    process.kill()


def test_all_threads_of_one_that_waits_outside_python(tmp_path: Path) -> None:
    text = stacks_after(started(WAITING.format(library="CDLL"), tmp_path), tmp_path, "in _on_sigterm")
    assert text.count("line 8 in wait") == 2
    assert text.count("line 14 in <module>") == 1


def test_the_main_thread_of_one_that_lets_no_python_run(tmp_path: Path) -> None:
    text = stacks_after(started(WAITING.format(library="PyDLL"), tmp_path), tmp_path, "in <module>")
    assert text.count("line 8 in wait") == 1
    assert text.count("line 14 in <module>") == 1
