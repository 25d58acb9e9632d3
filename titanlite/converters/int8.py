"""The converter ``int8``, for linear layers in int8."""

from __future__ import annotations

import logging
from collections.abc import Callable

from titanlite.config import JobConfig
from titanlite.config.int8_rules import WEIGHTS
from titanlite.converters.linears import LinearConverter, target_or_device, warn_of_emulation
from titanlite.converters.registry import register_converter
from titanlite.distributed.mesh import Mesh
from titanlite.quant.format import Matmul, OperandName
from titanlite.quant.int8.cpu import MATRIX_UNITS
from titanlite.quant.int8.format import Int8Format, is_native
from titanlite.quant.int8.gpu import choice
from titanlite.quant.int8.weights import Int8Weights

logger = logging.getLogger()

RECIPES: dict[str, tuple[Matmul, ...]] = {
    "rowwise": ("output", "grad_input", "grad_weight"),
    "rowwise_with_gw_hp": ("output", "grad_input"),
    "forward_only": ("output",),
}


# Elements of a weight. On a CPU without matrix units, smaller ones lose by their casts what the matmuls gain
# (docs/benchmarks/int8_cpu_narrow.json).
_SMALL = 512 * 512


@register_converter("int8")
class Int8Converter(LinearConverter):
    has_units = staticmethod(is_native)

    def __init__(self, config: JobConfig, mesh: Mesh) -> None:
        options, units = config.int8, target_or_device(mesh)
        if options.recipe_name == WEIGHTS:
            stored_by = f"int8.recipe_name = {WEIGHTS}"
            super().__init__("int8", WEIGHTS, Int8Weights(), options.filter_fqns, False, mesh, stored_by)
            return
        native = is_native(units)
        if not native and not options.emulate:
            warn_of_emulation("int8", units)
        recipe, emulate = options.recipe_name or "rowwise", options.emulate or not native
        gathered: list[OperandName] = ["weight"] if options.enable_fsdp_int8_all_gather else []
        gathered += ["input", "grad_output"] if options.enable_tensor_parallel_int8_all_gather else []
        format = Int8Format(RECIPES[recipe], emulate=emulate, target=mesh.target.architecture, gathered=tuple(gathered))
        if units != "cpu" and not emulate:
            logger.info("int8 on %s: %s", units, choice(units))
        gathered_by = "int8.enable_fsdp_int8_all_gather" if options.enable_fsdp_int8_all_gather else None
        super().__init__(
            *("int8", recipe, format, options.filter_fqns, emulate, mesh, gathered_by), moe_fqns=options.moe_fqns
        )

    def too_small(self) -> Callable[[int, int], bool] | None:
        measured = self.units == "cpu" and not MATRIX_UNITS  # with them other sizes gain, if any
        measured = measured and not self.emulated and self.recipe != WEIGHTS
        return (lambda k, n: k * n < _SMALL) if measured else None
