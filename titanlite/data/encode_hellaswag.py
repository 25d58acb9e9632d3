"""HellaSwag (https://arxiv.org/abs/1905.07830; ``Rowan/hellaswag`` on the hub), to train on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titanlite.data.examples import Encoder, Example, completion, labelled
from titanlite.data.records import text_of_record
from titanlite.data.tokenizer import Tokenizer


class HellaSwagEncoder(Encoder):
    """BOS + ``ctx`` + a space + the right ending + EOS; ending and EOS are scored.

    ``ctx`` and ``endings[label]``, as they are, are what NeMo-Automodel's HellaSwag recipes train on. Two things are
    otherwise there: nothing is between the two, so that their words touch, and no EOS follows unless the tokenizer
    adds one. Here a space is between them, as in the text that they are of and in evaluation, and EOS ends the answer.
    The preprocessing of evaluation (``titanlite.inference.tasks``) is not used: it would be other data than the recipes
    name.
    """

    fields = ("ctx", "endings", "label")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.identity = {"encoder": "hellaswag"}

    def encode(self, record: Mapping[str, Any]) -> Example:
        context = text_of_record(record, "ctx", None)
        label = labelled(record, "endings", "label", {})
        return completion(self._tokenizer, context, f" {record['endings'][label]}")
