"""The conversion of a model's linear layers to float8, in place, with torchao's names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from titanlite.float8.config import Float8LinearConfig, Float8LinearRecipeName
from titanlite.float8.float8_linear import Float8Linear
from titanlite.quant import linear
from titanlite.quant.convertible import name_matches
from titanlite.quant.float8.synchronize import sync_float8_amax_and_scale_history

__all__ = [
    "convert_to_float8_training",
    "swap_linear_layers",
    "sync_float8_amax_and_scale_history",
    "why_not_convertible",
]

ModuleFilter = Callable[[nn.Module, str], bool]


def convert_to_float8_training(
    module: nn.Module, *, module_filter_fn: ModuleFilter | None = None, config: Float8LinearConfig | None = None
) -> nn.Module:
    """Turn the ``nn.Linear`` layers in ``module`` into :class:`Float8Linear`, in place, and return ``module``.

    The layers remain the same objects, with their parameters, ties, dtypes, devices, hooks and names. Layers that
    cannot be computed in float8 (feature sizes that are not multiples of 16, a forward of their own, a weight that is
    not a plain parameter) do not change; :func:`why_not_convertible` gives the reason.

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


def swap_linear_layers(
    module: nn.Module,
    from_float_func: Callable[[nn.Linear], nn.Linear],
    *,
    module_filter_fn: ModuleFilter | None = None,
) -> nn.Module:
    """Replace each linear layer in ``module`` by ``from_float_func(layer)``, children first, and return ``module``; the
    replacement itself if ``module`` is a linear layer.

    Args:
        module_filter_fn: called with each linear layer and its fully qualified name; False leaves the layer alone.

    Raises:
        ValueError: ``module`` is a linear layer with children.
    """

    def is_swapped(layer: nn.Module, name: str) -> bool:
        return isinstance(layer, nn.Linear) and (module_filter_fn is None or module_filter_fn(layer, name))

    if is_swapped(module, ""):
        if list(module.children()):
            raise ValueError(f"swap_linear_layers: the root is a linear layer with children: {module}")
        return from_float_func(module)  # type: ignore[arg-type]

    def swap(parent: nn.Module, prefix: str) -> None:
        for name, child in parent.named_children():
            swap(child, f"{prefix}{name}.")
            if is_swapped(child, prefix + name):
                setattr(parent, name, from_float_func(child))  # type: ignore[arg-type]

    swap(module, "")
    return module


# ---- the automatic filter


def too_small(recipe: str, k: int, n: int) -> bool:
    """Return whether a layer of ``k`` input and ``n`` output features is expected to be slower in float8 on an H100.

    For tensorwise and rowwise these are the thresholds of torchao's automatic filter, from its H100 benchmarks
    (torchao/float8/README.md, "Performance"). They leave out rowwise_with_gw_hp, for which those of rowwise are used:
    it gains in two matmuls instead of three, but casts one copy of each operand instead of two, the cheaper one. By a
    count of bytes and FLOPs it breaks even no later (docs/internals/float8-small-layers.md).
    """
    if recipe == "tensorwise":
        return k <= 4096 and n <= 1024
    return n <= 2048 or k <= 1024 or (n <= 4096 and k <= 2048)


def _auto_filter_for_recipe(recipe: str | Float8LinearRecipeName, filter_fqns: Sequence[str]) -> ModuleFilter:
    """Return a ``module_filter_fn`` that takes the linear layers that are expected to gain by ``recipe``.

    Args:
        filter_fqns: names to leave out; an entry matches whole components of a dotted name.

    Raises:
        ValueError: an unknown recipe.
    """
    return partial(_gains, recipe=Float8LinearRecipeName(recipe).value, filter_fqns=tuple(filter_fqns))


def _gains(mod: nn.Module, fqn: str, *, recipe: str, filter_fqns: Sequence[str]) -> bool:
    if not isinstance(mod, nn.Linear) or any(name_matches(entry, fqn) for entry in filter_fqns):
        return False
    k, n = mod.in_features, mod.out_features
    return Float8LinearConfig().format.why_not(k, n) is None and not too_small(recipe, k, n)


def _auto_filter_for_rowwise(mod: nn.Module, fqn: str, filter_fqns: Sequence[str]) -> bool:
    return _gains(mod, fqn, recipe="rowwise", filter_fqns=filter_fqns)


def _auto_filter_for_tensorwise(mod: nn.Module, fqn: str, filter_fqns: Sequence[str]) -> bool:
    return _gains(mod, fqn, recipe="tensorwise", filter_fqns=filter_fqns)
