"""Multiple choice: a context and several endings, of which the model's most likely one is compared with the label.

The text of HellaSwag (https://arxiv.org/abs/1905.07830), the border between context and ending, and what is counted
are those of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness, version 0.4), so that the
numbers compare.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from titanlite.data import Tokenizer
from titanlite.data.files import JSON_SUFFIXES, find_files, with_compressed
from titanlite.data.readers import LinesReader
from titanlite.data.records import LONGEST_RECORD, Corrupt, decode_text
from titanlite.data.streamed import reading
from titanlite.errors import ConfigError, TrainingError, counted, renaming, shown
from titanlite.inference.score import Group, Scored, Scorer

HELLASWAG, _HUB, _SPLIT = "hellaswag", "Rowan/hellaswag", "validation"
_FIELDS = ("context", "endings", "label")
_HELLASWAG_FIELDS = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
_HUB_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Example:
    """A question of a task.

    Attributes:
        endings: as they are appended to the context, with the space between them where there is one.
        nbytes: the bytes of each ending in UTF-8, without that space.
        label: the index of the right ending.
        place: where it came from, for messages.
    """

    context: str
    endings: tuple[str, ...]
    nbytes: tuple[int, ...]
    label: int
    place: str


@dataclass(frozen=True)
class Accuracy:
    """The result of a task.

    Attributes:
        accuracy: the share of examples whose right ending has the largest log-likelihood.
        accuracy_norm: the same with the log-likelihood divided by the ending's bytes.
        stderr, stderr_norm: the standard errors of both; None for a single example.
        examples: their number.
        truncated: the number of examples that lost tokens at the beginning of the context.
        right: for each example, whether the model was right by either measure: what pairs two models.
    """

    accuracy: float
    accuracy_norm: float
    stderr: float | None
    stderr_norm: float | None
    examples: int
    truncated: int
    right: tuple[tuple[bool, bool], ...]

    def values(self) -> dict[str, float | None]:
        """Return the numbers by name, as ``--json`` shows them."""
        values = asdict(self)
        del values["truncated"], values["right"]
        return values


# ---- reading


def read_task(task: str, task_data: str | None = None, max_examples: int | None = None) -> list[Example]:
    """Return the examples of ``task``.

    Args:
        task: ``hellaswag``, or a file of JSON lines, a JSON array or parquet: records of ``context``, ``endings`` and
            ``label``, or of the fields of HellaSwag.
        task_data: a copy of ``hellaswag``, in one of these formats; None: its validation split on the Hugging Face hub.
        max_examples: read only so many; None: all.

    Raises:
        ConfigError: it cannot be read, a record is none of these, or there is none.
    """
    if max_examples is not None and max_examples < 1:
        raise ConfigError("must be at least 1", key="--max_examples", value=max_examples)
    if task_data is not None and task != HELLASWAG:
        raise ConfigError(
            f"is the local copy of {HELLASWAG}, and --tasks is {shown(task)}; leave it out, or name the file with "
            "--tasks",
            key="--task_data",
            value=task_data,
        )
    option, path = ("--tasks", task) if task_data is None else ("--task_data", task_data)
    records = _of_hub() if task == HELLASWAG and task_data is None else _of_file(option, path)
    examples = [_example(record, place) for place, record in islice(records, max_examples)]
    if not examples:
        raise ConfigError("there is no example in it; name a file with some", key=option, value=path)
    return examples


def _of_file(option: str, path: str) -> Iterator[tuple[str, Any]]:
    with renaming(lambda text: text.replace("training.dataset_path", option)):
        try:
            files = find_files(path, (".parquet", *with_compressed(*JSON_SUFFIXES)))
        except ConfigError as e:
            if option == "--tasks" and not os.path.lexists(path):
                e.why += f"; the only task with a name is {HELLASWAG}"
            raise
        for file in files:
            with reading(file):
                yield from _rows(file) if file.suffix.lower() == ".parquet" else _lines(file)


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as table:
        rows = (row for batch in table.iter_batches(1024) for row in batch.to_pylist())
        yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows, start=1))


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(LinesReader("").records(file, 0), start=1):
        place = f"{file}, record {number}"
        try:
            if len(line) > LONGEST_RECORD:
                raise ValueError("it is too long")
            yield place, json.loads(decode_text(line))
        except (ValueError, RecursionError, Corrupt) as e:
            raise ConfigError(f"{place}: no JSON ({e}); correct the file") from None


def _of_hub() -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset
    from huggingface_hub import HfApi

    try:
        # A request with a timeout first: without a network, load_dataset alone retries for 20 seconds or more.
        HfApi().dataset_info(_HUB, timeout=_HUB_TIMEOUT_S)
        rows = load_dataset(_HUB, split=_SPLIT)
    except Exception as e:  # exceptions of the hub library and of its HTTP library
        reason = (str(e).strip().splitlines() or ["no message"])[0]
        raise ConfigError(
            f"{_HUB} cannot be read from the Hugging Face hub ({type(e).__name__}: {reason}); check the network, or "
            "name a copy of its validation split with --task_data",
            key="--tasks",
            value=HELLASWAG,
        ) from e
    yield from ((f"{_HUB}, {_SPLIT}, row {number}", row) for number, row in enumerate(rows, start=1))


def _example(record: Any, place: str) -> Example:
    """Return a record as an example; raise ConfigError if it is none."""

    def refused(problem: str) -> ConfigError:
        return ConfigError(f"{place}: {problem}; correct the file")

    if not isinstance(record, dict):
        raise refused(f"is a JSON {type(record).__name__}, and must be an object")
    of_hellaswag = "context" not in record and "ctx_a" in record
    missing = [name for name in (_HELLASWAG_FIELDS if of_hellaswag else _FIELDS) if name not in record]
    if missing:
        raise refused(f'has no "{missing[0]}"; an example has {", ".join(_FIELDS)}, or the fields of {HELLASWAG}')
    endings = record["endings"]
    if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(ending, str) for ending in endings):
        raise refused('its "endings" must be a list of two texts or more')
    texts = [record[name] for name in (_HELLASWAG_FIELDS[:3] if of_hellaswag else _FIELDS[:1])]
    if not all(isinstance(text, str) for text in texts):
        raise refused("its context must be a text")
    if any(re.search("[\ud800-\udfff]", text) for text in (*texts, *endings)):
        raise refused("has half of a surrogate pair, which is no character")
    if "" in endings:
        raise refused(f"its ending {endings.index('')} is empty")
    context = texts[0]
    if of_hellaswag:
        activity, first, second = texts
        context = _without_artifacts(f"{activity}: {first} {second.capitalize()}")
        endings = [_without_artifacts(ending) for ending in endings]
    label = _label(record["label"])
    if label is None or not 0 <= label < len(endings):
        raise refused(
            f"label = {shown(record['label'])} must be the index of an ending, 0 to {len(endings) - 1}"
            + (f"; the test split of {HELLASWAG} has no labels, its validation split has" if label is None else "")
        )
    joined = tuple(_joined(context, ending, always=of_hellaswag) for ending in endings)
    return Example(context, joined, tuple(len(ending.encode()) for ending in endings), label, place)


def _label(value: object) -> int | None:
    """Return a label, which HellaSwag writes as a text; None if it is no integer."""
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _joined(context: str, ending: str, always: bool) -> str:
    """Return an ending with a space before it, unless the border has one already."""
    has_space = not context or context[-1].isspace() or ending[:1].isspace()
    return ending if has_space and not always else f" {ending}"


def _without_artifacts(text: str) -> str:
    """Return a text of HellaSwag without the marks of WikiHow, from which a part of it comes."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


