"""The rules of the converter ``mx`` and its section."""

from __future__ import annotations

from titanlite.config.refuse import check_converter, refuse
from titanlite.config.schema import JobConfig


def check(config: JobConfig) -> None:
    """Refuse options of [mx] that would have no effect, or contradict each other."""
    options, key = config.mx, "mx.enable_tensor_parallel_mxfp8_all_gather"
    if not check_converter(config, options, "mx"):
        return
    if options.moe_fqns and options.recipe_name == "mxfp8_with_gw_hp":
        refuse(
            config,
            "mx.moe_fqns",
            "experts compute all three of their matmuls in mxfp8, and mx.recipe_name = "
            '"mxfp8_with_gw_hp"; use mxfp8, or leave it out',
        )
    if (options.recipe_name, options.scale_mode) == ("mxfp8_rceil", "floor"):
        refuse(config, "mx.scale_mode", 'mx.recipe_name = "mxfp8_rceil" names another; leave out one of them')
    if options.enable_tensor_parallel_mxfp8_all_gather and options.recipe_name == "mxfp8_with_gw_hp":
        refuse(
            config,
            key,
            'inputs and gradients are needed in high precision too with mx.recipe_name = "mxfp8_with_gw_hp"; use '
            "mxfp8, or leave it out",
        )
    if options.enable_tensor_parallel_mxfp8_all_gather and config.parallelism.tensor_parallel_degree == 1:
        refuse(config, key, "has no effect with parallelism.tensor_parallel_degree = 1; set that, or leave it out")


def gathers_quantized(config: JobConfig) -> bool:
    """Return whether FSDP2 gathers weights in mxfp8, so that they are not there in high precision."""
    return config.mx.enable_fsdp_mxfp8_all_gather
