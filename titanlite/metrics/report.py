"""The header that says what is about to happen, and the summary that says what did."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from titanlite.config import JobConfig
from titanlite.environment import COMMAND
from titanlite.metrics.recorder import Recorder
from titanlite.metrics.sinks import Row


def table(title: str, rows: Mapping[str, str]) -> str:
    """Aligned ``name  value`` lines under a title."""
    width = max(map(len, rows))
    return "\n".join([title, *(f"    {name:<{width}}  {value}" for name, value in rows.items())])


def shown_path(path: str) -> str:
    """A path as one would type it: relative where it lies below the current folder."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else os.path.join(".", relative)


def _loss(row: Row) -> str:
    """Read back from metrics.jsonl, one that was not finite is None."""
    return "not finite" if row["loss"] is None else f"{row['loss']:.4f}"


def summary(recorder: Recorder, places: Mapping[str, str]) -> str:
    """What the run did: steps, tokens, losses, medians over the steady windows, peak memory, and where things are."""
    first, last, peak = recorder.first, recorder.last, recorder.peak
    validated = recorder.last_validation
    if first is None or last is None or peak is None:
        return "stopped before the first step"
    validation = {}
    if validated is not None:
        bits = validated["bits_per_byte"]
        in_bits = "" if bits is None else f", {bits:.4f} bits per byte"
        validation["validation"] = f"loss {validated['loss']:.4f}{in_bits} at step {validated['step']}"
    tps, mfu = recorder.median("tps"), recorder.median("mfu")
    return table(
        "training finished" if last["step"] == recorder.last_step else "training stopped early",
        {
            "steps": f"{first['step']} to {last['step']} of {recorder.last_step}",
            "tokens": f"{recorder.tokens_seen:,}",
            "loss": f"{_loss(first)} -> {_loss(last)}",
            **({"skipped steps": f"{last['skipped_steps']}"} if last["skipped_steps"] else {}),
            **validation,
            "median tps per device": "n/a (a single window)" if tps is None else f"{round(tps):,}",
            "median mfu": "n/a" if mfu is None else f"{mfu:.2f}%",
            "peak memory": f"{peak['memory_gib']:.2f} GiB ({peak['memory_pct']:.2f}%)",
            **places,
        },
    )


def next_command(config: JobConfig, file: Path, step: int, world_size: int) -> dict[str, str]:
    """What to type after a run that ended at ``step``, by what it does; ``file`` is its configuration."""
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    ngpu = f"NGPU={os.environ['LOCAL_WORLD_SIZE']} " if world_size > 1 else ""
    if machines != "1":
        ngpu = f"NNODES={machines} RDZV_ENDPOINT=... {ngpu}"
    again = f"{ngpu}CONFIG_FILE={file} {os.environ.get(COMMAND, 'titanlite')}"
    if not config.checkpoint.enable_checkpoint:
        return {"run it again": again}
    if step < config.training.steps:
        return {"continue it": again}
    return {"train longer": f"{again} --training.steps={2 * step}"}
