"""scripts/benchmarks/compiled_block.py counts what kernels move, and the counts of a block stay in their budgets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    assert counted["combined"][0] == pytest.approx(2 * 2 * MATRIX)  # kernels that are launched together read by turns


BYTES = {  # the largest share of torchao's bytes, of which the counts are
    ("tensorwise", "none"): 0.87,
    ("tensorwise", "op"): 0.86,
    ("rowwise", "none"): 0.70,
    ("rowwise", "op"): 0.77,
    ("rowwise_with_gw_hp", "none"): 0.74,
    ("rowwise_with_gw_hp", "op"): 0.76,
}


def counts(tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(ROOT / "scripts/benchmarks/compiled_block.py"), f"--output={tmp_path / 'counts'}"]
    done = subprocess.run([*command, *options], env=ENVIRONMENT, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads((tmp_path / "counts").read_text())["results"]
    return rows


@pytest.mark.slow
def test_budget_of_the_default(tmp_path: Path) -> None:
    """One graph, no second pass over a row, no value alone in a sector."""
    bf16, rowwise = counts(tmp_path, "--configs=bf16,rowwise", "--ac=none", "--kernels=inductor", "--systems=titanlite")
    budget = {"launches": 36, "mb": 3_680, "sectors_mb": 3_690, "kept_mib": 1_098}  # what was reached
    assert all(bf16[key] <= limit for key, limit in budget.items())
    budget = {"launches": 61, "mb": 9_100, "sectors_mb": 9_110, "kept_mib": 746}
    assert all(rowwise[key] <= limit for key, limit in budget.items())
    assert all(row["mb"] == pytest.approx(row["once_mb"], rel=1e-3) for row in (bf16, rowwise))


@pytest.mark.long
def test_against_torchao(tmp_path: Path) -> None:
    """Fewer bytes and launches than torchao's layers in the same block, and no more kept."""
    rows = {
        (row["system"], row["config"], row["ac"]): row
        for row in counts(tmp_path, "--configs=tensorwise,rowwise,rowwise_with_gw_hp", "--kernels=inductor")
    }
    for (config, ac), share in BYTES.items():
        ours, theirs = rows["titanlite", config, ac], rows["torchao", config, ac]
        assert all(ours[key] <= share * theirs[key] for key in ("mb", "sectors_mb"))
        assert ours["launches"] <= 0.70 * theirs["launches"]
        assert ours["kept_mib"] <= theirs["kept_mib"] + 1
        assert ours["matmuls_mb"] == pytest.approx(theirs["matmuls_mb"], rel=1e-3)


@pytest.mark.long
def test_values_of_compiled_code(tmp_path: Path) -> None:
    """The code for an absent GPU, fused by our rules, computes in Triton's interpreter what the CPU computes, up to
    the rounding of bf16."""
    sys.path.insert(0, str(ROOT / "scripts/benchmarks"))
    from absent_gpu import device

    command = [sys.executable, str(Path(__file__).with_name("compiled_values.py"))]
    env = {**ENVIRONMENT, **device.environment(tmp_path)}
    output = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=1000).stdout
    values = json.loads(output.splitlines()[-1])
    assert min(values.values()) >= 34, values
