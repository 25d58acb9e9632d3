"""Turning a model's linear layers into float8 ones, in place, by torchao's names."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from titanlite.float8.config import Float8LinearConfig
from titanlite.float8.float8_linear import Float8Linear
from titanlite.quant import linear
from titanlite.quant.float8.synchronize import sync_float8_amax_and_scale_history

__all__ = ["convert_to_float8_training", "sync_float8_amax_and_scale_history", "why_not_convertible"]


def convert_to_float8_training(
    module: nn.Module,
    *,
    module_filter_fn: Callable[[nn.Module, str], bool] | None = None,
    config: Float8LinearConfig | None = None,
) -> nn.Module:
    """Turn the ``nn.Linear`` layers in ``module`` into :class:`Float8Linear`, in place; returns ``module``.

    The layers stay the objects they are, with their parameters, ties, dtypes, devices, hooks and names. Layers that
    cannot be computed in float8 (feature sizes that are not multiples of 16, subclasses with a forward of their own)
    stay as they are; :func:`why_not_convertible` gives the reason.

    Args:
        module_filter_fn: called with each linear layer and its fully qualified name; False leaves it out.
        config: how to compute; default: the recipe tensorwise.

    Raises:
        ValueError: nothing to convert, with the reasons; or converted before.
    """
    settled = config or Float8LinearConfig()

    def keep(layer: nn.Linear, name: str) -> str | None:
        left_out = module_filter_fn is not None and not module_filter_fn(layer, name)
        return "left out by module_filter_fn" if left_out else None

    try:
        linear.convert_linears(
            module,
            settled.format,
            lambda layer: Float8Linear.from_float(layer, settled),
            keep,
            gather_quantized=settled.enable_fsdp_float8_all_gather,
        )
    except ValueError as e:
        raise ValueError(f"convert_to_float8_training: {e}") from e
    return module


def why_not_convertible(module: nn.Module) -> str | None:
    """Return why ``module`` cannot become a Float8Linear; None if it can."""
    return linear.why_not_convertible(module, Float8LinearConfig().format)
