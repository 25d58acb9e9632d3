"""The message and the exit status of a run that ends by an exception."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from titanlite.config import JobConfig
from titanlite.distributed.waiting import timed_out
from titanlite.environment import LAUNCH_DIR
from titanlite.errors import ConfigError, NothingToDo, TrainingError
from titanlite.launch.caches import unwritable_cache
from titanlite.launch.command_line import report, reported
from titanlite.launch.stacks import end_soon, show_traceback
from titanlite.metrics.device import is_out_of_memory
from titanlite.training.out_of_memory import give_up

if TYPE_CHECKING:
    from titanlite.metrics.profiling import Profiler

logger = logging.getLogger()


def report_failure(
    error: Exception, config: JobConfig, step: int, profiler: Profiler | None, *, is_process: bool
) -> int:
    """Say why the run ends, and return the exit status.

    Args:
        step: the last step that was begun.
        profiler: None where the set-up failed.
        is_process: this process is the run's own, which a launcher has started; not a program that trains.

    Raises:
        Exception: ``error`` itself, if it is for a program that trains to handle.
    """
    if isinstance(error, NothingToDo):
        logger.info("%s", error)
        return 0
    if isinstance(error, ConfigError | TrainingError):
        return report(error, config)
    if is_out_of_memory(error):
        status = give_up(error, config, step, None if profiler is None else profiler.exit_snapshot)
        if is_process:
            end_soon()
        return status
    if (unwritable := unwritable_cache(error)) is not None:
        return report(unwritable)
    if reported(os.environ.get(LAUNCH_DIR)):
        return 1  # another rank has reported the error; broken connections only follow from it
    if not is_process:
        raise error
    show_traceback(timed_out(error))
    return 1
