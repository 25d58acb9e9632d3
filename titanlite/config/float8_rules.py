"""The rules of the converter ``float8`` and its section."""

from __future__ import annotations

from typing import Any

from titanlite.config.format_cost import FormatCost
from titanlite.config.refuse import check_converter, refuse
from titanlite.config.schema import JobConfig

_GATHER, _PRECOMPUTE = "float8.enable_fsdp_float8_all_gather", "float8.precompute_float8_dynamic_scale_for_fsdp"
# Gathers of weights in float8 move fewer bytes with every recipe (docs/benchmarks/whole_step.json). Those with scales
# of rows need shards of the same size.
VARIANTS: tuple[tuple[dict[str, Any], ...], ...] = (
    ({"float8.recipe_name": "tensorwise", _GATHER: True, _PRECOMPUTE: True},),
    *(
        tuple({"float8.recipe_name": recipe, _GATHER: gather, _PRECOMPUTE: False} for gather in (True, False))
        for recipe in ("rowwise", "rowwise_with_gw_hp")
    ),
)
_WEIGHT_BYTES = 10  # that casts of a weight in both layouts move for each element
# The same of a weight that was gathered in float8. With one scale it is only copied, transposed. With scales of rows it
# is cast again by columns: read for the largest magnitudes, and read and written (docs/benchmarks/gather_casts.json).
_COPY_BYTES, _RECAST_BYTES = 2, 3


def check(config: JobConfig) -> None:
    """Refuse options of [float8] that would have no effect, or do not go together."""
    float8 = config.float8
    if not check_converter(config, float8, "float8"):
        return
    if float8.precompute_float8_dynamic_scale_for_fsdp and not float8.enable_fsdp_float8_all_gather:
        refuse(
            config,
            "float8.precompute_float8_dynamic_scale_for_fsdp",
            "has no effect unless weights are gathered in float8; set float8.enable_fsdp_float8_all_gather too",
        )
    if float8.moe_fqns and float8.recipe_name != "rowwise":
        refuse(
            config,
            "float8.moe_fqns",
            f'the grouped matmuls of experts have scales of rows, and float8.recipe_name = "'
            f'{float8.recipe_name or "tensorwise"}"; use rowwise, or leave it out',
        )
    for operand in ("input", "weight", "grad_output"):
        scaling, scale = getattr(float8, f"scaling_type_{operand}"), getattr(float8, f"static_scale_{operand}")
        if scaling != "dynamic" and float8.recipe_name not in (None, "tensorwise"):
            refuse(
                config,
                f"float8.scaling_type_{operand}",
                f'the scales of rows (float8.recipe_name = "{float8.recipe_name}") are dynamic; use tensorwise',
            )
        if scaling == "static" and scale is None:
            refuse(config, f"float8.scaling_type_{operand}", f"needs the scale; set float8.static_scale_{operand}")
        if scaling != "static" and scale is not None:
            refuse(
                config,
                f"float8.static_scale_{operand}",
                f'has no effect; set float8.scaling_type_{operand} = "static"',
            )
    if float8.enable_fsdp_float8_all_gather and float8.scaling_type_weight != "dynamic":
        refuse(
            config,
            "float8.enable_fsdp_float8_all_gather",
            f'weights gathered in float8 have dynamic scales, and float8.scaling_type_weight = "'
            f'{float8.scaling_type_weight}"; use one or the other',
        )


def gathers_quantized(config: JobConfig) -> bool:
    """Return whether FSDP2 gathers weights in float8, so that they are not there in high precision."""
    return config.float8.enable_fsdp_float8_all_gather


def memory_savings(config: JobConfig) -> dict[str, Any]:
    """Return options of [float8] that would save memory and are not set."""
    key = "force_recompute_fp8_weight_in_bwd"
    return {} if getattr(config.float8, key) else {f"float8.{key}": True}


# Bytes that the casts of an element of an input or a gradient move in torchao 0.18's compiled layer of Llama 3 8B on
# sm_90. Where stores are not coalesced, the sectors of 32 bytes are counted. They are differences of rows of
# docs/benchmarks/compiled_block.json: of 16,384 and 8,192 tokens, less those of the layer in bfloat16, for each of its
# 69,632 features. The published runs that the model of time is fitted to used torchao; titanlite's casts move fewer.
_CAST_BYTES = {"tensorwise": 4.7, "rowwise": 15.7, "rowwise_with_gw_hp": 4.4}


def cost(config: JobConfig) -> FormatCost:
    """Return the work of the converted layers. A weight is cast twice, and each cast reads it twice, for the largest
    magnitude and for the values, and writes one byte."""
    options = config.float8
    recipe = options.recipe_name or "tensorwise"
    tensorwise, gathers = recipe == "tensorwise", options.enable_fsdp_float8_all_gather
    dynamic = options.scaling_type_input == options.scaling_type_grad_output == "dynamic"
    moved = _CAST_BYTES[recipe]
    return FormatCost(
        recipe=recipe,
        row_scales=not tensorwise,
        grad_weight=recipe != "rowwise_with_gw_hp",
        input_bytes=moved,
        grad_bytes=moved,
        weight_bytes=_WEIGHT_BYTES if not gathers else _COPY_BYTES if tensorwise else 0,
        recast_bytes=0 if tensorwise else _RECAST_BYTES,
        agrees=tensorwise,
        casts_shards=recipe != "rowwise_with_gw_hp" and dynamic,
        gathers_weights=gathers,
        filter_fqns=tuple(options.filter_fqns),
        moe_fqns=tuple(options.moe_fqns),
        expert_weight_bytes=_WEIGHT_BYTES,
        native_on=(),
        emulated=options.emulate,
        grouped_on=("sm_90",),
    )
