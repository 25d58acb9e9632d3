"""What a data source is, the registry of them, and how documents are shuffled and dealt to shards.

A source hands out documents (strings) by virtual shard. Which shard a document belongs to is fixed by the source, the
seed and the number of shards alone, so that training data do not depend on the number of processes.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from titanlite.errors import ConfigError
from titanlite.registry import Registry

logger = logging.getLogger(__name__)


class Position(NamedTuple):
    """Where a document stands in a shard's epoch; opaque to everyone but the source that gave it.

    ``part`` is the file of a streamed source (always 0 where documents are read at random), ``document`` the
    document in that part.
    """

    part: int
    document: int


START = Position(0, 0)

# Shards advance at the same rate in tokens. With few documents in each, their lengths differ so much that short
# documents would be repeated many times for each pass over the long ones.
MIN_DOCUMENTS = 16


@dataclass(frozen=True)
class SourceOptions:
    """What the builder of a source receives.

    Attributes:
        name: the source's name in the registry.
        path: ``training.dataset_path``; None or "" where unset.
        text_field: the field of a record that holds the text.
        on_corrupt: "stop" or "skip": what to do with a document that cannot be read.
        seed: decides which documents form a shard, and their order.
    """

    name: str
    path: str | None
    text_field: str
    on_corrupt: str
    seed: int


class Source(ABC):
    """A corpus.

    Attributes:
        identity: plain values that two runs must share for a position saved by one to mean the same in the other.
        skipped: documents left out as corrupt so far, in this process (``data.on_corrupt = "skip"``).
        files: the local files that it reads.
    """

    def __init__(self, options: SourceOptions) -> None:
        self.options = options
        self.identity: dict[str, str | int] = {"dataset": options.name, "seed": options.seed}
        self.skipped = 0
        self.files: list[Path] = []

    @abstractmethod
    def num_shards(self, at_most: int) -> int:
        """Into how many shards to deal the documents: a divisor of ``at_most``, the global batch size."""

    @abstractmethod
    def documents(self, shard: int, num_shards: int, epoch: int, start: Position) -> Iterator[tuple[Position, str]]:
        """One shard's documents in one epoch, each with its position, from ``start`` (inclusive) to the end.

        Raises:
            ConfigError: a document is corrupt and ``on_corrupt`` is "stop".
        """

    def corrupt(self, where: str, problem: str) -> None:
        """Report a document that cannot be read: raises, or counts it and warns the first time."""
        if self.options.on_corrupt == "stop":
            raise ConfigError(
                f'{where}: {problem}; correct the file, or leave out such documents with data.on_corrupt = "skip"'
            )
        if self.skipped == 0:
            logger.warning(f'{where}: {problem}; left out, and so is every other one (data.on_corrupt = "skip")')
        self.skipped += 1


class RandomAccessSource(Source):
    """A source whose documents are numbered: shuffled once by the seed, dealt, and reshuffled in every epoch."""

    def __init__(self, options: SourceOptions, num_documents: int) -> None:
        super().__init__(options)
        if num_documents == 0:
            raise ConfigError(
                "there is no document in it (all files are empty); point it at files with text",
                key="training.dataset_path",
                value=options.path,
            )
        self.num_documents = num_documents
        self.identity["documents"] = num_documents
        self._shuffled = permutation(num_documents, options.seed)

    @abstractmethod
    def read(self, index: int) -> str | None:
        """Document ``index``, or None where it is corrupt and was reported."""

    def num_shards(self, at_most: int) -> int:
        """The largest divisor of ``at_most`` that leaves every shard at least 16 documents, or else 1."""
        return largest_divisor(at_most, self.num_documents // MIN_DOCUMENTS)

    def documents(self, shard: int, num_shards: int, epoch: int, start: Position) -> Iterator[tuple[Position, str]]:
        members = self._shuffled[shard::num_shards]
        order = members[permutation(len(members), self.options.seed, epoch, shard)]
        for place in range(start.document, len(order)):
            text = self.read(int(order[place]))
            if text is not None:
                yield Position(0, place), text


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` that is not above ``limit``; 1 where that is below 1."""
    return max(d for d in range(1, min(number, max(1, limit)) + 1) if number % d == 0)


def permutation(size: int, *key: int) -> NDArray[np.int64]:
    """A permutation of range(size) that depends on ``key`` alone.

    Sorted raw draws of the bit generator, because numpy promises to keep those across its versions, and does not
    promise it for ``Generator.permutation``: a run resumed under another numpy must see the same order.
    """
    draws = np.random.PCG64(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(draws, kind="stable").astype(np.int64)


Builder = Callable[[SourceOptions], Source]
SOURCES: Registry[Builder] = Registry("data source", "training.dataset")


def build_source(
    name: str, *, path: str | None = None, text_field: str = "text", on_corrupt: str = "stop", seed: int
) -> Source:
    """The source called ``name`` (see :class:`SourceOptions` for the arguments).

    Raises:
        ConfigError: there is no such source, or its files are missing, unreadable or empty, or its hub is out of reach.
    """
    builder = SOURCES.get(name)
    if on_corrupt not in ("stop", "skip"):
        raise ConfigError('must be "stop" or "skip"', key="data.on_corrupt", value=on_corrupt)
    if seed < 0:
        raise ConfigError("must be 0 or more", key="training.seed", value=seed)
    return builder(SourceOptions(name, path or None, text_field, on_corrupt, seed))
