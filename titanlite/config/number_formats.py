"""The converters that compute in a number format, as far as the configuration and other rooms have to know them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from titanlite.config import float8_rules, int8_rules, mx_rules
from titanlite.config.format_cost import FormatCost
from titanlite.config.schema import JobConfig


@dataclass(frozen=True)
class NumberFormat:
    """The rules of one converter.

    Attributes:
        name: of the converter, and of its section.
        check: refuses options of the section.
        gathers_quantized: whether FSDP2 gathers weights in the format, where the converter is used.
        cost: the work of its layers, for predictions of time; None: it is not modelled.
        variants: the options of the recipes that a plan tries, some with others for shards with different numbers of
            rows; none: it tries the converter as it is configured only.
        memory_savings: options of the section that would save memory and are not set.
        weight_bytes: the bytes of an element of a converted weight between steps.
        from_torchtitan: torchtitan has the section too, under two names, and with options for experts.
    """

    name: str
    check: Callable[[JobConfig], None]
    from_torchtitan: bool
    gathers_quantized: Callable[[JobConfig], bool] = lambda config: False
    memory_savings: Callable[[JobConfig], dict[str, Any]] = lambda config: {}
    weight_bytes: Callable[[JobConfig], int] = lambda config: 4
    cost: Callable[[JobConfig], FormatCost] | None = None
    variants: tuple[tuple[dict[str, Any], ...], ...] = ()


NUMBER_FORMATS = (
    NumberFormat(
        "float8",
        float8_rules.check,
        True,
        float8_rules.gathers_quantized,
        float8_rules.memory_savings,
        cost=float8_rules.cost,
        variants=float8_rules.VARIANTS,
    ),
    NumberFormat(
        "int8",
        int8_rules.check,
        from_torchtitan=False,
        gathers_quantized=int8_rules.gathers_quantized,
        weight_bytes=int8_rules.weight_bytes,
    ),
    NumberFormat(
        "mx", mx_rules.check, True, mx_rules.gathers_quantized, cost=mx_rules.cost, variants=mx_rules.VARIANTS
    ),
)


def formats_of(config: JobConfig) -> list[NumberFormat]:
    """Return the number formats among the converters of ``config``."""
    return [number_format for number_format in NUMBER_FORMATS if number_format.name in config.model.converters]


def gathers_quantized(config: JobConfig) -> bool:
    """Return whether FSDP2 gathers weights in a number format, so that they are not there in high precision."""
    return any(number_format.gathers_quantized(config) for number_format in formats_of(config))


def least_weight_bytes(config: JobConfig) -> int:
    """Return the bytes of an element of a weight between steps, at least."""
    return min((number_format.weight_bytes(config) for number_format in formats_of(config)), default=4)


def stored_as(config: JobConfig) -> str:
    """Return the dtypes that weights have between steps, for the header of a run."""
    names = [n.name for n in formats_of(config) if n.weight_bytes(config) == 1]
    return " and ".join([*names, "float32"])
