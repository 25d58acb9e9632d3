"""The header at the start of a run, and the summary at its end."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from titanlite.config import JobConfig
from titanlite.environment import COMMAND
from titanlite.metrics.recorder import Recorder
from titanlite.metrics.sinks import Row, shown_memory


def table(title: str, rows: Mapping[str, str]) -> str:
    """Format aligned ``name  value`` lines under a title."""
    width = max(map(len, rows))
    return "\n".join([title, *(f"    {name:<{width}}  {value}" for name, value in rows.items())])


def shown_path(path: str) -> str:
    """Shorten a path: relative to the current folder if it is below that, else unchanged."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else os.path.join(".", relative)


def _loss(row: Row) -> str:
    """Format the loss; in rows from metrics.jsonl, None means that it was not finite."""
    return "not finite" if row["loss"] is None else f"{row['loss']:.4f}"


def summary(recorder: Recorder, places: Mapping[str, str]) -> str:
    """Summarize the run: steps, tokens, losses, medians over the steady windows, peak memory, paths of files."""
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
            "peak memory": "{:.2f} GiB ({:.2f}%)".format(*shown_memory(peak)),
            **places,
        },
    )


def next_command(config: JobConfig, file: Path, step: int, world_size: int) -> dict[str, str]:
    """Return the next command after a run that ended at ``step``, by purpose; ``file`` is the run's configuration."""
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    ngpu = f"NGPU={os.environ['LOCAL_WORLD_SIZE']} " if world_size > 1 else ""
    if machines != "1":
        ngpu = f"NNODES={machines} RDZV_ENDPOINT=... {ngpu}"
    command = f"{ngpu}CONFIG_FILE={file} {os.environ.get(COMMAND, 'titanlite')}"
    if not config.checkpoint.enable_checkpoint:
        return {"run it again": command}
    if step < config.training.steps:
        return {"continue it": command}
    return {"train longer": f"{command} --training.steps={2 * step}"}
