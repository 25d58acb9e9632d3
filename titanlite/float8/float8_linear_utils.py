"""The conversion of a model's linear layers to float8, in place, with torchao's names."""

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
    """Turn the ``nn.Linear`` layers in ``module`` into :class:`Float8Linear`, in place, and return ``module``.

    The layers remain the same objects, with their parameters, ties, dtypes, devices, hooks and names. Layers that
    cannot be computed in float8 (feature sizes that are not multiples of 16, subclasses of ``nn.Linear``) do not
    change; :func:`why_not_convertible` gives the reason.

    Args:
        module_filter_fn: called with each linear layer and its fully qualified name; False leaves the layer out.
        config: the casts and matmuls of the layers; None: the recipe tensorwise.

    Raises:
        ValueError: there is nothing to convert (the message has the reasons), or a layer is converted already.
    """
    config = config or Float8LinearConfig()

    def keep(layer: nn.Linear, name: str) -> str | None:
        left_out = module_filter_fn is not None and not module_filter_fn(layer, name)
        return "left out by module_filter_fn" if left_out else None

    try:
        linear.convert_linears(
            module,
            config.format,
            lambda layer: Float8Linear.from_float(layer, config),
            keep,
            gather_quantized=config.enable_fsdp_float8_all_gather,
        )
    except ValueError as e:
        raise ValueError(f"convert_to_float8_training: {e}") from e
    return module


def why_not_convertible(module: nn.Module) -> str | None:
    """Return why ``module`` cannot become a Float8Linear; None if it can."""
    return linear.why_not_convertible(module, Float8LinearConfig().format)
