"""The ceilings of a device: the speed of matmuls in each format, and of a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from titanlite.doctor.clock import time_in_turn
from titanlite.quant.format import WEIGHT, Format, Use

_SIZE = {"cpu": 1024, "cuda": 8192}  # rows and columns: enough to reach what there is to reach
_COPIED = {"cpu": 256 << 20, "cuda": 1 << 30}  # bytes; more than caches hold


def copy_bandwidth(device: torch.device) -> float:
    """Return bytes per second of a copy, those read and those written together."""
    source = torch.ones(_COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (seconds,) = time_in_turn({0: partial(target.copy_, source)}, device, 1.0).values()
    return 2 * source.nbytes / min(seconds)


def matmul_ceilings(device: torch.device, formats: Mapping[str, Format]) -> Iterator[tuple[str, float]]:
    """Yield the FLOP/s of square matmuls of random numbers: in float32, in bfloat16, and in the ``formats`` as this
    device computes them, without their casts."""
    size = _SIZE[device.type]
    x, w = (torch.randn(size, size, device=device) for _ in range(2))
    ways: dict[str, Callable[[], Tensor]] = {"float32": partial(torch.mm, x, w.t())}
    a, b = x.bfloat16(), w.bfloat16()
    ways["bfloat16"] = partial(torch.mm, a, b.t())
    for name, format in formats.items():
        here = format.on(device)
        operands = here.cast(a, Use("input", 1)), here.cast(b, WEIGHT).t()
        ways[name] = partial(here.multiply, *operands, "output", torch.bfloat16)
    for name, way in ways.items():
        (seconds,) = time_in_turn({name: way}, device, 1.0).values()
        yield name, 2 * size**3 / min(seconds)
