"""Which is faster here: the Triton kernels, or those that the compiler makes of plain operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from titanlite.quant.float8 import kernels
from titanlite.quant.float8.kernels import reference

DIFFERENT = 1e-3  # the largest share of numbers that may


class Times(NamedTuple):
    """Medians of one cast, in microseconds."""

    triton: float
    inductor: float


def measure(
    rows: int, columns: int, dtype: torch.dtype, by_rows: kernels.Layout, by_columns: kernels.Layout, power_of_2: bool
) -> Times:
    """Times the cast of a random (rows, columns) bfloat16 matrix both ways on the current GPU, in turn. Compiling takes
    some seconds; the results are compared, too.

    Raises:
        RuntimeError: more of them differ than the compiler's division, which is not IEEE's, can explain.
    """
    from triton.testing import do_bench

    generator = torch.Generator("cuda").manual_seed(0)  # not the run's, which a choice must not move
    x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16, generator=generator)
    how = (dtype, by_rows, by_columns, power_of_2)
    ways: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
        "triton": kernels.cast,
        "inductor": torch.compile(reference.cast, fullgraph=True),
    }
    results = [way(x, *how) for way in ways.values()]
    for a, b in zip(*results, strict=True):
        if (a.float() != b.float()).float().mean() > DIFFERENT:
            raise RuntimeError(f"casts of a {rows} x {columns} matrix, {how}: the kernels disagree with the compiler's")
    times = {name: 1000 * do_bench(lambda way=way: way(x, *how), return_mode="median") for name, way in ways.items()}
    return Times(**times)
