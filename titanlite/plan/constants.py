"""The fitted constants of :mod:`titanlite.plan.time`. scripts/benchmarks/step_time.py fits them to published runs, and
docs/benchmarks/step_time.json has the residuals."""

from __future__ import annotations

from typing import NamedTuple


class Constants(NamedTuple):
    """Constants for what cannot be counted, from published runs.

    Attributes:
        matmul: the speed of matmuls in a step, of that of large matmuls alone.
        fp8_matmul: the same for 8-bit floating point, with one scale for each tensor.
        row_scales: the speed of matmuls with scales of rows, of those with one scale.
        attention: the speed of causal attention, of that of large matmuls in bfloat16.
        memory: the bandwidth of compiled code, of the data sheet's.
        eager: how many times as many bytes code that is not compiled moves.
        exposed: the share of FSDP2's communication that computing does not hide.
        asynchronous: the share of tensor parallelism's communication that asynchronous tensor parallelism hides.
    """

    matmul: float
    fp8_matmul: float
    row_scales: float
    attention: float
    memory: float
    eager: float
    exposed: float
    asynchronous: float


# Before the fit: the shares of large matmuls that steps usually reach; FlashAttention 2 on an H100 at some 330 TFLOP/s
# in forward and backward (Shah et al., "FlashAttention-3", 2024, figures 5 and 6); a copy's share of the bandwidth.
PRIOR = Constants(0.85, 0.80, 0.80, 0.45, 0.75, 2.0, 0.20, 0.4)
FITTED = Constants(0.8054, 0.7821, 0.841, 0.3918, 0.8036, 2.2479, 0.2053, 0.4058)
