"""How a linear layer is computed in float8: the names, the recipes, and the rules of what goes with what."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NoReturn, get_args

import torch

from titanlite.float8 import kernels
from titanlite.float8.devices import default_dtypes
from titanlite.float8.numerics import FP8_DTYPES


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


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


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
            _refuse(
                "CastConfig(scaling_type=STATIC): needs a static_scale, for example 448 / (the largest value expected)"
            )
        if self.static_scale is not None and not static:
            _refuse(
                f"CastConfig(static_scale={self.static_scale}): has no effect with scaling_type="
                f"{self.scaling_type.name}; use ScalingType.STATIC"
            )
        if self.static_scale is not None and not 0 < self.static_scale < float("inf"):
            _refuse(f"CastConfig(static_scale={self.static_scale}): must be positive and finite")
        stateful = self.scaling_type in (ScalingType.DELAYED, ScalingType.STATIC)
        if stateful and self.scaling_granularity is ScalingGranularity.AXISWISE:
            _refuse(
                f"CastConfig(scaling_type={self.scaling_type.name}, scaling_granularity=AXISWISE): scales of rows are "
                "dynamic only; use TENSORWISE, or ScalingType.DYNAMIC"
            )
        if self.target_dtype is not None and self.target_dtype not in FP8_DTYPES:
            _refuse(
                f"CastConfig(target_dtype={self.target_dtype}): must be a float8 dtype, one of "
                f"{', '.join(str(d) for d in FP8_DTYPES)}"
            )

    @property
    def is_cast(self) -> bool:
        return self.scaling_type is not ScalingType.DISABLED

    @property
    def is_axiswise(self) -> bool:
        return self.is_cast and self.scaling_granularity is ScalingGranularity.AXISWISE

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


Kernels = Literal["auto", "triton", "inductor"]


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
            types = {c.scaling_type for c in (first, second) if c.is_cast}
            if types & {ScalingType.DELAYED, ScalingType.STATIC} and first != second:
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

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The float8 dtypes of the operands."""
        return tuple(dict.fromkeys(c.dtype for c in self.casts.values() if c.is_cast))

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
