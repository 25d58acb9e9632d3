"""The interface of data sources, their registry, and the shuffling and sharding of documents.

A source returns documents (strings) by virtual shard. The shard of a document depends only on the source, the seed and
the number of shards. So the training data do not depend on the number of processes.
"""

from __future__ import annotations

import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from titanlite.config.run_config import HUB
from titanlite.data.files import fingerprint
from titanlite.data.records import Corrupt
from titanlite.errors import ConfigError
from titanlite.registry import Registry

logger = logging.getLogger(__name__)


class Position(NamedTuple):
    """The position of a document in a shard's epoch. Only the source that made it can interpret it.

    ``part`` is the file of a streamed source, and always 0 in a random-access source. ``document`` is the index of the
    document in that part.
    """

    part: int
    document: int


START = Position(0, 0)

# The fewest documents per shard. All shards advance at the same rate in tokens. With few documents per shard, their
# lengths in tokens would differ so much that short shards repeat many times during one epoch of a long shard.
MIN_DOCUMENTS = 16

# The documents to look through for the extent of a fault.
_SURVEY = 100


@dataclass(frozen=True)
class SourceOptions:
    """The arguments of a source's builder.

    Attributes:
        name: the source's name in the registry.
        path: ``training.dataset_path``; None or "" if unset.
        text_field: the field of a record that holds the text.
        fields: the fields that an encoder reads; the source then returns records, as mappings. None: it returns texts.
        on_corrupt: the action for a document that cannot be read: "stop" or "skip".
        seed: determines the documents of each shard, and their order.
    """

    name: str
    path: str | None
    text_field: str
    on_corrupt: str
    seed: int
    fields: tuple[str, ...] | None = None


class Source(ABC):
    """A corpus of documents. The loader cuts long ones into pieces (:mod:`titanlite.data.cut`).

    Attributes:
        identity: plain values. A saved position is valid in another run only if these are equal.
        files: the local files that the source reads, in its order.
        continues_older: the position to continue from is of a titanlite that read some documents otherwise.
    """

    def __init__(self, options: SourceOptions, files: Sequence[Path] = ()) -> None:
        self.options = options
        self.identity: dict[str, str | int] = {"dataset": options.name, "seed": options.seed}
        self.files = list(files)
        if files:
            self.identity["content"] = fingerprint(files)
        self.continues_older = False
        self._skipped = 0

    @property
    def skipped(self) -> int:
        """The number of corrupt documents that this process has skipped (``data.on_corrupt = "skip"``)."""
        return self._skipped

    @abstractmethod
    def num_shards(self, at_most: int) -> int:
        """Return the number of shards, a divisor of ``at_most``, which is the global batch size."""

    @abstractmethod
    def documents(self, shard: int, num_shards: int, epoch: int, start: Position) -> Iterator[tuple[Position, str]]:
        """Yield (position, text) of one shard's documents in one epoch, from ``start`` (inclusive) to the end.

        Raises:
            ConfigError: a document is corrupt and ``on_corrupt`` is "stop".
        """

    def location(self, shard: int, num_shards: int, epoch: int, position: Position) -> str:
        """Return the place of a document that :meth:`documents` returned, for messages."""
        return f"document {position.document} of part {position.part} of data shard {shard}"

    def in_order(self) -> Iterator[str]:
        """Yield every document once, whole, in the order of the files where the source has one."""
        return (text for _, text in self.documents(0, 1, 0, START))

    def first_documents(self) -> Iterator[tuple[str, Corrupt | None]]:
        """Yield the location of each document in the order of the files, and what is wrong with it; for messages."""
        return iter(())

    def corrupt(self, locate: Callable[[], str], fault: Corrupt) -> None:
        """Report a corrupt document: raise ConfigError, or count it and log a warning for the first one.

        The order of the documents is random, so the error names the first document in the files that has the fault.

        Args:
            locate: returns the place of the document. It may read the file up to there, so only a message calls it.
        """
        if self.options.on_corrupt == "stop":
            first = list(itertools.islice(self.first_documents(), _SURVEY))
            same = [(place, other) for place, other in first if other is not None and other.kind == fault.kind]
            location, fault = same[0] if same else (locate(), fault)
            extent = f" (of the first {len(first)} documents, {len(same)} have this fault)" if len(same) > 1 else ""
            raise ConfigError(
                f"{location}: {fault}{extent}; correct the file, or leave out such documents with "
                'data.on_corrupt = "skip"'
            )
        if self._skipped == 0:
            logger.warning(f'{locate()}: {fault}; left out, as are all that cannot be read (data.on_corrupt = "skip")')
        self._skipped += 1

    def differs_from_older(self, location: str, difference: str) -> None:
        """Raise ConfigError if an older titanlite, whose position this run continues, read a document otherwise."""
        if self.continues_older:
            raise ConfigError(
                f"{location} {difference}: the titanlite that wrote the checkpoint read it otherwise, so the run "
                "cannot be continued exactly; start the data afresh with the checkpoint's weights: "
                'checkpoint.exclude_from_loading = ["dataloader"]'
            )


