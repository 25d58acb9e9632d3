"""The data loader: packs documents into sequences. Global batches do not depend on the number of processes.

The k-th global batch of B sequences depends only on the source, its seed, B, seq_len and the packing. The documents are
dealt to V virtual shards (V divides B). Each shard is an endless stream of encoded documents, which a packer makes into
sequences. Slot b of every global batch is the next sequence of shard b mod V. A rank owns a contiguous range of slots,
and reads the shards of these slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from titanlite.data.best_fit import ExamplePacker
from titanlite.data.document_stream import BEGINNING, DocumentStream, Place
from titanlite.data.examples import Encoder, TextEncoder
from titanlite.data.packing import Packer, Rows, StreamPacker, fill
from titanlite.data.prefetch import Prefetcher
from titanlite.data.sources import Source
from titanlite.data.tokenizer import Tokenizer
from titanlite.errors import ConfigError

_MOST = 1 << 62  # the largest epoch, document or token of a place


@dataclass(frozen=True)
class Batch:
    """The tokens of one data-parallel rank for one optimizer step.

    Attributes:
        inputs: int64 [n_microbatches, local_batch_size, seq_len].
        labels: int64, the same shape; ``labels[..., i]`` is the token after ``inputs[..., i]``, or -100 if it is not
            scored.
        starts: int64, the same shape: the index in its sequence at which the document of each token begins. None:
            attention does not regard the borders of documents.
        lengths: the tokens of each sequence before its padding, int64 [n_microbatches, local_batch_size]. None: no
            padding.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    starts: torch.Tensor | None = None
    lengths: torch.Tensor | None = None


# The way in which documents are read, in the state. A state without it is of a titanlite that did not cut long
# documents of JSON and parquet, and kept byte order marks.
_READING = 2

# Entries of the identity: the options that set them, and words for those that are no option.
_OPTIONS = {
    "dataset": "training.dataset",
    "seed": "training.seed",
    "seq_len": "training.seq_len",
    "global_batch_size": "training.global_batch_size",
    "text_field": "data.text_field",
    "held_out_percent": "validation.held_out_percent",
}
_WORDS = {
    "content": "the content of the files (a digest of their sizes and ends)",
    "documents": "the number of documents",
    "files": "the number of files",
}


@dataclass(frozen=True)
class Packing:
    """The way from documents to sequences.

    Attributes:
        kind: "stream": one document after the other, cut where a sequence ends; "examples": whole examples, by best
            fit; "none": one example per sequence.
        document_mask: tell the documents of a sequence apart (always, unless ``kind`` is "stream").
        too_long: the action for an example that is longer than a sequence: "truncate", "drop" or "error".
    """

    kind: str = "stream"
    document_mask: bool = False
    too_long: str = "truncate"

    @property
    def identity(self) -> dict[str, str | int]:
        """The entries of the identity on which a place in the data depends."""
        return {} if self.kind == "stream" else {"packing": self.kind, "too_long": self.too_long}

    def packer(self, documents: DocumentStream, seq_len: int, padding: int) -> Packer:
        if self.kind == "stream":
            return StreamPacker(documents, seq_len, mask=self.document_mask)
        single = self.kind == "none"
        return ExamplePacker(documents, seq_len, padding=padding, single=single, too_long=self.too_long)


