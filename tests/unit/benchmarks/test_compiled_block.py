"""scripts/benchmarks/compiled_block.py counts what kernels move, and the counts of a block stay in their budgets."""

from __future__ import annotations

import itertools
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
    configs = "--configs=bf16,tensorwise,rowwise"
    rows = counts(tmp_path, configs, "--ac=none", "--kernels=inductor", "--systems=titanlite")
    budgets = {  # what was reached: launches, MB, MB in sectors, MiB kept
        "bf16": (36, 3_680, 3_690, 1_098),
        "tensorwise": (68, 7_980, 7_990, 746),
        "rowwise": (61, 9_100, 9_110, 746),
    }
    assert len(rows) == len(budgets)
    for row in rows:
        reached = (row[key] for key in ("launches", "mb", "sectors_mb", "kept_mib"))
        assert all(n <= limit for n, limit in zip(reached, budgets[row["config"]], strict=True)), row
        assert row["mb"] == pytest.approx(row["once_mb"], rel=1e-3)
        assert row["recompilations"] == 0


def test_the_result_file_reaches_the_targets() -> None:
    """A block moves at most this share of torchao's bytes, plain and in sectors, with twice the tokens too."""
    results = json.loads((ROOT / "docs/benchmarks/compiled_block.json").read_text())["results"]
    rows = {(r["system"], r["fusion"], r["config"], r["ac"], r["tokens"]): r for r in results}
    targets = {
        ("tensorwise", "none"): 0.89,
        ("tensorwise", "op"): 0.86,
        ("rowwise", "none"): 0.76,
        ("rowwise", "op"): 0.79,
        ("rowwise_with_gw_hp", "none"): 0.80,
        ("rowwise_with_gw_hp", "op"): 0.80,
    }
    for tokens, ((config, ac), target) in itertools.product((8192, 16384), targets.items()):
        mine, theirs = (
            rows[system, fusion, config, ac, tokens]
            for system, fusion in (("titanlite", "block"), ("torchao", "compiler"))
        )
        assert all(mine[key] <= target * theirs[key] for key in ("mb", "sectors_mb"))
        assert mine["launches"] <= 0.70 * theirs["launches"]
    bf16 = rows["titanlite", "block", "bf16", "none", 8192]
    assert bf16["mb"] <= rows["torchtitan", "compiler", "bf16", "none", 8192]["mb"]
    for config in ("tensorwise", "rowwise"):
        assert rows["titanlite", "block", config, "none", 8192]["kept_mib"] <= 0.68 * bf16["kept_mib"]


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
