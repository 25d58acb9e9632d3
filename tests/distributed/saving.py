"""A worker: what the processes that save and load together tell each other."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from titanlite.checkpoint.collectives import union_on_all
from titanlite.config.schema import Comm
from titanlite.distributed.runtime import start_runtime, stop_runtime


class Broadcasts:
    """Counts the broadcasts of objects, while it is entered."""

    def __enter__(self) -> Broadcasts:
        self.sources: list[int] = []
        self._call = dist.broadcast_object_list
        dist.broadcast_object_list = self._counted
        return self

    def __exit__(self, *_: object) -> None:
        dist.broadcast_object_list = self._call

    def _counted(self, objects: list[Any], src: int, group: dist.ProcessGroup | None) -> None:
        self.sources.append(src)
        self._call(objects, src=src, group=group)


def unions() -> dict[str, Any]:
    """The union of parts that are the same on all ranks, on two of four, and on none; and which ranks sent one."""
    runtime = start_runtime(Comm())
    parts: dict[str, dict[str, Any]] = {
        "same": {"b": 2, "a": (1, 2)},
        "two": {"a": 1, "b": 2} if runtime.rank < 2 else {"b": 2, "c": 3},
        "each": {f"{runtime.rank}": runtime.rank},
        "none": {},
    }
    found = {}
    for name, part in parts.items():
        with Broadcasts() as sent:
            found[name] = [sorted(union_on_all(runtime.control, part)), sent.sources]
    stop_runtime()
    return found
