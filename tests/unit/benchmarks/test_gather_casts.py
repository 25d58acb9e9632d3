"""scripts/benchmarks/gather_casts.py counts the ideal bytes, and many more by plain operations."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import gather_casts


def test_casts_move_what_they_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather_casts, "ROWS", 128)
    monkeypatch.setattr(gather_casts, "COLUMNS", 256)
    out = tmp_path / "gather_casts.json"
    monkeypatch.setattr(sys, "argv", ["gather_casts.py", f"--out={out}"])
    assert gather_casts.main() == 0
    rows = {row["config"]: row for row in json.loads(out.read_text())["results"]}
    assert {*rows} == {"tensorwise", "rowwise", "rowwise_with_gw_hp", "int8", "mxfp8"}
    for row in rows.values():
        assert row["counted"] == pytest.approx(row["ideal"], abs=0.02)
        assert row["plain"] > 3 * row["ideal"]
        assert row["launches"] < row["plain_launches"]
