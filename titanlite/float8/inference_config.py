"""The configurations of float8 inference, with torchao's names and fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from titanlite.float8.config import e4m3_dtype
from titanlite.float8.types import FP8Granularity, PerRow, PerTensor, granularity_of
from titanlite.quant.float8.numerics import FP8_DTYPES


class Float8MMConfig(NamedTuple):
    """The options of a float8 matmul.

    Attributes:
        emulate: multiply the quantized values in float32, on any hardware.
        use_fast_accum: let the hardware accumulate in less than float32.
        pad_inner_dim: accepted for compatibility with torchao; operands are always padded as the hardware needs.
    """

    emulate: bool = False
    use_fast_accum: bool = False
    pad_inner_dim: bool = False


FAST = Float8MMConfig(use_fast_accum=True)


@dataclass(frozen=True)
class Float8DynamicActivationFloat8WeightConfig:
    """A configuration for float8 matmuls with activations scaled by the amax of the batch (PerTensor) or of each token
    (PerRow).

    Args:
        activation_dtype, weight_dtype: float8 dtypes; not e5m2 both, which the hardware does not multiply.
        granularity: of activation and weight, or a pair of two equal ones; None: PerTensor. torchao's objects are
            accepted too.
        packing_format: only "plain" exists.
        mm_config: the options of the matmul; None: fast accumulation.
        activation_value_lb, activation_value_ub: bounds of the amax that the scale of the activation is computed from.
        kernel_preference: "auto" and "torch" are the same; "emulated" multiplies in float32.
        set_inductor_config: accepted for compatibility with torchao; no setting of the compiler is changed.
        version, alg_id: only 2 and 0 exist.

    Raises:
        ValueError: any other value.
    """

    activation_dtype: torch.dtype = e4m3_dtype
    weight_dtype: torch.dtype = e4m3_dtype
    granularity: FP8Granularity | tuple[FP8Granularity, FP8Granularity] | None = None
    packing_format: Any = "plain"
    mm_config: Float8MMConfig | None = None
    activation_value_lb: float | None = None
    activation_value_ub: float | None = None
    kernel_preference: Any = "auto"
    set_inductor_config: bool = True
    version: int = 2
    alg_id: int = 0

    def __post_init__(self) -> None:
        pair = self.granularity
        if isinstance(pair, (tuple, list)) and len(pair) == 2 and granularity_of(pair[0]) == granularity_of(pair[1]):
            object.__setattr__(self, "granularity", pair[0])
        _set_granularity(self, PerTensor(), ", or a pair (activation, weight) of equal ones")
        _check_matmul(self)
        _check_only(self, "packing_format", "plain")
        _check_only(self, "version", 2)
        _check_only(self, "alg_id", 0)


@dataclass(frozen=True)
class Float8WeightOnlyConfig:
    """A configuration that saves memory: weights in float8, dequantized to the input's dtype for each matmul.

    Args:
        weight_dtype: a float8 dtype.
        granularity: of the weight; None: PerRow. torchao's objects are accepted too.
        set_inductor_config, version: as of :class:`Float8DynamicActivationFloat8WeightConfig`.

    Raises:
        ValueError: any other value.
    """

    weight_dtype: torch.dtype = e4m3_dtype
    set_inductor_config: bool = True
    version: int = 2
    granularity: FP8Granularity | None = None

    def __post_init__(self) -> None:
        _set_granularity(self, PerRow())
        _check_dtype(self, "weight_dtype")
        _check_only(self, "version", 2)


@dataclass(frozen=True, kw_only=True)
class Float8StaticActivationFloat8WeightConfig:
    """A configuration for float8 matmuls with activations scaled by a constant, which saves the pass for their amax.

    Larger inputs than ``activation_amax`` are clamped to it. Measure it with
    :func:`titanlite.float8.inference.calibrate`, on data like those of inference.

    Args:
        activation_amax: the largest magnitude of a layer's input: one for all layers, or by fully qualified name. The
            scale is ``fp8_max / activation_amax``.
        act_quant_scale: ``activation_amax / fp8_max`` instead, as in torchao.
        granularity: of the weight; None: PerTensor.
        The others: as of :class:`Float8DynamicActivationFloat8WeightConfig`.

    Raises:
        ValueError: not exactly one of the first two, an amax that is not positive and finite, an empty mapping, or any
            other value.
    """

    activation_amax: float | Tensor | Mapping[str, float | Tensor] | None = None
    act_quant_scale: float | Tensor | None = None
    activation_dtype: torch.dtype = e4m3_dtype
    weight_dtype: torch.dtype = e4m3_dtype
    granularity: FP8Granularity | None = None
    mm_config: Float8MMConfig | None = None
    kernel_preference: Any = "auto"
    set_inductor_config: bool = True

    def __post_init__(self) -> None:
        _set_granularity(self, PerTensor())
        _check_matmul(self)
        if (self.activation_amax is None) == (self.act_quant_scale is None):
            raise ValueError(
                "Float8StaticActivationFloat8WeightConfig: needs activation_amax or act_quant_scale, one of the two; "
                "calibrate() measures activation_amax"
            )
        amax: Any = self.activation_amax
        if self.act_quant_scale is not None:
            amax = _positive(self.act_quant_scale, "act_quant_scale=") * torch.finfo(self.activation_dtype).max
            object.__setattr__(self, "act_quant_scale", None)
        elif isinstance(amax, Mapping):
            if not amax:
                raise ValueError("activation_amax={}: names no layer; run batches through the model under calibrate()")
            amax = {fqn: _positive(value, f"activation_amax of {fqn!r}: ") for fqn, value in amax.items()}
        else:
            amax = _positive(amax, "activation_amax=")
        object.__setattr__(self, "activation_amax", amax)


QuantizationConfig: TypeAlias = (
    Float8DynamicActivationFloat8WeightConfig | Float8WeightOnlyConfig | Float8StaticActivationFloat8WeightConfig
)


class InputCast(NamedTuple):
    """The cast of a layer's input, and its matmul.

    Attributes:
        bounds: of the amax that a dynamic scale is computed from.
    """

    dtype: torch.dtype = e4m3_dtype
    mm_config: Float8MMConfig = FAST
    bounds: tuple[float | None, float | None] = (None, None)


def input_cast_of(config: QuantizationConfig) -> InputCast | None:
    """Return the cast of the inputs; None if they are not cast."""
    if isinstance(config, Float8WeightOnlyConfig):
        return None
    bounds = getattr(config, "activation_value_lb", None), getattr(config, "activation_value_ub", None)
    assert config.mm_config is not None
    return InputCast(config.activation_dtype, config.mm_config, bounds)


def _refuse(config: QuantizationConfig, name: str, rule: str) -> None:
    raise ValueError(f"{type(config).__name__}({name}={getattr(config, name)!r}): must be {rule}")


def _set_granularity(config: QuantizationConfig, default: FP8Granularity, alternative: str = "") -> None:
    value = default if config.granularity is None else granularity_of(config.granularity)
    if value is None:
        _refuse(config, "granularity", f"titanlite.float8's PerTensor() or PerRow(){alternative}")
    object.__setattr__(config, "granularity", value)


def _check_dtype(config: QuantizationConfig, name: str) -> None:
    if getattr(config, name) not in FP8_DTYPES:
        _refuse(config, name, f"one of {', '.join(map(str, FP8_DTYPES))}")


def _check_only(config: QuantizationConfig, name: str, only: object) -> None:
    value = getattr(config, name)
    if getattr(value, "value", value) != only:  # torchao's value is an enumeration
        _refuse(config, name, f"{only!r}: titanlite has no other")


def _check_matmul(
    config: Float8DynamicActivationFloat8WeightConfig | Float8StaticActivationFloat8WeightConfig,
) -> None:
    _check_dtype(config, "activation_dtype")
    _check_dtype(config, "weight_dtype")
    if all("e5m2" in str(dtype) for dtype in (config.activation_dtype, config.weight_dtype)):
        _refuse(config, "weight_dtype", "an e4m3 dtype if activation_dtype is e5m2")
    preference = getattr(config.kernel_preference, "value", config.kernel_preference)
    if preference not in ("auto", "torch", "emulated"):
        _refuse(config, "kernel_preference", '"auto", "torch" or "emulated"')
    matmul = FAST if config.mm_config is None else Float8MMConfig(*config.mm_config)
    object.__setattr__(config, "mm_config", matmul._replace(emulate=matmul.emulate or preference == "emulated"))


def _positive(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several elements
        number = float("nan")
    if not 0 < number < float("inf"):
        raise ValueError(f"{name}{value!r}: must be one positive finite number; calibrate() measures it")
    return number
