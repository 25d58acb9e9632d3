"""The configuration of a float8 linear layer: its options, the recipes, and the valid combinations."""

from __future__ import annotations

import enum
import logging
from dataclasses import InitVar, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, NoReturn, get_args

from titanlite.quant import kernels
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
    "e4m3_dtype",
    "e5m2_dtype",
]

logger = logging.getLogger("titanlite.float8")

e4m3_dtype, e5m2_dtype = default_dtypes()


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


@dataclass(frozen=True)
class DelayedScalingConfig:
    """The options of delayed scaling.

    Args:
        history_len: the number of steps whose amaxes are kept.
        scale_fn_name: the function that computes the scale's amax from the history; only "max" exists.

    Raises:
        ValueError: an invalid value.
    """

    history_len: int = 16
    scale_fn_name: str = "max"

    def __post_init__(self) -> None:
        if self.history_len < 1:
            _refuse(f"DelayedScalingConfig(history_len={self.history_len}): must be at least 1")
        if self.scale_fn_name != "max":
            _refuse(f'DelayedScalingConfig(scale_fn_name="{self.scale_fn_name}"): must be "max"')


@dataclass(frozen=True)
class Float8GemmConfig:
    """The options of one matmul.

    Args:
        use_fast_accum: let the hardware accumulate in less than float32, which is faster and a little less exact.
            Emulation always accumulates in float32.
    """

    use_fast_accum: bool = False


class Float8LinearRecipeName(enum.Enum):
    """The recipes, from fastest to most exact."""

    TENSORWISE = "tensorwise"
    """One scale per tensor; e4m3 in forward, e5m2 for gradients."""
    ROWWISE = "rowwise"
    """One power-of-two scale per contracted row, e4m3 everywhere: an outlier costs precision in its own row only."""
    ROWWISE_WITH_GW_HP = "rowwise_with_gw_hp"
    """Like rowwise, but grad_weight is computed in high precision, and the weight in grad_input has one scale."""


# (operand, the cast for its first matmul, the cast for its second matmul, default dtype)
_OPERANDS = (
    ("input", "cast_config_input", "cast_config_input_for_grad_weight", e4m3_dtype),
    ("weight", "cast_config_weight", "cast_config_weight_for_grad_input", e4m3_dtype),
    ("grad_output", "cast_config_grad_output", "cast_config_grad_output_for_grad_weight", e5m2_dtype),
)
_MATMULS = (
    ("output", "cast_config_input", "cast_config_weight"),
    ("grad_input", "cast_config_grad_output", "cast_config_weight_for_grad_input"),
    ("grad_weight", "cast_config_input_for_grad_weight", "cast_config_grad_output_for_grad_weight"),
)


