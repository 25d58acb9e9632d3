"""The float8 support of devices."""

from __future__ import annotations

import logging
from functools import cache

import torch

from titanlite.quant.devices import architecture, sm

logger = logging.getLogger("titanlite.float8")

OCP = (torch.float8_e4m3fn, torch.float8_e5m2)
FNUZ = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_MI300 = ("gfx940", "gfx941", "gfx942")
_MI350 = ("gfx950",)


def default_dtypes() -> tuple[torch.dtype, torch.dtype]:
    """Return the e4m3 and the e5m2 dtype of this machine: the fnuz ones on MI300, else the OCP ones."""
    # Query AMD devices only: a query initializes the device, and this runs on import.
    return (
        FNUZ
        if torch.version.hip and torch.cuda.is_available() and architecture(torch.device("cuda", 0)) in _MI300
        else OCP
    )


def native_dtypes(architecture: str) -> tuple[torch.dtype, ...]:
    """Return the float8 dtypes that the hardware multiplies; empty where float8 has to be emulated."""
    if architecture in _MI300:
        return FNUZ
    if architecture in _MI350:
        return OCP
    return OCP if sm(architecture) >= 89 else ()


def has_grouped_matmuls(architecture: str) -> bool:
    """Return whether GPUs of this architecture have a grouped matmul in float8 with scales of rows."""
    return sm(architecture) == 90


def why_not(architecture: str, dtypes: set[torch.dtype], *, emulate: bool, compiled: bool) -> str | None:
    """Return why casts to ``dtypes`` cannot be computed on ``architecture`` with these options; None if they can."""
    native = native_dtypes(architecture)
    missing = sorted(str(dtype) for dtype in dtypes - set(native))
    if native and missing and not emulate:
        return (
            f"{', '.join(missing)}: {architecture} multiplies {' and '.join(map(str, native))} only; use these, or set "
            "emulate=True"
        )
    if 0 < sm(architecture) < 89 and compiled:
        return (
            f"float8 on {architecture} can only be emulated, and the compiler has no float8 conversions below sm_89: "
            "leave torch.compile out"
        )
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def must_emulate(
    device: torch.device, target: str | None, dtypes: tuple[torch.dtype, ...], emulate: bool, compiled: bool
) -> bool:
    """Return whether to emulate: on request, or because ``device`` has no float8 units, which is logged once.

    Args:
        target: the architecture to compute for; None: that of ``device``.

    Raises:
        ValueError: ``device`` cannot compute with these options; see :func:`why_not`.
    """
    return _must_emulate(target or architecture(device), dtypes, emulate, compiled)


@cache
def _must_emulate(name: str, dtypes: tuple[torch.dtype, ...], emulate: bool, compiled: bool) -> bool:
    reason = why_not(name, set(dtypes), emulate=emulate, compiled=compiled)
    if reason:
        raise ValueError(f"float8: {reason}")
    native = bool(native_dtypes(name))
    if not emulate and not native and name not in {*_noticed, "meta"}:
        _noticed.add(name)
        logger.warning("float8 is emulated on %s: the same quantized values, multiplied in float32", name)
    return emulate or not native


_noticed: set[str] = set()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def scales_rows_in_matmuls(device: torch.device, target: str | None = None) -> bool:
    """Return whether a matmul with full accumulation should apply the scales of rows and columns inside the kernel.

    On sm_90 with CUDA 12.9 or later, PyTorch calls cuBLASLt for it (aten/src/ATen/native/cuda/ScaledBlas.cpp).
    Elsewhere it uses a CUTLASS kernel that is slow with full accumulation (torchao/float8/float8_ops.py).

    Args:
        target: the architecture to compute for, with the newest CUDA; None: that of ``device``.
    """
    if target is not None:
        return target == "sm_90"
    return architecture(device) == "sm_90" and cuda_version() >= (12, 9)


def cuda_version() -> tuple[int, ...]:
    """Return the CUDA version that PyTorch was built for; (0,) without CUDA."""
    return tuple(map(int, (torch.version.cuda or "0").split(".")))


def has_native_float8(device: torch.device) -> bool:
    """Return whether ``device`` has float8 units."""
    return bool(native_dtypes(architecture(device)))
