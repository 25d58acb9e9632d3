"""A worker: saves of one series on four processes, with plans that are kept, and what the processes tell each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from titanlite.checkpoint.background import BackgroundSaver
from titanlite.checkpoint.collectives import SaveError, union_on_all
from titanlite.checkpoint.folder import step_folder
from titanlite.checkpoint.hashing_file import HashingFile
from titanlite.checkpoint.plan_cache import PlanCache
from titanlite.checkpoint.storage import Info, load, save
from titanlite.config.schema import Comm
from titanlite.distributed.runtime import Runtime, start_runtime, stop_runtime

MODEL = {"name": "llama3", "flavor": "debugmodel", "args": {}}


class Copied(TorchDispatchMode):
    """Counts the bytes that copies write."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::copy_", "aten::clone", "aten::_to_copy"):
            self.nbytes += out.nbytes
        if func._schema.name == "aten::_foreach_copy_":
            self.nbytes += sum(copy.nbytes for copy in args[0])
        return out


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


def unions(runtime: Runtime) -> dict[str, Any]:
    """The union of parts that are the same on all ranks, on two of four, and on none; and which ranks sent one."""
    parts: dict[str, dict[str, Any]] = {
        "same": {"b": 2, "a": (1, 2)},
        "two": {"a": 1, "b": 2} if runtime.rank < 2 else {"b": 2, "c": 3},
        "each": {f"{runtime.rank}": runtime.rank},
        "none": {},
    }
    keys_and_sources = {}
    for name, part in parts.items():
        with Broadcasts() as sent:
            keys_and_sources[name] = [sorted(union_on_all(runtime.control, part)), sent.sources]
    return keys_and_sources


def sent_to_writer(root: Path, saver: BackgroundSaver, runtime: Runtime, mesh: DeviceMesh) -> dict[str, Any]:
    """Save tensors of more than a page in the background; return the sizes of the contents that went through the pipe,
    and whether the file is that of DCP's own writer."""
    whole = torch.arange(64.0 * 4096)
    shapes = [(64, 4096), (4096, 64), (64, 4096)]
    tensors = {f"model.{i}": distribute_tensor(whole.view(s) * i, mesh, [Shard(0)]) for i, s in enumerate(shapes)}
    copies, sizes = saver._copy(tensors, None), []
    assert saver._writer is not None
    send = saver._writer.send

    def recorded(kind: bytes, begin: int = 0, end: int = 0, content: Any = b"") -> None:
        sizes.append(len(content))
        send(kind, begin, end, content)

    saver._writer.send = recorded  # type: ignore[method-assign]
    folder = save(root, copies, Info(9, MODEL), runtime.control, new_file=saver.new_file)
    del saver._writer.send
    theirs = root.parent / "dcp"
    with torch.utils.serialization.config.patch({"save.compute_crc32": False}):
        dcp_save(copies, storage_writer=FileSystemWriter(theirs), process_group=runtime.control)
    name = f"__{runtime.rank}_0.distcp"
    return {"largest": max(sizes), "is DCP's": (folder / name).read_bytes() == (theirs / name).read_bytes()}


def report(folder: str) -> dict[str, Any]:
    """What was planned and read back after each save, by its name."""
    runtime = start_runtime(Comm())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    root, plans, outcomes = Path(folder, "checkpoint"), PlanCache("test"), {}

    def state(value: float, extra: bool = False) -> dict[str, Tensor]:
        whole = torch.arange(64.0).reshape(16, 4) * value
        tensors = {
            "model.sharded": distribute_tensor(whole, mesh, [Shard(0)]),
            "model.replicated": distribute_tensor(whole + 1, mesh, [Replicate()]),
            f"random.{runtime.rank}.torch": torch.full((3,), value + runtime.rank),
        }
        return {**tensors, **({"model.extra": whole + 2} if extra and runtime.rank == 0 else {})}

    def metadata() -> int:
        kept = [id(m) for key, m in SavePlanner._cached_metadata.items() if "test" in key]
        return kept[0] if kept else 0

    def attempt(step: int, tensors: dict[str, Tensor], new_file: Any = HashingFile) -> None:
        before = metadata()
        save(root, tensors, Info(step, MODEL), runtime.control, plans=plans, new_file=new_file)
        read = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        load(step_folder(root, step), read, runtime.control)
        full = [
            (a.full_tensor(), b.full_tensor()) if hasattr(a, "full_tensor") else (a, b)
            for a, b in zip(read.values(), tensors.values(), strict=True)
        ]
        same = all(torch.equal(a, b) for a, b in full)
        outcomes[f"step {step}"] = {"same": same, "planned": runtime.rank == 0 and metadata() != before}

    attempt(1, state(1.0))
    attempt(2, state(2.0))
    attempt(3, state(3.0, extra=True))
    attempt(4, state(4.0, extra=True))
    strange = state(5.0) | ({"model.sharded": torch.zeros(3)} if runtime.rank == 1 else {})  # no plan of all fits
    try:
        attempt(5, strange)
    except SaveError as e:
        outcomes["failed"] = str(e)
    outcomes["kept after a failure"] = len(plans)
    attempt(6, state(6.0))
    attempt(7, state(7.0))
    saver = BackgroundSaver(torch.device("cpu"), pin=False)
    copies = saver._copy(state(8.0), None)
    try:
        new_file = saver.new_file if runtime.rank != 1 else lambda path: saver.new_file("/dev/full")
        save(root, copies, Info(8, MODEL), runtime.control, plans=plans, new_file=new_file)
    except SaveError as e:
        outcomes["full"] = str(e)
    attempt(8, copies, saver.new_file)
    plans.clear()
    outcomes["unions"] = unions(runtime)

    outcomes["sent"] = sent_to_writer(root, saver, runtime, mesh)
    tensors, copied = {k: t for k, t in state(1.0).items() if k.startswith("model")}, []
    for _ in range(2):
        with Copied() as mode:
            copies = saver._copy(tensors, None)
        copied.append(mode.nbytes)
    outcomes["copied"] = copied
    outcomes["local bytes"] = sum(t.to_local().numel() * 4 for t in tensors.values())  # type: ignore[attr-defined]
    outcomes["copies are equal"] = all(torch.equal(copies[k].to_local(), t.to_local()) for k, t in tensors.items())  # type: ignore[attr-defined]
    saver.close()
    stop_runtime()
    return outcomes