class DataLoader:
    """An endless iterator of :class:`Batch`. A thread prepares the batches ahead of time.

    Args:
        seq_len: tokens per sequence.
        global_batch_size: sequences per optimizer step, over all ranks.
        local_batch_size: sequences per forward pass of this rank.
        dp_rank, dp_degree: the data-parallel rank of this process, and the number of data-parallel ranks.
        encoder: makes tokens of the source's documents; None: for text.
        pin_memory: put batches in page-locked memory, for asynchronous copies to a GPU.
        prefetch: the number of batches to keep ready.

    Attributes:
        identity: plain values; they must be equal on all ranks, or the batches do not form one global batch.

    Raises:
        ConfigError: the batch sizes do not divide. ``next()`` raises it too, if reading or packing fails.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        global_batch_size: int,
        local_batch_size: int,
        dp_rank: int,
        dp_degree: int,
        encoder: Encoder | None = None,
        packing: Packing = Packing(),
        pin_memory: bool = False,
        prefetch: int = 2,
    ) -> None:
        _check_sizes(seq_len, global_batch_size, local_batch_size, dp_degree)
        self._source = source
        self._encoder = encoder or TextEncoder(tokenizer)
        self._packing, self._padding = packing, tokenizer.eos_id
        self._seq_len = seq_len
        self._shape = (-1, local_batch_size, seq_len)
        self._pin_memory = pin_memory
        self._prefetch = prefetch
        self._num_shards = source.num_shards(global_batch_size)
        self._sequences_per_shard = global_batch_size // self._num_shards
        owned = global_batch_size // dp_degree
        slots = range(dp_rank * owned, (dp_rank + 1) * owned)
        self._first_slots = slots
        self._slots = [(slot % self._num_shards, slot // self._num_shards) for slot in slots]
        self.identity: dict[str, str | int] = {
            **source.identity,
            **self._encoder.identity,
            **packing.identity,
            "num_shards": self._num_shards,
            "global_batch_size": global_batch_size,
            "seq_len": seq_len,
            "vocab_size": tokenizer.vocab_size,
        }
        shards = sorted({shard for shard, _ in self._slots})
        self._progress = _Progress(0, dict.fromkeys(shards, BEGINNING))
        self._prefetcher: Prefetcher[tuple[Batch, _Progress]] | None = None
        self._closed = False

    def __iter__(self) -> DataLoader:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise RuntimeError("the loader was closed")
        # The thread starts here, not in the constructor, so that a position can be loaded first.
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self._batches(self._progress), self._prefetch)
        batch, self._progress = self._prefetcher.get()
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch that ``next()`` returned, for the shards that this rank reads.

        The values are plain strings and integers: ``step``, ``identity``, ``reading``, and ``shards``: shard number (a
        string) -> :meth:`Place.numbers`. Ranks that read the same shard return the same entry; see
        :func:`merge_states`.
        """
        shards = {str(shard): place.numbers() for shard, place in self._progress.shards.items()}
        reading = {} if self._source.continues_older else {"reading": _READING}
        return {"step": self._progress.step, "identity": dict(self.identity), "shards": shards, **reading}

    @property
    def skipped(self) -> int:
        """The number of corrupt documents left out up to the last batch that ``next()`` returned, since step 1.

        It counts the shards of which this data-parallel rank has the first slot: the sum over these ranks is that of
        all shards.
        """
        return sum(place.skipped for place in self._first_places())

    @property
    def truncated(self) -> int:
        """The number of examples that were cut to the length of a sequence; counted as :attr:`skipped`."""
        return sum(place.truncated for place in self._first_places())

    def _first_places(self) -> list[Place]:
        return [place for shard, place in self._progress.shards.items() if shard in self._first_slots]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, the merged state of all ranks; their number may have been another.

        Raises:
            ConfigError: the state has another corpus, seed, tokenizer size, global batch size or seq_len. ``next()``
                raises it later, where an older titanlite, which wrote the state, read a document otherwise.
            ValueError: the state lacks a shard that this rank reads, or holds a number that is no place.
        """
        if any(not 0 <= int(number) < _MOST for numbers in state["shards"].values() for number in numbers):
            raise ValueError("a place in the data is negative or too large")
        _, local_batch_size, _ = self._shape
        _check_identity(state["identity"], self.identity, local_batch_size, len(self._first_slots))
        missing = [shard for shard in self._progress.shards if str(shard) not in state["shards"]]
        if missing:
            raise ValueError(f"the state lacks the data shards {missing}: merge the states of all ranks first")
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
        saved = {shard: [int(number) for number in state["shards"][str(shard)]] for shard in self._progress.shards}
        places = {shard: Place.of(numbers) for shard, numbers in saved.items()}
        self._source.continues_older = "reading" not in state
        self._progress = _Progress(int(state["step"]), places)

    def close(self) -> None:
        """Stop the thread; ``state_dict()`` still works afterwards."""
        self._closed = True
        if self._prefetcher is not None:
            self._prefetcher.close()

    def _batches(self, begin: _Progress) -> Iterator[tuple[Batch, _Progress]]:
        """Yield the batch of each step after ``begin``, with the progress after that step."""
        packers = {
            shard: self._packing.packer(
                DocumentStream(self._source, shard, self._num_shards, self._seq_len, place),
                self._seq_len,
                self._padding,
            )
            for shard, place in begin.shards.items()
        }
        step = begin.step
        while True:
            fill(packers.values(), self._encoder, self._sequences_per_shard)
            rows = {shard: packer.take(self._sequences_per_shard) for shard, packer in packers.items()}
            step += 1
            progress = _Progress(step, {shard: packer.place for shard, packer in packers.items()})
            yield self._assemble(rows), progress

    def _assemble(self, rows: dict[int, Rows]) -> Batch:
        """Put the sequences of all shards, in the order of the slots, into the tensors of the microbatches."""

        def tensor(arrays: dict[int, NDArray[np.int32]]) -> torch.Tensor:
            array = np.stack([arrays[shard][sequence] for shard, sequence in self._slots]).astype(np.int64)
            result = torch.from_numpy(array).reshape(self._shape[: array.ndim + 1])
            return result.pin_memory() if self._pin_memory else result

        starts = {shard: r.starts for shard, r in rows.items() if r.starts is not None}
        lengths = {shard: r.lengths for shard, r in rows.items() if r.lengths is not None}
        return Batch(
            tensor({shard: r.inputs for shard, r in rows.items()}),
            tensor({shard: r.labels for shard, r in rows.items()}),
            tensor(starts) if starts else None,
            tensor(lengths) if lengths else None,
        )


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge the ``state_dict()`` of all ranks, taken after the same step, into one state of all shards."""
    merged = {**states[0], "shards": {}}
    for state in states:
        if (state["step"], state["identity"]) != (merged["step"], merged["identity"]):
            raise ValueError(f"states of different steps or runs: {state} and {states[0]}")
        merged["shards"].update(state["shards"])
    return merged


