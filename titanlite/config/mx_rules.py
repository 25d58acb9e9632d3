"""The rules of the converter ``mx`` and its section."""

from __future__ import annotations

from typing import Any

from titanlite.config.format_cost import FormatCost
from titanlite.config.refuse import check_converter, refuse
from titanlite.config.schema import JobConfig

VARIANTS: tuple[tuple[dict[str, Any], ...], ...] = (({"mx.recipe_name": "mxfp8"},),)
_NATIVE_ON = ("sm_100",)
# Bytes that the casts of an element in both layouts move: each reads it in bfloat16 and writes a byte, and a scale for
# 32 elements. A block of 32 has its own scale, so that no pass for the largest magnitude comes first.
_CAST_BYTES = 2 * (2 + 1 + 1 / 32)
_RECAST_BYTES = 2 * (1 + 1 / 32)  # what was gathered is read, and written again in blocks along the other dimension


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


def cost(config: JobConfig) -> FormatCost:
    """Return the work of the converted layers. Their matmuls take the scales of blocks themselves, as fast as one scale
    for each tensor."""
    options = config.mx
    all_three, gathers = options.recipe_name != "mxfp8_with_gw_hp", options.enable_fsdp_mxfp8_all_gather
    moved = _CAST_BYTES if all_three else _CAST_BYTES / 2
    return FormatCost(
        recipe=options.recipe_name,
        row_scales=False,
        grad_weight=all_three,
        input_bytes=moved,
        grad_bytes=moved,
        weight_bytes=0 if gathers else _CAST_BYTES,  # gathered in the format, it is only cast again
        recast_bytes=_RECAST_BYTES,
        agrees=False,
        casts_shards=options.enable_tensor_parallel_mxfp8_all_gather,
        gathers_weights=gathers,
        filter_fqns=tuple(options.filter_fqns),
        moe_fqns=tuple(options.moe_fqns),
        expert_weight_bytes=_CAST_BYTES,
        native_on=_NATIVE_ON,
        emulated=options.emulate or options.recipe_name == "mxfp8_emulated",
        grouped_on=_NATIVE_ON,
    )
