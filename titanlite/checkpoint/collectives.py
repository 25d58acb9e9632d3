"""Collective calls between the processes that save or load together: if one fails on a process, it fails on all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from titanlite.checkpoint.folder import DamagedCheckpoint
from titanlite.errors import ConfigError

T = TypeVar("T")


class SaveError(Exception):
    """A checkpoint could not be written. Raised on all processes."""


def on_all(
    group: dist.ProcessGroup | None,
    function: Callable[[], T],
    failed: Callable[[list[str]], Exception] = lambda problems: SaveError("; ".join(problems)),
) -> list[T]:
    """Call ``function`` on every process; return all results, ordered by rank. If it raises on any of them, raise
    ``failed(problems)`` on all, with a line for each rank that it raised on."""
    try:
        result: tuple[T | None, str] = (function(), "")
    except Exception as e:  # any exception: the other processes must not wait for this one
        result = (None, f"rank {dist.get_rank()}: {message_of(e)}")
    results: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(results, result, group=group)
    errors = [error for _, error in results if error]
    if errors:
        raise failed(errors)
    return [value for value, _ in results]


def union_on_all(group: dist.ProcessGroup | None, part: Mapping[str, T]) -> dict[str, T]:
    """Return the entries of all processes together. Of those with the same ``part``, which exchange hashes of 32 bytes,
    one sends it: without a pipeline, rank 0 alone."""
    digest = torch.frombuffer(
        bytearray(hashlib.sha256(repr(sorted(part.items())).encode()).digest()), dtype=torch.uint8
    )
    digests = [torch.empty_like(digest) for _ in range(dist.get_world_size(group))]
    dist.all_gather(digests, digest, group=group)
    first = {bytes(d.tolist()): rank for rank, d in reversed([*enumerate(digests)])}
    union: dict[str, T] = {}
    for rank in sorted(first.values()):
        sent = [part]
        dist.broadcast_object_list(sent, src=rank, group=group)
        union |= sent[0]
    return union


def shapes_on_all(group: dist.ProcessGroup | None, state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors that all processes have together."""
    return union_on_all(group, {name: tuple(tensor.shape) for name, tensor in state.items()})


def from_rank_zero(group: dist.ProcessGroup | None, function: Callable[[], T]) -> T:
    """Call ``function`` on rank 0; return its result on every process.

    Raises:
        ConfigError: on every process, if ``function`` raised ConfigError or OSError.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except ConfigError as e:
            outcome[1] = e
        except OSError as e:
            outcome[1] = ConfigError(
                f"the checkpoints cannot be read: {e}; make them readable, or choose another folder"
            )
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def message_of(error: BaseException) -> str:
    if isinstance(error, DamagedCheckpoint):
        return "; ".join(error.problems)
    return str(error) if isinstance(error, (OSError, ConfigError)) else f"{type(error).__name__}: {error}"
