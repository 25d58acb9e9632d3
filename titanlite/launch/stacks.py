"""The place in the code where a worker failed or was ended: a traceback, or the stacks of its threads.

A rank that waits in a collective runs no Python signal handlers, so faulthandler writes the stacks. It does so on
SIGTERM, by which torchrun ends the remaining workers after one has died, and when a process crashes or aborts (for
example by NCCL's watchdog). The stacks go to a file, because SIGTERM also asks a run to stop in order, and then nobody
needs them. The launcher shows the files of a failed run. Without a launcher, a worker shows its own stacks if it still
runs some time after SIGTERM.
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

# Seconds. Less than the 30 s after which torchrun's agent kills a process; longer than a usual step.
PATIENCE = 10
CLEAN_UP = 30  # seconds; enough to close files. A broken NCCL communicator can take forever


def stacks_file(folder: str, rank: int) -> Path:
    """Return a worker's file in the launcher's folder. Its last write is at the failure, if the worker noticed it."""
    return Path(folder, f"stacks-{rank}")


def keep_stacks() -> None:
    """Write this process's stacks on SIGTERM or a crash, from now on. Call this after :class:`StopRequest` has
    installed its handlers, which run next."""
    folder = os.environ.get(LAUNCH_DIR)
    if folder:
        file: IO[str] = stacks_file(folder, _rank()).open("w+")
        faulthandler.enable(file)
    else:
        file = tempfile.TemporaryFile("w+")  # noqa: SIM115  (it stays open until the process ends)
        faulthandler.enable(sys.stderr or file)
    # First, in C and without Python's lock (GIL), which may never become free: the thread that got the signal. Only
    # this thread: the other threads still run, and reading their changing frames has crashed processes.
    faulthandler.register(signal.SIGTERM, file, all_threads=False, chain=True)
    # Then, with the lock, so that no frame changes: all threads.
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
    text = f"titanlite: rank {_rank()} is still there {PATIENCE} s after SIGTERM, which found it here:\n{file.read()}"
    print(text, file=sys.stderr, flush=True)


def show_traceback(waited: str | None = None) -> None:
    """Show the traceback of the current exception at once, because the clean-up that follows may hang. The process ends
    after ``CLEAN_UP`` seconds at the latest.

    Args:
        waited: the operation that took too long, if that was the error.
    """
    text = f"titanlite: rank {_rank()} failed:\n{traceback.format_exc()}"
    print(f"{text}titanlite: rank {_rank()} {waited}" if waited else text, file=sys.stderr, flush=True)
    folder = os.environ.get(LAUNCH_DIR)
    if folder:
        faulthandler.unregister(signal.SIGTERM)
        signal.set_wakeup_fd(-1)
        stacks_file(folder, _rank()).write_text("")  # the traceback replaces the stacks
        os.utime(stacks_file(folder, _rank()))  # writing nothing to an empty file may keep its old time
    end_soon()


def end_soon() -> None:
    """End this process with status 1 in ``CLEAN_UP`` seconds, if cleaning up has not ended it by then."""
    try:
        faulthandler.dump_traceback_later(CLEAN_UP, exit=True)
    except RuntimeError:  # no memory for the thread of the timer
        signal.alarm(CLEAN_UP)
