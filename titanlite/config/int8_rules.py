"""The rules of the converter ``int8`` and its section."""

from __future__ import annotations

from titanlite.config.refuse import check_converter
from titanlite.config.schema import JobConfig


def check(config: JobConfig) -> None:
    """Refuse options of [int8] that would have no effect."""
    check_converter(config, config.int8, "int8")
