"""The rendezvous of workers that torchrun has restarted.

torchrun's agents keep one store for all attempts (torch 2.11 to 2.13). Restarted workers would find the addresses of
killed workers in it, and fail to connect. The workers of one attempt therefore agree on a new prefix in the store.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

_JOINED, _ROSTER, _ACKNOWLEDGED, _START = (f"titanlite/{key}" for key in ("joined", "roster", "acknowledged", "start"))
_INTERVAL = 0.05  # seconds between two polls


def store_of_attempt(rank: int, world_size: int, timeout: timedelta) -> Store | None:
    """Return the store for ``init_process_group``; None if torchrun will not restart workers, so the default works."""
    if world_size == 1 or int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) == 0:
        return None
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    return agree(store, rank, world_size, timeout)


def agree(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """Return a prefix of ``store`` for these ``world_size`` processes alone, whatever earlier processes left in it.

    Each process announces a random number. Rank 0 publishes the list of numbers that it sees, until all processes have
    acknowledged the same list. A dead process does not acknowledge, and its replacement changes the list.

    Raises:
        TimeoutError: not all processes came within ``timeout``.
    """
    number, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(f"{_JOINED}/{rank}", number)
    everybody = [f"{_JOINED}/{r}" for r in range(world_size)]
    roster: list[str] = []
    while True:
        if rank == 0:
            joined = [value.decode() for value in store.multi_get(everybody)]
            if joined != roster:
                roster = joined
                store.set(_ROSTER, json.dumps(roster))
        elif store.check([_ROSTER]):
            roster = json.loads(store.get(_ROSTER))
        if len(roster) == world_size and roster[rank] == number:
            name = "-".join((str(uuid.uuid5(uuid.NAMESPACE_OID, "".join(roster))), str(world_size)))
            store.set(f"{_ACKNOWLEDGED}/{rank}", name)
            if rank == 0 and _all_acknowledge(store, world_size, name):
                store.set(_START, name)
            if store.check([_START]) and store.get(_START).decode() == name:
                return PrefixStore(name, store)
        if time.monotonic() > end:
            raise TimeoutError(f"rank {rank}: the {world_size} processes did not meet within {timeout}")
        time.sleep(_INTERVAL)


def _all_acknowledge(store: Store, world_size: int, name: str) -> bool:
    keys = [f"{_ACKNOWLEDGED}/{rank}" for rank in range(world_size)]
    return store.check(keys) and all(value.decode() == name for value in store.multi_get(keys))
