"""Text from a trained model, on one process or with tensor parallelism over all processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from titanlite.checkpoint.folder import latest_checkpoint
from titanlite.data import Tokenizer
from titanlite.data.generation_config import end_ids
from titanlite.distributed.runtime import Runtime
from titanlite.errors import ConfigError, counted
from titanlite.inference.answer import check_stop
from titanlite.inference.generate import Generated, generate_together
from titanlite.inference.load import generation_of, opened
from titanlite.inference.prompts import Given, Task, batches, tasks_of
from titanlite.inference.sampling import Sampling, TokenSampler

BATCH_SIZE = 8


class Writer(NamedTuple):
    """A model that writes text; ``end_ids`` are the tokens that end one."""

    decoder: TokenSampler
    tokenizer: Tokenizer
    end_ids: frozenset[int]
    process: Runtime


@contextmanager
def opened_writer(
    checkpoint: str,
    dtype: str = "float32",
    tokenizer_path: str | None = None,
    *,
    quantize: str | None = None,
    calibration: str | None = None,
) -> Iterator[Writer]:
    """Load a model that writes text; see :func:`titanlite.inference.load.opened`."""
    with opened(
        checkpoint, dtype, tokenizer_path, quantize=quantize, calibration=calibration, tensor_parallel=True
    ) as (loaded, mesh, process):
        tokenizer, folder = loaded.tokenizer, latest_checkpoint(checkpoint)
        decoder = TokenSampler(
            loaded.model,
            process.device,
            loaded.max_seq_len,
            tokenizer.vocab_size,
            tp=mesh.tp,
            group=process.control if process.world_size > 1 else None,
        )
        ends = end_ids(generation_of(folder, tokenizer), folder) | {tokenizer.eos_id}
        yield Writer(decoder, tokenizer, ends, process)


def continue_texts(
    checkpoint: str,
    givens: Sequence[Given],
    max_new_tokens: int | None,
    sampling: Sampling,
    dtype: str = "float32",
    tokenizer_path: str | None = None,
    *,
    stop: Sequence[str] = (),
    quantize: str | None = None,
    calibration: str | None = None,
    cached: bool = True,
    batch_size: int = BATCH_SIZE,
) -> Iterator[Task]:
    """Yield the prompts with what the model writes after them, in order. The speed is printed to stderr.

    Args:
        checkpoint: the folder of one step, or of Hugging Face weights; or that of a run, or of its checkpoints, of
            which the latest is taken.
        givens: the texts to continue, of which an empty one begins a document, and the conversations to answer.
        max_new_tokens: None: as many as the model has positions for, at most 256.
        dtype: the torch dtype of the weights, by name.
        tokenizer_path: the tokenizer, where the folder has none; None: the one of the folder.
        stop: strings that end a text, and are not part of it.
        quantize, calibration: see :func:`titanlite.inference.load.load_model`.
        cached: cache keys and values; False: compute all tokens again for each new token.
        batch_size: the largest number of prompts that are computed together.

    Raises:
        ConfigError: the model cannot be loaded, or a prompt does not fit, of which nothing is computed then.
    """
    check_stop(stop)
    if batch_size < 1:
        raise ConfigError("must be at least 1", key="--batch_size", value=batch_size)
    with opened_writer(checkpoint, dtype, tokenizer_path, quantize=quantize, calibration=calibration) as writer:
        decoder, tokenizer, ends, process = writer
        tasks = tasks_of(givens, tokenizer, decoder.max_seq_len, max_new_tokens, ends, stop)
        total = Generated([], 0, 0.0, 0, 0.0)
        for batch in batches(tasks, batch_size, decoder):
            prompts, answers = [task.ids for task in batch], [task.answer for task in batch]
            total += generate_together(decoder, prompts, answers, sampling, cached=cached)
            yield from batch
        if process.rank == 0:
            numbers = dtype if quantize is None else f"{quantize}, {dtype}"
            processes = counted(process.world_size, "process")
            print(f"{numbers} on {process.device}, {processes}: {total.speed()}", file=sys.stderr)
