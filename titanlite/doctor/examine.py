"""Examine this machine: facts, features, measurements, and a verdict, in less than a minute."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from titanlite.config import JobConfig
from titanlite.config.number_formats import NUMBER_FORMATS
from titanlite.doctor import allreduce
from titanlite.doctor.features import Feature, attention, features
from titanlite.doctor.layers import DTYPES
from titanlite.doctor.machine import find_device, machine, usable_cores
from titanlite.doctor.verdict import Row, Verdict, decide
from titanlite.models.layers import DecoderArgs
from titanlite.training.model_shape import choose_shape

SECONDS = 45.0  # for the measurements; the rest of a minute is for imports
_OF_COLLECTIVES = 12.0


@dataclass
class Examination:
    """The result of an examination of the machine.

    Attributes:
        machine: facts, in words.
        model: the model that the layers are of.
        attention: the kernel that would run.
        rows: the measurements, as :mod:`titanlite.doctor.probe` prints them.
        all_reduce: see :func:`titanlite.doctor.allreduce.measure`; None: not measured.
        unfinished: why measurements are missing; empty if none is.
    """

    machine: dict[str, str]
    model: str
    attention: str
    features: list[Feature]
    rows: list[Row]
    all_reduce: dict[str, Any] | None
    unfinished: str
    verdict: Verdict

    def json(self) -> str:
        """Return everything as one JSON object."""
        content = asdict(self)
        content["features"] = [feature._asdict() for feature in self.features]
        return json.dumps(content, indent=2)


def examine(
    config: JobConfig, argv: Sequence[str], seconds: float = SECONDS, processes: int | None = None, measure: bool = True
) -> Examination:
    """Examine this machine for a configuration.

    Args:
        argv: the arguments that ``config`` was loaded from.
        seconds: for all measurements; those that are not ready by then are left out.
        processes: for the all-reduce; None: one for each GPU, without GPUs two if there are as many processors.

    Raises:
        ConfigError: there is no such model.
    """
    device, remark = find_device()
    shape = choose_shape(config)
    facts = {"device": f"{device.type}{f': {remark}' if remark else ''}", **machine(device)}
    rows: list[Row] = []
    unfinished, reduced = "nothing was measured, as asked", None
    if measure:
        count = processes or (torch.cuda.device_count() if device.type == "cuda" else min(2, usable_cores()))
        end = time.monotonic() + seconds
        if count > 1:
            reduced = allreduce.measure(count, min(_OF_COLLECTIVES, seconds / 3))
        rows, unfinished = _probe(argv, end - time.monotonic())
    return Examination(
        machine=facts,
        model=shape.about,
        attention=_attention(config, device),
        features=features(device, [number_format.name for number_format in NUMBER_FORMATS]),
        rows=rows,
        all_reduce=reduced,
        unfinished=unfinished,
        verdict=decide(rows, config.training.compile),
    )


def _attention(config: JobConfig, device: torch.device) -> str:
    flavor, dtype = choose_shape(config).flavor, DTYPES[config.training.mixed_precision_param]
    if not isinstance(flavor, DecoderArgs):
        return "that of the model"
    return attention(device, flavor.n_heads, flavor.n_kv_heads, flavor.head_size, dtype)


def _probe(argv: Sequence[str], seconds: float) -> tuple[list[Row], str]:
    """Return the rows of a measuring process, and why the last ones are missing, if they are."""
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "titanlite.doctor.probe", *argv]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(max(seconds, 0), end)
        timer.start()
        assert process.stdout is not None
        try:
            rows = [json.loads(line) for line in process.stdout if line.startswith("{") and line.endswith("}\n")]
        finally:
            timer.cancel()
            process.kill()
            status = process.wait()
        if rows and rows[-1]["kind"] == "done":
            return rows[:-1], ""
        if late.is_set():
            return rows, f"{seconds:.0f} s were not enough for more; --seconds gives more time"
        errors.seek(0)
        last = errors.read().strip().splitlines()[-1:]
        cause = signal.Signals(-status).name if status < 0 else f"status {status}"
        return rows, f"the measuring process ended early ({cause}{f': {last[0]}' if last else ''})"
