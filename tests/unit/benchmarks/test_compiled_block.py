"""scripts/benchmarks/compiled_block.py counts what kernels move, and the counts of a block stay in their budgets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import ROOT

MATRIX = 4096 * 1000
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts/benchmarks'}"}


@pytest.mark.slow
def test_kernels_of_known_traffic() -> None:
    """Bytes read and written: a second pass counts, what all programs read counts once, a lone byte is a sector."""
    command = [sys.executable, str(Path(__file__).with_name("counted_kernels.py"))]
    env = {**ENVIRONMENT, "TRITON_INTERPRET": "1"}
    output = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=100).stdout
    counted = json.loads(output.splitlines()[-1])
    assert counted["copy"] == pytest.approx([2 * MATRIX, 2 * MATRIX, 4 * MATRIX, 4 * MATRIX], rel=0.02)
    assert counted["in_two_passes"] == pytest.approx([4 * MATRIX, 2 * MATRIX, 6 * MATRIX, 4 * MATRIX], rel=0.02)
    assert counted["byte_by_byte"] == pytest.approx([MATRIX, MATRIX, 33 * MATRIX, 2 * MATRIX], rel=0.02)
    assert counted["scaled_by_a_vector"][:2] == pytest.approx([2 * MATRIX + 2000, 2 * MATRIX])


@pytest.mark.long
def test_a_block_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """One graph; what is moved and kept, by system; torchao's layers in the same block move more."""
    options = ["--configs=rowwise", "--ac=none", "--kernels=triton", f"--output={tmp_path / 'counts.json'}"]
    script = str(ROOT / "scripts/benchmarks/compiled_block.py")
    done = subprocess.run(
        [sys.executable, script, *options], env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = json.loads((tmp_path / "counts.json").read_text())["results"]
    assert (ours["system"], theirs["system"]) == ("titanlite", "torchao")
    budget = {"mb": 9_100, "sectors_mb": 9_100, "kept_mib": 842}  # what was reached
    assert all(ours[key] <= limit for key, limit in budget.items())
    assert all(ours[key] < 0.70 * theirs[key] for key in ("mb", "sectors_mb"))
    assert ours["matmuls_mb"] == pytest.approx(theirs["matmuls_mb"], rel=1e-3)
