"""The files and services that a run writes its metrics to."""

from __future__ import annotations

from pathlib import Path

import tomli

from titanlite.config import JobConfig, dump_toml
from titanlite.config.job_name import distinguishing_options
from titanlite.config.run_config import METRICS, VALIDATION
from titanlite.metrics.sinks import JsonlSink, Sink
from titanlite.metrics.tensorboard import TensorBoardSink
from titanlite.metrics.wandb_sink import WandbSink, check_login
from titanlite.training.run_folder import logged_rows


def check_outputs(config: JobConfig) -> None:
    """Check that the services that a run writes to let it in.

    Raises:
        ConfigError: one does not.
    """
    if config.metrics.enable_wandb:
        check_login()


def open_outputs(config: JobConfig, run_path: Path, step: int) -> list[Sink]:
    """Open what rank 0 writes to: ``metrics.jsonl`` and, as configured, TensorBoard's events and wandb. A run that
    goes on after ``step`` appends."""
    validation = run_path / VALIDATION if config.validation.enable else None
    sinks: list[Sink] = [JsonlSink(run_path / METRICS, validation)]
    if config.metrics.enable_tensorboard and not config.metrics.save_for_all_ranks:
        sinks.append(open_tensorboard(config, run_path, step))
    if config.metrics.enable_wandb:
        sinks.append(WandbSink(run_path, config.job.name or "", step, tomli.loads(dump_toml(config))))
    return sinks


def open_tensorboard(config: JobConfig, run_path: Path, step: int, rank: int | None = None) -> Sink:
    """Open the events of the run, or of one ``rank`` of it. TensorBoard calls a run by the path of its folder."""
    folder = run_path / config.metrics.save_tb_folder / (config.job.name or "")
    if rank is not None:
        folder /= f"rank_{rank}"
    sink = TensorBoardSink(folder, step, logged_rows(run_path) if step else ())
    sink.describe(dump_toml(config), distinguishing_options(config))
    return sink
