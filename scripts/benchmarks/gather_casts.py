"""Count the bytes of the casts of weights that FSDP2 gathers in a number format, for a GPU that is not there.

    python scripts/benchmarks/gather_casts.py --out docs/benchmarks/gather_casts.json

Two casts are counted:

- ``shard``: a shard of float32 weights, as one of 8 ranks has it, is cast for a gather of what bfloat16 weights would
  be. ``ideal``: it is read once for the cast, and once before that for the largest magnitude if all ranks have to agree
  on it; a byte per element is written, and the scales.
- ``again``: a weight that was gathered with scales of rows, or of blocks, is cast again along its other dimension, for
  the gradient of the input. ``ideal``: its bytes are read once for the largest magnitudes and once for the cast, or
  once for both where they are those of blocks; a byte per element is written, and the scales.

The bytes of titanlite's kernels are the loads and stores that Triton's interpreter executes, those of other operators
the sizes of their tensors. ``plain``: the same cast by PyTorch's operators, one after the other; ``compiled``: by the
code that PyTorch's compiler makes of these for sm_90 (:mod:`absent_gpu`), as in a compiled block, with whole sectors of
32 bytes counted where it stores less.
tests/unit/float8/test_float8_gather.py and test_float8_recast.py compare the results. It needs a C++ compiler, and no
GPU; nothing is timed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before triton looks

import compiled_block
import harness
import results
import torch
import torch.distributed as dist
from absent_gpu import device
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter
from whole_step import bytes_of

from titanlite.float8 import Float8LinearConfig
from titanlite.quant.format import Format, Operand
from titanlite.quant.fsdp import ShardedWeight
from titanlite.quant.int8.format import Int8Format
from titanlite.quant.kernels import launch
from titanlite.quant.mx import kernels as mx_kernels
from titanlite.quant.mx.format import MXFormat

ROWS, COLUMNS, RANKS = 512, 4096, 8  # of Llama 3 8B's wq
KERNELS: dict[str, Callable[..., Any]] = {
    "titanlite_quant::amaxes": launch.amaxes,
    "titanlite_quant::cast": launch.cast_with,
    "titanlite_quant::recast": launch.recast,
    "titanlite_mx::cast_rows": mx_kernels.cast_rows_by_kernel,
    "titanlite_mx::recast": mx_kernels.recast_by_kernel,
}
# Bytes per element of what is written beside a byte for each: the scales.
_SCALES = {"tensorwise": 0.0, "mxfp8": 1 / 32}


class Counter(TorchDispatchMode):
    """Counts operators that are no views, and their bytes; titanlite's run as Triton kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.moved = 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kernel := KERNELS.get(func._schema.name):
            with counted_accesses(self), self:  # it also zeroes memory for the largest magnitudes
                return kernel(*args, **kwargs)
        out = func(*args, **kwargs)
        if not func.is_view and func.namespace != "c10d" and not func._opname.startswith(("empty", "new_empty")):
            self.launches += 1
            self.moved += bytes_of(func, args, kwargs, out)
        return out


