"""Float8 inference: quantize the linear layers of a trained model.

    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))

The names are torchao's. The numerics are those of training, :mod:`titanlite.quant.float8.numerics`: a scale is the
multiplier ``fp8_max / max(amax, EPS)``, and the dtype is the machine's e4m3.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanlite.float8.float8_linear import Float8Linear
from titanlite.quant.autograd import refuse_double_backward
from titanlite.quant.float8.devices import default_dtypes, has_native_float8
from titanlite.quant.float8.matmul import scaled_mm
from titanlite.quant.float8.numerics import amax_of, amax_to_scale, dequantize, quantize
from titanlite.quant.format import Operand

logger = logging.getLogger("titanlite.float8")

_HIGH_PRECISION = (torch.bfloat16, torch.float16, torch.float32)
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # torch.compile's and activation checkpointing's
_READ_WEIGHTS_DIRECTLY = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # fused kernels, which read the tensors

# ---- configuration


@dataclass(frozen=True)
class PerTensor:
    """One scale for the tensor."""


@dataclass(frozen=True)
class PerRow:
    """One scale for each row: each output feature of a weight, each token of an activation."""


Granularity: TypeAlias = PerTensor | PerRow


@dataclass(frozen=True)
class Float8DynamicActivationFloat8WeightConfig:
    """A configuration for float8 matmuls with activations scaled by the amax of the batch (PerTensor) or of each token
    (PerRow).

    Args:
        granularity: of activation and weight; or, as in torchao, a pair of two equal ones.

    Raises:
        ValueError: any other granularity.
    """

    granularity: Granularity | tuple[Granularity, Granularity] = PerTensor()

    def __post_init__(self) -> None:
        pair = self.granularity
        if isinstance(pair, (tuple, list)) and len(pair) == 2 and pair[0] == pair[1]:
            object.__setattr__(self, "granularity", pair[0])
        _check_granularity(self, ", or a pair (activation, weight) of equal ones")


@dataclass(frozen=True)
class Float8WeightOnlyConfig:
    """A configuration that saves memory: weights in float8, dequantized to the input's dtype for each matmul.

    Args:
        granularity: of the weight.

    Raises:
        ValueError: any other granularity.
    """

    granularity: Granularity = PerRow()

    def __post_init__(self) -> None:
        _check_granularity(self)


@dataclass(frozen=True, kw_only=True)
class Float8StaticActivationFloat8WeightConfig:
    """A configuration for float8 matmuls with activations scaled by a constant, which saves the pass for their amax.

    Larger inputs than ``activation_amax`` are clamped to it. Measure it with :func:`calibrate`, on data like those of
    inference.

    Args:
        activation_amax: the largest magnitude of a layer's input: one for all layers, or by fully qualified name. The
            scale is ``fp8_max / activation_amax``; torchao's ``act_quant_scale`` is ``activation_amax / fp8_max``.
        granularity: of the weight.

    Raises:
        ValueError: an amax that is not positive and finite, an empty mapping, or any other granularity.
    """

    activation_amax: float | Tensor | Mapping[str, float | Tensor]
    granularity: Granularity = PerTensor()

    def __post_init__(self) -> None:
        _check_granularity(self)
        amax: Any = self.activation_amax
        if isinstance(amax, Mapping):
            if not amax:
                raise ValueError("activation_amax={}: names no layer; run batches through the model under calibrate()")
            amax = {fqn: _positive(value, f"activation_amax of {fqn!r}: ") for fqn, value in amax.items()}
        else:
            amax = _positive(amax, "activation_amax=")
        object.__setattr__(self, "activation_amax", amax)


QuantizationConfig: TypeAlias = (
    Float8DynamicActivationFloat8WeightConfig | Float8WeightOnlyConfig | Float8StaticActivationFloat8WeightConfig
)


def _check_granularity(config: QuantizationConfig, alternative: str = "") -> None:
    if not isinstance(config.granularity, (PerTensor, PerRow)):
        value = f"{type(config).__name__}(granularity={config.granularity!r})"
        raise ValueError(f"{value}: must be titanlite.float8's PerTensor() or PerRow(){alternative}")


def _positive(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several elements
        number = float("nan")
    if not 0 < number < float("inf"):
        raise ValueError(f"{name}{value!r}: must be one positive finite number; calibrate() measures it")
    return number


def _amax_for(config: QuantizationConfig, fqn: str) -> float | None:
    amax: Any = getattr(config, "activation_amax", None)
    return amax.get(fqn) if isinstance(amax, dict) else amax


# ---- the layer


class _Matmul(torch.autograd.Function):
    """The matmul ``x @ weight.T`` in float8. Its gradient treats quantization as the identity, as training does."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, weight_scale: Tensor, x_scale: Tensor | None, emulate: bool
    ) -> Tensor:
        ctx.save_for_backward(weight, weight_scale)
        if x_scale is None:
            x_scale = amax_to_scale(amax_of(x, 1 if weight_scale.ndim else None), weight.dtype)
        else:
            x = x.masked_fill(x.isinf(), float("nan"))  # a clamped infinity would be a plausible number
        a = Operand(quantize(x, x_scale, weight.dtype), x_scale)
        b = Operand(weight, weight_scale).t()
        return scaled_mm(a, b, out_dtype=x.dtype, fast_accum=True, emulate=emulate)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling():
            refuse_double_backward("float8")
        return grad_output @ dequantize(*ctx.saved_tensors).to(grad_output.dtype), None, None, None, None


