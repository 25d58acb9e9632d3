"""The converter ``int8``, for linear layers in int8."""

from __future__ import annotations

import logging

from titanlite.config import JobConfig
from titanlite.converters.linears import TOO_SMALL, LinearConverter, target_or_device, warn_of_emulation
from titanlite.converters.registry import register_converter
from titanlite.distributed.mesh import Mesh
from titanlite.quant.format import Matmul
from titanlite.quant.int8.format import Int8Format, is_native
from titanlite.quant.int8.gpu import choice

logger = logging.getLogger()

RECIPES: dict[str, tuple[Matmul, ...]] = {
    "rowwise": ("output", "grad_input", "grad_weight"),
    "rowwise_with_gw_hp": ("output", "grad_input"),
    "forward_only": ("output",),
}


_NARROW = 512  # features; on a CPU, layers of width 256 do not gain and those of width 768 do


@register_converter("int8")
class Int8Converter(LinearConverter):
    has_units = staticmethod(is_native)

    def __init__(self, config: JobConfig, mesh: Mesh) -> None:
        options, units = config.int8, target_or_device(mesh)
        native = is_native(units)
        if not native and not options.emulate:
            warn_of_emulation("int8", units)
        recipe, emulate = options.recipe_name or "rowwise", options.emulate or not native
        format = Int8Format(RECIPES[recipe], emulate=emulate, target=mesh.target.architecture)
        if units != "cpu" and not emulate:
            logger.info("int8 on %s: %s", units, choice(units))
        self.on_cpu = units == "cpu"
        super().__init__("int8", recipe, format, options.filter_fqns, emulate, units)

    def why_no_gain(self, in_features: int, out_features: int) -> str | None:
        narrow = min(in_features, out_features) < _NARROW
        return TOO_SMALL if self.on_cpu and not self.emulated and narrow else None
