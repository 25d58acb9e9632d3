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
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch.distributed as dist

from titanlite.config import JobConfig, dump_toml
from titanlite.config.run_config import section_in
from titanlite.converters.registry import TimedOption, options_to_time
from titanlite.distributed.runtime import Runtime
from titanlite.errors import counted

logger = logging.getLogger(__name__)

_FASTER = 1.02  # times closer than this are the same: then the count decides
_WORSE = 1.5  # errors further apart than this have another cause than the order of additions
_LARGEST = 0.5  # an error; those of float8 are 0.05 to 0.1 with the weights that a model begins with
_LIMIT = 150.0  # seconds of the child process, which compiles a block for each kind
_REPORT = "Please report it: both should compute the same, to about 0.1."


class Timing(NamedTuple):
    """A comparison of kinds.

    Attributes:
        blocks: how many the model had.
        seconds: of forward and backward, by kind, in each round.
        errors: by kind, the distance of the gradients to those of high precision, over the norm of the latter; of the
            parameter where it is largest.
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
    """Return the fastest of two kinds; that of the count if neither is. If the gradients of one kind are much further
    from those of high precision, the other one is taken, with a warning; if those of both are far, that of the count.
    """
    seconds, errors, names = timing.seconds, timing.errors, option.kinds
    (other,) = (kind for kind in names if kind != option.by_count)
    both = option.by_count, other
    closer, further = sorted(both, key=lambda kind: math.inf if math.isnan(errors[kind]) else errors[kind])
    figures = " and ".join(f"{errors[kind]:.3g} with {name}" for kind, name in names.items())
    warning = f"gradients of a block differ from high precision by {figures}, of their norm; {{}} are taken. {_REPORT}"
    if not errors[closer] <= _LARGEST:  # nor if it is not a number
        return Decision(option.by_count, "by count", warning.format(names[option.by_count]))
    if not errors[further] <= _WORSE * errors[closer]:
        return Decision(closer, "the other kind computes something else", warning.format(names[closer]))
    ratio = median(mine / theirs for mine, theirs in zip(*(seconds[kind] for kind in both), strict=True))
    times = ", ".join(f"{1e3 * median(seconds[kind]):.2f} ms with {name}" for kind, name in names.items())
    why = f"forward and backward of {counted(timing.blocks, 'block')} took {times}"
    return Decision(other if ratio > _FASTER else option.by_count, why)


def choose(config: JobConfig, runtime: Runtime, earlier: Mapping[str, Any]) -> dict[str, str]:
    """Put the choices into ``config``, the same on all ranks, and return them for the header.

    Args:
        earlier: the configuration of the run that goes on here, on rank 0; empty if none does.
    """
    # Two runs with ``training.deterministic`` make the same choice.
    options = [] if config.training.deterministic else options_to_time(config, runtime.device)
    choices = {option.name: _kept(config, option, earlier) for option in options}

    def ask() -> None:
        for option in options:
            if not choices[option.name]:
                choices[option.name] = _ask(config, option, min(_LIMIT, config.comm.init_timeout_seconds / 2))

    runtime.on_rank_zero(ask)
    answer = [choices]
    if runtime.world_size > 1:
        dist.broadcast_object_list(answer, src=0, group=runtime.control)
    for name, choice in answer[0].items():
        section, _, key = name.rpartition(".")
        setattr(config.section(section), f"{key}_chosen", choice)
    return answer[0]


def _kept(config: JobConfig, option: TimedOption, earlier: Mapping[str, Any]) -> str:
    """Return the choice of the run that goes on; an empty string if the recipe or the rules for blocks are others."""
    section, _, key = option.name.rpartition(".")
    before, compiled_before = section_in(earlier, section), section_in(earlier, "compile")
    same = before.get("recipe_name") == config.value(f"{section}.recipe_name")
    same = same and compiled_before.get("block_fusion") == config.compile.block_fusion
    return str(before.get(f"{key}_chosen", "")) if same else ""


def _ask(config: JobConfig, option: TimedOption, seconds: float) -> str:
    """Return the choice in words: the kind, a colon, and why."""
    kinds = " and ".join(option.kinds)
    logger.info("timing a block with %s = %s; naming one of them leaves this out", option.name, kinds)
    try:
        decision = decide(option, time_in_child(config, option, seconds))
    except Exception as e:  # of a compiler or a driver, for example
        taken = f"{option.kinds[option.by_count]} are taken, the better ones by count"
        decision = Decision(option.by_count, "by count", f"no block could be timed ({e}); {taken}")
    if decision.warning:
        logger.warning('%s = "auto": %s', option.name, decision.warning)
    return f"{decision.kind}: {decision.why}"


def time_in_child(config: JobConfig, option: TimedOption, seconds: float) -> Timing:
    """Return the timing of a child process, which has so many seconds.

    Raises:
        RuntimeError: it failed, or had too little time.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.toml")
        file.write_text(dump_toml(config), encoding="utf-8")
        command = [sys.executable, "-m", "titanlite.doctor.time_blocks", str(file), option.name, *option.kinds]
        try:
            child = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{seconds:.0f} s were not enough") from None
    last = next((line for line in reversed(child.stdout.splitlines()) if line.startswith("{")), "")
    if child.returncode or not last:
        reason = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"status {child.returncode}: {reason}")
    return Timing(**json.loads(last))
