"""The recipes of grouped matmuls, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from titanlite.quant.float8.casts import CastConfig, ScalingGranularity
from titanlite.quant.float8.devices import default_dtypes
from titanlite.quant.float8.format import Float8Format
from titanlite.quant.groups import GroupedFormat
from titanlite.quant.int8.format import Int8Format
from titanlite.quant.mx.format import MXFormat


def _float8_rowwise() -> Float8Format:
    row = CastConfig(scaling_granularity=ScalingGranularity.AXISWISE, target_dtype=default_dtypes()[0])
    return Float8Format((row, row), (row, row), (row, row), power_of_2=True)


GROUPED_RECIPES: dict[str, Callable[[], GroupedFormat]] = {
    "float8_rowwise": _float8_rowwise,
    "mxfp8": MXFormat,
    "int8_rowwise": Int8Format,
}
"""float8_rowwise: e4m3, a power of two as the scale of each contracted row; mxfp8: e4m3 in blocks of 32, with rceil
scales; int8_rowwise: a scale of each contracted row."""


@cache
def grouped_format(recipe: str) -> GroupedFormat:
    """Return the format of a recipe.

    Raises:
        ValueError: there is no such recipe.
    """
    if recipe not in GROUPED_RECIPES:
        raise ValueError(f'recipe = "{recipe}": there is no such recipe; known: {", ".join(GROUPED_RECIPES)}')
    return GROUPED_RECIPES[recipe]()