@dataclass(frozen=True)
class _Progress:
    """The number of steps made, and the position of each shard after them."""

    step: int
    shards: dict[int, Place]


def _check_sizes(seq_len: int, global_batch_size: int, local_batch_size: int, dp_degree: int) -> None:
    sizes = {
        "training.seq_len": seq_len,
        "training.local_batch_size": local_batch_size,
        "training.global_batch_size": global_batch_size,
    }
    for option, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{option} = {size}: must be at least 1")
    unit = local_batch_size * dp_degree
    if global_batch_size % unit:
        nearest = " or ".join(
            str(n) for n in (global_batch_size // unit * unit, -(-global_batch_size // unit) * unit) if n
        )
        raise ConfigError(
            "must be a multiple of training.local_batch_size x the "
            f"data-parallel degree = {local_batch_size} x {dp_degree} = {unit}; use {nearest}",
            key="training.global_batch_size",
            value=global_batch_size,
        )


def _check_identity(saved: dict[str, Any], current: dict[str, Any], local_batch_size: int, sequences: int) -> None:
    """Check that a saved place fits. ``sequences`` are those of a step that one data-parallel rank reads."""
    both: dict[str, tuple[Any, Any]] = {key: (saved.get(key), current.get(key)) for key in {**saved, **current}}
    # A state without these is of a titanlite that did not save them.
    unsaved = {"content", "text_field"} - saved.keys()
    changed = {key: (old, new) for key, (old, new) in both.items() if old != new and key not in unsaved}
    if not changed:
        return
    name, fix = next(iter(changed)), "restore that"
    if "global_batch_size" in changed:
        name = "global_batch_size"
        changed.pop("num_shards", None)  # follows from it
        fix = _restoring(int(changed[name][0]), local_batch_size, current[name] // sequences)
    differences = ", ".join(f"{_WORDS.get(key, key)} was {old}, is {new}" for key, (old, new) in changed.items())
    key = _OPTIONS.get(name, "")
    raise ConfigError(
        f"the checkpoint's place in the data does not fit this run: {differences}; {fix}, or start the data afresh "
        'with the checkpoint\'s weights: checkpoint.exclude_from_loading = ["dataloader"]',
        key=key,
        value=changed[name][1] if key else None,
    )


def _restoring(global_batch_size: int, local_batch_size: int, dp_degree: int) -> str:
    """Return what restores the global batch size of a run that continues on ``dp_degree`` data-parallel ranks."""
    if global_batch_size < dp_degree or global_batch_size % dp_degree:
        return f"continue it on a number of data-parallel processes that divides {global_batch_size}"
    share = global_batch_size // dp_degree
    fitting = max(size for size in range(1, local_batch_size + 1) if share % size == 0)
    smaller = f" --training.local_batch_size={fitting}" if fitting != local_batch_size else ""
    return f"continue it with --training.global_batch_size={global_batch_size}{smaller}"
