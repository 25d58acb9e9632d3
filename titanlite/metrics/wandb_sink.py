"""Weights & Biases: the logged steps and the validations, by the names that TensorBoard has."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from titanlite.errors import ConfigError
from titanlite.metrics.sinks import Row
from titanlite.metrics.tensorboard import scalars_of, validation_scalars_of

logger = logging.getLogger()


def check_login() -> None:
    """Check that wandb needs no key, or has one.

    Raises:
        ConfigError: it would ask for a key, below a status that is drawn over the question.
    """
    import wandb

    try:
        mode = os.environ.get("WANDB_MODE") or wandb.setup().settings.mode  # of wandb's own files
        if mode in ("online", "shared") and not wandb.login(prompt=False):
            raise _refused("there is no API key")
    except (wandb.Error, OSError) as e:
        raise _refused(e) from None


def _refused(why: object) -> ConfigError:
    why = f"wandb cannot be started: {why}; run wandb login, or set WANDB_MODE=offline"
    return ConfigError(why, key="metrics.enable_wandb", value=True)


class WandbSink:
    """Writes a run of Weights & Biases. As in torchtitan, ``WANDB_PROJECT``, ``WANDB_TEAM`` and ``WANDB_RUN_NAME`` name
    it, and ``WANDB_MODE=offline`` keeps it in the folder. A run that continues is a run of its own there, in the same
    group: wandb takes no step a second time. With ``WANDB_RUN_ID`` and ``WANDB_RESUME`` it is the same run.
    :func:`check_login` comes first.

    Args:
        folder: the run folder; the files are in its folder ``wandb``.
        name: of the run.
        step: the run continues after this step.
        options: the configuration, by section and key.

    Raises:
        ConfigError: the run cannot be started.
    """

    def __init__(self, folder: Path, name: str, step: int, options: Mapping[str, Any]) -> None:
        import wandb

        self._errors = (wandb.Error, OSError)
        self._folder, self._lacks = folder, ""
        try:
            self._run: Any = wandb.init(
                entity=os.environ.get("WANDB_TEAM"),
                project=os.environ.get("WANDB_PROJECT", "titanlite"),
                name=os.environ.get("WANDB_RUN_NAME") or (f"{name} after step {step}" if step else name),
                group=os.environ.get("WANDB_RUN_GROUP") or name,
                dir=str(folder),
                config=dict(options),
                # The console is ours: it has a status, and no output of other programs between the log lines.
                settings=wandb.Settings(silent=True, console="off"),
            )
        except self._errors as e:
            raise _refused(e) from None
        logger.info("wandb: %s", self._run.url or f"offline, in {self._run.dir}")
        if (there := self._run.step) > step + 1:
            logger.warning("wandb has this run's rows up to step %d, and takes only later ones", there - 1)

    def write(self, row: Row) -> None:
        self._log(row["step"], {"tokens_seen": row["tokens_seen"], **scalars_of(row)})

    def write_validation(self, row: Row) -> None:
        self._log(row["step"], validation_scalars_of(row))

    def _log(self, step: int, values: Mapping[str, float | None]) -> None:
        known = {tag: value for tag, value in values.items() if value is not None and math.isfinite(value)}
        self._try(step, lambda: self._run.log(known, step=step))

    def _try(self, step: int, write: Callable[[], object]) -> None:
        """Write, but nothing after an error, which is told once."""
        if self._lacks:
            return
        try:
            write()
        except self._errors as e:
            self._lacks = f"wandb lacks the rows from about step {step} on ({e})"
            logger.error("WANDB CANNOT BE WRITTEN: %s; metrics.jsonl has the rows", self._lacks)

    def lacks(self) -> str:
        return self._lacks

    def close(self, failed: bool = False) -> None:
        self._try(0, lambda: self._run.finish(exit_code=int(failed)))
