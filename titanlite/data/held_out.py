"""A source in two parts that share no document: what training reads, and what is held out for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from titanlite.data.sources import MIN_DOCUMENTS, Position, RandomAccessSource, Source, largest_divisor


def is_held_out(text: str, percent: float) -> bool:
    """Whether a document is among the ``percent`` of all that are held out.

    Its text alone decides, so that it is on the same side in every source, with every seed, order and number of
    processes, and so are all its copies.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < percent / 100 * 2**64


class PartOfSource(Source):
    """The documents of ``source`` that are held out, or those that are not; positions are those of ``source``.

    Attributes:
        read, kept: how many documents were read so far in this process, and how many of them belong to this part.
    """

    def __init__(self, source: Source, percent: float, *, held_out: bool) -> None:
        super().__init__(source.options)
        self._source = source
        self._percent = percent
        self._held_out = held_out
        self.files = source.files
        self.identity = {**source.identity, "held_out_percent": str(percent)}
        self.read = self.kept = 0

    def num_shards(self, at_most: int) -> int:
        """As the whole source for what is left of it. The few documents held out make fewer shards: of 16 documents,
        as far as one can tell, or where their number is not known, of a file."""
        if not self._held_out:
            return self._source.num_shards(at_most)
        if isinstance(self._source, RandomAccessSource):
            expected = self._source.num_documents * self._percent / 100
            return largest_divisor(at_most, int(expected) // MIN_DOCUMENTS)
        return largest_divisor(at_most, int(self._source.identity.get("files", at_most)))

    def documents(self, shard: int, num_shards: int, epoch: int, start: Position) -> Iterator[tuple[Position, str]]:
        for position, text in self._source.documents(shard, num_shards, epoch, start):
            self.read += 1
            if is_held_out(text, self._percent) == self._held_out:
                self.kept += 1
                yield position, text
