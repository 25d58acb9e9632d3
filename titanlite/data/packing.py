"""Packing: cut the endless token stream of each virtual shard into sequences.

A sequence can hold several documents, or a part of one. Without document masks nothing marks the borders but BOS and
EOS: attention crosses them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from titanlite.data.document_stream import DocumentStream, Place
from titanlite.data.examples import Encoder, Example
from titanlite.data.records import Corrupt
from titanlite.data.sources import START
from titanlite.errors import ConfigError

NOT_SCORED = -100  # as a label

# Characters to fetch per missing token; most text has more characters per token. Then a second, cheap fetch follows,
# while fetching too much would delay the first step.
_CHARACTERS_PER_TOKEN = 3
_CHARACTERS_PER_RECORD = 1000


class Rows(NamedTuple):
    """Sequences, int32 [n, seq_len] each, and their lengths; see :class:`titanlite.data.loader.Batch`."""

    inputs: NDArray[np.int32]
    labels: NDArray[np.int32]
    starts: NDArray[np.int32] | None
    lengths: NDArray[np.int32] | None = None  # [n]


class Packer(Protocol):
    """Makes the sequences of one shard.

    Attributes:
        place: where to continue after the last sequence that :meth:`take` returned.
    """

    place: Place

    def missing(self, sequences: int) -> int:
        """Return about how many tokens the next ``sequences`` sequences still need; 0 if none."""
        ...

    def fetch(self, missing: int) -> list[tuple[Place, Any]]:
        """Return the next documents, about ``missing`` tokens."""
        ...

    def add(self, place: Place, example: Example | Corrupt) -> None:
        """Append the example of a fetched document, or why it has none."""
        ...

    def take(self, sequences: int) -> Rows:
        """Return the next sequences. ``missing(sequences)`` must be 0."""
        ...


class StreamPacker:
    """The stream of one shard: example after example, epoch after epoch.

    Sequence n is the tokens n * seq_len to (n + 1) * seq_len of the stream, both included. So each token is an input
    once and a label once.

    Args:
        mask: tell the documents of a sequence apart. Then the first token of a document is no label.
    """

    def __init__(self, documents: DocumentStream, seq_len: int, *, mask: bool) -> None:
        self._documents, self._seq_len, self._mask = documents, seq_len, mask
        self.place = place = documents.begin
        # Examples with unused tokens, each stored from its first token.
        self._ready: deque[tuple[Place, Example]] = deque()
        self._num_ready = -place.token
        self._epoch = place.epoch
        # Tokens of this epoch so far; None if the stream resumed in the middle of the epoch.
        self._epoch_tokens: int | None = 0 if place.position == START else None
        self._left_out = 0

    def missing(self, sequences: int) -> int:
        return max(0, sequences * self._seq_len + 1 - self._num_ready)

    def fetch(self, missing: int) -> list[tuple[Place, Any]]:
        documents: list[tuple[Place, Any]] = []
        # If it continues within a document: read that one before believing the place in it.
        characters = missing * _CHARACTERS_PER_TOKEN if self._num_ready >= 0 else 1
        while characters > 0:
            place, document = next(self._documents)
            documents.append((place, document))
            # BOS and EOS count as one each; an empty document has these two tokens.
            characters -= len(document) + 2 if isinstance(document, str) else _CHARACTERS_PER_RECORD
        return documents

    def add(self, place: Place, example: Example | Corrupt) -> None:
        """Append an example.

        Raises:
            TooLittleText: it begins a new epoch, and the previous epoch was shorter than one sequence.
            ConfigError: the stream begins within a document, which is shorter.
        """
        if place.epoch > self._epoch:
            if self._epoch_tokens is not None:
                self._documents.require_a_sequence(self._epoch_tokens)
            self._epoch, self._epoch_tokens = place.epoch, 0
        if isinstance(example, Corrupt):
            self._documents.leave_out(place, example)
            self._left_out += 1
            return
        count = len(example.tokens)
        if not self._ready and self.place.token >= count:
            raise ConfigError(
                f"the checkpoint continues at token {self.place.token} of a document, which has {count}: it is "
                "another document, or the checkpoint is damaged; restore it, or start the data afresh with "
                "--checkpoint.exclude_from_loading=dataloader"
            )
        if self._epoch_tokens is not None:
            self._epoch_tokens += count
        self._ready.append((place._replace(skipped=place.skipped + self._left_out), example))
        self._num_ready += count

    def take(self, sequences: int) -> Rows:
        """Return the next sequences; advance by ``sequences * seq_len`` tokens."""
        length, begin, seq_len = sequences * self._seq_len, self.place.token, self._seq_len
        examples = [example for _, example in self._ready]
        tokens = np.concatenate([example.tokens for example in examples])[begin : begin + length + 1]
        inputs, labels, starts = tokens[:-1], tokens[1:], None
        if any(example.scored is not None for example in examples):
            scored = np.concatenate([np.full(len(e.tokens), True) if e.scored is None else e.scored for e in examples])
            labels = np.where(scored[begin : begin + length + 1][1:], labels, NOT_SCORED)
        if self._mask:
            begins = np.cumsum([0, *(len(example.tokens) for example in examples)]) - begin
            is_first = np.zeros(length + 1, dtype=bool)
            is_first[begins[(begins >= 0) & (begins <= length)]] = True
            labels = np.where(is_first[1:], NOT_SCORED, labels)
            is_first[:length:seq_len] = True
            index = np.arange(length, dtype=np.int32)
            starts = (np.maximum.accumulate(np.where(is_first[:-1], index, 0)) - index // seq_len * seq_len).reshape(
                sequences, seq_len
            )
        self._advance(length)
        return Rows(inputs.reshape(sequences, seq_len), labels.astype(np.int32).reshape(sequences, seq_len), starts)

    def _advance(self, length: int) -> None:
        self._num_ready -= length
        token = self.place.token + length
        # The label of the last input is in the queue too, so this loop never empties the queue.
        while token >= len(self._ready[0][1].tokens):
            token -= len(self._ready.popleft()[1].tokens)
        self.place = self._ready[0][0]._replace(token=token)


def fill(packers: Collection[Packer], encoder: Encoder, sequences: int) -> None:
    """Encode documents until every packer has ``sequences`` sequences ready.

    The documents of all packers are encoded as one batch, because the tokenizer uses all cores for a batch of texts.
    """
    while short := [(packer, missing) for packer in packers if (missing := packer.missing(sequences))]:
        fetched = [(packer, place, record) for packer, n in short for place, record in packer.fetch(n)]
        examples = encoder.encode_batch([record for _, _, record in fetched])
        for (packer, place, _), example in zip(fetched, examples, strict=True):
            packer.add(place, example)
