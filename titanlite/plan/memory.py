"""Count the memory and the traffic of a step while it runs on tensors without data.

Every operation of a step, forward and backward, passes a dispatch mode, which follows each storage from its allocation
to its end. The result is what a caching allocator calls active memory, without its rounding (512 bytes a tensor) and
its fragmentation. (For the memory of generated kernels, see :mod:`titanlite.plan.compiled_memory`.)
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PARAMETERS, OPTIMIZER, GRADIENTS = "parameters", "optimizer state", "gradients"
ACTIVATIONS, GATHERED, UNREDUCED = "activations", "gathered parameters", "unsharded gradients"
TEMPORARY = "optimizer temporaries"


@dataclass(eq=False)
class Allocation:
    """The memory of a storage, from the event ``born`` to the event ``died`` (None if it is still alive)."""

    nbytes: int
    kind: str
    born: int
    died: int | None = None


class Collective(NamedTuple):
    dimension: str
    name: str
    ranks: int


@dataclass
class Traffic:
    """The traffic of one collective over a step: ``nbytes`` of the whole tensors (gathered or to be reduced), and the
    bytes that each rank sends. The latter follow the ring algorithms that define NCCL's bus bandwidth (nccl-tests,
    PERFORMANCE.md): (n - 1) / n of ``nbytes`` for all-gather and reduce-scatter, twice that for all-reduce."""

    calls: int = 0
    nbytes: int = 0
    sent: int = 0

    def add(self, nbytes: int, share: float) -> None:
        self.calls += 1
        self.nbytes += nbytes
        self.sent += round(nbytes * share)


_c10d, _functional = torch.ops.c10d, torch.ops._c10d_functional
_NAMES = {
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "all_gather_into_tensor_out": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce",
    "all_to_all_single": "all-to-all",
    "alltoall_base_": "all-to-all",
    "shard_dim_alltoall": "all-to-all",
    "exchange_loads": "all-to-all",
    "to_experts": "all-to-all",
    "from_experts": "all-to-all",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
}


def copies_to_itself(func: Any, args: Any) -> bool:
    """Return whether an operator copies a tensor to itself, which does nothing."""
    return func is torch.ops.aten.copy_.default and args[0] is args[1]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def collective_of(func: Any, args: tuple[Any, ...], out: Any) -> tuple[ProcessGroup, str, int] | None:
    """Return the group, the name and the bytes of a collective; None for an operator that does not communicate."""
    packet = func._schema.name.split("::")[1]
    if packet not in _NAMES:
        return None
    boxed = [a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())]
    if boxed:
        group = ProcessGroup.unbox(boxed[0])
    else:
        name = next(a for a in reversed(args) if isinstance(a, str))
        group = _resolve_process_group(name)  # type: ignore[arg-type]
    if func.namespace == "c10d":
        whole = args[1 if packet == "_reduce_scatter_base_" else 0]
    else:
        whole = out if "all_gather" in packet else args[0]  # of an operator of titanlite's, what it sends
    return group, _NAMES[packet], sum(t.numel() * t.element_size() for t in _tensors(whole))


def _share(name: str, ranks: int) -> float:
    once = (ranks - 1) / ranks
    return {"all-reduce": 2 * once, "send": 1.0, "broadcast": 1.0, "receive": 0.0}.get(name, once)


@contextmanager
def _replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    """Replace a function of a class of torch, which passes no dispatch mode, to see it being called: torch has no hook
    for these. Nothing of titanlite is replaced."""
    old = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old)


class MemoryTracker(TorchDispatchMode):
    """Follows the memory of all tensors that are created inside this context. Enter it inside a ``FakeTensorMode``, or
    use real tensors. Tensors on the meta device have no memory.

    Args:
        dimensions: the name of the dimension of parallelism by the name of its process group.

    Attributes:
        live, peak: the memory now and its maximum, in bytes.
        segments: the maximum between two marks (:meth:`mark`), with the name of the first, in order.
    """

    def __init__(self, dimensions: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.dimensions = dimensions or {}
        self.live = self.peak = 0
        self.segments: list[tuple[str, int]] = [("", 0)]
        self.traffic: defaultdict[Collective, Traffic] = defaultdict(Traffic)
        self.all: list[Allocation] = []
        self._by_storage: dict[int, Allocation] = {}
        self._watched: dict[int, weakref.finalize[Any, Any]] = {}
        self._kind = ACTIVATIONS
        self._now = self._peak_at = 0
        self._paused = False
        self._dimension: str | None = None

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # the compiler's own tensors are not the step's

    # ---- for the caller

    @contextmanager
    def kind(self, name: str, dimension: str | None = None) -> Iterator[None]:
        """Label allocations inside this context with a kind, and collectives with a dimension."""
        before = self._kind, self._dimension
        self._kind, self._dimension = name, dimension or self._dimension
        try:
            yield
        finally:
            self._kind, self._dimension = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count allocations inside this context; :meth:`add` can count them later."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def restart_peak(self) -> None:
        """Restart the peak at the memory of now, and the count of collectives at zero."""
        self.peak, self._peak_at = self.live, self._now
        self.traffic.clear()
        self.segments.clear()
        self.mark("start")

    def mark(self, name: str) -> None:
        """Begin a segment."""
        self.segments.append((name, self.live))

    def at_peak(self) -> Counter[str]:
        """Return the bytes that were alive at the peak, by kind."""
        by_kind: Counter[str] = Counter()
        for a in self.all:
            if a.born <= self._peak_at and (a.died is None or a.died > self._peak_at):
                by_kind[a.kind] += a.nbytes
        return by_kind

    # ---- storages

    def add(self, tree: Any) -> None:
        """Count the storages of these tensors, unless they are counted already."""
        for tensor in _tensors(tree):
            if tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._by_storage and storage.nbytes():
                    self._born(key, storage.nbytes(), self._kind)
                    if key not in self._watched:
                        self._watched[key] = weakref.finalize(storage, self._ended, key)

    def name(self, tensors: Any, kind: str) -> None:
        """Change the kind of the storages of these tensors."""
        for tensor in _tensors(tensors):
            allocation = self._by_storage.get(tensor.untyped_storage()._cdata)
            if allocation is not None:
                allocation.kind = kind

    def _born(self, key: int, nbytes: int, kind: str) -> None:
        self._now += 1
        self._by_storage[key] = allocation = Allocation(nbytes, kind, self._now)
        self.all.append(allocation)
        self.live += nbytes
        name, peak = self.segments[-1]
        if self.live > peak:
            self.segments[-1] = name, self.live
        if self.live > self.peak:
            self.peak, self._peak_at = self.live, self._now

    def _died(self, key: int) -> Allocation | None:
        allocation = self._by_storage.pop(key, None)
        if allocation is not None:
            self._now += 1
            allocation.died = self._now
            self.live -= allocation.nbytes
        return allocation

    def _ended(self, key: int) -> None:
        self._died(key)
        self._watched.pop(key, None)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        """Count a storage after a resize. FSDP2 frees and refills gathered parameters so, without an operation."""
        key = storage._cdata
        before = self._died(key)
        if storage.nbytes():
            if key not in self._watched:
                self._watched[key] = weakref.finalize(storage, self._ended, key)
            self._born(key, storage.nbytes(), before.kind if before else self._frozen.get(key, self._kind))
        elif before is not None:
            self._frozen[key] = before.kind

    # ---- the mode

    def __enter__(self) -> MemoryTracker:
        self._frozen: dict[int, str] = {}
        resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            out = resize(storage, size)
            self._resized(storage)
            return out

        propagate = ShardingPropagator._propagate_tensor_meta_non_cached

        def propagate_paused(*args: Any) -> Any:
            with self.paused():  # DTensor infers shapes with tensors that are not part of the step
                return propagate(*args)

        self._patches = ExitStack()
        for owner, name, new in (
            (torch.UntypedStorage, "resize_", resize_),
            (ShardingPropagator, "_propagate_tensor_meta_non_cached", propagate_paused),
        ):
            self._patches.enter_context(_replaced(owner, name, new))
        _active.append(self)
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        _active.remove(self)
        self._patches.close()
        for watch in self._watched.values():
            watch.detach()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, Tensor) and t not in _PLAIN and not issubclass(t, FakeTensor) for t in types):
            return NotImplemented  # a subclass: its inner operations arrive here one by one
        out = func(*args, **(kwargs or {}))
        namespace = func.namespace
        if namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "titanlite"):
            self._count(func, args, out)
        if not self._paused:
            self.add(out)
        if namespace == "fsdp" or func is _c10d._reduce_scatter_base_.default or copies_to_itself(func, args):
            self._name_fsdp(func, args, kwargs or {}, out)
        return out

    def _count(self, func: Any, args: Any, out: Any) -> None:
        collective = collective_of(func, args, out)
        if collective is not None:
            group, name, nbytes = collective
            dimension = self._dimension or self.dimensions.get(group.group_name, "world")
            ranks = group.size()
            if ranks > 1:
                self.traffic[Collective(dimension, name, ranks)].add(nbytes, _share(name, ranks))

    def _name_fsdp(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Set the kind of FSDP2's parameters and gradients, by the operators that FSDP2 uses to move them."""
        name = func._schema.name.split("::")[1]
        if name == "all_gather_copy_in":
            self.name(out, GATHERED)
        elif name == "split_with_sizes_copy":
            self.name(kwargs["out"], GATHERED)
        elif name == "chunk_cat":
            self.name((args[0], kwargs["out"]), UNREDUCED)
        elif name in ("_reduce_scatter_base_", "copy_"):  # of one shard: titanlite/distributed/one_shard.py
            self.name(args[0], GRADIENTS)


_active: list[MemoryTracker] = []
_PLAIN = {Tensor, torch.nn.Parameter}


def active_tracker() -> MemoryTracker | None:
    """Return the innermost active tracker; None if there is none."""
    return _active[-1] if _active else None
