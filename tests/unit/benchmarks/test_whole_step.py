"""scripts/benchmarks/whole_step.py counts what the arithmetic says, of a step outside compiled code."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.runs import ROOT
from titanlite.plan.lone_rank import in_a_process

sys.path.insert(0, str(ROOT / "scripts/benchmarks"))
import whole_step
from absent_gpu import device

_BLOCK = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336) + 2 * 4096  # parameters
_ENDS = 2 * 4096 * 128256 + 4096


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "gathered", "gpus", "fsdp_block", "fsdp_ends", "casts"),
    [
        # With one shard: a cast to bfloat16 and a copy of it, and a cast of the gradients.
        ("bf16", "bf16", 1, 6 + 4 + 6, 6 + 4 + 6, 0),
        # A cast of a shard, its copy into the buffer, and a copy out of what is gathered, twice but for the output and
        # the last norm, which stay; and a cast of the gradients.
        ("bf16", "bf16", 8, 2 * ((6 + 4) / 8 + 4) + 6, 1.5 * ((6 + 4) / 8 + 4) + 6, 0),
        # The shard is read twice, for its largest magnitude and for the cast; then one byte for each element.
        ("tensorwise", "float8", 8, 2 * (2 / 8 + 2) + 6, 1.5 * ((6 + 4) / 8 + 4) + 6, (4 + 4 + 1) / 8),
        # A row is read once. With one shard what was gathered is copied once, and stays.
        ("rowwise", "float8", 1, 2 + 6, 6 + 4 + 6, 4 + 1),
    ],
)
def test_bytes_of_each_parameter(
    config: str, gathered: str, gpus: int, fsdp_block: float, fsdp_ends: float, casts: float
) -> None:
    counts = in_a_process(whole_step.eager, config, gathered, gpus, 1)
    assert counts["fsdp"][1] == pytest.approx(fsdp_block * _BLOCK + fsdp_ends * _ENDS, rel=1e-3)
    assert counts.get("casts", (0, 0.0))[1] == pytest.approx(casts * _BLOCK, rel=1e-3)
    adamw = 2 * 4 * 4  # the parameter, both moments and the gradient, which it divides, read and written
    assert counts["optimizer"][1] == pytest.approx((adamw + 4) * (_BLOCK + _ENDS) / gpus, rel=1e-3)
    hidden = 8192 * 4096 * 2
    # The embedding; the norm, forward and backward; the embedding's gradient, in which all rows are zeroed.
    assert counts["ends"][1] == pytest.approx((2 + 2 + 3 + 1) * hidden + _ENDS / 2 * 2, rel=1e-3)


@pytest.mark.slow
def test_a_block_does_not_cast_the_weights_that_arrive_in_float8(tmp_path: Path) -> None:
    """It copies them, transposed, in backward, 2 bytes for each element, and casts them not twice, 8 bytes: it reads
    bfloat16 for the largest magnitude, and again for each of the two casts."""
    results = json.loads((ROOT / "docs/benchmarks/compiled_block.json").read_text())["results"]
    about = {"system": "titanlite", "config": "tensorwise", "ac": "none", "tokens": 8192, "fusion": "block"}
    (cast,) = (row for row in results if about.items() <= row.items())
    gathered = whole_step.blocks("tensorwise", "float8", device.environment(tmp_path))
    weights = _BLOCK - 2 * 4096
    assert cast["mb"] - gathered["mb"] == pytest.approx(6 * weights / 1e6, rel=0.01)
    assert gathered["kept_mib"] == pytest.approx(cast["kept_mib"], abs=1)
