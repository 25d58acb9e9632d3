"""The header that says what is about to happen, and the summary that says what did."""

from __future__ import annotations

from collections.abc import Mapping

from titanlite.metrics.recorder import Recorder


def table(title: str, rows: Mapping[str, str]) -> str:
    """Aligned ``name  value`` lines under a title."""
    width = max(map(len, rows))
    return "\n".join([title, *(f"    {name:<{width}}  {value}" for name, value in rows.items())])


def summary(recorder: Recorder, places: Mapping[str, str]) -> str:
    """What the run did: steps, tokens, losses, medians over the steady windows, peak memory, and where things are."""
    rows = recorder.rows
    if not rows:
        return "no step was done"
    tps, mfu = recorder.median("tps"), recorder.median("mfu")
    peak = max(rows, key=lambda row: row["memory_gib"])
    return table(
        "training finished" if rows[-1]["step"] == recorder.last_step else "training stopped early",
        {
            "steps": f"{rows[0]['step']} to {rows[-1]['step']} of {recorder.last_step}",
            "tokens": f"{recorder.tokens_seen:,}",
            "loss": f"{rows[0]['loss']:.4f} -> {rows[-1]['loss']:.4f}",
            "median tps per device": "n/a (a single window)" if tps is None else f"{round(tps):,}",
            "median mfu": "n/a" if mfu is None else f"{mfu:.2f}%",
            "peak memory": f"{peak['memory_gib']:.2f} GiB ({peak['memory_pct']:.2f}%)",
            **places,
        },
    )