class Float8InferenceLinear(nn.Linear):
    """A linear layer with a float8 weight, as :func:`quantize_` makes it.

    It has no attribute ``weight``, so that nothing can use the float8 numbers without their scale. Its state dict holds
    plain tensors: an unchanged ``bias``, and these buffers, which keep their dtypes under ``.to(dtype)``:

        weight_float8: (out_features, in_features), float8 e4m3.
        weight_scale: float32 multiplier, () or (out_features, 1).
        input_scale: float32 multiplier, (); only with static scaling.
    """

    weight_float8: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    casts_input: bool

    def forward(self, input: Tensor) -> Tensor:
        """Map ``input`` [..., in_features] of bfloat16, float16 or float32 to [..., out_features] in the same dtype (in
        autocast's, if that is enabled).

        A NaN or infinity in the input gives NaN for all values with the same scale: the row, or the whole output. The
        input's gradient uses the dequantized weight, and treats quantization as the identity.

        Raises:
            TypeError: the input has another dtype.
            ValueError: the input has another number of features.
        """
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        if input.dtype not in _HIGH_PRECISION:
            raise TypeError(f"input of {input.dtype}: must be bfloat16, float16 or float32")
        if input.shape[-1:] != (self.in_features,):
            raise ValueError(f"input of shape {tuple(input.shape)}: the last dimension must be {self.in_features}")
        bias = None if self.bias is None else self.bias.to(input.dtype)
        if not self.casts_input or input.numel() == 0:  # an empty input has no amax
            return F.linear(input, dequantize(self.weight_float8, self.weight_scale).to(input.dtype), bias)
        rows, emulate = input.reshape(-1, self.in_features), not has_native_float8(input.device)
        out: Tensor = _Matmul.apply(rows, self.weight_float8, self.weight_scale, self.input_scale, emulate)
        out = out.view(*input.shape[:-1], self.out_features)
        return out if bias is None else out + bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # .to(dtype) is for the bias only: the buffers keep their dtypes.
        buffers = [self.weight_float8, self.weight_scale, self.input_scale]

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if moved.dtype != t.dtype and any(t is b for b in buffers) else moved

        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        granularity = PerRow() if self.weight_scale.ndim else PerTensor()
        input = "static" if self.input_scale is not None else "dynamic" if self.casts_input else "not cast"
        return f"{super().extra_repr()}, weight={self.weight_float8.dtype} {granularity}, input={input}"


