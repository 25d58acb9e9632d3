"""How a linear layer is computed in float8: the names, the recipes, and the rules of what goes with what."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, NoReturn, get_args

from titanlite.quant.float8 import kernels
from titanlite.quant.float8.casts import CastConfig, ScalingGranularity, ScalingType
from titanlite.quant.float8.devices import default_dtypes
from titanlite.quant.float8.format import Float8Format, Kernels
from titanlite.quant.format import Matmul

__all__ = [
    "CastConfig",
    "DelayedScalingConfig",
    "Float8GemmConfig",
    "Float8LinearConfig",
    "Float8LinearRecipeName",
    "ScalingGranularity",
    "ScalingType",
]


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


@dataclass(frozen=True)
class DelayedScalingConfig:
    """Delayed scaling.

    Args:
        history_len: steps that an amax is remembered for.
        scale_fn_name: how a scale is made of the history; only "max" is known.
    """

    history_len: int = 16
    scale_fn_name: str = "max"

    def __post_init__(self) -> None:
        if self.history_len < 1:
            _refuse(f"DelayedScalingConfig(history_len={self.history_len}): must be at least 1")
        if self.scale_fn_name != "max":
            _refuse(f'DelayedScalingConfig(scale_fn_name="{self.scale_fn_name}"): only "max" is known')


@dataclass(frozen=True)
class Float8GemmConfig:
    """One matmul.

    Args:
        use_fast_accum: let the hardware accumulate in less than float32: faster, a little less exact. Without effect in
            emulation, which accumulates in float32.
    """

    use_fast_accum: bool = False


class Float8LinearRecipeName(enum.Enum):
    """The recipes, from fastest to most exact."""

    TENSORWISE = "tensorwise"
    """One scale per tensor; e4m3 forward, e5m2 gradients."""
    ROWWISE = "rowwise"
    """One power-of-two scale per contracted row, e4m3 everywhere: an outlier costs only its own row precision."""
    ROWWISE_WITH_GW_HP = "rowwise_with_gw_hp"
    """As rowwise, with grad_weight computed in high precision and one scale for the weight in grad_input."""


_E4M3, _E5M2 = default_dtypes()
# (operand, its use in the matmul of its own name, its use in the other one, default dtype)
_OPERANDS = (
    ("input", "cast_config_input", "cast_config_input_for_grad_weight", _E4M3),
    ("weight", "cast_config_weight", "cast_config_weight_for_grad_input", _E4M3),
    ("grad_output", "cast_config_grad_output", "cast_config_grad_output_for_grad_weight", _E5M2),
)
_MATMULS = (
    ("output", "cast_config_input", "cast_config_weight"),
    ("grad_input", "cast_config_grad_output", "cast_config_weight_for_grad_input"),
    ("grad_weight", "cast_config_input_for_grad_weight", "cast_config_grad_output_for_grad_weight"),
)


@dataclass(frozen=True)
class Float8LinearConfig:
    """The computation of a :class:`Float8Linear`: three matmuls, each with two operands.

    Args:
        cast_config_input: ``input`` in ``output = input @ weight.T``.
        cast_config_input_for_grad_weight: ``input`` in ``grad_weight = grad_output.T @ input``; None: as above.
        cast_config_weight: ``weight`` in the output.
        cast_config_weight_for_grad_input: ``weight`` in ``grad_input = grad_output @ weight``; None: as above.
        cast_config_grad_output: ``grad_output`` in grad_input.
        cast_config_grad_output_for_grad_weight: ``grad_output`` in grad_weight; None: as above.
        gemm_config_output, gemm_config_grad_input, gemm_config_grad_weight: the matmuls.
        enable_fsdp_float8_all_gather: under FSDP2, gather weights in float8, one byte per element.
        pad_inner_dim: accepted for torchao's sake: what has to be padded for the hardware (the tokens) always is.
        emulate: compute with float32 matmuls on the quantized values, wherever it runs.
        force_recompute_fp8_weight_in_bwd: keep no quantized copy of the weight between forward and backward; quantize
            it again. Saves 1 byte per weight element (2 with scales of rows) for the time of another quantization.
        round_scales_to_power_of_2: round every scale down to a power of two.
        delayed_scaling_config: for the operands with ``ScalingType.DELAYED``.
        kernels: what casts with dynamic scales on float8 units: "triton", titanlite's own kernels; "inductor", plain
            operations, for the compiler to make kernels of; "auto", Triton's where it is installed. The numbers are
            the same to the bit, but for scales that the compiler divides with less than IEEE's precision.
        target: the architecture to compute for, such as "sm_90", on a device that only stands for it, as in estimates;
            None: the device's own.

    Raises:
        ValueError: naming the fields, the rule and the way out.
    """

    cast_config_input: CastConfig = field(default_factory=CastConfig)
    cast_config_input_for_grad_weight: CastConfig = None  # type: ignore[assignment]  # settled in __post_init__
    cast_config_weight: CastConfig = field(default_factory=CastConfig)
    cast_config_weight_for_grad_input: CastConfig = None  # type: ignore[assignment]
    cast_config_grad_output: CastConfig = field(default_factory=CastConfig)
    cast_config_grad_output_for_grad_weight: CastConfig = None  # type: ignore[assignment]
    gemm_config_output: Float8GemmConfig = field(default_factory=lambda: Float8GemmConfig(use_fast_accum=True))
    gemm_config_grad_input: Float8GemmConfig = field(default_factory=Float8GemmConfig)
    gemm_config_grad_weight: Float8GemmConfig = field(default_factory=Float8GemmConfig)
    enable_fsdp_float8_all_gather: bool = False
    pad_inner_dim: bool = False
    emulate: bool = False
    force_recompute_fp8_weight_in_bwd: bool = False
    round_scales_to_power_of_2: bool = False
    delayed_scaling_config: DelayedScalingConfig = field(default_factory=DelayedScalingConfig)
    kernels: Kernels = "auto"
    target: str | None = None

    def __post_init__(self) -> None:
        for operand, own, other, default in _OPERANDS:
            first = getattr(self, own)
            second = getattr(self, other) or first
            if first.target_dtype is None:
                first = replace(first, target_dtype=second.target_dtype or default)
            if second.target_dtype is None:
                second = replace(second, target_dtype=first.target_dtype)
            if first.is_cast and second.is_cast and first.target_dtype != second.target_dtype:
                _refuse(
                    f"{own}.target_dtype={first.target_dtype}, {other}.target_dtype={second.target_dtype}: {operand} "
                    "must have the same dtype in both of its matmuls"
                )
            object.__setattr__(self, own, first)  # the class is frozen for those who read it
            object.__setattr__(self, other, second)
        for matmul, a, b in _MATMULS:
            if getattr(self, a).is_cast != getattr(self, b).is_cast:
                _refuse(
                    f"{a}.scaling_type={getattr(self, a).scaling_type.name}, "
                    f"{b}.scaling_type={getattr(self, b).scaling_type.name}: the operands of {matmul} must both be "
                    "cast to float8 or neither; disable both"
                )
        self._check_stateful()
        self._check_kernels()
        if self.enable_fsdp_float8_all_gather:
            for name in ("cast_config_weight", "cast_config_weight_for_grad_input"):
                if getattr(self, name).scaling_type is not ScalingType.DYNAMIC:
                    _refuse(
                        f"enable_fsdp_float8_all_gather with {name}.scaling_type="
                        f"{getattr(self, name).scaling_type.name}: a weight that is gathered in float8 needs dynamic "
                        "scales in both of its matmuls; use ScalingType.DYNAMIC, or gather in high precision"
                    )

    def _check_stateful(self) -> None:
        """Delayed and static scales belong to a tensor, which both of its matmuls then share."""
        for _, own, other, _ in _OPERANDS:
            first, second = getattr(self, own), getattr(self, other)
            if (first.is_stateful or second.is_stateful) and first != second:
                _refuse(
                    f"{own} = {first.short_str()}, {other} = {second.short_str()}: delayed and static scaling hold for "
                    f"both matmuls of an operand; leave {other} out"
                )

    def _check_kernels(self) -> None:
        if self.kernels not in get_args(Kernels):
            _refuse(f'kernels="{self.kernels}": must be one of {", ".join(get_args(Kernels))}')
        if self.kernels == "triton" and self.emulate:
            _refuse('kernels="triton" with emulate=True: emulation is plain operations; choose one')
        if self.kernels == "triton" and not kernels.AVAILABLE:
            _refuse('kernels="triton": triton is not installed; install it, or use kernels="inductor"')

    @property
    def casts(self) -> dict[str, CastConfig]:
        """The six operands' casts, by field name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name.startswith("cast_config")}

    @cached_property
    def format(self) -> Float8Format:
        """The number format that a layer of this configuration computes in."""
        casts: dict[str, Any] = {
            operand: (getattr(self, own), getattr(self, other)) for operand, own, other, _ in _OPERANDS
        }
        fast: dict[Matmul, Float8GemmConfig] = {
            "output": self.gemm_config_output,
            "grad_input": self.gemm_config_grad_input,
            "grad_weight": self.gemm_config_grad_weight,
        }
        return Float8Format(
            **casts,
            power_of_2=self.round_scales_to_power_of_2,
            fast_accum=tuple(matmul for matmul, config in fast.items() if config.use_fast_accum),
            kernels=self.kernels,
            emulate=self.emulate,
            history_len=self.delayed_scaling_config.history_len,
            target=self.target,
        )

    @staticmethod
    def from_recipe_name(recipe_name: Float8LinearRecipeName | str) -> Float8LinearConfig:
        """The configuration of a recipe.

        Raises:
            ValueError: unknown name; the message lists the known ones.
        """
        names = [name.value for name in Float8LinearRecipeName]
        if not isinstance(recipe_name, Float8LinearRecipeName):
            if recipe_name not in names:
                _refuse(f'recipe_name = "{recipe_name}": there is no such recipe; known: {", ".join(names)}')
            recipe_name = Float8LinearRecipeName(recipe_name)
        if recipe_name is Float8LinearRecipeName.TENSORWISE:
            return Float8LinearConfig()
        row = CastConfig(scaling_granularity=ScalingGranularity.AXISWISE, target_dtype=_E4M3)
        rowwise: dict[str, Any] = {f"cast_config_{operand}": row for operand, *_ in _OPERANDS}
        if recipe_name is Float8LinearRecipeName.ROWWISE_WITH_GW_HP:
            disabled = CastConfig(scaling_type=ScalingType.DISABLED)
            rowwise["cast_config_weight_for_grad_input"] = CastConfig(target_dtype=_E4M3)
            rowwise["cast_config_input_for_grad_weight"] = disabled
            rowwise["cast_config_grad_output_for_grad_weight"] = disabled
        return Float8LinearConfig(**rowwise, round_scales_to_power_of_2=True)