class RandomAccessSource(Source):
    """A source with indexed documents. They are shuffled once with the seed, dealt to shards, and in every epoch each
    shard is shuffled again."""

    def __init__(self, options: SourceOptions, num_documents: int, files: Sequence[Path] = ()) -> None:
        super().__init__(options, files)
        require_documents(num_documents, options)
        self.num_documents = num_documents
        self.identity["documents"] = num_documents
        self._shuffled = permutation(num_documents, options.seed)

    @abstractmethod
    def read(self, index: int) -> str | None:
        """Return document ``index``; if it is corrupt, report it with :meth:`corrupt` and return None."""

    def place_of(self, index: int) -> str:
        """Return the place of document ``index``, for messages."""
        return f"document {index}"

    def location(self, shard: int, num_shards: int, epoch: int, position: Position) -> str:
        return self.place_of(int(self._order(shard, num_shards, epoch)[position.document]))

    def _order(self, shard: int, num_shards: int, epoch: int) -> NDArray[np.int64]:
        members = self._shuffled[shard::num_shards]
        return members[permutation(len(members), self.options.seed, epoch, shard)]

    def in_order(self) -> Iterator[str]:
        return (text for index in range(self.num_documents) if (text := self.read(index)) is not None)

    def num_shards(self, at_most: int) -> int:
        """Return the largest divisor of ``at_most`` with at least 16 documents in every shard, or else 1."""
        return largest_divisor(at_most, self.num_documents // MIN_DOCUMENTS)

    def documents(self, shard: int, num_shards: int, epoch: int, start: Position) -> Iterator[tuple[Position, str]]:
        order = self._order(shard, num_shards, epoch)
        for index in range(start.document, len(order)):
            text = self.read(int(order[index]))
            if text is not None:
                yield Position(0, index), text


def require_documents(number: int, options: SourceOptions) -> None:
    """Raise a ConfigError if a source has no documents."""
    if not number:
        raise ConfigError(
            "there is no document in it (all files are empty); point it at files with text",
            key="training.dataset_path",
            value=options.path,
        )


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of ``number`` that is at most ``limit``; 1 if ``limit`` is below 1."""
    return max(d for d in range(1, min(number, max(1, limit)) + 1) if number % d == 0)


def permutation(size: int, *key: int) -> NDArray[np.int64]:
    """Return a permutation of range(size) that depends only on ``key``.

    It sorts raw draws of the bit generator. A run resumed with another version of numpy must see the same order, and
    numpy guarantees a stable stream across versions for these draws, but not for ``Generator.permutation``.
    """
    draws = np.random.PCG64(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(draws, kind="stable").astype(np.int64)


HUB_FORM = f"{HUB}owner/name"  # or hub:owner/name:subset
Builder = Callable[[SourceOptions], Source]
SOURCES: Registry[Builder] = Registry("data source", "training.dataset")


def build_source(
    name: str,
    *,
    path: str | None = None,
    text_field: str = "text",
    on_corrupt: str = "stop",
    seed: int,
    fields: tuple[str, ...] | None = None,
) -> Source:
    """Build the source registered as ``name`` (see :class:`SourceOptions` for the arguments).

    Raises:
        ConfigError: there is no such source, its files are missing, unreadable or empty, or the hub is not reachable.
    """
    builder = SOURCES.get(HUB_FORM if name.startswith(HUB) else name)
    if on_corrupt not in ("stop", "skip"):
        raise ConfigError('must be "stop" or "skip"', key="data.on_corrupt", value=on_corrupt)
    if seed < 0:
        raise ConfigError("must be 0 or more", key="training.seed", value=seed)
    return builder(SourceOptions(name, path or None, text_field, on_corrupt, seed, fields))
