"""The header at the start of a run, and the summary at its end."""

from __future__ import annotations

import os
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from titanlite.config import JobConfig, packaged
from titanlite.config.run_config import CONFIG
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


def end_above(start: float | None, losses: Sequence[float], steps: int) -> float | None:
    """Return the median of the last losses of a run that ended above where it began, else None.

    The end of a run is the last tenth of its steps, at least 5 and at most 100 of them. It is above the start if nine
    tenths of its losses are; of fewer than 5 losses, by 5%, because one batch is harder than another.

    Args:
        start: the loss of step 1; None if it is not known.
        losses: those of the latest steps, the last one last.
        steps: the number of steps made.
    """
    length = min(max(5, steps // 10), 100, steps - 1)
    last = losses[-length:] if length > 0 else []
    if start is None or not last:
        return None
    limit = start if len(last) >= 5 else 1.05 * start
    return statistics.median(last) if sum(loss > limit for loss in last) >= 0.9 * len(last) else None


def summary(
    recorder: Recorder, places: Mapping[str, str], start: float | None = None, losses: Sequence[float] = ()
) -> str:
    """Summarize the run: steps, tokens, losses, medians over the steady windows, peak memory, paths of files.

    Args:
        start, losses: see :func:`end_above`.
    """
    first, last, peak = recorder.first, recorder.last, recorder.peak
    validated = recorder.last_validation
    if first is None or last is None or peak is None:
        return "stopped before the first step"
    validation = {}
    if validated is not None:
        bits = validated["bits_per_byte"]
        in_bits = "" if bits is None else f", {bits:.4f} bits per byte"
        validation["validation"] = f"loss {validated['loss']:.4f}{in_bits} at step {validated['step']}"
    title = "training finished" if last["step"] == recorder.last_step else "training stopped early"
    loss, above = f"{_loss(first)} -> {_loss(last)}", {}
    if recorder.steps_before and start is not None:
        loss = f"{start:.4f} at step 1, {loss}"
    if (end := end_above(start, losses, last["step"])) is not None:
        title = f"{title}, and THE LOSS IS ABOVE WHERE IT BEGAN"
        above["loss at the end"] = (
            f"{end:.4f}, the median of the last steps, above the {start:.4f} of step 1: the run has unlearned; lower "
            "optimizer.lr, or lengthen lr_scheduler.warmup_steps"
        )
    tps, mfu = recorder.median("tps"), recorder.median("mfu")
    return table(
        title,
        {
            "steps": f"{recorder.steps_before + 1} to {last['step']} of {recorder.last_step}",
            "tokens": f"{recorder.tokens_seen:,}",
            "loss": loss,
            **above,
            **({"skipped steps": f"{last['skipped_steps']}"} if last["skipped_steps"] else {}),
            **({"skipped documents": f"{last['skipped_documents']:,}"} if last["skipped_documents"] else {}),
            **({"truncated examples": f"{last['truncated_examples']:,}"} if last.get("truncated_examples") else {}),
            **validation,
            "median tps per device": "n/a (a single window)" if tps is None else f"{round(tps):,}",
            "median mfu": "n/a" if mfu is None else f"{mfu:.2f}%",
            "peak memory": "{:.2f} GiB ({:.2f}%)".format(*shown_memory(peak)),
            **places,
        },
    )


def what_next(config: JobConfig, run: Path, world_size: int) -> str:
    """Return numbered commands that go on from a first run, which has kept its model in the folder ``run``. They work
    as printed."""
    titanlite, train = titanlite_command(), _train(run / CONFIG, world_size)
    folder, own_folder = shlex.quote(str(run)), shlex.quote(f"{run}_own_text")
    root = packaged.FOLDER.parent
    text = root / "docs" / "*.md" if (root / "docs").is_dir() else root / "*" / "*.py"
    own_text = f"--training.dataset=text --training.dataset_path={shlex.quote(shown_path(str(text)))}"
    commands = {
        "talk to it": f"{titanlite} generate --checkpoint {folder} --prompt import",
        "train on your own text: a folder of .txt files, or files that a pattern names, such as these": (
            f"{train} --job.dump_folder={own_folder} {own_text}"
        ),
        "train the same in low precision": f"{train} --model.converters=float8 --float8.recipe_name=rowwise",
        "compare the runs in the folder": f"{titanlite} compare {folder}",
    }
    if config.model.converters:  # it is in low precision
        del commands["train the same in low precision"]
    lines = (f"    {number}. {purpose}:\n        {commands[purpose]}" for number, purpose in enumerate(commands, 1))
    return "\n".join(["what to do next:", *lines])


def next_command(config: JobConfig, file: Path, step: int, world_size: int) -> dict[str, str]:
    """Return the next command after a run that ended at ``step``, by purpose, if there is one; ``file`` is the run's
    configuration."""
    command = _train(file, world_size)
    if not config.checkpoint.enable_checkpoint:
        return {} if config.checkpoint.keep_model and step == config.training.steps else {"run it again": command}
    if step < config.training.steps:
        return {"continue it": command}
    if config.checkpoint.last_save_model_weights_only:
        return {}
    return {"train longer": f"{command} --training.steps={2 * step}"}


def titanlite_command() -> str:
    """Return how the console script is called from the current folder."""
    script = Path(sys.executable).with_name("titanlite")
    python = shlex.quote(sys.executable)
    return shlex.quote(shown_path(str(script))) if script.exists() else f"{python} -m titanlite.commands"


def _train(file: Path, world_size: int) -> str:
    """Return the command that trains as ``file`` says, on the processes of this run."""
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    ngpu = f"NGPU={processes} " if world_size > 1 or torch.cuda.device_count() > 1 else ""  # else it is the default
    if machines != "1":
        ngpu = f"NNODES={machines} RDZV_ENDPOINT=... {ngpu}"
    program = shlex.quote(os.environ[COMMAND]) if COMMAND in os.environ else titanlite_command()
    return f"{ngpu}CONFIG_FILE={shlex.quote(str(file))} {program}"
