"""One virtual shard as an endless stream of tokens, cut into sequences."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from titanlite.data.sources import START, Position, Source
from titanlite.data.tokenizer import Tokenizer
from titanlite.errors import ConfigError

# Text to fetch per missing token. Less than most text needs: a second round costs little, and tokens that no
# sequence asks for yet only delay the first step.
_CHARACTERS_PER_TOKEN = 3


class TooLittleText(ConfigError):
    """A data shard has less than a sequence in a whole epoch."""


class Place(NamedTuple):
    """Where the next token of a shard's stream is: its epoch, its document, and its number in BOS + document + EOS."""

    epoch: int
    position: Position
    token: int


BEGINNING = Place(0, START, 0)


class ShardStream:
    """The endless stream of one shard: BOS + document + EOS, document after document, epoch after epoch.

    Sequence n is the tokens [n * seq_len, (n + 1) * seq_len] of the stream, both ends included: each is input once, and
    label once.
    """

    def __init__(self, source: Source, shard: int, num_shards: int, seq_len: int, place: Place) -> None:
        self._source = source
        self._shard = shard
        self._num_shards = num_shards
        self._seq_len = seq_len
        self.place = place
        # Documents that were tokenized and not used up yet, each from its first token.
        self._ready: deque[tuple[Place, NDArray[np.int32]]] = deque()
        self._num_ready = -place.token
        self._epoch = place.epoch
        # Tokens of the epoch so far; None in an epoch that was entered in its middle, on resume.
        self._epoch_tokens: int | None = 0 if place.position == START else None
        self._texts = self._read(place)

    def missing(self, sequences: int) -> int:
        """How many tokens the next ``sequences`` sequences still need."""
        return max(0, sequences * self._seq_len + 1 - self._num_ready)

    def fetch(self, characters: int) -> list[tuple[Place, str]]:
        """The next documents, of at least so many characters together."""
        documents: list[tuple[Place, str]] = []
        while characters > 0:
            place, text = next(self._texts)
            documents.append((place, text))
            characters -= len(text) + 2  # an empty document is two tokens
        return documents

    def add(self, place: Place, tokens: NDArray[np.int32]) -> None:
        """Append a document that was tokenized, its BOS and EOS included.

        Raises:
            TooLittleText: it begins a new epoch, and the one before had less than a sequence in it.
        """
        if place.epoch > self._epoch:
            if self._epoch_tokens is not None:
                self._require_a_sequence(self._epoch_tokens)
            self._epoch, self._epoch_tokens = place.epoch, 0
        if self._epoch_tokens is not None:
            self._epoch_tokens += len(tokens)
        self._ready.append((place, tokens))
        self._num_ready += len(tokens)

    def take(self, sequences: int) -> NDArray[np.int32]:
        """The next sequences, int32 [sequences, seq_len + 1]; moves on by ``sequences * seq_len`` tokens.

        ``missing(sequences)`` must be 0.
        """
        length = sequences * self._seq_len
        tokens = np.concatenate([document for _, document in self._ready])[self.place.token :]
        self._advance(length)
        rows = np.lib.stride_tricks.sliding_window_view(tokens[: length + 1], self._seq_len + 1)
        return rows[:: self._seq_len]

    def _advance(self, length: int) -> None:
        self._num_ready -= length
        token = self.place.token + length
        # The label of the last input is always ready too, so the last document is never used up here.
        while token >= len(self._ready[0][1]):
            token -= len(self._ready.popleft()[1])
        self.place = self._ready[0][0]._replace(token=token)

    def _read(self, place: Place) -> Iterator[tuple[Place, str]]:
        epoch, start = place.epoch, place.position
        while True:
            empty = True
            for position, text in self._source.documents(self._shard, self._num_shards, epoch, start):
                empty = False
                yield Place(epoch, position, 0), text
            if empty and start == START:
                self._require_a_sequence(0)
            epoch, start = epoch + 1, START

    def _require_a_sequence(self, tokens: int) -> None:
        if tokens <= self._seq_len:
            raise TooLittleText(
                f"training.seq_len = {self._seq_len}: a sequence and its last label need {self._seq_len + 1} tokens, "
                f"and data shard {self._shard} of {self._num_shards} has only {tokens} in a whole epoch; use a smaller "
                "training.seq_len, a smaller training.global_batch_size (fewer shards), or more text"
            )


def fill(streams: Collection[ShardStream], tokenizer: Tokenizer, sequences: int) -> None:
    """Make ``sequences`` sequences ready in every stream.

    All streams' documents are tokenized together, because the tokenizer works on a batch with all cores.
    """
    while short := [stream for stream in streams if stream.missing(sequences)]:
        fetched = [
            (stream, place, text)
            for stream in short
            for place, text in stream.fetch(stream.missing(sequences) * _CHARACTERS_PER_TOKEN)
        ]
        encoded = tokenizer.encode_batch([text for _, _, text in fetched])
        for (stream, place, _), ids in zip(fetched, encoded):
            document = np.empty(len(ids) + 2, dtype=np.int32)
            document[0], document[1:-1], document[-1] = tokenizer.bos_id, ids, tokenizer.eos_id
            stream.add(place, document)
