"""The log-likelihoods of tokens under a model. Sequences of similar length go through it together, and the batches are
dealt to all processes, each of which has the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from titanlite.distributed.runtime import Runtime
from titanlite.errors import ConfigError, TrainingError
from titanlite.inference.generate import inference

# Positions of a forward pass, with the padding. On a CPU, the activations of more leave its caches.
_POSITIONS_ON_CPU, _POSITIONS_ON_GPU = 2048, 16384
_LOGITS = 1 << 29  # of a forward pass, which bounds the memory
_BATCHES = 32  # among which sequences of similar length are chosen
_ROWS = 1024  # whose logits are in float32 at a time


class Scored(NamedTuple):
    """A sequence of which some tokens are scored.

    Attributes:
        tokens: int32 [n]; the model reads all but the last one.
        first: the index of the first token that is scored, 1 or more; all after it are scored too.
    """

    tokens: NDArray[np.int32]
    first: int = 1


Group = Sequence[Scored]  # goes through the model in one batch
_Batch = list[tuple[int, Group]]


@dataclass(frozen=True)
class Scorer:
    """Computes log-likelihoods with ``model``, which maps int64 [batch, n] to logits [batch, n, vocabulary]. Its
    attention is causal, so that padding at the end changes nothing. ``vocab_size`` limits the memory for logits."""

    model: nn.Module
    vocab_size: int
    process: Runtime

    def scores(self, groups: Iterable[Group]) -> Iterator[list[list[float]]]:
        """Yield the log-likelihoods, in nats, of the scored tokens of each sequence, for the next groups in their
        order: a list for each group. All processes call this with the same groups, and get the same numbers, which do
        not depend on the number of processes.

        Raises:
            ConfigError, TrainingError: what ``groups`` raises on any process.
        """
        most = _POSITIONS_ON_CPU if self.process.device.type == "cpu" else _POSITIONS_ON_GPU
        positions = max(1, min(most, _LOGITS // self.vocab_size))
        windows = _windows(groups, positions)
        rank, ranks = self.process.rank, self.process.world_size
        while True:
            mine: dict[int, list[float]] = {}
            window: list[_Batch] | None = None
            error: Exception | None = None
            try:
                window = next(windows, None)
            except (ConfigError, TrainingError) as e:
                error = e
            batches = window or []
            # As many on every process, as sharded weights need: at the end, some compute the last one again.
            for number in range(rank, -(-len(batches) // ranks) * ranks, ranks):
                mine |= self._batch(batches[min(number, len(batches) - 1)])
            # Once for every window, so that no process waits long for another.
            outcomes: list[Any] = self.process.gather((mine, error))
            for _, error in outcomes:
                if error is not None:
                    raise error
            if window is None:
                return
            together: dict[int, list[float]] = {}
            for scores, _ in outcomes:
                together |= scores
            yield [together[index] for index in sorted(together)]

    def _batch(self, batch: _Batch) -> dict[int, list[float]]:
        """Return the log-likelihoods of the sequences of each group, by its number."""
        sequences = [sequence for _, group in batch for sequence in group]
        tokens = np.zeros((len(sequences), max(len(sequence.tokens) for sequence in sequences)), np.int64)
        for row, (ids, _) in zip(tokens, sequences):
            row[: len(ids)] = ids
            # Not a token of another text: what is not a number would spoil all others, even with a weight of 0.
            row[len(ids) :] = ids[-2]
        labels = torch.from_numpy(tokens).to(self.process.device)
        with inference(self.model):
            logits: Tensor = self.model(labels[:, :-1])
            sums = torch.stack(
                [
                    _log_likelihood(of_row[first - 1 : len(ids) - 1], targets[first : len(ids)])
                    for of_row, targets, (ids, first) in zip(logits, labels, sequences)
                ]
            )
        scores = iter(sums.tolist())
        return {index: [next(scores) for _ in group] for index, group in batch}


def _log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the log-likelihoods of ``targets`` [n] under ``logits`` [n, vocab_size], in float64: of
    each in float32."""
    parts = zip(logits.split(_ROWS), targets.split(_ROWS))
    losses = [F.cross_entropy(part.float(), targets, reduction="none") for part, targets in parts]
    return -torch.cat(losses).sum(dtype=torch.float64)


def _windows(groups: Iterable[Group], positions: int) -> Iterator[list[_Batch]]:
    """Yield the batches of the next groups: about 32 at a time, of at most ``positions`` with the padding, unless one
    group has more."""
    window: _Batch = []
    total = 0
    for index, group in enumerate(groups):
        window.append((index, group))
        total += len(group) * _longest(group)
        if total >= _BATCHES * positions:
            yield _batches(window, positions)
            window, total = [], 0
    if window:
        yield _batches(window, positions)


def _longest(group: Group) -> int:
    return max(len(sequence.tokens) for sequence in group) - 1


def _batches(window: _Batch, positions: int) -> list[_Batch]:
    """Divide a window into batches of groups of similar length, the longest first."""
    batches: list[_Batch] = []
    rows = longest = 0
    for index, group in sorted(window, key=lambda numbered: -_longest(numbered[1])):
        if not batches or (rows + len(group)) * longest > positions:
            batches.append([])
            rows, longest = 0, _longest(group)
        batches[-1].append((index, group))
        rows += len(group)
    return batches
