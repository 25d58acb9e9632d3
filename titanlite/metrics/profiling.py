"""torch.profiler traces of chosen steps, and snapshots of a GPU's memory after them."""

from __future__ import annotations

import logging
import os
import pickle
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import clear_frames

import torch
from torch.profiler import ProfilerAction, ProfilerActivity

from titanlite.config.schema import Profiling
from titanlite.errors import ConfigError
from titanlite.metrics.device import is_out_of_memory

logger = logging.getLogger(__name__)

_WARMUP = 3  # steps of the profiler before it records, so that its start-up is not in the trace
_MAX_EVENTS = 100_000  # of the allocator's history, as in torchtitan; live allocations always have their stacks


class Profiler:
    """Writes the files that ``[profiling]`` asks for, of this process: every ``profile_freq`` steps, files of that step
    in the run folder.

    - ``<save_traces_folder>/iteration_<step>/rank<rank>_trace.json``: the step's operators and kernels, for
      https://ui.perfetto.dev or chrome://tracing;
    - ``<save_memory_snapshot_folder>/iteration_<step>/rank<rank>_memory_snapshot.pickle``, on GPUs, for
      https://pytorch.org/memory_viz: live allocations, and the last 100,000 allocations and frees. When memory runs
      out, there is one more, in ``iteration_<last completed step>_exit``.

    The history of memory begins here. Create the profiler before the model, so that it has the parameters' stacks.

    Attributes:
        exit_snapshot: the file that was written when memory ran out.

    Raises:
        ConfigError: memory snapshots need a GPU, because only its allocator keeps a history.
    """

    def __init__(self, options: Profiling, run_folder: Path, rank: int, device: torch.device) -> None:
        self.options, self.run_folder, self.rank = options, run_folder, rank
        self.exit_snapshot: Path | None = None
        self._gpu, self._snapshots = device.type == "cuda", options.enable_memory_snapshot
        if self._snapshots and not self._gpu:
            raise ConfigError(
                f"a memory snapshot is the history of a GPU's allocator, and this runs on {device.type}; leave it out "
                "(profiling.enable_profiling shows each operator's shapes here too)",
                key="profiling.enable_memory_snapshot",
                value=True,
            )
        if self._snapshots:
            torch.cuda.memory._record_memory_history(enabled="all", max_entries=_MAX_EVENTS)

    @contextmanager
    def steps(self, after: int, last: int) -> Iterator[Callable[[], None]]:
        """Yield a function to call at the end of every step from ``after`` + 1 to ``last``."""
        frequency = self.options.profile_freq
        if (self.options.enable_profiling or self._snapshots) and last // frequency == after // frequency:
            logger.warning(
                "profiling.profile_freq = %d: none of the steps %d to %d is a multiple of it, so none is recorded",
                frequency,
                after + 1,
                last,
            )
        self._step, self._due, self._failing = after, False, False
        self._prof = self._start(after + 1) if self.options.enable_profiling else None
        try:
            yield self._step_done
        except Exception as e:
            if self._snapshots and is_out_of_memory(e):
                clear_frames(e.__traceback__)  # free memory: the snapshot needs some
                self._failing = True
                self._save_snapshot()
            raise
        finally:
            if self._snapshots:
                torch.cuda.memory._record_memory_history(enabled=None)
            if self._prof is not None:
                self._prof.stop()

    def _start(self, first: int) -> torch.profiler.profile:
        if not self._gpu:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch 2.13 prints two lines for every recording
        warnings.filterwarnings("ignore", message=".*Profiler clears events at the end of each cycle")
        prof = torch.profiler.profile(
            activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._gpu else []),
            schedule=self._action,
            on_trace_ready=self._save_trace,
            record_shapes=True,
        )
        # The profiler counts from 0, but its files must have the step numbers of the run.
        prof.step_num, prof.current_action = first, self._action(first)  # type: ignore[assignment]
        prof.start()
        return prof

    def _action(self, step: int) -> ProfilerAction:
        """Return the profiler's action for a step, counted from 1."""
        remaining = -step % self.options.profile_freq
        if remaining == 0:
            return ProfilerAction.RECORD_AND_SAVE
        return ProfilerAction.WARMUP if remaining <= _WARMUP else ProfilerAction.NONE

    def _step_done(self) -> None:
        self._step += 1
        self._due = self._step % self.options.profile_freq == 0
        if self._snapshots and self._due:
            self._save_snapshot()
        if self._prof is not None:
            self._prof.step()
        self._due = False  # at the end, the profiler reports an incomplete step

    def _save_trace(self, prof: torch.profiler.profile) -> None:
        if self._due:
            folder = self.options.save_traces_folder
            self._save("profiler trace", folder, "trace.json", lambda path: prof.export_chrome_trace(str(path)))

    def _save_snapshot(self) -> None:
        def write(path: Path) -> None:
            with path.open("wb") as file:
                pickle.dump(torch.cuda.memory._snapshot(), file, protocol=4)  # the viewer reads 2 to 4

        self._save("memory snapshot", self.options.save_memory_snapshot_folder, "memory_snapshot.pickle", write)

    def _save(self, kind: str, folder: str, name: str, write: Callable[[Path], None]) -> None:
        """Write a file. If that fails, log it, and continue the run."""
        path = self.run_folder / folder / f"iteration_{self._step}{'_exit' if self._failing else ''}"
        path /= f"rank{self.rank}_{name}"
        start = time.perf_counter()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
        except (OSError, MemoryError, RuntimeError) as e:
            logger.error("the %s of step %d CANNOT BE WRITTEN to %s: %s", kind, self._step, path, e)
        else:
            seconds = time.perf_counter() - start
            step = f"of the end after step {self._step}" if self._failing else f"of step {self._step}"
            logger.info("%s %s in %s (%.1f s)", kind, step, path, seconds)
            self.exit_snapshot = path if self._failing else None
