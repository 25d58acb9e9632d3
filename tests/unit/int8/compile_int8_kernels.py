"""Compiles the int8 kernels for a GPU that need not be there: the one argument. Prints the count, and by kernel the
instructions that load and that store 16 bytes."""

from __future__ import annotations

import itertools
import sys

from tests.support.ahead_of_time import compile, wide_accesses
from titanlite.quant.devices import sm
from titanlite.quant.int8 import gpu, triton_matmul
from titanlite.quant.kernels import launch, outputs
from titanlite.quant.kernels import triton_kernels as kernels

SIZES = {"M": "i32", "N": "i32", "stride": "i32"}
NUMBERS = {"LARGEST": outputs.largest(launch.torch.int8), "DTYPE": launch.tl.int8, "POWER_OF_2": False}
NONE, VECTOR = launch.LAYOUTS["none"], launch.LAYOUTS["vector"]


def assert_wide(kernel: str, assembly: str, stores: bool = True) -> None:
    loads, wide_stores = wide_accesses(assembly)
    assert loads, f"{kernel} loads no 16 bytes at a time"
    assert wide_stores or not stores, f"{kernel} stores no 16 bytes at a time"


def main(name: str) -> None:
    count = 0
    for x, (by_rows, by_columns) in itertools.product(("bf16", "fp32"), ((VECTOR, VECTOR), (NONE, VECTOR))):
        layouts = {"BY_ROWS": by_rows, "BY_COLUMNS": by_columns}
        amaxes = {"x": f"*{x}", "row_amax": "*i32", "column_amax": "*i32", **SIZES}
        outs = {"by_rows": "*i8", "row_scale": "*fp32", "by_columns": "*i8", "column_scale": "*fp32"}
        assert_wide(
            "amax", compile(name, kernels.amax_kernel, amaxes, {**layouts, **launch.AMAX_TILE.options()}), False
        )
        options = {**NUMBERS, **layouts, **launch.CAST_TILE.options()}
        assert_wide("cast", compile(name, kernels.cast_kernel, {**amaxes, **outs}, options))
        count += 2
    signature = {"x": "*i8", "x_scale": "*fp32", "column_amax": "*i32", **SIZES}
    options = {"BY_ROWS": NONE, "BY_COLUMNS": VECTOR, "POWER_OF_2": False}
    amaxes_kernel = compile(name, kernels.amax_kernel, signature, {**options, **launch.AMAX_TILE.options()})
    assert_wide("amaxes of what was gathered", amaxes_kernel, False)
    signature |= {"by_columns": "*i8", "column_scale": "*fp32"}
    options |= {**NUMBERS, **launch.CAST_TILE.options()}
    assert_wide("cast of what was gathered", compile(name, kernels.cast_kernel, signature, options))
    count += 2
    signature = {"x": "*bf16", "by_rows": "*i8", "row_scale": "*fp32", "N": "i32", "stride": "i32"}
    for block, warps in ((4096, 4), (32768, 16)):
        options = {**NUMBERS, "BLOCK_N": block, "num_warps": warps}
        assert_wide("row cast", compile(name, kernels.row_cast_kernel, signature, options))
        count += 1
    options = {**NUMBERS, "BLOCK_N": 4096, "num_warps": 4, "ROUNDED": launch.tl.bfloat16}
    assert_wide("cast of a shard", compile(name, kernels.row_cast_kernel, {**signature, "x": "*fp32"}, options))
    count += 1
    operands = {"a": "*i8", "b": "*i8", "a_scale": "*fp32", "b_scale": "*fp32"}
    operands |= dict.fromkeys(("M", "N", "K", "a_stride", "b_stride"), "i32")
    if gpu.has_kernel(name):
        for tile, out, length in itertools.product(gpu.tiles(name), ("bf16", "fp32"), (4096, 4096 + 16)):
            if (out, length) == ("fp32", 4096 + 16):
                continue
            assembly = compile(name, triton_matmul.matmul_kernel, {**operands, "out": f"*{out}"}, tile.options(length))
            # On AMD's GPUs a thread has four neighbouring sums.
            assert_wide("matmul", assembly, stores=bool(sm(name)) or out == "fp32")
            count += 1
    print(f"compiled {count} kernels for {name}")


main(sys.argv[1])
