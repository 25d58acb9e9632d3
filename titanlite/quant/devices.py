"""The architecture of a device, and what it lacks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger("titanlite.quant")


def architecture(device: torch.device) -> str:
    """Return the GPU's architecture as compilers spell it, such as "sm_90"; the device type for other devices."""
    if device.type != "cuda":
        return device.type
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _architecture(index: int) -> str:
    """Return the architecture of GPU ``index``, such as "sm_90" or "gfx942"."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def sm(architecture: str) -> int:
    """Return the number of an NVIDIA architecture, 90 for "sm_90"; 0 for any other."""
    number = architecture.removeprefix("sm_")
    return int(number) if number.isdigit() else 0


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make the device of ``x`` the current one: Triton launches there, not on the device of its arguments."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def lacks_units(
    format: str,
    is_native: Callable[[str], bool],
    device: torch.device,
    target: str | None = None,
    needs: str = "",
) -> bool:
    """Return whether there are no units for ``format``, which is logged once.

    Args:
        target: the architecture to compute for; None: that of ``device``.
        needs: what the units need, if the name of the architecture does not say it.
    """
    return device.type != "meta" and _lacks_units(format, is_native, target or architecture(device), needs)


@cache
def _lacks_units(format: str, is_native: Callable[[str], bool], architecture: str, needs: str) -> bool:
    native = is_native(architecture)
    if not native:
        logger.warning(
            "%s is emulated on %s: the same quantized values, multiplied in float32%s",
            *(format, architecture, f" (units need {needs})" if needs else ""),
        )
    return not native


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def lacks_result(
    format: str,
    results: tuple[torch.dtype, ...] | None,
    dtype: torch.dtype,
    device: torch.device,
    target: str | None = None,
) -> bool:
    """Return whether the units for ``format`` cannot write ``dtype``, which is logged once.

    Args:
        results: the dtypes that they can write; None: all.
        target: the architecture to compute for; None: that of ``device``.
    """
    return results is not None and _lacks_result(format, results, dtype, target or architecture(device))


@cache
def _lacks_result(format: str, results: tuple[torch.dtype, ...], dtype: torch.dtype, architecture: str) -> bool:
    lacks = dtype not in results
    if lacks:
        logger.warning(
            "%s is emulated on %s where its result is in %s: the units write %s only",
            *(format, architecture, dtype, ", ".join(map(str, results))),
        )
    return lacks
