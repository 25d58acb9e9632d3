"""The prediction of a run by the cost model of ``titanlite plan``, and its error after the run."""

from __future__ import annotations

from typing import Any, NamedTuple

from titanlite.config import JobConfig
from titanlite.errors import ConfigError
from titanlite.metrics.device import GIB
from titanlite.models.layers import DecoderArgs
from titanlite.plan.devices import device_called
from titanlite.plan.layout_memory import reserved_gib
from titanlite.plan.refusals import check_time_is_modelled, check_units
from titanlite.plan.time import step_time
from titanlite.plan.work import work_of
from titanlite.training.model_shape import choose_shape


class Prediction(NamedTuple):
    """The step time in seconds and the peak of reserved memory in GiB, of a run with so many tokens in a step, for each
    device that ``tps`` counts."""

    seconds: float
    memory_gib: float
    tokens_per_device: float

    def describe(self) -> str:
        """Return the prediction for the header of a run."""
        return f"{self.seconds:.3g} s per step, {self.memory_gib:.1f} GiB (docs/planning.md says how far to trust it)"

    def error(self, tps: float | None, memory_gib: float) -> str:
        """Return how far the prediction was off, for the summary of a run.

        Args:
            tps: the measured tokens per second and device; None: there is no steady window.
            memory_gib: the measured peak.
        """
        memory = f"{self.memory_gib:.1f} GiB, {_off(self.memory_gib, memory_gib)}"
        if tps is None:
            return memory
        return f"{self.seconds:.3g} s per step, {_off(self.seconds, self.tokens_per_device / tps)}; {memory}"


def predict(config: JobConfig, args: Any, device_name: str, world_size: int) -> Prediction | None:
    """Predict a run of ``world_size`` devices; None for devices that are not known, and for models and options that the
    cost model does not cover.

    Args:
        args: the configured arguments of the model. Activation checkpointing is resolved.
        device_name: as torch reports it.
    """
    device = device_called(device_name)
    if device is None or not isinstance(args, DecoderArgs):
        return None
    try:
        check_time_is_modelled(config, args)
        check_units(config, args, device)
        work = work_of(config, args, world_size)
        return Prediction(step_time(work, device).seconds, reserved_gib(work).total, work.tokens_per_device)
    except ConfigError:
        return None


def reserved_peak(config: JobConfig, world_size: int, vocab_size: int) -> int | None:
    """Return the bytes that the allocator of the busiest device reserves, by the memory model of ``titanlite plan``;
    None for models and options that it does not cover. Activation checkpointing is resolved.

    Raises:
        ConfigError: training with this configuration would raise it.
    """
    shape = choose_shape(config)
    if not isinstance(shape.flavor, DecoderArgs) or config.training.enable_cpu_offload:
        return None
    try:
        check_time_is_modelled(config, shape.flavor)
    except ConfigError:
        return None
    args = shape.spec.configure(shape.flavor, vocab_size, config.training.seq_len)
    return round(reserved_gib(work_of(config, args, world_size)).total * GIB)


def _off(predicted: float, measured: float) -> str:
    percent = 100 * (predicted / measured - 1)
    return f"{abs(percent):.0f}% {'more' if percent > 0 else 'less'} than measured"
