"""The tables in the docs are those of the result files."""

from __future__ import annotations

import json

import tables


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
    results = json.loads((tables.RESULTS / "roofline_assumed.json").read_text(encoding="utf-8"))["results"]
    speeds = [r["speedup_over_bf16"] for r in results if "floor_s" in r and r["config"] != "bf16"]
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
