"""The rules of the converter ``int8`` and its section."""

from __future__ import annotations

from typing import Any

from titanlite.config.refuse import check_converter
from titanlite.config.schema import JobConfig


def check(config: JobConfig) -> None:
    """Refuse options of [int8] that would have no effect."""
    check_converter(config, config.int8, "int8")


def gathers_quantized(config: JobConfig) -> bool:
    """Return False: FSDP2 gathers the weights in high precision."""
    return False


def memory_savings(config: JobConfig) -> dict[str, Any]:
    """Return no options: none of [int8] saves memory."""
    return {}
