"""Processes that meet in a store in which earlier ones left their keys."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import HashStore, PrefixStore, Store

from titanlite.distributed.rejoin import agree

TIMEOUT = timedelta(seconds=10)


def meet(store: Store, world_size: int, late: float = 0.0) -> list[Store]:
    """Each rank in a thread; rank 1 comes late."""
    stores: dict[int, Store] = {}

    def join(rank: int) -> None:
        time.sleep(late if rank == 1 else 0)
        stores[rank] = agree(store, rank, world_size, TIMEOUT)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [stores[rank] for rank in range(world_size)]


@pytest.mark.parametrize("late", [0.0, 0.3])
def test_no_attempt_sees_keys_of_another(late: float) -> None:
    store = HashStore()
    for attempt in range(4):
        parts = meet(store, 3, late)
        assert not any(part.check(["address"]) for part in parts)
        parts[2].set("address", str(attempt))
        assert [part.get("address") for part in parts] == [str(attempt).encode()] * 3


def test_who_died_while_joining_is_replaced() -> None:
    store = HashStore()
    with pytest.raises(TimeoutError):
        agree(store, 1, 2, timedelta(seconds=0.2))
    first, second = meet(store, 2, late=0.3)
    first.set("key", "value")
    assert second.get("key") == b"value"


def test_who_does_not_come_is_waited_for_in_vain() -> None:
    with pytest.raises(TimeoutError, match="the 2 processes did not meet"):
        agree(PrefixStore("", HashStore()), 1, 2, timedelta(seconds=0.2))
