"""The bytes that a Triton kernel reads and writes, by Triton's interpreter.

The interpreter runs some programs of the grid. A load returns zeros, a store does nothing, and both note their
addresses, so that no memory is needed. The counts of these programs stand for all of them.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle, interpreter_builder

SECTOR = 32  # bytes: the smallest transfer of NVIDIA's and AMD's second-level cache
SAMPLED = 1  # programs of a grid: all but those at its ends do the same
ROUNDS = 4  # of a loop
_SPACE = 40  # bits of an address within a buffer


@dataclass(frozen=True)
class Pointer:
    """An argument of a kernel: an address in a buffer that does not exist.

    Attributes:
        buffer: its number; arguments that share memory have the same one.
        offset: bytes.
        size: the bytes of the buffer that the tensor covers.
    """

    buffer: int
    offset: int
    size: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return (self.buffer + 1 << _SPACE) + self.offset


@dataclass
class Traffic:
    """Bytes of one kernel.

    Attributes:
        read, written: what is touched, once; a second pass over it within a program counts again.
        sectors: the same, in whole sectors of 32 bytes.
        once: read and written, without second passes.
    """

    read: float = 0
    written: float = 0
    sectors: float = 0
    once: float = 0

    @property
    def total(self) -> float:
        return self.read + self.written


@dataclass
class _Accesses:
    """The accesses of one program to one buffer.

    Attributes:
        addresses: the unique addresses of each load or store.
        weights: how often each load or store stands for itself; see :meth:`_Observer.range`.
    """

    addresses: list[np.ndarray[Any, Any]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    itemsize: int = 1

    def bytes(self) -> tuple[float, float, float]:
        """Return the distinct bytes, those of repeated accesses, and the sectors' bytes per distinct byte."""
        distinct, first = np.unique(np.concatenate(self.addresses), return_index=True)
        weights = np.repeat(self.weights, [len(addresses) for addresses in self.addresses])
        size = weights[first].sum() * self.itemsize
        again = weights.sum() * self.itemsize - size
        sectors = len(np.unique(distinct // SECTOR)) * SECTOR
        return size, again, max(sectors / (len(distinct) * self.itemsize), 1.0)


class _Observer:
    """Takes the place of the interpreter's loads and stores."""

    def __init__(self) -> None:
        self.accesses: dict[tuple[int, bool], _Accesses] = defaultdict(_Accesses)
        self._weight = 1.0

    def range(self, start: Any, stop: Any = None, step: Any = 1, **_: Any) -> Iterator[tl.tensor]:
        """Take the place of a loop: of many rounds, run the first few, which then stand for all."""
        bounds = [
            int(bound.handle.data.item()) if isinstance(bound, tl.tensor) else int(bound)
            for bound in (start, stop, step)
        ]
        rounds = range(*bounds)
        run = rounds[:ROUNDS]
        before, self._weight = self._weight, self._weight * len(rounds) / max(len(run), 1)
        for number in run:
            yield interpreter._implicit_cvt(number)
        self._weight = before

    def note(self, pointers: TensorHandle, mask: TensorHandle | None, *, is_store: bool) -> None:
        addresses = np.asarray(pointers.data).ravel()
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, pointers.data.shape).ravel()]
        if not len(addresses):
            return
        addresses = np.unique(addresses)
        accesses = self.accesses[int(addresses[0]) >> _SPACE, is_store]
        accesses.addresses.append(addresses)
        accesses.weights.append(self._weight)
        accesses.itemsize = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)

    def load(self, pointers: TensorHandle, mask: Any, other: Any, *_: Any) -> TensorHandle:
        self.note(pointers, mask, is_store=False)
        dtype = pointers.get_element_ty()
        return TensorHandle(np.zeros(pointers.data.shape, interpreter._get_np_dtype(dtype)), dtype)

    def store(self, pointers: TensorHandle, value: Any, mask: Any, *_: Any) -> None:
        self.note(pointers, mask, is_store=True)

    def atomic(self, operation: Any, pointers: TensorHandle, value: TensorHandle, mask: Any, *_: Any) -> TensorHandle:
        self.note(pointers, mask, is_store=True)
        return TensorHandle(np.zeros_like(value.data), value.dtype.scalar)


def _converted(source: TensorHandle, dtype: Any, *_: Any) -> TensorHandle:
    """Take the place of a conversion between floating-point numbers, which is slow for float8."""
    return TensorHandle(np.zeros(source.data.shape, interpreter._get_np_dtype(dtype.scalar)), dtype.scalar)


