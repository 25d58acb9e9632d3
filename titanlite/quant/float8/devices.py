"""What a device can do in float8."""

from __future__ import annotations

import logging
from functools import cache

import torch

logger = logging.getLogger("titanlite.float8")

OCP = (torch.float8_e4m3fn, torch.float8_e5m2)
FNUZ = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_MI300 = ("gfx940", "gfx941", "gfx942")
_MI350 = ("gfx950",)


def default_dtypes() -> tuple[torch.dtype, torch.dtype]:
    """This machine's e4m3 and e5m2: the OCP formats, or on MI300 the fnuz ones."""
    # Only AMD is asked: asking starts the device, which on NVIDIA's would happen on import for nothing.
    return FNUZ if torch.version.hip and torch.cuda.is_available() and _architecture(0) in _MI300 else OCP


@cache
def _architecture(index: int) -> str:
    """``sm_90``, ``gfx942``, ..."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def architecture(device: torch.device) -> str:
    """The name of the device's instruction set as compilers spell it; "cpu", ... for what has none."""
    if device.type != "cuda":
        return device.type
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


def native_dtypes(architecture: str) -> tuple[torch.dtype, ...]:
    """The float8 dtypes that the device multiplies; none where float8 has to be emulated."""
    if architecture in _MI300:
        return FNUZ
    if architecture in _MI350:
        return OCP
    return OCP if _sm(architecture) >= 89 else ()


def _sm(architecture: str) -> int:
    number = architecture.removeprefix("sm_")
    return int(number) if number.isdigit() else 0


def why_not(architecture: str, dtypes: set[torch.dtype], *, emulate: bool, compiled: bool) -> str | None:
    """Why casts to ``dtypes`` cannot be computed on ``architecture`` as asked; None if they can."""
    native = native_dtypes(architecture)
    lacking = sorted(str(dtype) for dtype in dtypes - set(native))
    if native and lacking and not emulate:
        return (
            f"{', '.join(lacking)}: {architecture} multiplies {' and '.join(map(str, native))} only; use those, or "
            "emulate=True"
        )
    if 0 < _sm(architecture) < 89 and compiled:
        return (
            f"float8 on {architecture} can only be emulated, and the compiler has no float8 conversions below sm_89: "
            "leave torch.compile out"
        )
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def must_emulate(
    device: torch.device, target: str | None, dtypes: tuple[torch.dtype, ...], emulate: bool, compiled: bool
) -> bool:
    """Whether to emulate: where asked to, and where ``device`` has no float8 units, which is said once.

    Args:
        target: the architecture to compute for, in place of the device's own.

    Raises:
        ValueError: what is asked for cannot be computed on ``device``; see :func:`why_not`.
    """
    return _must_emulate(target or architecture(device), dtypes, emulate, compiled)


@cache
def _must_emulate(name: str, dtypes: tuple[torch.dtype, ...], emulate: bool, compiled: bool) -> bool:
    reason = why_not(name, set(dtypes), emulate=emulate, compiled=compiled)
    if reason:
        raise ValueError(f"float8: {reason}")
    native = bool(native_dtypes(name))
    if not emulate and not native and name not in _noticed:
        _noticed.add(name)
        logger.warning("float8 is emulated on %s: the same quantized values, multiplied in float32", name)
    return emulate or not native


_noticed: set[str] = set()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def scales_rows_in_matmuls(device: torch.device, target: str | None = None) -> bool:
    """Whether matmuls with full accumulation are to apply scales of rows and columns themselves. On compute capability
    9.0 PyTorch leaves that to cuBLASLt, from CUDA 12.9 on (aten/src/ATen/native/cuda/ScaledBlas.cpp); the CUTLASS
    kernel that it has for other devices is slow with full accumulation (torchao/float8/float8_ops.py).

    Args:
        target: the architecture to compute for, with the newest CUDA, in place of the device's own.
    """
    if target is not None:
        return target == "sm_90"
    return architecture(device) == "sm_90" and cuda_version() >= (12, 9)


def cuda_version() -> tuple[int, ...]:
    """That PyTorch was built for; (0,) without CUDA."""
    return tuple(map(int, (torch.version.cuda or "0").split(".")))


def has_native_float8(device: torch.device) -> bool:
    """Whether ``device`` multiplies float8 itself."""
    return bool(native_dtypes(architecture(device)))
