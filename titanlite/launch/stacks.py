"""Where a worker was when it had to end: a traceback where Python is asked, else the stacks of all its threads.

A rank that waits in a collective runs no signal handlers of Python, so faulthandler writes the stacks: on the SIGTERM
by which torchrun ends the workers that are left when one has died, and when a process crashes or aborts (as NCCL's
watchdog makes it do). They go to a file: SIGTERM is also how a run is asked to stop in order, and then they are of no
interest. The launcher shows the files of a run that failed; without it a worker does so itself, when it is still there
a while after SIGTERM.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import IO

from titanlite.environment import LAUNCH_DIR

# Less than the 30 s after which torchrun's agent kills what SIGTERM did not end; longer than a step usually takes.
PATIENCE = 10
CLEAN_UP = 30  # seconds; longer than closing files takes, and a broken NCCL communicator can take forever


def stacks_file(folder: str, rank: int) -> Path:
    """A worker's file in the launcher's folder: last written to when the worker failed, unless it died silently."""
    return Path(folder, f"stacks-{rank}")


def keep_stacks() -> None:
    """Keep this process's stacks for the log from now on. After the handlers for stopping in order: these run next."""
    folder = os.environ.get(LAUNCH_DIR)
    if folder:
        file: IO[str] = stacks_file(folder, _rank()).open("w+")
        faulthandler.enable(file)
    else:
        file = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open as long as the process)
        faulthandler.enable(sys.stderr or file)
    # First, in C and without Python's lock, which may never come free: where the thread is that got the signal. Only
    # that one: the others run on meanwhile, and to read their changing frames has crashed processes.
    faulthandler.register(signal.SIGTERM, file, all_threads=False, chain=True)
    # Then, with the lock, so that no frame changes, all threads.
    receive, send = os.pipe()
    os.set_blocking(send, False)
    signal.set_wakeup_fd(send, warn_on_full_buffer=False)
    late = not folder and int(os.environ.get("WORLD_SIZE", 1)) > 1
    threading.Thread(target=_on_sigterm, args=(receive, file, late), name="stacks", daemon=True).start()


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _on_sigterm(signals: int, file: IO[str], show_late: bool) -> None:
    while signal.SIGTERM not in os.read(signals, 1):
        pass
    file.seek(0)
    file.truncate()
    faulthandler.dump_traceback(file)
    if not show_late:
        return
    time.sleep(PATIENCE)
    file.seek(0)
    said = f"titanlite: rank {_rank()} is still there {PATIENCE} s after SIGTERM, which found it here:\n{file.read()}"
    print(said, file=sys.stderr, flush=True)


def show_traceback() -> None:
    """Show at once where the exception at hand was raised: what is cleaned up next may hang. It ends with the process
    then, before long."""
    print(f"titanlite: rank {_rank()} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    folder = os.environ.get(LAUNCH_DIR)
    if folder:
        faulthandler.unregister(signal.SIGTERM)
        signal.set_wakeup_fd(-1)
        stacks_file(folder, _rank()).write_text("")  # the traceback stands for them
        os.utime(stacks_file(folder, _rank()))  # emptying an empty file may leave its time alone
    end_soon()


def end_soon() -> None:
    """End this process with status 1 in ``CLEAN_UP`` seconds, if cleaning up has not ended it by then."""
    try:
        faulthandler.dump_traceback_later(CLEAN_UP, exit=True)
    except RuntimeError:  # no memory for its thread
        signal.alarm(CLEAN_UP)