@dataclass(frozen=True)
class Part:
    """Programs of a grid that do the same work. A combined kernel has several parts.

    Attributes:
        programs: their number.
        index: program 0 to ``programs`` - 1 -> its place in the grid.
    """

    programs: int
    index: Callable[[int], tuple[int, int, int]]


def whole(grid: tuple[int, ...]) -> Part:
    """Return the part that has all programs of ``grid``."""
    x, y, z = (*grid, *(1,) * (3 - len(grid)))
    return Part(x * y * z, lambda program: (program % x, program // x % y, program // (x * y)))


def count(
    kernel: InterpretedFunction, grid: tuple[int, ...], arguments: Mapping[str, Any], parts: Sequence[Part] = ()
) -> Traffic:
    """Count the bytes of ``kernel[grid](**arguments)``, where tensors are given as :class:`Pointer`.

    What all programs of a part touch together is the sum over programs, but at most the size of the tensors: what
    several programs read is in the second-level cache. Parts of a combined kernel share no cache: they run one after
    the other.
    """
    sizes: dict[int, int] = defaultdict(int)
    for pointer in {argument for argument in arguments.values() if isinstance(argument, Pointer)}:
        sizes[pointer.buffer + 1] += pointer.size
    traffic = Traffic()
    for part in parts or (whole(grid),):
        _count_part(kernel, grid, arguments, part, sizes, traffic)
    return traffic


def _count_part(
    kernel: InterpretedFunction,
    grid: tuple[int, ...],
    arguments: Mapping[str, Any],
    part: Part,
    sizes: Mapping[int, int],
    traffic: Traffic,
) -> None:
    """Add the bytes of one part to ``traffic``. ``sizes``: the bytes of each buffer."""
    sampled = min(part.programs, SAMPLED)
    totals: dict[tuple[int, bool], list[tuple[float, float, float]]] = defaultdict(list)
    for sample in range(sampled):
        program = part.programs * (2 * sample + 1) // (2 * sampled)
        for key, accesses in _run(kernel, grid, part.index(program), arguments).items():
            totals[key].append(accesses.bytes())
    per = part.programs / sampled
    for (buffer, is_store), counts in totals.items():
        distinct = per * sum(size for size, _, _ in counts)
        share = min(1.0, sizes[buffer] / distinct)
        size = share * (distinct + per * sum(again for _, again, _ in counts))
        inflation = sum(size * ratio for size, _, ratio in counts) / sum(size for size, _, _ in counts)
        traffic.read += 0 if is_store else size
        traffic.written += size if is_store else 0
        traffic.sectors += size * inflation
        traffic.once += share * distinct


def _first_of(reduction: Any, inputs: Any) -> list[Any]:
    """Take the place of a reduction by any function, which the interpreter computes element by element: return the
    first element. The values do not matter here."""
    inputs, axis = reduction.unravel(inputs, reduction.axis)
    values = (np.take(value.handle.data, [0], axis) for value in inputs)
    values = (value if reduction.keep_dims else np.squeeze(value, axis) for value in values)
    return [reduction.to_tensor(value, tensor.dtype) for value, tensor in zip(values, inputs, strict=True)]


def _run(
    kernel: InterpretedFunction, grid: tuple[int, ...], index: tuple[int, ...], arguments: Mapping[str, Any]
) -> dict[tuple[int, bool], _Accesses]:
    observer = _Observer()
    function = kernel.rewrite()
    annotations = inspect.get_annotations(kernel.fn)
    constants = {name for name, kind in annotations.items() if kind is tl.constexpr or str(kind).endswith("constexpr")}
    bound = {
        name: value if name in constants or value is None else interpreter._implicit_cvt(value)
        for name, value in inspect.getcallargs(function, **arguments).items()
    }
    replaced = {
        "create_masked_load": observer.load,
        "create_masked_store": observer.store,
        "create_atomic_rmw": observer.atomic,
        "create_fp_to_fp": _converted,
    }
    patch, reduce = interpreter._patch_lang, interpreter.ReduceOps.generic_reduce

    def patch_with_range(function: Any) -> Any:  # called for each device function
        scope = patch(function)
        tl.range = observer.range
        return scope

    scope = patch_with_range(kernel.fn)
    try:
        interpreter._patch_lang, interpreter.ReduceOps.generic_reduce = patch_with_range, _first_of
        for name, method in replaced.items():
            setattr(interpreter_builder, name, method)
        interpreter_builder.set_grid_dim(*grid, *(1,) * (3 - len(grid)))
        interpreter_builder.set_grid_idx(*index)
        function(**bound)
    finally:
        for name in replaced:
            delattr(interpreter_builder, name)
        interpreter._patch_lang, interpreter.ReduceOps.generic_reduce = patch, reduce
        scope.restore()
    return observer.accesses
