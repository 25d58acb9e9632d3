"""Evaluate a trained model: the loss of text, and the accuracy of choices between endings."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from titanlite.errors import ConfigError, counted
from titanlite.inference.documents import TextLoss, read_documents, text_loss
from titanlite.inference.load import LoadedModel, opened
from titanlite.inference.score import Scorer
from titanlite.inference.tasks import Accuracy, accuracy_of, read_task


@dataclass(frozen=True)
class Evaluation:
    """The result of :func:`evaluate`.

    Attributes:
        text: the loss of the documents; None: none were asked for.
        choices: the accuracy in the task; None: none was asked for.
        notes: what was left out or truncated, for stderr.
    """

    text: TextLoss | None
    choices: Accuracy | None
    notes: tuple[str, ...]

    def values(self) -> dict[str, Any]:
        """Return all numbers by name; None where there is none, such as the standard error of a single example."""
        values: dict[str, Any] = {}
        if (text := self.text) is not None:
            values |= {"loss": text.loss, "perplexity": text.perplexity, "bits_per_byte": text.bits_per_byte}
            values |= {"tokens": text.tokens, "bytes": text.nbytes, "documents": text.documents}
        if (choices := self.choices) is not None:
            values |= choices.values()
        return values

    def json(self) -> str:
        return json.dumps(self.values(), allow_nan=False)

    def table(self) -> str:
        """Return the numbers for people, a line for each."""
        values = self.values()
        errors = {"accuracy": values.pop("stderr", None), "accuracy_norm": values.pop("stderr_norm", None)}
        lines = []
        for name, value in values.items():
            text = "too large" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
            error = "" if errors.get(name) is None else f" +- {errors[name]:.4f}"
            lines.append(f"{name.replace('_', ' '):<15}{text}{error}")
        return "\n".join(lines)


def evaluate(
    checkpoint: str,
    data: str | None = None,
    tasks: str | None = None,
    *,
    text_field: str = "text",
    max_documents: int | None = None,
    task_data: str | None = None,
    max_examples: int | None = None,
    seq_len: int | None = None,
    dtype: str = "float32",
    tokenizer_path: str | None = None,
    quantize: str | None = None,
    calibration: str | None = None,
) -> Evaluation:
    """Return the loss of ``data``, the accuracy in ``tasks``, or both. On several processes, each has the whole model
    and computes a share; all return the same.

    Args:
        checkpoint, dtype, tokenizer_path, quantize, calibration: see :func:`titanlite.inference.load.opened`.
        data, text_field, max_documents: see :func:`titanlite.inference.documents.read_documents`.
        tasks, task_data, max_examples: see :func:`titanlite.inference.tasks.read_task`.
        seq_len: the most tokens that the model reads at a time; None: the positions that it has.

    Raises:
        ConfigError: neither was asked for, the model cannot be loaded, the data cannot be read, or there are none.
        TrainingError: a loss is not finite.
    """
    if data is None and tasks is None:
        raise ConfigError("nothing to evaluate: name text with --data, or a task with --tasks")
    for key, value, needed, given in (
        ("--max_documents", max_documents, "--data", data),
        ("--max_examples", max_examples, "--tasks", tasks),
        ("--task_data", task_data, "--tasks", tasks),
    ):
        if value is not None and given is None:
            raise ConfigError(f"has no effect without {needed}; leave it out", key=key, value=value)
    texts = None if data is None else read_documents(data, text_field, max_documents)
    examples = None if tasks is None else read_task(tasks, task_data, max_examples)
    with opened(checkpoint, dtype, tokenizer_path, quantize=quantize, calibration=calibration) as (loaded, _, process):
        seq_len = _checked_seq_len(seq_len, loaded)
        tokenizer = loaded.tokenizer
        scorer = Scorer(loaded.model, tokenizer.vocab_size, process)
        text = choices = None
        with _progress(process.rank) as progress:
            if texts is not None:
                text = text_loss(scorer, tokenizer, texts, seq_len, progress)
            if examples is not None:
                choices = accuracy_of(scorer, tokenizer, examples, seq_len, progress)
    notes = []
    if text is not None and text.left_out:
        notes.append(f"{data}: {counted(text.left_out, 'document')} without a token left out")
    if choices is not None and choices.truncated:
        lost = counted(choices.truncated, "example")
        notes.append(f"{tasks}: the context of {lost} lost its beginning, to fit in {seq_len} tokens")
    return Evaluation(text, choices, tuple(notes))


def _checked_seq_len(seq_len: int | None, loaded: LoadedModel) -> int:
    positions = loaded.max_seq_len
    if seq_len is not None and not 1 <= seq_len <= positions:
        raise ConfigError(f"must be 1 to {positions}, the positions of the model", key="--seq_len", value=seq_len)
    return seq_len or positions


@contextmanager
def _progress(rank: int) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows on a terminal how far the evaluation is; the line is cleared at the end."""
    if rank or not sys.stderr.isatty():
        yield lambda _: None
        return

    def show(text: str) -> None:
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        show("")
