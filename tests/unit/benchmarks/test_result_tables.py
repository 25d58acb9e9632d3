"""The tables in the docs are those of the result files."""

from __future__ import annotations

import json

import pytest
import tables

from titanlite.models.spec import get_model_spec
from titanlite.plan.devices import DEVICES


def test_the_docs_quote_what_was_measured() -> None:
    for path in tables.PAGES:
        text = path.read_text(encoding="utf-8")
        assert tables.filled(text) == text, f"{path.name}: run scripts/benchmarks/tables.py"


def test_every_table_has_one_place() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in tables.PAGES)
    assert {name: text.count(f"<!-- {name} -->\n|") for name in [*tables.TABLES, *tables.FROM_TESTS]} == dict.fromkeys(
        [*tables.TABLES, *tables.FROM_TESTS], 1
    )


def test_the_predicted_speed_is_that_of_its_file() -> None:
    """The summary in docs/performance.md."""
    results = json.loads((tables.RESULTS / "counted_step.json").read_text(encoding="utf-8"))["results"]
    speeds = [r["over_bf16"] for r in results if r["system"] == "titanlite" and r["config"] != "bf16"]
    page = (tables.ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert f"a speed of {min(speeds):.2f} to {max(speeds):.2f} times bf16's" in " ".join(page.split())


def test_a_number_that_changed_shows() -> None:
    text = (tables.ROOT / "docs" / "float8.md").read_text(encoding="utf-8")
    results = json.loads((tables.RESULTS / "loss_parity.json").read_text(encoding="utf-8"))["results"]
    shown = f"{results[0]['mean_final_loss']:.4f}"
    assert shown in text
    assert tables.filled(text.replace(shown, "1.2345")) == text


def test_float8_learns_what_bf16_learns() -> None:
    """The claim of docs/float8.md, held against its file: every interval inside 0.5%, three seeds, 200 steps."""
    results = json.loads((tables.RESULTS / "loss_parity.json").read_text(encoding="utf-8"))["results"]
    by_config = {r["config"]: r for r in results}
    for recipe in ("tensorwise", "rowwise", "rowwise_with_gw_hp"):
        low, high = by_config[recipe]["interval_95_pct"]
        assert -0.5 < low < high < 0.5
    assert all(r["steps"] == 200 and len(r["final_loss"]) == 3 for r in results)


def test_biases_balance_the_experts_in_each_seed() -> None:
    """The claim of docs/moe.md, held against its file: three seeds, 300 steps."""
    results = json.loads((tables.RESULTS / "moe_balance.json").read_text(encoding="utf-8"))["results"]
    with_bias, without = (next(r for r in results if r["config"] == config) for config in ("bias", "no bias"))
    assert (with_bias["steps"], len(with_bias["largest_share"])) == (300, 3)
    for share, other in zip(with_bias["largest_share"], without["largest_share"], strict=True):
        assert share < other
        assert share < 2 * with_bias["mean_share"]


def test_experts_are_no_slower_than_those_of_transformers() -> None:
    """The claim of docs/moe.md, held against its file: eager and compiled, whatever the other's weights."""
    results = json.loads((tables.RESULTS / "moe_speed.json").read_text(encoding="utf-8"))["results"]
    mine = [r for r in results if r["system"] == "titanlite"]
    assert {r["compile"] for r in mine} == {False, True}
    assert all(r["ratio_to_transformers"] <= 1 for r in mine)


@pytest.mark.parametrize(
    ("way", "family", "flavor", "shared_by"),
    [
        ("30B-A3B, 8 GPUs, FSDP alone", "qwen3_moe", "30B-A3B", 1),
        ("30B-A3B, 8 GPUs, `ep` = 8", "qwen3_moe", "30B-A3B", 8),
        ("235B-A22B, `ep` = 8", "qwen3_moe", "235B-A22B", 8),
        ("671B, `ep` = 64", "deepseek_v3", "671B", 64),
    ],
)
def test_what_casts_of_experts_take_is_calculated(way: str, family: str, flavor: str, shared_by: int) -> None:
    """The table in docs/moe.md."""
    args, device = get_model_spec(family).flavor(flavor), DEVICES["h100"]
    mixture, layers = args.mixture, args.n_layers - args.mixture.n_dense_layers
    expert = 3 * args.dim * mixture.expert_dim
    here = layers * expert * mixture.n_experts // shared_by
    flops = 6 * 4096 * mixture.experts_per_token * layers * expert
    ms = 1e3 * 6 * here / (device.bandwidth_tbs * 1e12)
    cells = (
        *(way, f"{here / 1e9:.1f} billion", f"{2 * here / 2**30:.1f} GiB"),
        f"{6 * here / 1e9:.0f} GB, {ms:.2g} ms",
        f"{flops / 1e12:.0f} TFLOP, {flops / device.fp8_tflops / 1e9:.0f} ms",
    )
    assert f"| {' | '.join(cells)} |" in (tables.ROOT / "docs" / "moe.md").read_text(encoding="utf-8")


def test_estimates_of_a_layer_are_close_to_the_counted_ones() -> None:
    """Two results, made in different ways, agree on the bytes that a compiled layer keeps for backward."""
    estimated, counted = (
        json.loads((tables.RESULTS / f"{name}.json").read_text())["results"]
        for name in ("float8_memory", "compiled_block")
    )
    kept = {
        row["config"]: row["kept_mib"]
        for row in counted
        if (row["system"], row["fusion"], row["ac"], row["tokens"]) == ("titanlite", "block", "none", 8192)
    }
    compiled = [row for row in estimated if row["compile"] and "kept_per_layer_mib" in row]
    assert len(compiled) == len(kept) == 4
    for row in compiled:
        assert row["kept_per_layer_mib"] == pytest.approx(kept[row["config"]], rel=0.05)
