"""Examples: tokens, and which of them are scored. Encoders make them from the records of a data source."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from titanlite.data.records import Corrupt
from titanlite.data.tokenizer import Tokenizer


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
