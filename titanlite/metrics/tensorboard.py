"""TensorBoard's events: the logged steps, the configuration as text, and the hparams with the final metrics."""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from titanlite.errors import ConfigError, shown
from titanlite.metrics.last_part import last_part
from titanlite.metrics.sinks import Row

logger = logging.getLogger()

TAGS = {
    "loss": "loss_metrics/global_avg_loss",
    "max_loss": "loss_metrics/global_max_loss",
    "grad_norm": "grad_norm",
    "lr": "lr",
    "tps": "throughput(tps)",
    "tflops": "tflops",
    "mfu": "mfu(%)",
    "step_time_s": "time_metrics/end_to_end(s)",
    "data_loading_s": "time_metrics/data_loading(s)",
    "data_loading_pct": "time_metrics/data_loading(%)",
    "memory_gib": "memory/max_active(GiB)",
    "memory_pct": "memory/max_active(%)",
    "reserved_gib": "memory/max_reserved(GiB)",
    "reserved_pct": "memory/max_reserved(%)",
    "num_alloc_retries": "memory/num_alloc_retries",
    "num_ooms": "memory/num_ooms",
    "skipped_steps": "skipped_steps",
    "skipped_documents": "skipped_documents",
    "truncated_examples": "truncated_examples",
    "expert_largest_share": "experts/largest_share",
    "expert_most_rows": "experts/most_rows",
    "router_entropy": "experts/router_entropy",
    "balance_loss": "experts/balance_loss",
}


# The loss by the number of tokens seen, which runs with other batch sizes share.
BY_TOKENS = "loss_by_tokens/global_avg_loss"


_MOST_EXPERTS = 1024  # of all layers: with more, TensorBoard has the largest share of each layer, not each expert


def scalars_of(row: Row) -> dict[str, float | None]:
    """Return the values of a logged step, by tag."""
    scalars = {tag: row.get(key) for key, tag in TAGS.items()}
    by_layer: dict[str, list[float]] = row.get("expert_tokens", {})
    for layer, tokens in by_layer.items():
        if sum(map(len, by_layer.values())) <= _MOST_EXPERTS:
            scalars |= {f"experts/tokens/{layer}/{expert}": count for expert, count in enumerate(tokens)}
        else:
            scalars[f"experts/largest_share/{layer}"] = max(tokens) / max(1, sum(tokens))
    return scalars


def validation_scalars_of(row: Row) -> dict[str, float | None]:
    """Return the values of a validation, by tag."""
    keys = ("loss", "bits_per_byte", "accuracy", "accuracy_norm")
    return {f"validation_metrics/{key}": row.get(key) for key in keys}


class TensorBoardSink:
    """Writes TensorBoard events. A run that continues after ``step`` hides its earlier events of later steps.

    Args:
        earlier: the rows up to ``step``. Their losses by tokens are written again, but for those of fewer tokens than
            ``step``: the events of later steps are hidden by the number on the x axis, which is of tokens there.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, folder: Path, step: int = 0, earlier: Iterable[Row] = ()) -> None:
        # Imported only here, because it takes half a second.
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._step, self._lacks = folder, step, ""
        self._losses = array("d")
        self._last: dict[str, float | None] = {}
        self._end: Any = None
        try:
            self._writer: Any = SummaryWriter(log_dir=str(folder), flush_secs=10, purge_step=step + 1)
        except OSError as e:
            raise ConfigError(
                f"{folder} cannot be written: {e.strerror or e}; remove what is there, or choose another name",
                key="metrics.save_tb_folder",
            ) from None
        for row in earlier:
            self._add_by_tokens(row, write=row["tokens_seen"] > step)

    def describe(self, configuration: str, options: Mapping[str, Any]) -> None:
        """Write the configuration, TOML, as text, and ``options`` by name as hparams. When this is closed, the final
        metrics join them."""
        from torch.utils.tensorboard.summary import hparams

        numbers = {name: type(value) in (int, float) for name, value in options.items()}
        plain = {name: value if numbers[name] else shown(value).strip('"') for name, value in options.items()}
        # The summary that is left out lists all options of an experiment. TensorBoard would take the list of one run
        # for all; without it, it collects the options of all runs.
        _, start, self._end = hparams(plain, {})
        block = "".join(f"    {line}\n" for line in configuration.splitlines())  # as Markdown shows code
        self._try(lambda: self._writer.add_text("config", block, self._step))
        self._try(lambda: self._writer.file_writer.add_summary(start))

    def write(self, row: Row) -> None:
        self._step = row["step"]
        self._add(self._step, scalars_of(row))
        self._add_by_tokens(row)
        self._last |= {"final/tps": row["tps"], "final/mfu": row["mfu"]}

    def write_validation(self, row: Row) -> None:
        values = validation_scalars_of(row)
        self._add(row["step"], values)
        self._last |= {tag.replace("validation_metrics/", "final/validation_"): value for tag, value in values.items()}

    def _add_by_tokens(self, row: Row, write: bool = True) -> None:
        if row["loss"] is not None and math.isfinite(row["loss"]):
            self._losses.append(row["loss"])
        if write:
            self._add(row["tokens_seen"], {BY_TOKENS: row["loss"]})

    def _add(self, step: int, scalars: Mapping[str, float | None]) -> None:
        for tag, value in scalars.items():
            if value is not None and math.isfinite(value):
                self._try(partial(self._writer.add_scalar, tag, value, step))

    def _try(self, write: Callable[[], object]) -> None:
        """Write, but nothing after an error: TensorBoard's writer does not recover from a full disk."""
        if self._lacks:
            return
        try:
            write()
        except OSError as e:
            self._lacks = f"{self._folder} lacks the rows from about step {self._step} on ({e})"
            logger.error("TENSORBOARD'S FILES CANNOT BE WRITTEN: %s; metrics.jsonl has the rows", self._lacks)

    def lacks(self) -> str:
        return self._lacks

    def close(self, failed: bool = False) -> None:
        if self._end is not None and self._losses and self._last:
            losses = self._losses[-last_part(len(self._losses)) :]
            self._add(self._step, {"final/loss": sum(losses) / len(losses), **self._last})
            self._try(lambda: self._writer.file_writer.add_summary(self._end))
        try:
            self._writer.close()
        except OSError as e:
            logger.error("%s lacks its last rows: %s", self._folder, e)
