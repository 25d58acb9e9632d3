"""Name the operation, and the ranks, that a process waits for too long.

gloo ends a collective after ``comm.train_timeout_seconds``. A send or a receive it ends only after the time with which
its group began, ``comm.init_timeout_seconds``, and says neither which one it was nor of whom. :class:`MessageWatch`
ends these in time. NCCL has a watchdog of its own.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType

import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

_WAITING = (str(Path(dist.__file__).parent), str(Path(__file__).with_name("pipeline.py")))  # where a message is awaited
_TIMED_OUT = "Timed out waiting"  # gloo's words


class Messages:
    """The messages of a pipeline that this process has asked for. Enter it while the pipeline runs.

    Attributes:
        running: True while the pipeline runs.
        count: how many there were.
        last: the last of them since it began to run, in words.
    """

    def __init__(self) -> None:
        self.running, self.count = False, 0
        self.last: deque[str] = deque(maxlen=4)

    def __enter__(self) -> None:
        self.running = True
        self.last.clear()

    def __exit__(self, *_: object) -> None:
        self.running = False

    def add(self, text: str) -> None:
        self.count += 1
        self.last.append(text)


class NotedStage(PipelineStage):
    """A stage that notes in ``messages`` what it is going to send and receive."""

    messages: Messages | None = None

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._noted("receive the activations", fwd_chunk_id, "from", super().get_fwd_recv_ops(fwd_chunk_id))

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._noted("send the activations", fwd_chunk_id, "to", super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._noted("receive the gradients", bwd_chunk_id, "from", super().get_bwd_recv_ops(bwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._noted("send the gradients", bwd_chunk_id, "to", super().get_bwd_send_ops(bwd_chunk_id))

    def _noted(self, action: str, microbatch: int, preposition: str, ops: list[dist.P2POp]) -> list[dist.P2POp]:
        if ops and self.messages is not None:
            self.messages.add(
                f"{action} of microbatch {microbatch} of stage {self.stage_index} {preposition} rank {ops[0].peer}"
            )
        return ops


class MessageWatch:
    """Ends this process with status 1 if the thread that makes the watch waits for one message too long.

    Args:
        seconds: how long it may wait.
        step: returns the number of the current step.
        end: ends the process, after the message is written.
    """

    def __init__(
        self, messages: Messages, seconds: float, step: Callable[[], int], end: Callable[[int], object] = os._exit
    ) -> None:
        self._messages, self._seconds, self._step, self._end = messages, seconds, step, end
        self._interval = min(max(seconds / 20, 0.1), 5)
        self._thread = threading.get_ident()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="message-watch", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        since, before = time.monotonic(), -1
        while not self._closed.wait(self._interval):
            frame = sys._current_frames().get(self._thread)
            waits = self._messages.running and frame is not None and frame.f_code.co_filename.startswith(_WAITING)
            del frame  # it keeps what its function refers to
            if not waits or self._messages.count != before:
                since, before = time.monotonic(), self._messages.count if waits else -1
            elif time.monotonic() - since >= self._seconds:
                self._report(time.monotonic() - since)
                return

    def _report(self, seconds: float) -> None:
        asked = "; to ".join(self._messages.last)
        print(
            f"titanlite: rank {dist.get_rank()} has waited {seconds:.0f} s in step {self._step()}, more than "
            f"comm.train_timeout_seconds, for one of the last messages of its pipeline: to {asked}",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        time.sleep(2 * self._interval)  # the others wait too: let them say for what before their connections break
        self._end(1)


def timed_out(error: BaseException) -> str | None:
    """Return which collective over which ranks ended with gloo's timeout, and where it was called; None if the error is
    another one."""
    if _TIMED_OUT not in str(error):
        return None
    collective, ranks, place = "a message", "", ""
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        frame, line = trace.tb_frame, trace.tb_lineno
        file = frame.f_code.co_filename
        if file.startswith(_WAITING[0]):
            collective, ranks = frame.f_code.co_name, _ranks_of(frame) or ranks
        elif "titanlite" in file:
            place = f", called in {frame.f_code.co_name} ({Path(file).name}, line {line})"
        trace = trace.tb_next
    return f"waited too long in {collective}{ranks}{place}"


def _ranks_of(frame: FrameType) -> str:
    """Return the ranks of the group that a function of torch.distributed was called with."""
    group = frame.f_locals.get("group")
    if "group" not in frame.f_locals or not isinstance(group, dist.ProcessGroup | None):
        return ""
    return f" of ranks {', '.join(map(str, dist.get_process_group_ranks(group)))}"