# ---- scoring


def accuracy_of(
    scorer: Scorer,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    seq_len: int,
    progress: Callable[[str], None],
) -> Accuracy:
    """Return how often the model prefers the right ending; of two that are equal, it prefers the first.

    Raises:
        ConfigError: an ending has no tokens, or more than ``seq_len``.
        TrainingError: a log-likelihood is not finite.
    """
    truncated = 0

    def groups() -> Iterator[Group]:
        nonlocal truncated
        for example in examples:
            group, is_truncated = encode(example, tokenizer, seq_len)
            truncated += is_truncated
            yield group

    right: list[tuple[bool, bool]] = []
    for scores in scorer.scores(groups()):
        for example, log_likelihoods in zip(examples[len(right) :], scores):
            if not all(map(math.isfinite, log_likelihoods)):
                raise TrainingError(
                    f"{example.place}: the log-likelihoods of the endings are {log_likelihoods}: the model's weights "
                    "are damaged, or its training diverged"
                )
            by_bytes = [score / n if n else -math.inf for score, n in zip(log_likelihoods, example.nbytes)]
            best, best_by_bytes = (int(np.argmax(scores)) for scores in (log_likelihoods, by_bytes))
            right.append((best == example.label, best_by_bytes == example.label))
        progress(f"{len(right):,} of {counted(len(examples), 'example')}")
    n = len(right)
    accuracy, normalized = (sum(column) / n for column in zip(*right))
    errors = (standard_error(accuracy, n), standard_error(normalized, n))
    return Accuracy(accuracy, normalized, *errors, n, truncated, tuple(right))


def standard_error(share: float, n: int) -> float | None:
    """Return the standard error of a share of ``n`` examples: sqrt(sum (x - share)**2 / (n - 1)) / sqrt(n), x being 0
    or 1. None for a single example."""
    return math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None


def encode(example: Example, tokenizer: Tokenizer, seq_len: int) -> tuple[Group, bool]:
    """Return the tokens of context and ending, for each ending, of which those of the ending are scored, and whether
    the context was truncated.

    The spaces at the end of the context belong to the ending. The ending's tokens are those that follow as many tokens
    as the context has, in context and ending tokenized together. The context begins with BOS where the tokenizer adds
    it, and where there is nothing else. What is too long for the ``seq_len`` tokens that the model reads is cut off at
    the beginning.

    Raises:
        ConfigError: an ending has no tokens, or more than ``seq_len``.
    """
    context = example.context.rstrip()
    spaces = example.context[len(context) :]
    texts = [context, *(context + spaces + ending for ending in example.endings)]
    of_context, *wholes = tokenizer.encode_batch(texts)
    bos = np.full(1 if tokenizer.adds_bos or not len(of_context) else 0, tokenizer.bos_id, np.int32)
    before = np.concatenate((bos, of_context))
    group: list[Scored] = []
    is_truncated = False
    for number, whole in enumerate(wholes):
        ending = whole[len(of_context) :]
        if not 0 < len(ending) <= seq_len:
            rule = f"must be 1 to {seq_len}, what the model reads at a time (--seq_len)"
            raise ConfigError(f"{example.place}: its ending {number} has {counted(len(ending), 'token')}: {rule}")
        tokens = np.concatenate((before, ending))
        is_truncated |= len(tokens) > seq_len + 1
        tokens = tokens[-(seq_len + 1) :]
        group.append(Scored(tokens, len(tokens) - len(ending)))
    return group, is_truncated
