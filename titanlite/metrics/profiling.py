"""torch.profiler traces of chosen steps, and memory snapshots behind them."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from traceback import clear_frames

import torch
from torch.profiler import ProfilerAction, ProfilerActivity

from titanlite.config.schema import Profiling
from titanlite.metrics.device import is_out_of_memory
from titanlite.metrics.memory_snapshot import record_gpu_history, save_cpu_snapshot, save_gpu_snapshot

logger = logging.getLogger(__name__)

_WARMUP = 3  # steps that the profiler watches before it records, so that its own start-up is not in the trace


class Profiler:
    """What ``[profiling]`` asks for, of this process: every ``profile_freq`` steps, files of that step in the run
    folder.

    - ``<save_traces_folder>/iteration_<step>/rank<rank>_trace.json``: the step's operators and kernels, for
      https://ui.perfetto.dev or chrome://tracing;
    - ``<save_memory_snapshot_folder>/iteration_<step>/rank<rank>_memory_snapshot.pickle``, for
      https://pytorch.org/memory_viz: what is alive and, on a GPU, the last 100,000 allocations and frees; on the CPU
      those of that step. For this ``torch.profiler`` records every step there, so that there is also a snapshot where
      memory runs out, on GPUs too: in ``iteration_<last step that was done>_exit``.

    On a GPU the history begins when this is made: before the model, for the stacks of its parameters.

    Attributes:
        exit_snapshot: the file that was written when memory ran out.
    """

    def __init__(self, options: Profiling, run_folder: Path, rank: int, device: torch.device) -> None:
        self.options, self.run_folder, self.rank = options, run_folder, rank
        self.exit_snapshot: Path | None = None
        self._gpu = device.type == "cuda"
        self._traces, self._snapshots = options.enable_profiling, options.enable_memory_snapshot
        self._every_step = self._snapshots and not self._gpu
        if self._snapshots and self._gpu:
            record_gpu_history(True)

    @contextmanager
    def steps(self, after: int) -> Iterator[Callable[[], None]]:
        """Yields what to call at the end of every step; the first one follows step ``after``."""
        self._step, self._due, self._failing = after, False, False
        self._prof = self._start(after + 1) if self._traces or self._every_step else None
        try:
            yield self._step_done
        except Exception as e:
            if self._snapshots and is_out_of_memory(e):
                clear_frames(e.__traceback__)  # to write about memory takes some
                self._failing = True
                if self._gpu:
                    self._save_snapshot()
            raise
        finally:
            self._stop()

    def _stop(self) -> None:
        if self._snapshots and self._gpu:
            record_gpu_history(False)
        if self._prof is not None:
            try:
                self._prof.stop()
            except (MemoryError, RuntimeError) as e:
                if not self._failing:
                    raise
                logger.error("torch.profiler has no memory for the end of its recording either: %s", e)

    def _start(self, first: int) -> torch.profiler.profile:
        if not self._gpu:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch 2.13 prints two lines for every recording
        warnings.filterwarnings("ignore", message=".*Profiler clears events at the end of each cycle")
        prof = torch.profiler.profile(
            activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._gpu else []),
            schedule=self._action,
            on_trace_ready=self._ready,
            record_shapes=True,
            profile_memory=self._every_step,
        )
        # It counts from 0; what it writes is to carry the run's own numbers.
        prof.step_num, prof.current_action = first, self._action(first)  # type: ignore[assignment]
        prof.start()
        return prof

    def _action(self, step: int) -> ProfilerAction:
        """What to do with the step of this number, from 1."""
        left = -step % self.options.profile_freq
        if left == 0 or self._every_step:
            return ProfilerAction.RECORD_AND_SAVE
        return ProfilerAction.WARMUP if left <= _WARMUP else ProfilerAction.NONE

    def _step_done(self) -> None:
        self._step += 1
        self._due = self._step % self.options.profile_freq == 0
        if self._snapshots and self._gpu and self._due:
            self._save_snapshot()
        if self._prof is not None:
            # Not in the first step, which imports and compiles: its calls of Python took over a gigabyte.
            prof, self._prof = self._prof, None  # if this fails, as it takes memory too, there is nothing to stop
            prof.with_stack = self._every_step
            prof.step()
            self._prof = prof
        self._due = False  # what the profiler brings at the end of the run is a step that was only begun

    def _ready(self, prof: torch.profiler.profile) -> None:
        if self._traces and self._due:
            self._save(
                "profiler trace",
                self.options.save_traces_folder,
                "trace.json",
                lambda path: prof.export_chrome_trace(str(path)),
            )
        if self._every_step and (self._due or self._failing):
            self._save_snapshot(prof)

    def _save_snapshot(self, prof: torch.profiler.profile | None = None) -> None:
        write = save_gpu_snapshot if prof is None else partial(save_cpu_snapshot, prof)
        self._save("memory snapshot", self.options.save_memory_snapshot_folder, "memory_snapshot.pickle", write)

    def _save(self, what: str, folder: str, name: str, write: Callable[[Path], None]) -> None:
        """Write a file; a run does not end because one cannot be."""
        path = self.run_folder / folder / f"iteration_{self._step}{'_exit' if self._failing else ''}"
        path /= f"rank{self.rank}_{name}"
        start = time.perf_counter()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
        except (OSError, MemoryError, RuntimeError) as e:
            logger.error("the %s of step %d CANNOT BE WRITTEN to %s: %s", what, self._step, path, e)
        else:
            seconds = time.perf_counter() - start
            when = f"of the end after step {self._step}" if self._failing else f"of step {self._step}"
            logger.info("%s %s in %s (%.1f s)", what, when, path, seconds)
            self.exit_snapshot = path if self._failing else None
