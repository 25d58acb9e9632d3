"""The quantizers ``float8_dynamic``, ``float8_weight_only`` and ``float8_static``, for a trained model's linear layers.
They use ``titanlite.float8.inference``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from titanlite.converters.quantizers import Quantized, Quantizer, register_quantizer
from titanlite.float8.config import Float8LinearConfig
from titanlite.float8.inference import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8StaticActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    PerRow,
    QuantizationConfig,
    calibrate,
    quantize_,
)
from titanlite.float8.inference_config import InputCast
from titanlite.float8.inference_linear import from_quantized
from titanlite.quant.float8.numerics import amax_of, amax_to_scale, quantize

Record = Mapping[str, Tensor] | None
DTYPE = torch.float8_e4m3fn  # in files, on every machine


def _weight(weight: Tensor, by_rows: bool) -> tuple[Tensor, Tensor]:
    scale = amax_to_scale(amax_of(weight, 1 if by_rows else None), DTYPE)
    return quantize(weight, scale, DTYPE), scale.reciprocal().reshape(-1, 1) if by_rows else scale.reciprocal()[None]


def _input_scale(amax: Tensor) -> Tensor:
    return amax_to_scale(amax, DTYPE).reciprocal().reshape(1)


def _restore(layer: nn.Linear, stored: Quantized, casts_input: bool) -> None:
    weight_scale = stored.weight_scale.float().reciprocal()
    from_quantized(
        layer,
        stored.weight,
        weight_scale if weight_scale.ndim == 2 else weight_scale.reshape(()),
        None if stored.input_scale is None else stored.input_scale.float().reciprocal().reshape(()),
        input_cast=InputCast(DTYPE) if casts_input else None,
    )


def _register(
    name: str, weights: str, inputs: dict[str, Any] | None, config: Callable[[Record], QuantizationConfig]
) -> None:
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    register_quantizer(
        name,
        Quantizer(
            scheme={
                "weights": {**number, "strategy": weights, "dynamic": False},
                "input_activations": None if inputs is None else {**number, **inputs},
            },
            file_format="float-quantized",
            why_not=lambda *features: None if inputs is None else Float8LinearConfig().format.why_not(*features),
            quantize=lambda model, layers, record: quantize_(
                model, config(record), lambda _, name: name in layers, strict=True
            ),
            quantize_weight=lambda weight: _weight(weight, by_rows=weights == "channel"),
            input_scale=_input_scale,
            restore=lambda layer, stored: _restore(layer, stored, casts_input=inputs is not None),
            calibrate=calibrate if inputs is not None and not inputs["dynamic"] else None,
        ),
    )


_register(
    "float8_dynamic",
    "channel",
    {"strategy": "token", "dynamic": True},
    lambda _: Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
)
_register("float8_weight_only", "channel", None, lambda _: Float8WeightOnlyConfig())
_register(
    "float8_static",
    "tensor",
    {"strategy": "tensor", "dynamic": False},
    lambda record: Float8StaticActivationFloat8WeightConfig(activation_amax=record or {}),
)
