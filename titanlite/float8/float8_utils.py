"""Scales and errors, with torchao's names and arguments."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from titanlite.float8.config import ScalingGranularity
from titanlite.quant.float8 import numerics
from titanlite.quant.float8.numerics import EPS, FP8_DTYPES

FP8_TYPES = set(FP8_DTYPES)
IS_ROCM = torch.version.hip is not None and torch.cuda.is_available()

__all__ = [
    "EPS",
    "FP8_TYPES",
    "IS_ROCM",
    "amax_to_scale",
    "compute_error",
    "fp8_tensor_statistics",
    "tensor_to_amax",
    "tensor_to_scale",
    "to_fp8_saturated",
]


def _check(float8_dtype: torch.dtype) -> None:
    if float8_dtype not in FP8_TYPES:
        raise ValueError(f"float8_dtype={float8_dtype}: must be one of {', '.join(map(str, FP8_DTYPES))}")


def amax_to_scale(amax: Tensor, float8_dtype: torch.dtype, round_scales_to_power_of_2: bool = False) -> Tensor:
    """Return the float32 scale, a multiplier, that maps ``amax`` to the largest finite value of ``float8_dtype``.

    Raises:
        ValueError: ``float8_dtype`` is not a float8 dtype.
    """
    _check(float8_dtype)
    return numerics.amax_to_scale(amax, float8_dtype, round_scales_to_power_of_2)


@torch.no_grad()
def tensor_to_amax(
    x: Tensor,
    reduce_amax: bool = False,
    device_mesh: DeviceMesh | None = None,
    scaling_granularity: ScalingGranularity = ScalingGranularity.TENSORWISE,
    axiswise_dim: int | None = None,
) -> Tensor:
    """Return the largest magnitude of ``x``, (), or with AXISWISE the magnitudes along ``axiswise_dim``, which is kept
    with size 1.

    Args:
        reduce_amax: take the maximum over the processes of ``device_mesh``, or over all without it.

    Raises:
        ValueError: AXISWISE without ``axiswise_dim``.
    """
    axiswise = scaling_granularity is ScalingGranularity.AXISWISE
    if axiswise and axiswise_dim is None:
        raise ValueError("scaling_granularity=AXISWISE: needs axiswise_dim, the dimension to reduce")
    amax = numerics.amax_of(x, axiswise_dim if axiswise else None)
    if reduce_amax and dist.is_initialized():
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=None if device_mesh is None else device_mesh.get_group())
    return amax


@torch.no_grad()
def tensor_to_scale(
    hp_tensor: Tensor,
    float8_dtype: torch.dtype,
    reduce_amax: bool = False,
    device_mesh: DeviceMesh | None = None,
    scaling_granularity: ScalingGranularity = ScalingGranularity.TENSORWISE,
    axiswise_dim: int | None = None,
    round_scales_to_power_of_2: bool = False,
) -> Tensor:
    """Return the float32 scale, a multiplier, to cast ``hp_tensor`` with. Arguments as of :func:`tensor_to_amax`."""
    amax = tensor_to_amax(hp_tensor, reduce_amax, device_mesh, scaling_granularity, axiswise_dim)
    return amax_to_scale(amax, float8_dtype, round_scales_to_power_of_2)


def to_fp8_saturated(x: Tensor, float8_dtype: torch.dtype) -> Tensor:
    """Cast ``x`` to ``float8_dtype``, clamped to its finite range; NaN stays NaN.

    Raises:
        ValueError: ``float8_dtype`` is not a float8 dtype.
    """
    _check(float8_dtype)
    return numerics.quantize(x, torch.ones((), device=x.device), float8_dtype)


def compute_error(x: Tensor, y: Tensor) -> Tensor:
    """Return the signal-to-noise ratio in dB of ``y``, of which ``x`` is the exact value."""
    return 20 * torch.log10(torch.linalg.vector_norm(x) / torch.linalg.vector_norm(x - y))


def fp8_tensor_statistics(tensor: Any, float8_dtype: torch.dtype) -> tuple[int, int]:
    """Return how many elements of ``tensor`` are zero, and how many are the largest finite magnitude.

    Args:
        tensor: holds its float8 data in ``qdata`` or ``_data``.

    Raises:
        ValueError: ``float8_dtype`` is not a float8 dtype.
    """
    _check(float8_dtype)
    data = (tensor.qdata if hasattr(tensor, "qdata") else tensor._data).float().abs()
    return int((data == 0).sum()), int((data == torch.finfo(float8_dtype).max).sum())


def _round_scale_down_to_power_of_2(scale: Tensor) -> Tensor:
    assert scale.dtype == torch.float32, "scale must be float32 tensor"
    return numerics.round_down_to_power_of_2(scale)