@dataclass(frozen=True)
class Float8LinearConfig:
    """The configuration of a :class:`Float8Linear`: three matmuls, each with two operands.

    Args:
        cast_config_input: ``input`` in ``output = input @ weight.T``.
        cast_config_input_for_grad_weight: ``input`` in ``grad_weight = grad_output.T @ input``; None: as in the output.
        cast_config_weight: ``weight`` in the output.
        cast_config_weight_for_grad_input: ``weight`` in ``grad_input = grad_output @ weight``; None: as in the output.
        cast_config_grad_output: ``grad_output`` in grad_input.
        cast_config_grad_output_for_grad_weight: ``grad_output`` in grad_weight; None: as in grad_input.
        gemm_config_output, gemm_config_grad_input, gemm_config_grad_weight: the options of the three matmuls.
        enable_fsdp_float8_all_gather: under FSDP2, gather weights in float8, one byte per element.
        pad_inner_dim: accepted for compatibility with torchao; operands are always padded as the hardware needs.
        emulate: compute with float32 matmuls on the quantized values, on any hardware.
        force_recompute_fp8_weight_in_bwd: keep no quantized copy of the weight between forward and backward; quantize
            it again. Saves 1 byte per weight element (2 with scales of rows) for the time of another quantization.
        round_scales_to_power_of_2: round every scale down to a power of two.
        delayed_scaling_config: the options of ``ScalingType.DELAYED``.
        kernels: the casts with dynamic scales on float8 units: "triton", titanlite's own kernels; "inductor", plain
            operations that the compiler makes kernels of; "auto", Triton where it is installed, but plain operations in
            compiled code if every scale is that of a whole tensor: the compiler's casts move fewer bytes there. The
            results have the same bits, but for the last bit of the reciprocal of a scale that is no power of two.
        target: the architecture to compute for, such as "sm_90", in an estimate without that device; None: the
            device's own.
        enable_amax_init, enable_pre_and_post_forward: options of old versions of torchao, accepted without effect.

    Raises:
        ValueError: an invalid combination; the message names the fields, the rule and the fix.
    """

    cast_config_input: CastConfig = field(default_factory=CastConfig)
    cast_config_input_for_grad_weight: CastConfig = None  # type: ignore[assignment]  # set in __post_init__
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
    enable_amax_init: InitVar[bool | None] = None
    enable_pre_and_post_forward: InitVar[bool | None] = None

    def __post_init__(self, enable_amax_init: bool | None, enable_pre_and_post_forward: bool | None) -> None:
        old = {"enable_amax_init": enable_amax_init, "enable_pre_and_post_forward": enable_pre_and_post_forward}
        for name, value in old.items():
            if value is not None:
                logger.warning("Float8LinearConfig(%s=%s) has no effect: torchao removed the option", name, value)
        for operand, first_name, second_name, default in _OPERANDS:
            first = getattr(self, first_name)
            second = getattr(self, second_name) or first
            if first.target_dtype is None:
                first = replace(first, target_dtype=second.target_dtype or default)
            if second.target_dtype is None:
                second = replace(second, target_dtype=first.target_dtype)
            if first.is_cast and second.is_cast and first.target_dtype != second.target_dtype:
                _refuse(
                    f"{first_name}.target_dtype={first.target_dtype}, {second_name}.target_dtype="
                    f"{second.target_dtype}: {operand} must have the same dtype in both of its matmuls"
                )
            object.__setattr__(self, first_name, first)  # because the class is frozen
            object.__setattr__(self, second_name, second)
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
                        f"{getattr(self, name).scaling_type.name}: a weight that is gathered in float8 must have "
                        "dynamic scales in both of its matmuls; use ScalingType.DYNAMIC, or gather in high precision"
                    )

    def _check_stateful(self) -> None:
        """Refuse delayed or static scaling for one matmul of an operand only: both share the scale of the tensor."""
        for _, first_name, second_name, _ in _OPERANDS:
            first, second = getattr(self, first_name), getattr(self, second_name)
            if (first.is_stateful or second.is_stateful) and first != second:
                _refuse(
                    f"{first_name} = {first.short_str()}, {second_name} = {second.short_str()}: delayed and static "
                    f"scaling hold for both matmuls of an operand; leave {second_name} out"
                )

    def _check_kernels(self) -> None:
        if self.kernels not in get_args(Kernels):
            _refuse(f'kernels="{self.kernels}": must be one of {", ".join(get_args(Kernels))}')
        if self.kernels == "triton" and self.emulate:
            _refuse('kernels="triton" with emulate=True: emulation uses plain operations; choose one of the two')
        if self.kernels == "triton" and not kernels.AVAILABLE:
            _refuse('kernels="triton": triton is not installed; install it, or use kernels="inductor"')

    @property
    def casts(self) -> dict[str, CastConfig]:
        """The six casts, by field name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name.startswith("cast_config")}

    @cached_property
    def format(self) -> Float8Format:
        """The number format of a layer with this configuration."""
        casts: dict[str, Any] = {
            operand: (getattr(self, first), getattr(self, second)) for operand, first, second, _ in _OPERANDS
        }
        matmuls: dict[Matmul, Float8GemmConfig] = {
            "output": self.gemm_config_output,
            "grad_input": self.gemm_config_grad_input,
            "grad_weight": self.gemm_config_grad_weight,
        }
        return Float8Format(
            **casts,
            power_of_2=self.round_scales_to_power_of_2,
            fast_accum=tuple(matmul for matmul, config in matmuls.items() if config.use_fast_accum),
            kernels=self.kernels,
            emulate=self.emulate,
            history_len=self.delayed_scaling_config.history_len,
            target=self.target,
        )

    @staticmethod
    def from_recipe_name(recipe_name: Float8LinearRecipeName | str) -> Float8LinearConfig:
        """Return the configuration of a recipe.

        Raises:
            ValueError: an unknown name; the message lists the known ones.
        """
        names = [name.value for name in Float8LinearRecipeName]
        if not isinstance(recipe_name, Float8LinearRecipeName):
            if recipe_name not in names:
                _refuse(f'recipe_name = "{recipe_name}": there is no such recipe; known: {", ".join(names)}')
            recipe_name = Float8LinearRecipeName(recipe_name)
        if recipe_name is Float8LinearRecipeName.TENSORWISE:
            return Float8LinearConfig()
        row = CastConfig(scaling_granularity=ScalingGranularity.AXISWISE, target_dtype=e4m3_dtype)
        rowwise: dict[str, Any] = {f"cast_config_{operand}": row for operand, *_ in _OPERANDS}
        if recipe_name is Float8LinearRecipeName.ROWWISE_WITH_GW_HP:
            disabled = CastConfig(scaling_type=ScalingType.DISABLED)
            rowwise["cast_config_weight_for_grad_input"] = CastConfig(target_dtype=e4m3_dtype)
            rowwise["cast_config_input_for_grad_weight"] = disabled
            rowwise["cast_config_grad_output_for_grad_weight"] = disabled
        return Float8LinearConfig(**rowwise, round_scales_to_power_of_2=True)
