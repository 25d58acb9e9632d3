"""scripts/benchmarks/gather_casts.py counts the ideal bytes, and many more by plain operations."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import gather_casts

from tests.support.runs import ROOT
from titanlite.config import load_config
from titanlite.config.number_formats import formats_of

FLOAT8_GATHER = "float8.enable_fsdp_float8_all_gather"


@pytest.mark.slow
def test_casts_move_what_they_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather_casts, "ROWS", 128)
    monkeypatch.setattr(gather_casts, "COLUMNS", 256)
    out = tmp_path / "gather_casts.json"
    monkeypatch.setattr(sys, "argv", ["gather_casts.py", f"--out={out}"])
    assert gather_casts.main() == 0
    rows = {(row["cast"], row["config"]): row for row in json.loads(out.read_text())["results"]}
    with_scales_of_rows = ["rowwise", "rowwise_with_gw_hp", "int8", "mxfp8"]
    assert [config for cast, config in rows if cast == "shard"] == ["tensorwise", *with_scales_of_rows]
    assert [config for cast, config in rows if cast == "again"] == with_scales_of_rows
    for (cast, _), row in rows.items():
        # Each tile of a cast by columns reads its rows' scales, and changes the largest magnitudes of its columns.
        assert row["counted"] == pytest.approx(row["ideal"], abs=0.02 if cast == "shard" else 0.2)
        assert row["plain"] > 3 * row["ideal"]
        assert row["launches"] < row["plain_launches"]


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        *(
            (recipe, ["--model.converters=float8", f"--float8.recipe_name={recipe}", f"--{FLOAT8_GATHER}"])
            for recipe in ("rowwise", "rowwise_with_gw_hp")
        ),
        ("mxfp8", ["--model.converters=mx", "--mx.recipe_name=mxfp8", "--mx.enable_fsdp_mxfp8_all_gather"]),
    ],
)
def test_plans_take_these_bytes(recipe: str, options: list[str]) -> None:
    config = load_config(options)
    (number_format,) = formats_of(config)
    assert number_format.cost is not None
    cost = number_format.cost(config)
    results = json.loads((ROOT / "docs/benchmarks/gather_casts.json").read_text())["results"]
    (row,) = (row for row in results if (row.get("cast"), row["config"]) == ("again", recipe))
    assert cost.weight_bytes + cost.recast_bytes == pytest.approx(row["counted"], rel=0.06)  # without scales and amaxes