@contextmanager
def counted_accesses(counter: Counter) -> Iterator[None]:
    """Count interpreted kernels, and the bytes that they load, store, and change by atomic operations."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    places = {"create_masked_load": (0, 1), "create_masked_store": (0, 2), "create_atomic_rmw": (1, 3)}

    def counted(name: str, pointers: int, mask: int) -> Callable[..., Any]:
        access = getattr(builder, name)

        def counting(this: Any, *args: Any) -> Any:
            itemsize = args[pointers].get_element_ty().primitive_bitwidth // 8
            counter.moved += int(args[mask].data.sum()) * itemsize
            return access(this, *args)

        return counting

    run = executor.__call__

    def launched(this: Any, *args: Any, **kwargs: Any) -> None:
        counter.launches += 1
        with _disable_current_modes():  # of the copies that the interpreter makes
            run(this, *args, **kwargs)

    counting = [(builder, name, counted(name, *at)) for name, at in places.items()] + [(executor, "__call__", launched)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in counting]
    try:
        for owner, name, function in counting:
            setattr(owner, name, function)
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def formats() -> dict[str, Format]:
    recipes = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
    float8 = {
        recipe: dataclasses.replace(
            Float8LinearConfig.from_recipe_name(recipe), target="sm_90", kernels="inductor"
        ).format
        for recipe in recipes
    }
    int8 = Int8Format(target="sm_90", gathered=("weight",))
    return {**float8, "int8": int8, "mxfp8": MXFormat(target="sm_100", gathered=("weight",))}


def cast(shard: Tensor, format: Format, mesh: DeviceMesh) -> Counter:
    weight, whole = ShardedWeight(shard, format), torch.Size((RANKS * ROWS, COLUMNS))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    with Counter() as counter:
        weight.fsdp_pre_all_gather(mesh, whole, (COLUMNS, 1), nn.Module(), policy)
    return counter


def cast_again(weight: Operand, format: Format) -> Counter:
    with Counter() as counter:
        format.recast(weight, "weight")
    return counter


def plain_of(format: Any) -> Format:
    return dataclasses.replace(format.emulated, target="cpu")


def count(name: str, format: Format, shard: Tensor, mesh: DeviceMesh) -> dict[str, Any]:
    reads = 1 if format.has_scales_of_rows("weight") else 2
    ideal = reads * 4 + 1 + _SCALES.get(name, 4 / COLUMNS)
    return _row(name, "shard", shard, ideal, cast(shard, format, mesh), cast(shard, plain_of(format), mesh))


def count_again(name: str, format: Format, weight: Tensor) -> dict[str, Any]:
    arrived = format.cast_to_gather(weight, torch.bfloat16, None)
    if name == "mxfp8":
        ideal = 2 * (1 + _SCALES[name])
    else:
        ideal = 3 + 2 * 4 / COLUMNS + (0 if name == "rowwise_with_gw_hp" else 4 / len(weight))
    by_kernels = cast_again(arrived, format.eager())
    return _row(name, "again", weight, ideal, by_kernels, cast_again(arrived, plain_of(format)))


def _row(name: str, cast: str, weight: Tensor, ideal: float, counter: Counter, plain: Counter) -> dict[str, Any]:
    moved = {"ideal": ideal, "counted": counter.moved / weight.numel(), "plain": plain.moved / weight.numel()}
    row = {"system": "titanlite", "config": name, "cast": cast, "rows": len(weight), "columns": COLUMNS}
    row |= {key: round(value, 4) for key, value in moved.items()}
    return {**row, "launches": counter.launches, "plain_launches": plain.launches}


def compiled(rows: int, columns: int) -> dict[str, dict[str, float]]:
    """Return the launches and the bytes of the compiled cast of a gathered weight, by recipe of float8."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "absent_gpu.recast", f"--rows={rows}", f"--columns={columns}"]
        child = harness.run(command, compiled_block.LIMIT, device.environment(Path(folder)))
    if child.status:
        raise SystemExit(child.why())
    counts: dict[str, dict[str, float]] = json.loads(child.output.splitlines()[-1])
    return counts


def main() -> int:
    args = harness.parser(__doc__).parse_args()
    torch.manual_seed(0)
    shard = torch.randn(ROWS, COLUMNS)
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    mesh = init_device_mesh("cpu", (RANKS,))
    rows = [count(name, format, shard, mesh) for name, format in formats().items()]
    weight = torch.randn(RANKS * ROWS, COLUMNS)
    rows += [
        count_again(name, format, weight)
        for name, format in formats().items()
        if format.has_scales_of_rows("weight")  # the others arrive as both matmuls take them
    ]
    by_compiler = compiled(*weight.shape)
    for row in rows:
        if row["cast"] == "again" and row["config"] in by_compiler:
            of_recipe = by_compiler[row["config"]]
            row["compiled"] = round(of_recipe["bytes"] / weight.numel(), 4)
            row["compiled_launches"] = of_recipe["launches"]
        print(row)
    dist.destroy_process_group()
    results.save("gather_casts", rows, args, "cpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
