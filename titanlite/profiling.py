"""torch.profiler traces of chosen steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from titanlite.config.schema import Profiling

logger = logging.getLogger(__name__)

_WARMUP = 3  # steps that the profiler watches before it records, so that its own start-up is not in the trace


@contextmanager
def profiler(options: Profiling, run_folder: Path, rank: int) -> Iterator[Callable[[], None]]:
    """Yields what to call at the end of every step; it does nothing where ``[profiling]`` is off.

    Of every ``profile_freq`` steps the last is recorded, to
    ``<run folder>/<save_traces_folder>/iteration_<step>/rank<rank>_trace.json``, for https://ui.perfetto.dev or
    chrome://tracing.
    """
    if not options.enable_profiling:
        yield lambda: None
        return

    def save(prof: torch.profiler.profile) -> None:
        folder = run_folder / options.save_traces_folder / f"iteration_{prof.step_num}"
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        prof.export_chrome_trace(str(folder / f"rank{rank}_trace.json"))
        logger.info("profiler trace of step %d in %s (%.1f s)", prof.step_num, folder, time.perf_counter() - start)

    warmup = min(_WARMUP, options.profile_freq - 1)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    plan = schedule(wait=options.profile_freq - warmup - 1, warmup=warmup, active=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=save, record_shapes=True) as prof:
        yield prof.step
