"""The experts whose grouped matmuls a converter turns into those of a number format."""

from __future__ import annotations

from torch import nn

from titanlite.errors import ConfigError, counted
from titanlite.models.layers import Experts
from titanlite.quant.convertible import name_matches
from titanlite.quant.experts import convert_grouped_matmuls
from titanlite.quant.grouped_mm import QuantGroupedMatmul
from titanlite.quant.groups import GroupedFormat
from titanlite.registry import nearest


def experts_in(model: nn.Module) -> dict[str, Experts]:
    """Return the experts of each mixture in ``model``, by fully qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def convert_experts(model: nn.Module, converter: str, format: GroupedFormat, moe_fqns: list[str]) -> str:
    """Let the chosen experts of ``model`` multiply in ``format``.

    Args:
        converter: its name, which is that of its section.
        moe_fqns: the option of the section: the experts to convert, by whole parts of their names.

    Returns:
        How many are converted, for the header of a run; empty without an entry.

    Raises:
        ConfigError: an entry matches no experts, or the format cannot compute those that it matches.
    """
    experts = experts_in(model)
    key = f"{converter}.moe_fqns"
    chosen: dict[str, Experts] = {}
    for entry in moe_fqns:
        if not experts:
            raise ConfigError("this model has no experts; leave it out", key=key, value=entry)
        matching = {name: module for name, module in experts.items() if name_matches(entry, name)}
        if not matching:
            near = nearest(entry, {*experts, *(name.split(".")[-1] for name in experts)})
            raise ConfigError(
                f"matches no experts{near}; an entry is a whole part of a dotted name, such as experts",
                key=key,
                value=entry,
            )
        chosen |= matching
    for name, module in chosen.items():
        if isinstance(module.multiply, QuantGroupedMatmul):
            raise ConfigError(
                f"{name} is converted already, by {module.multiply.format.name}; name it in one of the two sections",
                key=key,
                value=",".join(moe_fqns),
            )
        if reason := format.why_not_grouped() or format.why_not(*features_of(module)):
            raise ConfigError(f"{name}: {reason}; leave it out", key=key, value=",".join(moe_fqns))
        convert_grouped_matmuls(module, format)
    return f", the experts of {counted(len(chosen), 'layer')}" if chosen else ""


def features_of(experts: Experts) -> tuple[int, int]:
    """Return the features of a token, and those inside an expert."""
    _, inside, dim = experts.w1.shape
    return dim, inside


def computed_in(experts: Experts) -> str:
    """Return the format that experts compute in, for the table."""
    multiply = experts.multiply
    return multiply.format.name if isinstance(multiply, QuantGroupedMatmul) else "high precision (not in moe_fqns)"
