"""How one operand is cast to float8."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

from titanlite.quant.float8.kernels import Layout
from titanlite.quant.float8.numerics import FP8_DTYPES


class ScalingType(enum.Enum):
    """Where the scale of an operand comes from."""

    DYNAMIC = "dynamic"
    """The amax of the tensor itself."""
    DELAYED = "delayed"
    """The amaxes of the steps before; see :func:`~titanlite.float8.sync_float8_amax_and_scale_history`."""
    STATIC = "static"
    """A constant, ``CastConfig.static_scale``."""
    DISABLED = "disabled"
    """The operand is not cast."""

    def short_str(self) -> str:
        return self.value[:3]


class ScalingGranularity(enum.Enum):
    """How many scales an operand has."""

    TENSORWISE = "tensorwise"
    """One."""
    AXISWISE = "axiswise"
    """One for each row, or column, that the matmul contracts ("rowwise")."""

    def short_str(self) -> str:
        return "ten" if self is ScalingGranularity.TENSORWISE else "axs"


@dataclass(frozen=True)
class CastConfig:
    """How one operand is cast to float8.

    Args:
        target_dtype: a float8 dtype; None takes the device's own e4m3, and e5m2 for a tensorwise ``grad_output``.
        static_scale: the multiplier of ``ScalingType.STATIC``, a positive number or a tensor of one.

    Raises:
        ValueError: for combinations that have no meaning.
    """

    scaling_type: ScalingType = ScalingType.DYNAMIC
    scaling_granularity: ScalingGranularity = ScalingGranularity.TENSORWISE
    target_dtype: torch.dtype | None = None
    static_scale: float | None = None

    def __post_init__(self) -> None:
        if self.static_scale is not None:  # a number: it compares, hashes and pickles
            object.__setattr__(self, "static_scale", float(self.static_scale))
        static = self.scaling_type is ScalingType.STATIC
        if static and self.static_scale is None:
            raise ValueError(
                "CastConfig(scaling_type=STATIC): needs a static_scale, for example 448 / (the largest value expected)"
            )
        if self.static_scale is not None and not static:
            raise ValueError(
                f"CastConfig(static_scale={self.static_scale}): has no effect with scaling_type="
                f"{self.scaling_type.name}; use ScalingType.STATIC"
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
        """Whether the scale comes from elsewhere than the tensor that is cast."""
        return self.scaling_type in (ScalingType.DELAYED, ScalingType.STATIC)

    @property
    def is_axiswise(self) -> bool:
        return self.is_cast and self.scaling_granularity is ScalingGranularity.AXISWISE

    @property
    def layout(self) -> Layout:
        """The cast in the words of the kernels."""
        return "none" if not self.is_cast else "vector" if self.is_axiswise else "tensor"

    @property
    def dtype(self) -> torch.dtype:
        """``target_dtype``, once a Float8LinearConfig has settled it."""
        assert self.target_dtype is not None
        return self.target_dtype

    def short_str(self) -> str:
        if not self.is_cast:
            return "dis"
        dtype = str(self.target_dtype).removeprefix("torch.float8_")
        return f"{self.scaling_type.short_str()}_{self.scaling_granularity.short_str()}_{dtype}"
