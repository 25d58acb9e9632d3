"""The rules of the converter ``mx`` and its section."""

from __future__ import annotations

from titanlite.config.refuse import check_converter, refuse
from titanlite.config.schema import JobConfig


def check(config: JobConfig) -> None:
    """Refuse options of [mx] that would have no effect, or contradict each other."""
    options = config.mx
    if check_converter(config, options, "mx") and (options.recipe_name, options.scale_mode) == ("mxfp8_rceil", "floor"):
        refuse(config, "mx.scale_mode", 'mx.recipe_name = "mxfp8_rceil" names another; leave out one of them')
