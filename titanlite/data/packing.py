"""Packing: cut the endless token stream of each virtual shard into sequences.

A sequence can hold several documents, or a part of one. Nothing marks the borders but BOS and EOS: attention crosses
them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from titanlite.data.cut import cut
from titanlite.data.sources import START, Position, Source
from titanlite.data.tokenizer import Tokenizer
from titanlite.errors import ConfigError, counted

# Characters to fetch per missing token; most text has more characters per token. Then a second, cheap fetch follows,
# while fetching too much would delay the first step.
_CHARACTERS_PER_TOKEN = 3


class TooLittleText(ConfigError):
    """The documents of a data shard have fewer tokens in a whole epoch than one sequence needs."""


class Place(NamedTuple):
    """The position of the next token in a shard's stream: epoch, document, piece of it, and index in BOS + piece + EOS.

    ``skipped`` is the number of corrupt documents that were left out before it, in all epochs.
    """

    epoch: int
    position: Position
    token: int
    piece: int = 0
    skipped: int = 0


BEGINNING = Place(0, START, 0)


class ShardStream:
    """The endless stream of one shard: BOS + document + EOS, document after document, epoch after epoch. A long
    document is cut into pieces (:mod:`titanlite.data.cut`), and each is a document here.

    Sequence n is the tokens n * seq_len to (n + 1) * seq_len of the stream, both included. So each token is an input
    once and a label once.
    """

    def __init__(self, source: Source, shard: int, num_shards: int, seq_len: int, place: Place) -> None:
        self._source = source
        self._shard = shard
        self._num_shards = num_shards
        self._seq_len = seq_len
        self.place = place
        # Tokenized documents with unused tokens, each stored from its first token.
        self._ready: deque[tuple[Place, NDArray[np.int32]]] = deque()
        self._num_ready = -place.token
        self._epoch = place.epoch
        # Tokens of this epoch so far; None if the stream resumed in the middle of the epoch.
        self._epoch_tokens: int | None = 0 if place.position == START else None
        self._texts = self._read(place)

    def missing(self, sequences: int) -> int:
        """Return the number of tokens that the next ``sequences`` sequences still need."""
        return max(0, sequences * self._seq_len + 1 - self._num_ready)

    def fetch(self, characters: int) -> list[tuple[Place, str]]:
        """Return the next documents: at least ``characters`` characters in total, counting BOS and EOS as one each."""
        documents: list[tuple[Place, str]] = []
        if self._num_ready < 0:  # it continues within a document: read that one before believing the place in it
            characters = 1
        while characters > 0:
            place, text = next(self._texts)
            documents.append((place, text))
            characters -= len(text) + 2  # BOS and EOS; an empty document has these two tokens
        return documents

    def add(self, place: Place, tokens: NDArray[np.int32]) -> None:
        """Append a tokenized document, including its BOS and EOS.

        Raises:
            TooLittleText: the document begins a new epoch, and the previous epoch was shorter than one sequence.
            ConfigError: the stream begins within a document, which is shorter.
        """
        if not self._ready and self.place.token >= len(tokens):
            raise ConfigError(
                f"the checkpoint continues at token {self.place.token} of a document, which has {len(tokens)}: it is "
                "another document, or the checkpoint is damaged; restore it, or start the data afresh with "
                "--checkpoint.exclude_from_loading=dataloader"
            )
        if place.epoch > self._epoch:
            if self._epoch_tokens is not None:
                self._require_a_sequence(self._epoch_tokens)
            self._epoch, self._epoch_tokens = place.epoch, 0
        if self._epoch_tokens is not None:
            self._epoch_tokens += len(tokens)
        self._ready.append((place, tokens))
        self._num_ready += len(tokens)

    def take(self, sequences: int) -> NDArray[np.int32]:
        """Return the next sequences, int32 [sequences, seq_len + 1]; advance by ``sequences * seq_len`` tokens.

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
        # The label of the last input is in the queue too, so this loop never empties the queue.
        while token >= len(self._ready[0][1]):
            token -= len(self._ready.popleft()[1])
        self.place = self._ready[0][0]._replace(token=token)

    def _read(self, place: Place) -> Iterator[tuple[Place, str]]:
        """Yield the pieces from ``place`` on, each with the place of its first token."""
        source = self._source
        epoch, (start, first_piece), skipped = place.epoch, (place.position, place.piece), place.skipped
        while True:
            empty = True
            # All shards of this process count in source.skipped; between two lines here, this one alone reads.
            before = source.skipped
            for position, text in source.documents(self._shard, self._num_shards, epoch, start):
                empty = False
                skipped += source.skipped - before
                if source.continues_older and len(list(islice(cut(text), 2))) > 1:
                    source.differs_from_older("a document", f"of data shard {self._shard} is long and is cut")
                for piece, content in enumerate(cut(text)):
                    if piece >= first_piece or position != start:
                        yield Place(epoch, position, 0, piece, skipped), content
                before = source.skipped
            skipped += source.skipped - before
            if empty and start == START:
                self._require_a_sequence(0)
            epoch, start, first_piece = epoch + 1, START, 0

    def _require_a_sequence(self, tokens: int) -> None:
        if tokens <= self._seq_len:
            skipped = self._source.skipped
            left_out = f" ({counted(skipped, 'document')} left out, which cannot be read)" if skipped else ""
            raise TooLittleText(
                f"training.seq_len = {self._seq_len}: a sequence and its last label need {self._seq_len + 1} tokens, "
                f"and data shard {self._shard} of {self._num_shards} has only {tokens} in a whole epoch{left_out}; use "
                "a smaller training.seq_len, a smaller training.global_batch_size (fewer shards), or more text"
            )


def fill(streams: Collection[ShardStream], tokenizer: Tokenizer, sequences: int) -> None:
    """Tokenize documents until every stream has ``sequences`` sequences ready.

    The documents of all streams are tokenized as one batch, because the tokenizer uses all cores for a batch.
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