# ---- conversion


@dataclass(frozen=True)
class QuantizationReport:
    """The result of :func:`quantize_`, by fully qualified names.

    Args:
        quantized: the layers that are now in float8.
        left_out: the layers left in high precision, with the reasons; without those that ``filter_fn`` excluded.
    """

    quantized: tuple[str, ...]
    left_out: dict[str, str]


def quantize_(
    model: nn.Module,
    config: QuantizationConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    strict: bool = False,
) -> QuantizationReport:
    """Quantize the linear layers of ``model``, ``nn.Linear`` and :class:`Float8Linear`, in place, for inference.

    A layer remains the same object, with its bias and hooks, and becomes a :class:`Float8InferenceLinear`, with one
    byte per element of the weight. The high-precision weight is freed, unless another module such as an embedding uses
    it. Tied layers stay tied. Names do not have the parts that torch.compile and activation checkpointing insert.

    Args:
        filter_fn: called as ``filter_fn(layer, name)`` for every linear layer; None takes all.
        strict: raise if a chosen layer cannot be quantized, instead of leaving it in high precision.

    Raises:
        TypeError: ``config`` is not one of this module's configurations.
        ValueError: there is nothing to quantize, a layer is quantized already, an amax is for an unknown layer, or with
            ``strict`` a layer cannot be quantized. The model is then unchanged.
    """
    if not isinstance(config, QuantizationConfig):
        raise TypeError(f"config={config!r}: must be one of titanlite.float8's, for example Float8WeightOnlyConfig()")
    linears = dict(_linears(model))
    amax = getattr(config, "activation_amax", None)
    unknown = [fqn for fqn in amax if fqn not in linears] if isinstance(amax, dict) else []
    if unknown:
        raise ValueError(f"activation_amax of {unknown}: no such linear layers; the model has {list(linears)}")
    chosen = {fqn: m for fqn, m in linears.items() if filter_fn is None or filter_fn(m, fqn)}
    repeated = [fqn for fqn, m in chosen.items() if isinstance(m, Float8InferenceLinear)]
    if repeated:
        raise ValueError(
            f"{repeated} are quantized already: quantize a high-precision model, or exclude them by filter_fn"
        )

    readers = [m for m in model.modules() if isinstance(m, _READ_WEIGHTS_DIRECTLY)]
    read_by = {id(child): type(m).__name__ for m in readers for child in m.children()}
    reasons = {fqn: _why_not(m, read_by.get(id(m)), config, fqn) for fqn, m in chosen.items()}
    left_out = {fqn: reason for fqn, reason in reasons.items() if reason}
    quantized = {fqn: m for fqn, m in chosen.items() if fqn not in left_out}
    summary = "; ".join(f"{fqn or 'the model itself'}: {reason}" for fqn, reason in left_out.items())
    if strict and left_out:
        raise ValueError(f"cannot be quantized: {summary}; exclude them by filter_fn, or leave strict out to skip them")
    if not quantized:
        counts = f"of its {len(linears)} linear layers, filter_fn excluded {len(linears) - len(chosen)}"
        raise ValueError(f"there is nothing to quantize in {type(model).__name__}: {counts}; {summary or 'take some'}")

    tied: dict[int, dict[str, nn.Linear]] = {}
    for fqn, module in quantized.items():
        tied.setdefault(id(module.weight), {})[fqn] = module
    for group in tied.values():  # each weight is freed before the next is quantized
        _swap(group, config)
    done = f"quantized {len(quantized)} of {len(linears)} linear layers to float8 ({config.granularity} weights)"
    logger.log(logging.WARNING if left_out else logging.INFO, f"{done}{'; not ' if left_out else ''}{summary}")
    return QuantizationReport(tuple(quantized), left_out)


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield ".".join(part for part in name.split(".") if part not in _WRAPPERS), module


