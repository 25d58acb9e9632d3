"""The converter ``int8``, for linear layers in int8."""

from __future__ import annotations

import logging

import torch
from torch import nn

from titanlite.config import JobConfig
from titanlite.converters.linears import choose_linears, log_table
from titanlite.converters.registry import register_converter
from titanlite.distributed.mesh import Mesh
from titanlite.errors import ConfigError
from titanlite.quant.format import Matmul
from titanlite.quant.int8.format import Int8Format, has_native_int8, is_native
from titanlite.quant.linear import QuantLinear, convert_linears

logger = logging.getLogger()

RECIPES: dict[str, tuple[Matmul, ...]] = {
    "rowwise": ("output", "grad_input", "grad_weight"),
    "rowwise_with_gw_hp": ("output", "grad_input"),
    "forward_only": ("output",),
}


@register_converter("int8")
class Int8Converter:
    is_native = staticmethod(has_native_int8)

    def __init__(self, config: JobConfig, mesh: Mesh) -> None:
        options, target = config.int8, mesh.target.architecture
        device = torch.device(mesh.device_type)
        native = has_native_int8(device) if target is None else is_native(target)
        if not native and not options.emulate:
            logger.warning(
                "int8 is emulated: %s has no int8 units; the same quantized values are multiplied in float32",
                target or device.type,
            )
        self.recipe = options.recipe_name or "rowwise"
        self.format = Int8Format(RECIPES[self.recipe], emulate=options.emulate or not native)
        self.filter_fqns = options.filter_fqns

    def convert(self, model: nn.Module) -> str:
        choice = choose_linears(model, self.format, self.filter_fqns, too_small)
        try:
            convert_linears(
                model,
                self.format,
                lambda layer: QuantLinear.from_linear(layer, self.format),
                lambda _, name: choice.kept.get(name),
            )
        except ValueError as e:
            raise ConfigError(str(e), key="model.converters", value="int8") from e
        log_table(choice)
        return f"{self.recipe}{', emulated' if self.format.emulate else ''}, {choice.share()}"

    def post_optimizer_hook(self, model: nn.Module) -> None:
        """Do nothing: all scales are computed from the tensors themselves."""


def too_small(in_features: int, out_features: int) -> bool:
    """Return whether a layer is expected to be slower in int8."""
    return min(in_features, out_features) < 512
