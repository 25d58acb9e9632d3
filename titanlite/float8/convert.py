"""Turning a model's linear layers into float8 ones, in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from titanlite.float8.config import Float8LinearConfig
from titanlite.float8.fsdp import gathered_in_float8
from titanlite.float8.linear import Float8Linear, why_not_convertible
from titanlite.float8.scaling import float8_layers


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
    config = config or Float8LinearConfig()
    convertible: list[nn.Linear] = []
    reasons: dict[str, str] = {}
    for name, linear in module.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        if module_filter_fn is not None and not module_filter_fn(linear, name):
            reasons[name] = "left out by module_filter_fn"
        elif isinstance(linear, Float8Linear):
            raise ValueError(f'convert_to_float8_training: "{name}" is a Float8Linear already; convert a layer once')
        elif reason := why_not_convertible(linear):
            reasons[name] = reason
        else:
            convertible.append(linear)
    if not convertible:
        found = "; ".join(f'"{name}": {reason}' for name, reason in reasons.items()) or "there are no linear layers"
        raise ValueError(f"convert_to_float8_training: nothing to convert: {found}")
    if config.enable_fsdp_float8_all_gather:
        _wrap_weights(module, convertible, config)
    for linear in convertible:
        Float8Linear.from_float(linear, config)
    return module


@contextmanager
def high_precision(model: nn.Module) -> Iterator[None]:
    """Within it the float8 layers in ``model`` compute what an ``nn.Linear`` with the same weight would, in the dtype
    of their weight as it is then (under FSDP2's mixed precision its ``param_dtype``), and gather their input in that
    dtype under tensor parallelism: to evaluate a model without the error of float8. Without gradients, and delayed
    scaling sees nothing of it. A compiled model is compiled once more.

    Raises:
        ValueError: a weight is gathered in float8, so that it is not there in high precision.
    """
    layers = float8_layers(model)
    if any(layer.config.enable_fsdp_float8_all_gather for layer in layers):
        raise ValueError(
            "high_precision: enable_fsdp_float8_all_gather gathers weights in float8, so that they are not there in "
            "high precision; leave the flag out"
        )
    try:
        for layer in layers:
            layer.in_high_precision = True
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer.in_high_precision = False


def _wrap_weights(module: nn.Module, linears: list[nn.Linear], config: Float8LinearConfig) -> None:
    """Prepare the weights for FSDP2 to gather in float8; layers that share a weight go on sharing it."""
    owners: defaultdict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for name, owner in module.named_modules():
        for key, param in owner.named_parameters(recurse=False):
            owners[id(param)].append((owner, f"{name}.{key}"))
    chosen = set(map(id, linears))
    for linear in linears:
        for owner, name in owners[id(linear.weight)]:
            if id(owner) not in chosen:
                raise ValueError(
                    f'enable_fsdp_float8_all_gather: the weight of a float8 layer is also "{name}", which cannot '
                    "use it in float8; leave the layer out, or gather in high precision"
                )
    for linear in linears:
        weight = linear.weight
        wrapped = gathered_in_float8(weight, config)  # type: ignore[arg-type]  # torch types it as a Tensor
        for owner, _ in owners[id(weight)]:
            owner.weight = wrapped
