"""The sections [data], [validation] and [sample] of the schema; see :mod:`titanlite.config.schema`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from titanlite.config.value_rules import AnyPath, Percentage, Positive, PositiveOrAll


@dataclass
class Data:
    """Options that torchtitan of June 2025 does not have."""

    text_field: str = "text"
    """The field of a json or parquet document that holds its text."""
    prompt_field: str = "prompt"
    """The field of an example of training.dataset = "instruct" that holds what comes before the answer."""
    answer_field: str = "answer"
    """The field of such an example that holds the answer, which is learned: a string, or a list of strings of which one
    is right."""
    label_field: str = "label"
    """The field of such an example that tells which answer of a list is right: its number, from 0."""
    messages_field: str = "messages"
    """The field of an example of training.dataset = "chat" that holds the messages: a list of objects with role and
    content. The default reads conversations (from and value, of ShareGPT) too."""
    on_corrupt: Literal["stop", "skip"] = "stop"
    """If a document cannot be read: stop with an error (file and line), or skip it and count it in the log,
    metrics.jsonl and the summary."""
    packing: Literal["auto", "stream", "examples", "none"] = "auto"
    """Fill sequences with one document after the other, cut where a sequence ends (stream), with whole examples by best
    fit (examples), or with one example each (none). auto: examples if the data set has examples, else stream."""
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    """The action for an example of more tokens than a sequence, if data.packing is not stream: cut its end off, leave
    it out, or stop. An example of which nothing is left to learn is left out. Both count in skipped_documents."""
    document_mask: bool = False
    """Documents that share a sequence do not attend to each other, and each has positions from 0. The end of a document
    does not predict the beginning of the next one. Always so if data.packing is not stream. Not with context
    parallelism."""


@dataclass
class Validation:
    """The defaults are titanlite's own."""

    enable: bool = False
    """Compute the loss, and bits per byte, of text that training never sees."""
    dataset: str = ""
    """The data source of validation. Empty, or the same source and path as training: documents of the training data,
    held out from training. A source that shares files with the training data is refused."""
    dataset_path: AnyPath | None = None
    """The files of that source. Unset with an empty dataset: the training data's."""
    local_batch_size: Positive | None = None
    seq_len: Positive | None = None
    interval: Positive = 100
    """Validate every N steps, and after the last step."""
    steps: PositiveOrAll = 10
    """Batches of a validation, of the size of training batches; the same in every validation. Fewer if the text, read
    once, does not suffice."""
    held_out_percent: Percentage = 1.0
    """The share of the training data's documents that is held out; a hash of the text selects the documents."""
    precision: Literal["as_trained", "bfloat16"] = "as_trained"
    """bfloat16: validate layers that train in float8 in bfloat16 instead."""
    tasks: str = ""
    """A task whose accuracy each validation computes: hellaswag, or a file of context, endings and label, as for
    titanlite evaluate. Not under tensor, context or pipeline parallelism."""
    task_data: str | None = None
    """A copy of hellaswag's validation split. Unset: that on the Hugging Face hub."""
    max_examples: Positive | None = None
    """The most examples of the task, the first ones; unset: all."""


@dataclass
class Sample:
    """Options that torchtitan of June 2025 does not have."""

    enable: bool | None = None
    """After the last step, log how the model continues a prompt. Each token needs a forward, for which FSDP gathers all
    parameters. Unset: only for models of up to a billion parameters. Not under pipeline or context parallelism."""
    prompt: str | None = None
    """The text to continue; empty begins a document. Unset: "import" for pystdlib, empty for other data."""
    max_new_tokens: Positive = 64
    """The largest length of the sample, in tokens; prompt and sample together have at most training.seq_len tokens."""