def _why_not(module: nn.Linear, reader: str | None, config: QuantizationConfig, fqn: str) -> str | None:
    """Return why ``module`` cannot be quantized; None if it can. ``reader`` is the type of a parent that reads its
    weight without calling it."""
    weight = module._parameters.get("weight")
    if reader:
        return f"{reader} reads its weight directly"
    if weight is None:
        return "its weight is computed from other tensors (a parametrization, weight norm, pruning)"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    sharded = isinstance(module, Float8Linear) and module.sharding is not None
    if type(module) not in (nn.Linear, Float8Linear) or sharded or "forward" in vars(module):
        return f"is a {type(module).__name__} with a forward of its own"
    if weight.is_meta:
        return "its weight is on the meta device"
    if weight.dtype not in _HIGH_PRECISION:
        return f"its weight is {weight.dtype}, not bfloat16, float16 or float32"
    sizes = f"{module.in_features} -> {module.out_features} features"
    if not weight.numel():
        return f"{sizes}: its weight is empty"
    if not isinstance(config, Float8WeightOnlyConfig) and (module.in_features % 16 or module.out_features % 16):
        return f"{sizes}: float8 matmuls need multiples of 16"
    if isinstance(config, Float8StaticActivationFloat8WeightConfig) and _amax_for(config, fqn) is None:
        return "has no activation_amax (did not run in calibration)"
    return None


def _swap(tied: dict[str, nn.Linear], config: QuantizationConfig) -> None:
    """Quantize the layers ``tied``, by name, which share one weight."""
    dtype = default_dtypes()[0]
    weight = next(iter(tied.values())).weight.detach()
    scale = amax_to_scale(amax_of(weight, 1 if isinstance(config.granularity, PerRow) else None), dtype)
    data = quantize(weight, scale, dtype)
    for fqn, module in tied.items():
        amax = _amax_for(config, fqn)
        input_scale = None if amax is None else amax_to_scale(scale.new_tensor(amax), dtype)
        from_quantized(module, data, scale, input_scale, casts_input=not isinstance(config, Float8WeightOnlyConfig))


def from_quantized(
    module: nn.Linear, weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None, *, casts_input: bool
) -> Float8InferenceLinear:
    """Turn ``module`` itself into a :class:`Float8InferenceLinear` with an already quantized weight, and return it.

    Args:
        weight: (out_features, in_features), float8 e4m3.
        weight_scale: float32 multiplier, () or (out_features, 1).
        input_scale: float32 multiplier, (), of a static cast of the input; None: a dynamic cast, or none.
        casts_input: multiply in float8; False: dequantize the weight, and multiply in the input's dtype.
    """
    if isinstance(module, Float8Linear):  # remove the state of training
        module.to_linear()
    module.__class__ = Float8InferenceLinear
    assert isinstance(module, Float8InferenceLinear)
    del module.weight
    module.register_buffer("weight_float8", weight)
    module.register_buffer("weight_scale", weight_scale)
    module.register_buffer("input_scale", input_scale)
    module.casts_input = casts_input
    return module


@contextmanager
def calibrate(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the amax of every linear layer's input over all batches that run through ``model`` in this context::

        with torch.inference_mode(), calibrate(model) as amax:
            for batch in batches:
                model(batch)
        quantize_(model, Float8StaticActivationFloat8WeightConfig(activation_amax=amax))

    Yields the amaxes by fully qualified name, updated as the model runs. A compiled model runs uncompiled here, because
    compiled code does not call hooks that are added later.
    """
    amax: dict[str, Tensor] = {}

    def record(fqn: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        if x.numel():
            batch_amax = amax_of(x).float()
            amax[fqn] = torch.maximum(amax[fqn], batch_amax) if fqn in amax else batch_amax

    hooks = [m.register_forward_pre_hook(partial(record, fqn), with_kwargs=True) for fqn, m in _linears(model)]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield amax
    finally:
        for hook in hooks:
            hook.remove()
