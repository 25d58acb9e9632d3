"""The endless stream of documents of one data shard, epoch after epoch, each with its place."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from titanlite.data.cut import cut
from titanlite.data.records import Corrupt
from titanlite.data.sources import START, Position, Source
from titanlite.errors import ConfigError, counted


class TooLittleText(ConfigError):
    """The documents of a data shard have fewer tokens in a whole epoch than one sequence needs."""


class Place(NamedTuple):
    """The place of the next token in a shard's stream: epoch, document, piece of it, and index in its tokens.

    Attributes:
        skipped: the number of documents that were left out before it, in all epochs.
        truncated: the number of examples before it that were too long for a sequence, and lost their end.
        lookahead: of a packer of whole examples; see :class:`titanlite.data.best_fit.ExamplePacker`.
    """

    epoch: int
    position: Position
    token: int
    piece: int = 0
    skipped: int = 0
    truncated: int = 0
    lookahead: tuple[int, ...] = ()

    def numbers(self) -> list[int]:
        """Return the place as plain numbers, for a state."""
        cut = [self.truncated, *self.lookahead] if self.lookahead else []
        return [self.epoch, *self.position, self.token, self.piece, self.skipped, *cut]

    @staticmethod
    def of(numbers: list[int]) -> Place:
        """Return the place of :meth:`numbers`; the last ones may be missing in older states."""
        epoch, part, document, token, *rest = numbers
        piece, skipped, truncated, *lookahead = (*rest, *[0] * (3 - len(rest)))
        return Place(epoch, Position(part, document), token, piece, skipped, truncated, tuple(lookahead))


BEGINNING = Place(0, START, 0)


class DocumentStream:
    """The documents of one shard: texts, or records of several fields. A long text is cut into pieces
    (:mod:`titanlite.data.cut`), and each is a document here.

    Args:
        seq_len: the length of a sequence, for messages.
        place: the first place to read.
    """

    def __init__(self, source: Source, shard: int, num_shards: int, seq_len: int, place: Place) -> None:
        self._source, self._shard, self._num_shards, self._seq_len = source, shard, num_shards, seq_len
        self.begin = place
        self._documents = self._read(place)

    def __next__(self) -> tuple[Place, Any]:
        """Return the next document, and the place of its first token."""
        return next(self._documents)

    def leave_out(self, place: Place, fault: Corrupt) -> None:
        """Report a document that was read, but cannot be used; see :meth:`Source.corrupt`."""
        self._source.corrupt(lambda: self.location(place), fault)

    def location(self, place: Place) -> str:
        """Return the file and line of a document, for messages."""
        return self._source.location(self._shard, self._num_shards, place.epoch, place.position)

    def _read(self, place: Place) -> Iterator[tuple[Place, Any]]:
        source = self._source
        epoch, (start, first_piece), skipped = place.epoch, (place.position, place.piece), place.skipped
        while True:
            empty = True
            # All shards of this process count in source.skipped; between two lines here, this one alone reads.
            before = source.skipped
            for position, document in source.documents(self._shard, self._num_shards, epoch, start):
                empty = False
                skipped += source.skipped - before
                pieces = cut(document) if isinstance(document, str) else iter([document])
                if source.continues_older and isinstance(document, str) and len(list(islice(cut(document), 2))) > 1:
                    source.differs_from_older("a document", f"of data shard {self._shard} is long and is cut")
                for piece, content in enumerate(pieces):
                    if piece >= first_piece or position != start:
                        yield Place(epoch, position, 0, piece, skipped), content
                before = source.skipped
            skipped += source.skipped - before
            if empty and start == START:
                self.require_a_sequence(0)
            epoch, start, first_piece = epoch + 1, START, 0

    def require_a_sequence(self, tokens: int) -> None:
        """Raise TooLittleText if the ``tokens`` of an epoch are no more than a sequence."""
        if tokens <= self._seq_len:
            skipped = self._source.skipped
            left_out = f" ({counted(skipped, 'document')} left out as unreadable)" if skipped else ""
            raise TooLittleText(
                f"training.seq_len = {self._seq_len}: a sequence and its last label need {self._seq_len + 1} tokens, "
                f"and data shard {self._shard} of {self._num_shards} has only {tokens} in a whole epoch{left_out}; use "
                "a smaller training.seq_len, a smaller training.global_batch_size (fewer shards), or more text"
            )

    def require_an_example(self, examples: int) -> None:
        """Raise TooLittleText if an epoch has no example that can be used."""
        if not examples:
            raise TooLittleText(
                f"data shard {self._shard} of {self._num_shards} has no example in a whole epoch that can be used "
                f"({self._source.skipped} are left out); see the warnings above, data.too_long and training.seq_len"
            )
