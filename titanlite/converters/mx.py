"""The converter ``mx``, for linear layers in mxfp8."""

from __future__ import annotations

import logging

from titanlite.config import JobConfig
from titanlite.converters.linears import LinearConverter, target_or_device, warn_of_emulation
from titanlite.converters.registry import register_converter
from titanlite.distributed.mesh import Mesh
from titanlite.errors import ConfigError
from titanlite.quant.devices import sm
from titanlite.quant.format import OperandName
from titanlite.quant.mx.format import MXFormat, is_native
from titanlite.quant.mx.kernels import choice

logger = logging.getLogger()


@register_converter("mx")
class MXConverter(LinearConverter):
    has_units = staticmethod(is_native)

    def __init__(self, config: JobConfig, mesh: Mesh) -> None:
        options, units = config.mx, target_or_device(mesh)
        native = is_native(units)
        if 0 < sm(units) < 89 and config.compile_options("model") is not None:
            raise ConfigError(
                f"the compiler has no float8 conversions on {units}; leave training.compile out",
                key="model.converters",
                value="mx",
            )
        emulate = options.emulate or options.recipe_name == "mxfp8_emulated"
        if not native and not emulate:
            warn_of_emulation("mxfp8", units)
        gathered: list[OperandName] = ["weight"] if options.enable_fsdp_mxfp8_all_gather else []
        gathered += ["input", "grad_output"] if options.enable_tensor_parallel_mxfp8_all_gather else []
        format = MXFormat(
            "rceil" if options.recipe_name == "mxfp8_rceil" else options.scale_mode,
            grad_weight=options.recipe_name != "mxfp8_with_gw_hp",
            emulate=emulate or not native,
            target=mesh.target.architecture,
            gathered=tuple(gathered),
        )
        if not format.emulate:
            logger.info("mxfp8 on %s: %s", units, choice())
        gathered_by = "mx.enable_fsdp_mxfp8_all_gather" if options.enable_fsdp_mxfp8_all_gather else None
        recipe = f"{options.recipe_name}, {format.scale_mode}"
        super().__init__(
            *("mx", recipe, format, options.filter_fqns, format.emulate, mesh, gathered_by), moe_fqns=options.moe_fqns
        )
