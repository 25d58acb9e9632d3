"""Measure the time between two logged steps. Write one row to every sink, and collect values for the summary."""

from __future__ import annotations

import logging
import statistics
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from titanlite.errors import TrainingError, counted
from titanlite.metrics.device import GIB, device_name, peak_flops, peak_memory, reset_peak_memory
from titanlite.metrics.sinks import Row, Sink, shown_memory

logger = logging.getLogger()


@dataclass
class Recorder:
    """Times the windows between logged steps.

    Args:
        flops_per_token: model FLOPs of forward and backward.
        log_freq: the window, in steps; the first and the last step are logged too.
        last_step: the step after which the run ends.
        steps_before: the steps that were made before this run continued, or 0.
        tokens_seen: tokens of all devices in these steps.
        failed: the run has ended with an error.
    """

    sinks: Sequence[Sink]
    device: torch.device
    flops_per_token: int
    log_freq: int
    last_step: int
    steps_before: int = 0
    tokens_seen: int = 0
    failed: bool = False
    first: Row | None = None
    last: Row | None = None
    peak: Row | None = None  # the row of the highest memory
    last_validation: Row | None = None

    def __post_init__(self) -> None:
        self._steady = {"tps": array("d"), "mfu": array("d")}
        self._peak = peak_flops(device_name(self.device))
        self.restart()

    def restart(self) -> None:
        """Begin a new window now."""
        self._steps = 0
        self._tokens = 0.0
        self._data_loading = 0.0
        self._start = time.perf_counter()
        reset_peak_memory(self.device)

    def exclude(self, seconds: float) -> None:
        """Exclude time that was not training from the window."""
        self._start += seconds

    def step_done(self, device_tokens: float, all_tokens: int, data_loading_s: float) -> None:
        """Count a step: the tokens of this device (its share, if several devices work on the same tokens) and of all
        devices, and the seconds of waiting for the batch."""
        self._steps += 1
        self._tokens += device_tokens
        self._data_loading += data_loading_s
        self.tokens_seen += all_tokens

    def is_due(self, step: int) -> bool:
        return step == 1 or step % self.log_freq == 0 or step == self.last_step

    def log(
        self,
        step: int,
        *,
        loss: float,
        max_loss: float,
        grad_norm: float,
        lr: float,
        skipped_steps: int,
        skipped_documents: int,
        truncated_examples: int = 0,
        experts: Mapping[str, Any] | None = None,
    ) -> None:
        """Close the window at ``step`` and write its row. Reading ``loss`` has waited for the device.

        Args:
            skipped_steps: the number so far. The row of a skipped step can have values that are not finite.
            skipped_documents: the number of documents that the data have left out so far.
            truncated_examples: the number of examples that were too long for a sequence so far, and lost their end.
            experts: what the window has seen of the balance of experts (:class:`ExpertBalance`); none: no experts.
        """
        elapsed = time.perf_counter() - self._start
        tps = self._tokens / elapsed
        memory = peak_memory(self.device)
        flops = tps * self.flops_per_token
        reserved = memory.reserved
        row: Row = {
            "step": step,
            "loss": loss,
            "max_loss": max_loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "tps": tps,
            "tflops": flops / 1e12,
            "mfu": None if self._peak is None else 100 * flops / self._peak,
            "memory_gib": memory.active / GIB,
            "memory_pct": 100 * memory.active / memory.total,
            "step_time_s": elapsed / self._steps,
            "data_loading_s": self._data_loading / self._steps,
            "data_loading_pct": 100 * self._data_loading / elapsed,
            "tokens_seen": self.tokens_seen,
            "reserved_gib": None if reserved is None else reserved / GIB,
            "reserved_pct": None if reserved is None else 100 * reserved / memory.total,
            "num_alloc_retries": memory.alloc_retries,
            "num_ooms": memory.ooms,
            "skipped_steps": skipped_steps,
            "skipped_documents": skipped_documents,
            "truncated_examples": truncated_examples,
            **(experts or {}),
        }
        for key, kind in (("skipped_documents", "left out"), ("truncated_examples", "truncated")):
            if row[key] > (0 if self.last is None else self.last.get(key, 0)):
                logger.info("%s so far: %s", kind, counted(row[key], "document"))
        for sink in self.sinks:
            sink.write(row)
        self.remember(row)
        self.restart()

    def log_validation(
        self,
        step: int,
        *,
        loss: float,
        bits_per_byte: float | None,
        tokens: int,
        seconds: float,
        task: Mapping[str, float | None],
    ) -> None:
        """Write the row of a validation of ``tokens`` tokens, and the values of a ``task`` if there is one. Exclude its
        time from the window."""
        row: Row = {
            "step": step,
            "loss": loss,
            "bits_per_byte": bits_per_byte,
            "tokens": tokens,
            "time_s": seconds,
            **task,
        }
        for sink in self.sinks:
            sink.write_validation(row)
        self.last_validation = row
        self._start += seconds

    def remember(self, row: Row) -> None:
        """Use a row for the summary."""
        if self.first is None:
            self.first = row
        else:  # the first window has compilation and warm-up, so it is not steady
            for key, values in self._steady.items():
                if row[key] is not None:
                    values.append(row[key])
        self.last = row
        if self.peak is None or shown_memory(row) > shown_memory(self.peak):
            self.peak = row

    def median(self, key: str) -> float | None:
        """Return the median of ``tps`` or ``mfu`` over the steady windows; None if there are none."""
        values = self._steady[key]
        return statistics.median(values) if values else None

    def check_complete(self) -> None:
        """Check at the end of the run that all rows are written.

        Raises:
            TrainingError: rows could not be written.
        """
        if lacks := "; ".join(filter(None, (sink.lacks() for sink in self.sinks))):
            raise TrainingError(f"the run has ended, but {lacks}; the log has the rows")

    def close(self) -> None:
        for sink in self.sinks:
            sink.close(self.failed)
