"""Float8 inference: quantize the linear layers of a trained model.

    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))

The names are torchao's. The numerics are those of training, :mod:`titanlite.quant.float8.numerics`: a scale is the
multiplier ``fp8_max / max(amax, EPS)``, and the dtype is the machine's e4m3.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from titanlite.float8.float8_linear import Float8Linear
from titanlite.float8.inference_config import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8MMConfig,
    Float8StaticActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    QuantizationConfig,
    input_cast_of,
)
from titanlite.float8.inference_linear import HIGH_PRECISION, Float8InferenceLinear, from_quantized
from titanlite.float8.types import FP8Granularity, PerRow, PerTensor
from titanlite.quant.convertible import why_not_changeable
from titanlite.quant.float8.numerics import amax_of, amax_to_scale, quantize

__all__ = [
    "FP8Granularity",
    "Float8DynamicActivationFloat8WeightConfig",
    "Float8InferenceLinear",
    "Float8MMConfig",
    "Float8StaticActivationFloat8WeightConfig",
    "Float8WeightOnlyConfig",
    "PerRow",
    "PerTensor",
    "QuantizationConfig",
    "QuantizationReport",
    "calibrate",
    "quantize_",
]

logger = logging.getLogger("titanlite.float8")

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # torch.compile's and activation checkpointing's
_READ_WEIGHTS_DIRECTLY = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # fused kernels, which read the tensors


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
    device: torch.device | str | int | None = None,
    *,
    strict: bool = False,
) -> QuantizationReport:
    """Quantize the linear layers of ``model``, ``nn.Linear`` and :class:`Float8Linear`, in place, for inference.

    A layer remains the same object, with its bias and hooks, and becomes a :class:`Float8InferenceLinear`, with one
    byte per element of the weight. The high-precision weight is freed, unless another module such as an embedding uses
    it. Tied layers stay tied. Names do not have the parts that torch.compile and activation checkpointing insert.

    Args:
        filter_fn: called as ``filter_fn(layer, name)`` for every linear layer; None takes all.
        device: move the model there; each layer is quantized there after its weight is moved.
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
        _swap(group, config, device)
    if device is not None:
        model.to(device)
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
    if reader:
        return f"{reader} reads its weight directly"
    if reason := why_not_changeable(module, Float8Linear if isinstance(module, Float8Linear) else nn.Linear):
        return reason
    weight = module.weight
    if type(weight) is not nn.Parameter or (isinstance(module, Float8Linear) and module.sharding is not None):
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    if weight.is_meta:
        return "its weight is on the meta device"
    if weight.dtype not in HIGH_PRECISION:
        return f"its weight is {weight.dtype}, not bfloat16, float16 or float32"
    sizes = f"{module.in_features} -> {module.out_features} features"
    if not weight.numel():
        return f"{sizes}: its weight is empty"
    if not isinstance(config, Float8WeightOnlyConfig) and (module.in_features % 16 or module.out_features % 16):
        return f"{sizes}: float8 matmuls need multiples of 16"
    if isinstance(config, Float8StaticActivationFloat8WeightConfig) and _amax_for(config, fqn) is None:
        return "has no activation_amax (did not run in calibration)"
    return None


def _amax_for(config: QuantizationConfig, fqn: str) -> float | None:
    amax: Any = getattr(config, "activation_amax", None)
    return amax.get(fqn) if isinstance(amax, dict) else amax


def _swap(tied: dict[str, nn.Linear], config: QuantizationConfig, device: Any) -> None:
    """Quantize the layers ``tied``, by name, which share one weight, on ``device``, or where they are."""
    dtype = config.weight_dtype
    weight = next(iter(tied.values())).weight.detach()
    if device is not None:
        weight = weight.to(device)
    scale = amax_to_scale(amax_of(weight, 1 if isinstance(config.granularity, PerRow) else None), dtype)
    data, cast = quantize(weight, scale, dtype), input_cast_of(config)
    for fqn, module in tied.items():
        amax = _amax_for(config, fqn)
        input_scale = None if amax is None or cast is None else amax_to_scale(scale.new_tensor(amax), cast.dtype)
        from_quantized(module, data, scale, input_scale, input_cast=cast)


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
