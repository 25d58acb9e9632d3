"""Compiles the casts by group for a GPU that need not be there: the one argument."""

from __future__ import annotations

import sys

import torch

from tests.support.ahead_of_time import compile, wide_accesses
from titanlite.quant.kernels import launch, outputs, triton_groups
from titanlite.quant.mx import kernels, triton_casts

UNIT = 16  # rows to which float8 fills up each group


def main(name: str) -> None:
    dtype = torch.float8_e4m3fn
    sizes = {"M": "i32", "N": "i32", "stride": "i32"}
    places = {"row_of": "*i32", "group_of": "*i32"}
    count = 0
    for x in ("bf16", "fp32"):
        signature = {"x": f"*{x}", **places, "amax": "*i32", **sizes}
        assembly = compile(
            name, triton_groups.group_amax_kernel, signature, {"UNIT": UNIT, **launch.AMAX_TILE.options()}
        )
        assert wide_accesses(assembly)[0]
        signature = {"x": f"*{x}", **places, "scale": "*fp32", "to": "*fp8e4nv", **sizes}
        options = {"LARGEST": outputs.largest(dtype), "DTYPE": launch.DTYPES[dtype], "UNIT": UNIT}
        assembly = compile(name, triton_groups.group_cast_kernel, signature, {**options, **launch.CAST_TILE.options()})
        assert all(wide_accesses(assembly))
        for by_rows in (True, False):
            layout = "row" if by_rows else "column"
            signature = {"x": f"*{x}", f"by_{layout}s": "*fp8e4nv", f"{layout}_exponents": "*u8", **sizes}
            signature |= {} if by_rows else {"row_of": "*i32"}
            options = {"RCEIL": True, "BY_ROWS": by_rows, "BY_COLUMNS": not by_rows, "SWIZZLED": False}
            options |= {"SIZE": kernels.TILE, "num_warps": kernels.WARPS}
            assert all(wide_accesses(compile(name, triton_casts.cast_kernel, signature, options)))
        count += 4
    print(f"compiled {count} kernels for {name}")


main(sys.argv[1])
