"""The conversion of the grouped matmuls of a model's experts to float8, in place."""

from __future__ import annotations

from torch import nn

from titanlite.float8.config import Float8LinearConfig
from titanlite.float8.float8_linear_utils import ModuleFilter
from titanlite.quant.experts import convert_experts


def convert_moe_to_float8_training(
    module: nn.Module, *, module_filter_fn: ModuleFilter | None = None, config: Float8LinearConfig | None = None
) -> nn.Module:
    """Let the experts in ``module`` compute their grouped matmuls in float8, in place, and return ``module``.

    Experts are modules that have parameters of their own of three dimensions, [experts, rows, columns]. In their
    forward, each ``torch.nn.functional.grouped_mm`` of rows and matrices is
    :func:`titanlite.quant.grouped_mm.quantized_grouped_mm`, and so are its two gradients. The modules remain the same
    objects, with their parameters, hooks and names; the state dict does not change. Experts whose sizes are no
    multiples of 16 do not change.

    Linear layers are those of :func:`~titanlite.float8.convert_to_float8_training`.

    Args:
        module_filter_fn: called with each module that has such parameters and its fully qualified name; False leaves it
            out.
        config: its casts have scales of rows; None: the recipe rowwise.

    Raises:
        ValueError: there is nothing to convert (the message has the reasons), a module is converted already, or the
            config is of another recipe.
    """
    config = config or Float8LinearConfig.from_recipe_name("rowwise")

    def keep(experts: nn.Module, name: str) -> str | None:
        left_out = module_filter_fn is not None and not module_filter_fn(experts, name)
        return "left out by module_filter_fn" if left_out else None

    try:
        convert_experts(module, config.format, keep)
    except ValueError as e:
        raise ValueError(f"convert_moe_to_float8_training: {e}") from e
    return module
