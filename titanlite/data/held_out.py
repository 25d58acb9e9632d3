"""Split a source into two disjoint parts: documents for training, and documents held out for validation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from titanlite.data.sources import MIN_DOCUMENTS, Position, RandomAccessSource, Source, largest_divisor

_BLOCK = 1 << 20  # characters to encode at a time


def content_of(document: Any, fields: tuple[str, ...] | None) -> str:
    """Return the content of a document as a string: a text, or the ``fields`` of a record that are there."""
    if fields is None:
        return str(document)
    there = {field: document[field] for field in fields if document.get(field) is not None}
    return json.dumps(there, sort_keys=True, default=str)


def is_held_out(text: str, percent: float) -> bool:
    """Return True if a document belongs to the ``percent`` of all documents that are held out.

    The decision depends only on a hash of the text. It is therefore the same in every source, for every seed, order and
    number of processes, and for all copies of the document.
    """
    digest = hashlib.blake2b(digest_size=8)
    for begin in range(0, len(text), _BLOCK):
        digest.update(text[begin : begin + _BLOCK].encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest(), "big") < percent / 100 * 2**64


class PartOfSource(Source):
    """The held-out documents of ``source``, or all others; positions are those of ``source``.

    Attributes:
        read, kept: the number of documents that this process has read, and the number of them that are in this part.
    """

    def __init__(self, source: Source, percent: float, *, held_out: bool) -> None:
        super().__init__(source.options)
        self._source = source
        self._percent = percent
        self._held_out = held_out
        self.files = source.files
        self.identity = {**source.identity, "held_out_percent": str(percent)}
        self.read = self.kept = 0

    @property
    def skipped(self) -> int:
        return self._source.skipped

    def num_shards(self, at_most: int) -> int:
        """Return the number of shards: that of ``source`` for the training part. The held-out part is small and gets
        fewer: about 16 documents or more per shard, or, if the number of documents is unknown, one file or more."""
        if not self._held_out:
            return self._source.num_shards(at_most)
        if isinstance(self._source, RandomAccessSource):
            expected = self._source.num_documents * self._percent / 100
            return largest_divisor(at_most, int(expected) // MIN_DOCUMENTS)
        return largest_divisor(at_most, int(self._source.identity.get("files", at_most)))

    def location(self, shard: int, num_shards: int, epoch: int, position: Position) -> str:
        return self._source.location(shard, num_shards, epoch, position)

    def documents(self, shard: int, num_shards: int, epoch: int, start: Position) -> Iterator[tuple[Position, str]]:
        self._source.continues_older = self.continues_older
        for position, text in self._source.documents(shard, num_shards, epoch, start):
            self.read += 1
            if is_held_out(content_of(text, self.options.fields), self._percent) == self._held_out:
                self.kept += 1
                yield position, text
