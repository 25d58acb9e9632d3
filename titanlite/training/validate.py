"""Validation: during training, compute the loss of text that training never sees."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from titanlite.config import JobConfig, global_batch_size, holds_out
from titanlite.data import Batch, DataLoader, PartOfSource, Source, Tokenizer, TooLittleText
from titanlite.data.examples import Encoder
from titanlite.distributed.compile import CompileWatch
from titanlite.distributed.mesh import Mesh
from titanlite.distributed.runtime import Runtime
from titanlite.errors import ConfigError, TrainingError, counted, renaming
from titanlite.metrics.recorder import Recorder
from titanlite.optim.loss import IGNORED
from titanlite.quant.linear import high_precision
from titanlite.training.data import build_encoder, build_loader, open_source
from titanlite.training.step import StepRunner
from titanlite.training.validate_task import ValidationTask

logger = logging.getLogger()

# Independent of training.seed, so that runs with different seeds validate on the same text.
_SEED = 0


def training_part(source: Source, config: JobConfig) -> Source:
    """Return the part of the source that training reads: all but the documents that [validation] holds out."""
    if not holds_out(config):
        return source
    return PartOfSource(source, config.validation.held_out_percent, held_out=False)


@dataclass(frozen=True)
class ValidationData:
    """The data of every validation.

    Attributes:
        batches: this rank's shares of the global batches; each has the size of a training batch.
        tokens: the number of tokens whose prediction is scored, over all ranks.
        nbytes: the bytes of text that these tokens represent; None if the tokenizer does not know them.
        about: a description, for the log.
        identity: that of the loader; see :class:`titanlite.data.DataLoader`.
    """

    batches: list[Batch]
    tokens: int
    nbytes: int | None
    about: str
    identity: dict[str, str | int]


def read_validation_data(
    training_source: Source,
    training_encoder: Encoder | None,
    tokenizer: Tokenizer,
    config: JobConfig,
    mesh: Mesh,
    runtime: Runtime,
) -> ValidationData:
    """Read and tokenize the text of all validations. Each document is read once, and the sequences are the same for any
    number of processes and any seed.

    Raises:
        ConfigError: the text cannot be read, is less than one batch, or is in files that training reads.
    """
    with renaming(_of_validation):
        other = config.validation.dataset not in ("", config.training.dataset)
        encoder = build_encoder(config.validation.dataset, tokenizer, config) if other else training_encoder
        source = _source(training_source, config, encoder)
        sequences = global_batch_size(config, mesh.degrees.data_parallel)
        loader = build_loader(source, tokenizer, encoder, config, mesh, runtime)
        runtime.check_same("the validation data", loader.identity)
        batches = _read_once(loader, config.validation.steps)
    count = -runtime.agree_max(-len(batches))[0]
    batch_size = f"{counted(sequences, 'sequence')} of {config.training.seq_len} tokens"
    if not count:
        raise ConfigError(_too_little(source, batch_size, config))
    if count < config.validation.steps and runtime.rank == 0:
        logger.warning(
            "validation.steps = %d: the text makes %s of %s; every validation reads all of it once",
            config.validation.steps,
            counted(count, "batch"),
            batch_size,
        )
    batches = batches[:count]
    tokens, nbytes = _count(batches, tokenizer, mesh, runtime)
    skipped = runtime.sum(loader.skipped, mesh.degrees.data_parallel)
    name = config.validation.dataset or config.training.dataset
    data = f"{config.validation.held_out_percent}% of the documents of {name}, held out" if holds_out(config) else name
    precision = ", in bfloat16" if config.validation.precision == "bfloat16" else ""
    left_out = f", without {counted(skipped, 'unreadable document')}" if skipped else ""
    every = f"every {counted(config.validation.interval, 'step')}, {count} x {batch_size}{precision}"
    return ValidationData(batches, tokens, nbytes, f"{every}: {data}{left_out}", loader.identity)


def _source(training_source: Source, config: JobConfig, encoder: Encoder | None) -> Source:
    training, validation = config.training, config.validation
    held_out = holds_out(config)
    name = validation.dataset or training.dataset
    path = training.dataset_path if held_out else validation.dataset_path
    if name == training.dataset and bool(path) != bool(training.dataset_path):
        raise ConfigError(
            "the same set is trained on, once from the hub and once from a copy, and "
            "documents could be in both; leave out validation.dataset and validation.dataset_path, which holds out a "
            "part of the training data",
            key="validation.dataset",
            value=name,
        )
    source = open_source(name, path, config, encoder, _SEED)
    if held_out:
        return PartOfSource(source, validation.held_out_percent, held_out=True)
    trained_on = {_identity(file): file for file in training_source.files}
    shared = trained_on.keys() & set(map(_identity, source.files))
    if shared:
        raise ConfigError(
            f"training reads {len(shared)} of its {counted(len(source.files), 'file')} too, for example "
            f"{min(trained_on[file] for file in shared)}; name others, or leave out validation.dataset and "
            "validation.dataset_path, which holds out a part of the training data",
            key="validation.dataset",
            value=name,
        )
    return source


def _identity(file: Path) -> tuple[int, int]:
    """Return what is the same for a file under all its names, links of both kinds included."""
    status = file.stat()
    return status.st_dev, status.st_ino


def _of_validation(text: str) -> str:
    """Rename options in a message: sources use the names of [training], but the user set those of [validation]."""
    return text.replace("training.dataset", "validation.dataset")


def _read_once(loader: DataLoader, steps: int) -> list[Batch]:
    """Read up to ``steps`` batches; fewer if this rank would have to read a document twice."""
    batches = []
    try:
        for _ in range(steps):
            batch = next(loader)
            if any(epoch for epoch, *_ in loader.state_dict()["shards"].values()):
                break
            batches.append(batch)
    except TooLittleText:
        pass  # not even one sequence
    finally:
        loader.close()
    return batches


def _too_little(source: Source, batch_size: str, config: JobConfig) -> str:
    problem = f"validation.enable = true: the text to validate on is less than one batch of {batch_size}"
    if isinstance(source, PartOfSource):
        percent = config.validation.held_out_percent
        return (
            f"{problem}: it holds out {source.kept} of {counted(source.read, 'document')} read here "
            f"(validation.held_out_percent = {percent}); raise that, use more text, or name other data with "
            "validation.dataset"
        )
    return f"{problem}; use more text, or smaller batches (training.global_batch_size, training.seq_len)"


def _count(batches: Sequence[Batch], tokenizer: Tokenizer, mesh: Mesh, runtime: Runtime) -> tuple[int, int | None]:
    """Count the labels that are scored, and the bytes of text that they represent, over all ranks; None if the
    tokenizer does not know these."""
    sizes = None if tokenizer.token_bytes is None else torch.from_numpy(tokenizer.token_bytes)
    counts = torch.zeros(2, dtype=torch.int64)
    for batch in batches:
        scored = batch.labels[batch.labels != IGNORED]
        counts += torch.tensor([scored.numel(), 0 if sizes is None else int(sizes[scored].sum())])
    if runtime.world_size > 1:
        dist.all_reduce(counts, group=runtime.control)
    tokens, nbytes = (counts // (runtime.world_size // mesh.degrees.data_parallel)).tolist()  # count shared data once
    return tokens, None if sizes is None else nbytes


class Validator:
    """Computes the mean loss over ``data`` with the model of training: sharded, cut into stages, converted, compiled.

    Args:
        runner: computes the loss of a batch.
        task: choices between endings; None: there are none.
    """

    def __init__(
        self,
        config: JobConfig,
        data: ValidationData,
        runner: StepRunner,
        mesh: Mesh,
        device: torch.device,
        task: ValidationTask | None = None,
    ) -> None:
        self.data, self.task = data, task
        self.interval, self.last_step = config.validation.interval, config.training.steps
        self.in_high_precision = config.validation.precision == "bfloat16"
        self._runner, self._parts, self._mesh, self._device = runner, runner.parts, mesh, device

    def is_due(self, step: int) -> bool:
        return step % self.interval == 0 or step == self.last_step

    def run(self, step: int, recorder: Recorder, watch: CompileWatch, asked_to_stop: Callable[[], bool]) -> None:
        """Validate after ``step`` and write the result. Write nothing if ``asked_to_stop`` becomes true meanwhile; it
        is the same on all ranks.

        Raises:
            TrainingError: the loss is not finite.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # exclude earlier training steps from the time
        start = time.perf_counter()
        loss, accuracy = self.loss(asked_to_stop), None
        if loss is not None and not math.isfinite(loss):
            raise TrainingError(
                f"the validation after step {step}: loss {loss} is not finite, so the weights are beyond repair; lower "
                "optimizer.lr or training.max_norm, or lengthen lr_scheduler.warmup_steps"
            )
        if loss is not None and self.task is not None:
            with self._evaluating():
                accuracy = self.task.accuracy(asked_to_stop)
        if loss is None or (accuracy is None and self.task is not None):
            logger.info("the validation after step %d is left out", step)
            return
        seconds = time.perf_counter() - start
        bits = self.bits_per_byte(loss)
        task = {} if accuracy is None else accuracy.values()
        tokens = self.data.tokens
        recorder.log_validation(step, loss=loss, bits_per_byte=bits, tokens=tokens, seconds=seconds, task=task)
        watch.validation_done(step)

    def loss(self, asked_to_stop: Callable[[], bool] = lambda: False) -> float | None:
        """Return the mean negative log-likelihood of the tokens of all ranks, in nats; the same number on all ranks.
        None if ``asked_to_stop`` becomes true between two batches."""
        losses = []
        with self._evaluating():
            for batch in self.data.batches:
                if asked_to_stop():
                    return None
                losses.append(self._runner.evaluate(batch))
        total = torch.stack([loss.total for loss in losses]).double().sum()
        scored = torch.stack([loss.scored for loss in losses]).sum()
        # Tensor-parallel ranks have equal sums, which cancel out; of the pipeline stages, only the last has any.
        sums = torch.stack((total, scored.to(total)))
        if self._mesh.world.size() > 1:
            dist.all_reduce(sums)
        return (sums[0] / sums[1]).item()

    def bits_per_byte(self, loss: float) -> float | None:
        """Convert a loss to bits per byte, which are comparable between tokenizers; None if the bytes are not known."""
        return loss / math.log(2) * self.data.tokens / self.data.nbytes if self.data.nbytes else None

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Put the model in evaluation mode, in which delayed scaling records nothing; restore its mode at the end."""
        trained = [module for part in self._parts for module in part.modules() if module.training]
        with ExitStack() as stack:
            for part in self._parts:
                part.eval()
                if self.in_high_precision:
                    stack.enter_context(high_precision(part))
            try:
                yield
            finally:
                for module in trained:
                    module.training = True
                for part in self._parts:
                    for module in part.modules():
                        if isinstance(module, FSDPModule):
                            module.reshard()  # free parameters that are gathered for a backward
