"""The choice by measurement between the Triton kernels and those that the compiler generates from plain operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from titanlite.quant.float8 import kernels
from titanlite.quant.float8.kernels import reference

DIFFERENT = 1e-3  # the largest share of elements that may differ between the two


class Times(NamedTuple):
    """Medians of one cast, in microseconds."""

    triton: float
    inductor: float


def measure(
    rows: int, columns: int, dtype: torch.dtype, by_rows: kernels.Layout, by_columns: kernels.Layout, power_of_2: bool
) -> Times:
    """Time the cast of a random (rows, columns) bfloat16 matrix by both on the current GPU. Compiling takes some
    seconds.

    Raises:
        RuntimeError: the two results differ more than the compiler's division, which is not IEEE's, can explain.
    """
    from triton.testing import do_bench

    generator = torch.Generator("cuda").manual_seed(0)  # of its own: the run's generator must not advance
    x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16, generator=generator)
    args = (dtype, by_rows, by_columns, power_of_2)
    casts: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
        "triton": kernels.cast,
        "inductor": torch.compile(reference.cast, fullgraph=True),
    }
    results = [cast(x, *args) for cast in casts.values()]
    for a, b in zip(*results, strict=True):
        if (a.float() != b.float()).float().mean() > DIFFERENT:
            raise RuntimeError(f"casts of a {rows} x {columns} matrix, {args}: Triton and the compiler disagree")
    times = {name: 1000 * do_bench(lambda c=cast: c(x, *args), return_mode="median") for name, cast in casts.items()}
    return Times(**times)
