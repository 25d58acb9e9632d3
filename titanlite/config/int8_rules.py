"""The rules of the converter ``int8`` and its section."""

from __future__ import annotations

from titanlite.config.refuse import check_converter, refuse
from titanlite.config.schema import JobConfig
from titanlite.config.stored_weights import check_optimizer

WEIGHTS = "weights"
"""The recipe whose weights are stored in int8."""


def check(config: JobConfig) -> None:
    """Refuse options of [int8] that would have no effect, and an optimizer that cannot update int8 weights."""
    if not check_converter(config, config.int8, "int8"):
        return
    if config.int8.moe_fqns and config.int8.recipe_name not in (None, "rowwise"):
        refuse(
            config,
            "int8.moe_fqns",
            f'experts compute all three of their matmuls in int8, and int8.recipe_name = "{config.int8.recipe_name}"; '
            "use rowwise, or leave it out",
        )
    _check_gathers(config)
    if config.int8.recipe_name != WEIGHTS:
        return
    recipe = f'int8.recipe_name = "{WEIGHTS}"'
    if config.int8.emulate:
        refuse(config, "int8.emulate", f"has no effect with {recipe}, which needs no int8 units; leave it out")
    check_optimizer(config, recipe)


def _check_gathers(config: JobConfig) -> None:
    """Refuse gathers in int8 of what the recipe needs in high precision, and those that there are none of."""
    options, recipe = config.int8, config.int8.recipe_name or "rowwise"
    key = "int8.enable_fsdp_int8_all_gather"
    if options.enable_fsdp_int8_all_gather and recipe == WEIGHTS:
        refuse(config, key, f'has no effect with int8.recipe_name = "{WEIGHTS}", which always does this; leave it out')
    if options.enable_fsdp_int8_all_gather and recipe == "forward_only":
        refuse(
            config,
            key,
            "the gradient of the input needs the weight in high precision with int8.recipe_name = "
            '"forward_only"; use rowwise or rowwise_with_gw_hp, or leave it out',
        )
    key = "int8.enable_tensor_parallel_int8_all_gather"
    if options.enable_tensor_parallel_int8_all_gather and recipe != "rowwise":
        refuse(
            config,
            key,
            f'inputs and gradients are needed in high precision too with int8.recipe_name = "{recipe}"; use rowwise, '
            "or leave it out",
        )
    if options.enable_tensor_parallel_int8_all_gather and config.parallelism.tensor_parallel_degree == 1:
        refuse(config, key, "has no effect with parallelism.tensor_parallel_degree = 1; set that, or leave it out")


def gathers_quantized(config: JobConfig) -> bool:
    """Return whether FSDP2 gathers weights in int8, so that they are not there in high precision."""
    return config.int8.recipe_name == WEIGHTS or config.int8.enable_fsdp_int8_all_gather


def weight_bytes(config: JobConfig) -> int:
    """Return the bytes of an element of a converted weight between steps."""
    return 1 if config.int8.recipe_name == WEIGHTS else 4
