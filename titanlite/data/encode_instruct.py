"""Instructions: a prompt and its answer, or several answers and a label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titanlite.config.data_sections import Data
from titanlite.data.examples import Encoder, Example, completion, labelled
from titanlite.data.records import text_of_record
from titanlite.data.tokenizer import Tokenizer


class InstructEncoder(Encoder):
    """BOS + prompt + answer + EOS; answer and EOS are scored. Nothing is put between prompt and answer.

    The answer is a string, or a list of strings of which ``data.label_field`` names the right one, from 0.
    """

    def __init__(self, tokenizer: Tokenizer, data: Data) -> None:
        self._tokenizer = tokenizer
        self._prompt, self._answer, self._label = data.prompt_field, data.answer_field, data.label_field
        self._options = {
            data.prompt_field: "data.prompt_field",
            data.answer_field: "data.answer_field",
            data.label_field: "data.label_field",
        }
        self.fields = tuple(self._options)
        named = {"prompt_field": self._prompt, "answer_field": self._answer, "label_field": self._label}
        self.identity = {"encoder": "instruct", **named}

    def encode(self, record: Mapping[str, Any]) -> Example:
        prompt = text_of_record(record, self._prompt, "data.prompt_field")
        if isinstance(record.get(self._answer), (list, tuple)):
            answer = record[self._answer][labelled(record, self._answer, self._label, self._options)]
        else:
            answer = text_of_record(record, self._answer, "data.answer_field")
        return completion(self._tokenizer, prompt, answer)
