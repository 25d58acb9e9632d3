"""The trainer on the debug model beside another loop, in one process: what trainer_overhead.py, cpu_step.py and
checkpoint_save.py share."""

from __future__ import annotations

import copy
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

from harness import ROOT
from torch import Tensor, nn

from titanlite.config import load_config
from titanlite.distributed.runtime import stop_runtime
from titanlite.optim import build_optimizer
from titanlite.train import Trainer


@contextmanager
def quiet_trainer(options: Sequence[str], folder: Path | None = None) -> Iterator[Trainer]:
    """A trainer of the debug model, in a temporary run folder in ``folder``. Its log goes where a user's does not slow
    the loop either: to a file."""
    with tempfile.TemporaryDirectory(dir=folder) as run, Path(run, "log").open("w") as log:
        given = [f"--job.dump_folder={run}/run", "--training.steps=1000000", *options]
        trainer = Trainer(load_config(given, str(ROOT / "train_configs" / "debug_model.toml")))
        streams = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.StreamHandler)]
        before = [handler.setStream(log) for handler in streams]
        try:
            yield trainer
        finally:
            trainer.close()
            stop_runtime()
            for handler, stream in zip(streams, before, strict=True):
                handler.setStream(stream)


class BareLoop:
    """Training as one writes it: forward, loss, backward, clipping, optimizer, and nothing else.

    Args:
        loss_fn: (inputs, labels) of a batch: the mean loss.
        batches: the loop goes round in them; on the device.
        foreach: of :func:`torch.nn.utils.clip_grad_norm_`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        batches: Iterable[tuple[Tensor, Tensor]],
        trainer: Trainer,
        foreach: bool | None = None,
    ) -> None:
        self.model, self.loss_fn, self.batches = model, loss_fn, cycle(batches)
        self.optimizer = build_optimizer(model.named_parameters(), copy.deepcopy(trainer.config.optimizer))
        self.max_norm, self.foreach = trainer.config.training.max_norm, foreach

    def advance(self) -> Tensor:
        loss = self.loss_fn(*next(self.batches))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm, foreach=self.foreach)
        self.set_learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def set_learning_rate(self) -> None:
        """It stays what it is; for loops with a schedule to override."""


def rows_of(pairs: list[tuple[float, float]], trainer: Trainer, config: str, other: str) -> list[dict[str, Any]]:
    """A row for the trainer, with its median ratio to the ``other`` loop, and one for that.

    Args:
        pairs: seconds per step of both, as of :func:`harness.time_in_pairs`.
    """
    training = trainer.config.training
    shape = {"batch": training.local_batch_size, "seq_len": training.seq_len, "compile": training.compile}
    rows: list[dict[str, Any]] = []
    for system, seconds in zip(("titanlite", other), zip(*pairs, strict=True), strict=True):
        step = statistics.median(seconds)
        speed = {"tps": training.local_batch_size * training.seq_len / step, "step_ms": step * 1e3}
        rows.append({"system": system, "config": config, **shape, **speed})
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    rows[0][f"ratio_to_{other.replace(' ', '_')}"] = ratio
    return rows
