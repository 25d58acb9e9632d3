"""Meeting again after torchrun has restarted the workers.

Its agents keep one store for all attempts (torch 2.11 to 2.13), in which workers find the addresses of those that were
killed and cannot connect. Those of one attempt therefore agree on a part of the store that none before them used.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

_JOINED, _ROSTER, _ACKNOWLEDGED, _START = (f"titanlite/{key}" for key in ("joined", "roster", "acknowledged", "start"))
_INTERVAL = 0.05  # seconds between two looks


def store_of_attempt(rank: int, world_size: int, timeout: timedelta) -> Store | None:
    """The store for ``init_process_group``; None where it can make its own, as nothing will be restarted."""
    if world_size == 1 or int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) == 0:
        return None
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    return agree(store, rank, world_size, timeout)


def agree(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """A part of ``store`` for these ``world_size`` processes alone, whatever earlier ones left in it.

    Each announces itself by a number of its own. Rank 0 writes down whom it sees until every one has acknowledged the
    same list: whoever is dead does not acknowledge, and whoever takes its place changes the list.

    Raises:
        TimeoutError: some did not come.
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
