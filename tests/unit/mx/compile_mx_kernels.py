"""Compiles the cast to mxfp8 for a GPU that need not be there: the one argument."""

from __future__ import annotations

import itertools
import sys

from tests.support.ahead_of_time import compile, wide_accesses
from titanlite.quant.kernels import launch
from titanlite.quant.mx import kernels, triton_casts


def main(name: str) -> None:
    outs = {"by_rows": "*fp8e4nv", "row_exponents": "*u8", "by_columns": "*fp8e4nv", "column_exponents": "*u8"}
    layouts = [(True, True), (True, False), (False, True)]
    cases = list(itertools.product(("bf16", "fp32"), layouts, (True, False)))
    cases = [case for case in cases if case[2] or case[1] == (True, True)]
    for x, (by_rows, by_columns), rceil in cases:
        signature = {"x": f"*{x}", **outs, "M": "i32", "N": "i32", "stride": "i32"}
        options = {"RCEIL": rceil, "BY_ROWS": by_rows, "BY_COLUMNS": by_columns, "SWIZZLED": True, "SIZE": kernels.TILE}
        assembly = compile(name, triton_casts.cast_kernel, signature, {**options, "num_warps": kernels.WARPS})
        assert all(wide_accesses(assembly))
    signature = {"x": "*fp32", "by_rows": "*fp8e4nv", "row_exponents": "*u8", "M": "i32", "N": "i32", "stride": "i32"}
    options = {"RCEIL": True, "BY_ROWS": True, "BY_COLUMNS": False, "SWIZZLED": False, "SIZE": kernels.TILE}
    options |= {"ROUNDED": launch.tl.bfloat16, "num_warps": kernels.WARPS}  # the cast of a shard that ranks gather
    assert all(wide_accesses(compile(name, triton_casts.cast_kernel, signature, options)))
    signature = {"x": "*fp8e4nv", "x_exponents": "*u8", "M": "i32", "N": "i32", "stride": "i32"}
    signature |= {"by_columns": "*fp8e4nv", "column_exponents": "*u8"}
    options = {"RCEIL": True, "BY_ROWS": False, "BY_COLUMNS": True, "SWIZZLED": True, "SIZE": kernels.TILE}
    recast = compile(name, triton_casts.cast_kernel, signature, {**options, "num_warps": kernels.WARPS})
    assert all(wide_accesses(recast))
    print(f"compiled {len(cases) + 2} kernels for {name}")


main(sys.argv[1])
