"""Examples: tokens, and which of them are scored. Encoders make them from the records of a data source."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from titanlite.data.records import Corrupt, no_field, text_of_record
from titanlite.data.tokenizer import Tokenizer

_WHOLE = re.compile(r"\s*-?[0-9]{1,18}\s*")


class Example(NamedTuple):
    """One example.

    Attributes:
        tokens: int32 [n].
        scored: bool [n]; True where the model is to predict this token from those before it. Never the first one. None:
            all tokens are; where a document follows another, its first one too.
    """

    tokens: NDArray[np.int32]
    scored: NDArray[np.bool_] | None


class Encoder(ABC):
    """Makes an :class:`Example` of a record.

    Attributes:
        identity: plain values; a position in the data is valid in another run only if these are equal.
        fields: the fields of a record that it reads, where the record has them. Empty: it is given the text alone.
    """

    identity: dict[str, str | int]
    fields: tuple[str, ...]

    @abstractmethod
    def encode(self, record: Mapping[str, Any]) -> Example:
        """Return the example of ``record``; raise :class:`Corrupt` if it cannot be used."""

    def encode_batch(self, records: Sequence[Any]) -> list[Example | Corrupt]:
        """Return the example of each record, or why it cannot be used."""
        examples: list[Example | Corrupt] = []
        for record in records:
            try:
                examples.append(self.encode(record))
            except Corrupt as fault:
                examples.append(fault)
        return examples


class TextEncoder(Encoder):
    """Makes BOS + text + EOS of a text; every token is scored."""

    fields = ()

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.identity = {}

    def encode(self, record: Any) -> Example:
        (example,) = self.encode_batch([record])
        assert isinstance(example, Example)
        return example

    def encode_batch(self, records: Sequence[Any]) -> list[Example | Corrupt]:
        """Return the examples of texts, on all cores."""
        examples: list[Example | Corrupt] = []
        for ids in self._tokenizer.encode_batch(records):
            tokens = np.empty(len(ids) + 2, dtype=np.int32)
            tokens[0], tokens[1:-1], tokens[-1] = self._tokenizer.bos_id, ids, self._tokenizer.eos_id
            examples.append(Example(tokens, None))
        return examples


def completion(tokenizer: Tokenizer, prompt: str, answer: str) -> Example:
    """Return BOS + prompt + answer + EOS, of which answer and EOS are scored.

    Prompt and answer are encoded apart. A token across their border would give the prompt other ids than it has when
    the model is used, where the answer is not there yet.
    """
    before = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    tokens = [*before, *tokenizer.encode_continuation(answer), tokenizer.eos_id]
    return Example(np.array(tokens, dtype=np.int32), np.arange(len(tokens)) >= len(before))


def labelled(record: Mapping[str, Any], field: str, label_field: str, options: Mapping[str, str]) -> int:
    """Return the label of ``record``, an index into the list of strings ``field``.

    Args:
        options: the option that names a field, by field; for messages.

    Raises:
        Corrupt: there is no such list, no label, or it is none of the list.
    """
    if field not in record:
        raise Corrupt(no_field(field, record, options.get(field)), "no field")
    texts = record[field]
    if not isinstance(texts, Sequence) or isinstance(texts, str) or not texts:
        raise Corrupt(f'the field "{field}" is not a list of texts', "no list")
    for text in texts:
        text_of_record({field: text}, field, options.get(field))
    if label_field not in record:
        raise Corrupt(no_field(label_field, record, options.get(label_field)), "no field")
    label = record[label_field]
    if isinstance(label, str) and _WHOLE.fullmatch(label):
        label = int(label)
    if type(label) is not int:
        raise Corrupt(
            f'the label "{label_field}" is no whole number ({str(label)[:40]!r}); it tells which of the texts in '
            f'"{field}" is right, from 0, and some sets leave it out of their test files',
            "label",
        )
    if not 0 <= label < len(texts):
        raise Corrupt(
            f'the label "{label_field}" is {label}, out of range: "{field}" has {len(texts)} texts, 0 to '
            f"{len(texts) - 1}",
            "label range",
        )
    return label
