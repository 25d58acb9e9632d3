"""The options of the cast of one operand to float8."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

from titanlite.quant.float8.numerics import FP8_DTYPES
from titanlite.quant.kernels import Layout


class ScalingType(enum.Enum):
    """The source of an operand's scale."""

    DYNAMIC = "dynamic"
    """The amax of the tensor itself."""
    DELAYED = "delayed"
    """The amaxes of earlier steps; see :func:`~titanlite.float8.sync_float8_amax_and_scale_history`."""
    STATIC = "static"
    """A constant, ``CastConfig.static_scale``."""
    DISABLED = "disabled"
    """The operand is not cast."""

    def short_str(self) -> str:
        return self.value[:3]


class ScalingGranularity(enum.Enum):
    """The number of scales of an operand."""

    TENSORWISE = "tensorwise"
    """One scale for the tensor."""
    AXISWISE = "axiswise"
    """One scale for each row, or column, that the matmul sums over ("rowwise")."""

    def short_str(self) -> str:
        return "ten" if self is ScalingGranularity.TENSORWISE else "axs"


@dataclass(frozen=True)
class CastConfig:
    """The cast of one operand to float8.

    Args:
        target_dtype: a float8 dtype; None: the device's e4m3, or its e5m2 for a tensorwise ``grad_output``.
        static_scale: the multiplier of ``ScalingType.STATIC``, a positive number or a tensor of one element.

    Raises:
        ValueError: an invalid value or combination.
    """

    scaling_type: ScalingType = ScalingType.DYNAMIC
    scaling_granularity: ScalingGranularity = ScalingGranularity.TENSORWISE
    target_dtype: torch.dtype | None = None
    static_scale: float | None = None

    def __post_init__(self) -> None:
        if self.static_scale is not None:  # as a number it can be compared, hashed and pickled
            object.__setattr__(self, "static_scale", float(self.static_scale))
        static = self.scaling_type is ScalingType.STATIC
        if static and self.static_scale is None:
            raise ValueError(
                "CastConfig(scaling_type=STATIC): needs a static_scale, for example 448 / (largest expected magnitude)"
            )
        if self.static_scale is not None and not static:
            raise ValueError(
                f"CastConfig(static_scale={self.static_scale}): has no effect with "
                f"scaling_type={self.scaling_type.name}; use ScalingType.STATIC, or leave it out"
            )
        if self.static_scale is not None and not 0 < self.static_scale < float("inf"):
            raise ValueError(f"CastConfig(static_scale={self.static_scale}): must be positive and finite")
        if self.is_stateful and self.scaling_granularity is ScalingGranularity.AXISWISE:
            raise ValueError(
                f"CastConfig(scaling_type={self.scaling_type.name}, scaling_granularity=AXISWISE): scales of rows are "
                "dynamic only; use TENSORWISE, or ScalingType.DYNAMIC"
            )
        if self.target_dtype is not None and self.target_dtype not in FP8_DTYPES:
            raise ValueError(
                f"CastConfig(target_dtype={self.target_dtype}): must be a float8 dtype, one of "
                f"{', '.join(str(d) for d in FP8_DTYPES)}"
            )

    @property
    def is_cast(self) -> bool:
        return self.scaling_type is not ScalingType.DISABLED

    @property
    def is_dynamic(self) -> bool:
        return self.scaling_type is ScalingType.DYNAMIC

    @property
    def is_stateful(self) -> bool:
        """True if the scale does not come from the tensor that is cast."""
        return self.scaling_type in (ScalingType.DELAYED, ScalingType.STATIC)

    @property
    def is_axiswise(self) -> bool:
        return self.is_cast and self.scaling_granularity is ScalingGranularity.AXISWISE

    @property
    def layout(self) -> Layout:
        """The cast as the kernels name it."""
        return "none" if not self.is_cast else "vector" if self.is_axiswise else "tensor"

    @property
    def dtype(self) -> torch.dtype:
        """``target_dtype``, after a Float8LinearConfig has replaced None by a dtype."""
        assert self.target_dtype is not None
        return self.target_dtype

    def short_str(self) -> str:
        if not self.is_cast:
            return "dis"
        dtype = str(self.target_dtype).removeprefix("torch.float8_").removesuffix("fn")
        return f"{self.scaling_type.short_str()}_{self.scaling_granularity.short_str()}_{dtype}"
