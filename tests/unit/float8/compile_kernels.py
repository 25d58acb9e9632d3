"""Compiles every kernel for a GPU that need not be there: the one argument."""

from __future__ import annotations

import itertools
import sys

import torch

from tests.support.ahead_of_time import compile, wide_accesses
from titanlite.quant.float8.devices import native_dtypes
from titanlite.quant.kernels import launch, outputs
from titanlite.quant.kernels import triton_kernels as kernels

NAMES = {torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5", torch.float8_e4m3fnuz: "fp8e4b8"}
NAMES |= {torch.float8_e5m2fnuz: "fp8e5b16"}


def main(name: str) -> None:
    count = 0
    sizes = {"M": "i32", "N": "i32", "stride": "i32"}
    for x, dtype in [*itertools.product(("bf16",), native_dtypes(name)), ("fp32", native_dtypes(name)[0])]:
        numbers = {"LARGEST": outputs.largest(dtype), "DTYPE": launch.DTYPES[dtype]}
        out = f"*{NAMES[dtype]}"
        for by_rows, by_columns in itertools.product(launch.LAYOUTS.values(), repeat=2):
            layouts = {"BY_ROWS": by_rows, "BY_COLUMNS": by_columns}
            # Every combination for the most usual GPU; for the others, of which each takes as long, both layouts alike.
            if by_rows == by_columns == launch.LAYOUTS["none"] or (
                by_rows != by_columns and (x == "fp32" or name != "sm_90")
            ):
                continue
            signature = {"x": f"*{x}", "row_amax": "*i32", "column_amax": "*i32", "by_rows": out, "row_scale": "*fp32"}
            signature |= {"by_columns": out, "column_scale": "*fp32", **sizes}
            tensorwise = launch.LAYOUTS["tensor"] in (by_rows, by_columns)
            rounded = {"POWER_OF_2": not tensorwise}  # as the recipes have it
            options = {**numbers, **rounded, **layouts, **launch.CAST_TILE.options()}
            compile(name, kernels.cast_kernel, signature, options)
            of_amaxes = {"x": f"*{x}", "row_amax": "*i32", "column_amax": "*i32", **sizes}
            compile(name, kernels.amax_kernel, of_amaxes, {**layouts, **launch.AMAX_TILE.options()})
            count += 2
            if launch.LAYOUTS["none"] in (by_rows, by_columns):  # as SwiGLU has them cast
                gate = {"gate": f"*{x}"}
                compile(name, kernels.cast_kernel, {**signature, **gate}, options)
                compile(name, kernels.amax_kernel, {**of_amaxes, **gate}, {**layouts, **launch.AMAX_TILE.options()})
                count += 2
        signature = {"x": f"*{x}", "by_rows": out, "row_scale": "*fp32", "N": "i32", "stride": "i32"}
        for block, warps in ((4096, 4), (32768, 16)):
            options = {"POWER_OF_2": True, "BLOCK_N": block, "num_warps": warps}
            compile(name, kernels.row_cast_kernel, signature, {**numbers, **options})
            compile(name, kernels.row_cast_kernel, {**signature, "gate": f"*{x}"}, {**numbers, **options})
            count += 2
        if x == "fp32":  # a shard that FSDP2 gathers
            rounded = {**numbers, "ROUNDED": launch.tl.bfloat16}
            of_rows = {**rounded, "POWER_OF_2": True, "BLOCK_N": 4096, "num_warps": 4}
            assert all(wide_accesses(compile(name, kernels.row_cast_kernel, signature, of_rows)))
            layouts = {"BY_ROWS": launch.LAYOUTS["tensor"], "BY_COLUMNS": launch.LAYOUTS["none"], "POWER_OF_2": False}
            of_tensor = {**signature, "row_amax": "*i32", **sizes}
            options = {**rounded, **layouts, **launch.CAST_TILE.options()}
            assert all(wide_accesses(compile(name, kernels.cast_kernel, of_tensor, options)))
            count += 2
        like_up = dict.fromkeys(("grad", "gate", "up", "grad_gate"), f"*{x}") | sizes
        scales = {"column_amax": "*i32", "column_scale": "*fp32", "product": out}
        options = {**numbers, **launch.SWIGLU_TILE.options()}
        for by_columns, signature in (
            ("none", like_up),
            ("none", {**like_up, "product": f"*{x}"}),
            ("tensor", {**like_up, **scales}),
            ("vector", {**like_up, **scales}),
        ):
            given = {**options, "POWER_OF_2": by_columns != "tensor", "BY_COLUMNS": launch.LAYOUTS[by_columns]}
            compile(name, kernels.swiglu_backward_kernel, signature, given)
            count += 1
    recasts = [(dtype, layout, True) for dtype in native_dtypes(name) for layout in ("tensor", "vector")]
    for dtype, layout, power_of_2 in (*recasts, (native_dtypes(name)[0], "vector", False)):
        x = f"*{NAMES[dtype]}"
        signature = {"x": x, "column_amax": "*i32", **sizes, "x_scale": "*fp32"}
        options = {"BY_ROWS": launch.LAYOUTS["none"], "BY_COLUMNS": launch.LAYOUTS[layout], "POWER_OF_2": power_of_2}
        amaxes = compile(name, kernels.amax_kernel, signature, {**options, **launch.AMAX_TILE.options()})
        assert wide_accesses(amaxes)[0]
        options |= {"LARGEST": outputs.largest(dtype), "DTYPE": launch.DTYPES[dtype], **launch.CAST_TILE.options()}
        signature |= {"by_columns": x, "column_scale": "*fp32"}
        assert all(wide_accesses(compile(name, kernels.cast_kernel, signature, options)))
        count += 2
    for x in ("bf16", "fp32"):
        signature = {"product": f"*{x}", "row_scale": "*fp32", "column_scale": "*fp32", "out": f"*{x}"}
        steps = {"ROW_STEP": 1, "COLUMN_STEP": 1}
        options = {**steps, **launch.RESCALE_TILE.options()}
        compile(name, kernels.rescale_kernel, {**signature, "M": "i32", "N": "i32"}, options)
        count += 1
    print(f"compiled {count} kernels for {name}")


main(sys.argv[1])
