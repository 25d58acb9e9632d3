"""Packing of whole examples: no example is cut by the border of two sequences, and each is a document of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from titanlite.data.document_stream import DocumentStream, Place
from titanlite.data.examples import Example
from titanlite.data.packing import NOT_SCORED, Rows
from titanlite.data.records import Corrupt
from titanlite.data.sources import START
from titanlite.errors import ConfigError

# Sequences to look ahead for an example that fills a gap. With examples of half a sequence these are 8 candidates.
LOOKAHEAD = 4
_MOST_FETCHED = 1024


class _Waiting(NamedTuple):
    """An example that is in no sequence yet, and its number among the examples that were admitted."""

    place: Place
    number: int
    example: Example

    @property
    def size(self) -> int:
        return len(self.example.tokens) - 1


class ExamplePacker:
    """Packs the examples of one shard by best fit. A sequence begins with the example that has waited longest; then the
    largest that still fits follows, until none does. The rest is padding, which is not scored. All examples of an epoch
    are used before any of the next. An example of n tokens takes n - 1 positions: its last token is a label only.

    The place is that of the first example that waits, or else of the last one that was used. Its ``lookahead`` says how
    many examples have been admitted from there on, and which of them wait, so that a resumed run packs the same
    sequences.

    Args:
        padding: the token that fills a sequence.
        single: one example per sequence.
        too_long: the action for an example of more than seq_len + 1 tokens: "truncate", "drop" or "error".
    """

    def __init__(self, documents: DocumentStream, seq_len: int, *, padding: int, single: bool, too_long: str) -> None:
        self._documents, self._seq_len = documents, seq_len
        self._padding, self._single, self._too_long = padding, single, too_long
        self.place = place = documents.begin
        self._replayed, self._kept = (place.lookahead or (0,))[0], {*place.lookahead[1:]}
        self._encoded: deque[tuple[Place, Example]] = deque()  # not admitted yet
        self._waiting: list[_Waiting] = []
        self._admitted = 0
        self._sequences: list[list[_Waiting]] = []
        self._last = _Waiting(place._replace(lookahead=()), 0, Example(np.empty(0, np.int32), None))
        self._left_out, self._truncated = 0, place.truncated
        self._mean = 256.0  # tokens of an example, to fetch about as many as are needed
        self._epoch = place.epoch
        # Usable examples of this epoch so far; None if the stream resumed in the middle of the epoch.
        self._usable: int | None = 0 if place.position == START else None

    def missing(self, sequences: int) -> int:
        enough = 1 if self._single else LOOKAHEAD * self._seq_len
        while len(self._sequences) < sequences:
            waiting = sum(w.size for w in self._waiting)
            while self._encoded and not self._epoch_ends() and (waiting < enough or self._admitted < self._replayed):
                waiting += self._admit(*self._encoded.popleft())
            if not self._epoch_ends() and (waiting < enough or self._admitted < self._replayed):
                return max(1, enough - waiting)
            self._sequences.append(self._packed())
        return 0

    def _epoch_ends(self) -> bool:
        """Return True if all examples that wait are of one epoch, and the next one is of another."""
        return bool(self._waiting and self._encoded) and self._encoded[0][0].epoch > self._waiting[-1].place.epoch

    def fetch(self, missing: int) -> list[tuple[Place, Any]]:
        count = max(self._replayed - self._admitted, int(missing / self._mean) + 1)
        return [next(self._documents) for _ in range(min(_MOST_FETCHED, count))]

    def add(self, place: Place, example: Example | Corrupt) -> None:
        if place.epoch > self._epoch:
            if self._usable is not None:
                self._documents.require_an_example(self._usable)
            self._epoch, self._usable = place.epoch, 0
        usable = self._fitted(place, example) if isinstance(example, Example) else example
        if isinstance(usable, Corrupt):
            self._documents.leave_out(place, usable)
        if not isinstance(usable, Example):
            self._left_out += 1
            return
        if self._usable is not None:
            self._usable += 1
        self._mean = 0.99 * self._mean + 0.01 * len(usable.tokens)
        counted = place._replace(skipped=place.skipped + self._left_out, truncated=self._truncated)
        self._encoded.append((counted, usable))
        self._truncated += usable is not example and len(usable.tokens) == self._seq_len + 1

    def _fitted(self, place: Place, example: Example) -> Example | Corrupt | None:
        """Return the example if it fits into a sequence; else what ``too_long`` makes of it, None for nothing."""
        if len(example.tokens) < 2:
            return Corrupt("it has fewer than 2 tokens", "empty")
        if len(example.tokens) - 1 > self._seq_len:
            if self._too_long == "error":
                raise ConfigError(
                    f"{self._documents.location(place)}: it has {len(example.tokens) - 1} tokens, and a sequence "
                    f'{self._seq_len}; raise training.seq_len, or choose data.too_long = "truncate" or "drop"'
                )
            if self._too_long == "drop":
                return None
            scored = None if example.scored is None else example.scored[: self._seq_len + 1]
            example = Example(example.tokens[: self._seq_len + 1], scored)
        # A truncated example may have lost all of its answer.
        return example if example.scored is None or example.scored[1:].any() else None

    def _admit(self, place: Place, example: Example) -> int:
        """Let an example wait for a sequence; return its size, or 0 if it was used before the run was resumed."""
        self._last = _Waiting(place, self._admitted, example)
        self._admitted += 1
        if self._last.number < self._replayed and self._last.number not in self._kept:
            return 0
        self._waiting.append(self._last)
        return self._last.size

    def _packed(self) -> list[_Waiting]:
        sequence = [self._waiting.pop(0)]
        left = self._seq_len - sequence[0].size
        while not self._single:
            fitting = [i for i, w in enumerate(self._waiting) if w.size <= left]
            if not fitting:
                break
            sequence.append(self._waiting.pop(max(fitting, key=lambda i: (self._waiting[i].size, -i))))
            left -= sequence[-1].size
        return sequence

    def take(self, sequences: int) -> Rows:
        rows = [self._row([w.example for w in sequence]) for sequence in self._sequences[:sequences]]
        del self._sequences[:sequences]
        first = self._waiting[0] if self._waiting else self._last
        waiting = (w.number - first.number for w in self._waiting)
        self.place = first.place._replace(lookahead=(self._admitted - first.number, *waiting))
        inputs, labels, starts, lengths = (np.stack(arrays) for arrays in zip(*rows, strict=True))
        return Rows(inputs, labels, starts, lengths)

    def _row(self, examples: Sequence[Example]) -> Rows:
        inputs = np.full(self._seq_len, self._padding, dtype=np.int32)
        labels = np.full(self._seq_len, NOT_SCORED, dtype=np.int32)
        starts = np.empty(self._seq_len, dtype=np.int32)
        end = 0
        for example in examples:
            begin, end = end, end + len(example.tokens) - 1
            target = example.tokens[1:]
            inputs[begin:end], starts[begin:end] = example.tokens[:-1], begin
            labels[begin:end] = target if example.scored is None else np.where(example.scored[1:], target, NOT_SCORED)
        starts[end:] = end
        return Rows(inputs, labels, starts, np.array(end, dtype=np.int32))
