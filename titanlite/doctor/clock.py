"""Time functions that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)


def time_in_turn(
    ways: Mapping[Name, Callable[[], object]], device: torch.device, seconds: float, most: int = 15
) -> dict[Name, list[float]]:
    """Return the seconds of each way in each round. Others that use the machine meanwhile slow all of them.

    Args:
        seconds: for all rounds; three are made in any case.
        most: rounds.
    """

    def timed(way: Callable[[], object]) -> float:
        start = time.perf_counter()
        way()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for way in ways.values():  # compiles, fills caches
        if timed(way) < seconds:
            timed(way)
    taken: dict[Name, list[float]] = {name: [] for name in ways}
    end = time.perf_counter() + seconds
    for done in range(most):
        if done >= 3 and time.perf_counter() > end:
            break
        for name, way in ways.items():
            taken[name].append(timed(way))
    return taken
