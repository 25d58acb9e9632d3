"""Options that a run on a GPU decides by time, such as the kernels of a number format: the kind with which a compiled
block of the model is faster.

One process of a run times all kinds before the model is built, in a child process, and all ranks take its choice. A run
that goes on keeps it, so that it computes the same numbers. Nothing here ends a run: where nothing can be timed, the
kind that moves fewer bytes by count is taken.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch.distributed as dist

from titanlite.config import JobConfig, dump_toml
from titanlite.config.options import options_of
from titanlite.config.run_config import section_in
from titanlite.converters.registry import TimedOption, options_to_time
from titanlite.distributed.runtime import Runtime
from titanlite.errors import counted

logger = logging.getLogger(__name__)

SAME_TIME_RATIO = 1.02  # times closer than this are the same: then the count decides
ERROR_RATIO = 1.5  # errors further apart than this have another cause than the order of additions
LARGEST_ERROR = 0.8  # those of float8 are 0.05 to 0.1 with the weights that a model begins with
LIMIT = 150.0  # seconds for all options; a child process compiles a block for each kind
_REPORT = "Please report it: both should compute the same, to about 0.1."


class NothingToTime(Exception):
    """There is no block that could be timed."""


class Timing(NamedTuple):
    """A comparison of kinds.

    Attributes:
        blocks: how many the model had.
        seconds: of forward and backward, by kind, in each round.
        errors: by kind, the distance of a matrix's gradient to that of high precision, over the norm of the latter: the
            root of the mean square of all matrices of the blocks.
    """

    blocks: int
    seconds: dict[str, list[float]]
    errors: dict[str, float]


class Decision(NamedTuple):
    """The kind that is taken, why, and a warning; empty if there is none."""

    kind: str
    why: str
    warning: str = ""


def decide(option: TimedOption, timing: Timing) -> Decision:
    """Return the faster of two kinds; that of the count if neither is. If the gradients of one kind are much further
    from those of high precision, the other one is taken, with a warning; if those of both are far, that of the count.
    """
    seconds, errors, names = timing.seconds, timing.errors, option.kinds
    (other,) = (kind for kind in names if kind != option.by_count)
    both = option.by_count, other
    closer, further = sorted(both, key=lambda kind: math.inf if math.isnan(errors[kind]) else errors[kind])
    figures = " and ".join(f"{errors[kind]:.3g} with {name}" for kind, name in names.items())
    warning = f"gradients of a block differ from high precision by {figures}, of their norm; {{}} are taken. {_REPORT}"
    if not errors[closer] <= LARGEST_ERROR:  # nor if it is not a number
        return Decision(option.by_count, "by count", warning.format(names[option.by_count]))
    if not errors[further] <= ERROR_RATIO * errors[closer]:
        return Decision(closer, "the other kind computes something else", warning.format(names[closer]))
    ratio = median(mine / theirs for mine, theirs in zip(*(seconds[kind] for kind in both), strict=True))
    times = ", ".join(f"{1e3 * median(seconds[kind]):.2f} ms with {name}" for kind, name in names.items())
    why = f"forward and backward of {counted(timing.blocks, 'block')} took {times}"
    return Decision(other if ratio > SAME_TIME_RATIO else option.by_count, why)


def choose(config: JobConfig, runtime: Runtime, earlier: Mapping[str, Any]) -> dict[str, str]:
    """Put the choices into ``config``, the same on all ranks, and return them for the header. Choices of another start,
    which ``config`` may come with, are forgotten.

    Args:
        earlier: the configuration of the run that goes on here, on rank 0; empty if none does.
    """
    options = options_to_time(config, runtime.device)
    choices = {option.name: _kept(config, option, earlier) for option in options}

    def ask() -> None:
        end = time.monotonic() + min(LIMIT, config.comm.init_timeout_seconds / 2)
        for option in options:
            # Two runs with ``training.deterministic`` make the same choice; a seed checkpoint comes from no step.
            if not choices[option.name] and not (
                config.training.deterministic or config.checkpoint.create_seed_checkpoint
            ):
                choices[option.name] = _ask(config, option, end - time.monotonic())

    runtime.on_rank_zero(ask)
    answer = [choices]
    if runtime.world_size > 1:
        dist.broadcast_object_list(answer, src=0, group=runtime.control)
    for section, keys in options_of(type(config)).items():  # type: ignore[arg-type]
        for key in keys:
            if key.endswith("_chosen"):
                setattr(config.section(section), key, answer[0].get(f"{section}.{key.removesuffix('_chosen')}", ""))
    return {name: choice for name, choice in answer[0].items() if choice}


def _kept(config: JobConfig, option: TimedOption, earlier: Mapping[str, Any]) -> str:
    """Return the choice of the run that goes on, by count if it made none; an empty string if there is no such run, or
    it had another recipe or was compiled by other rules."""
    section, _, key = option.name.rpartition(".")
    before, compiled_before = section_in(earlier, section), section_in(earlier, "compile")
    same = before.get("recipe_name") == config.value(f"{section}.recipe_name")
    same = same and compiled_before.get("block_fusion") == config.compile.block_fusion
    if not earlier or not same:
        return ""
    return str(before.get(f"{key}_chosen", "")) or f"{option.by_count}: by count, as before"


def _ask(config: JobConfig, option: TimedOption, seconds: float) -> str:
    """Return the choice in words: the kind, a colon, and why."""
    kinds = " and ".join(option.kinds)
    logger.info("timing a block with %s = %s; naming one of them leaves this out", option.name, kinds)
    by_count = f"{option.kinds[option.by_count]} are taken, the better ones by count"
    try:
        decision = decide(option, time_in_child(config, option, seconds))
    except NothingToTime as e:
        logger.info('%s = "auto": no block was timed: %s; %s', option.name, e, by_count)
        decision = Decision(option.by_count, "by count")
    except Exception as e:
        decision = Decision(option.by_count, "by count", f"no block could be timed ({e}); {by_count}")
    if decision.warning:
        logger.warning('%s = "auto": %s', option.name, decision.warning)
    return f"{decision.kind}: {decision.why}"


def time_in_child(config: JobConfig, option: TimedOption, seconds: float) -> Timing:
    """Return the timing of a child process, which has so many seconds and imports what this one can.

    Raises:
        NothingToTime: there is no block that could be timed.
        RuntimeError: it failed, or had too little time.
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.toml")
        file.write_text(dump_toml(config), encoding="utf-8")
        command = [sys.executable, "-m", "titanlite.doctor.time_blocks", str(os.getpid()), str(file)]
        command += [option.name, *option.kinds]
        try:
            child = subprocess.run(
                command,
                env=env,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=max(seconds, 0.1),
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{seconds:.0f} s were not enough") from None
    last = next((line for line in reversed(child.stdout.splitlines()) if line.startswith("{")), "")
    answer = json.loads(last) if last else {"error": f"its process ended with status {child.returncode}"}
    if "skipped" in answer:
        raise NothingToTime(answer["skipped"])
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return Timing(**answer)
