"""HellaSwag (https://arxiv.org/abs/1905.07830; ``Rowan/hellaswag`` on the hub): to train on, and to evaluate."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from titanlite.data.examples import Encoder, Example, completion, labelled
from titanlite.data.records import text_of_record
from titanlite.data.tokenizer import Tokenizer

_BRACKETS = re.compile(r"\[.*?\]")


class HellaSwagEncoder(Encoder):
    """BOS + ``ctx`` + a space + the right ending + EOS; ending and EOS are scored.

    ``ctx`` and ``endings[label]``, as they are, are what NeMo-Automodel's HellaSwag recipes train on. Two things are
    otherwise there: nothing is between the two, so that their words touch, and no EOS follows unless the tokenizer
    adds one. Here a space is between them, as in the text that they are of and in evaluation, and EOS ends the answer.
    The preprocessing of evaluation (:func:`choices`) is not used: it would be other data than the recipes name.
    """

    fields = ("ctx", "endings", "label")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.identity = {"encoder": "hellaswag"}

    def encode(self, record: Mapping[str, Any]) -> Example:
        context = text_of_record(record, "ctx", None)
        ending = record["endings"][labelled(record, "endings", "label", {})]
        return completion(self._tokenizer, context, f" {ending}")


class Choices(NamedTuple):
    """A question with several answers. A model is asked how probable a space and the ending are after the context.

    Attributes:
        label: the index of the right one in ``endings``.
    """

    context: str
    endings: list[str]
    label: int


def choices(record: Mapping[str, Any]) -> Choices:
    """Return the question of a record for evaluation: ``context``, ``endings`` and ``label`` as they are; or, of a
    record of HellaSwag, which has no ``context``, as lm-evaluation-harness prepares it.

    There the context is ``activity_label: ctx_a ctx_b``, ``ctx_b`` with a capital; and in context and endings
    " [title]" is a full stop, other brackets are left out (both are left from WikiHow), and two spaces are one.

    Raises:
        Corrupt: the record lacks a field, or the label is none of the endings.
    """
    label = labelled(record, "endings", "label", {})
    endings = list(record["endings"])
    if "context" in record:
        return Choices(text_of_record(record, "context", None), endings, label)
    activity, begin, end = (text_of_record(record, field, None) for field in ("activity_label", "ctx_a", "ctx_b"))
    return Choices(_clean(f"{activity}: {begin} {end.capitalize()}"), [_clean(ending) for ending in endings], label)


def _clean(text: str) -> str:
    return _BRACKETS.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")
