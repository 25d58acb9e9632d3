"""scripts/benchmarks/whole_step.py counts what the arithmetic says, of a step outside compiled code."""

from __future__ import annotations

import sys

import pytest

from tests.support.runs import ROOT
from titanlite.plan.lone_rank import in_a_process

sys.path.insert(0, str(ROOT / "scripts/benchmarks"))
import whole_step

_BLOCK = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336) + 2 * 4096  # parameters
_ENDS = 2 * 4096 * 128256 + 4096


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "gpus", "fsdp_block", "fsdp_ends", "casts"),
    [
        # With one shard: a cast to bfloat16 and a copy of it, and a cast of the gradients.
        ("bf16", 1, 6 + 4 + 6, 6 + 4 + 6, 0),
        # A cast of a shard, its copy into the buffer, and a copy out of what is gathered, twice but for the output and
        # the last norm, which stay; and a cast of the gradients.
        ("bf16", 8, 2 * ((6 + 4) / 8 + 4) + 6, 1.5 * ((6 + 4) / 8 + 4) + 6, 0),
        # The shard is read twice, for its largest magnitude and for the cast; then one byte for each element.
        ("tensorwise", 8, 2 * (2 / 8 + 2) + 6, 1.5 * ((6 + 4) / 8 + 4) + 6, (4 + 4 + 1) / 8),
    ],
)
def test_bytes_of_each_parameter(config: str, gpus: int, fsdp_block: float, fsdp_ends: float, casts: float) -> None:
    counts = in_a_process(whole_step.eager, config, gpus, 1)
    assert counts["fsdp"][1] == pytest.approx(fsdp_block * _BLOCK + fsdp_ends * _ENDS, rel=1e-3)
    assert counts.get("casts", (0, 0.0))[1] == pytest.approx(casts * _BLOCK, rel=1e-3)
    adamw = 2 * 4 * 4  # the parameter, both moments and the gradient, which it divides, read and written
    assert counts["optimizer"][1] == pytest.approx((adamw + 4) * (_BLOCK + _ENDS) / gpus, rel=1e-3)
    hidden = 8192 * 4096 * 2
    # The embedding; the norm, forward and backward; the embedding's gradient, in which all rows are zeroed.
    assert counts["ends"][1] == pytest.approx((2 + 2 + 3 + 1) * hidden + _ENDS / 2 * 2, rel=1e-3)
