"""Kernels whose traffic is known, counted by Triton's interpreter: prints read, written and sectors' bytes by name."""

from __future__ import annotations

import json

import torch
import triton
import triton.language as tl
from absent_gpu.accesses import Part, Pointer, count

ROWS, COLUMNS = 4096, 1000  # no multiple of the tile


@triton.jit
def copy(x, out, N, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = columns < N
    row = tl.program_id(0).to(tl.int64)
    tl.store(out + row * N + columns, tl.load(x + row * N + columns, mask=inside), mask=inside)


@triton.jit
def in_two_passes(x, out, N, BLOCK: tl.constexpr):
    row, largest = tl.program_id(0), tl.full([BLOCK], 0, tl.float32)
    for start in tl.range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(x + row * N + columns, mask=columns < N).to(tl.float32))
    scale = tl.max(largest, 0)
    for start in tl.range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(x + row * N + columns, mask=columns < N).to(tl.float32) * scale
        tl.store(out + row * N + columns, values.to(tl.bfloat16), mask=columns < N)


@triton.jit
def byte_by_byte(x, out, M, N, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    tl.store(out + columns * M + row, tl.load(x + row * N + columns, mask=columns < N), mask=columns < N)


@triton.jit
def scaled_by_a_vector(x, vector, out, N, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside, row = columns < N, tl.program_id(0)
    values = tl.load(x + row * N + columns, mask=inside) * tl.load(vector + columns, mask=inside)
    tl.store(out + row * N + columns, values, mask=inside)


@triton.jit
def sums_of_rows_and_columns(x, by_rows, by_columns, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Two kernels in one launch, which read the same at different times."""
    program, columns = tl.program_id(0), tl.arange(0, BLOCK)
    if program < ROWS:
        values = tl.load(x + program * N + columns, mask=columns < N, other=0)
        tl.store(by_rows + program, tl.sum(values, 0))
    else:
        rows = tl.arange(0, ROWS)
        values = tl.load(x + rows * N + program - ROWS)
        tl.store(by_columns + program - ROWS, tl.sum(values, 0))


def pointer(buffer: int, dtype: torch.dtype, rows: int = ROWS) -> Pointer:
    return Pointer(buffer, 0, rows * COLUMNS * dtype.itemsize, dtype)


def main() -> None:
    x, out = pointer(0, torch.bfloat16), pointer(1, torch.bfloat16)
    bytes_in, bytes_out = pointer(0, torch.uint8), pointer(1, torch.uint8)
    cases = {
        "copy": (copy, {"x": x, "out": out, "N": COLUMNS, "BLOCK": 1024}),
        "in_two_passes": (in_two_passes, {"x": x, "out": out, "N": COLUMNS, "BLOCK": 8}),
        "byte_by_byte": (byte_by_byte, {"x": bytes_in, "out": bytes_out, "M": ROWS, "N": COLUMNS, "BLOCK": 1024}),
        "scaled_by_a_vector": (
            scaled_by_a_vector,
            {"x": x, "vector": pointer(2, torch.bfloat16, 1), "out": out, "N": COLUMNS, "BLOCK": 1024},
        ),
    }
    counted = {name: count(kernel, (ROWS,), arguments) for name, (kernel, arguments) in cases.items()}
    sums = {"by_rows": pointer(1, torch.bfloat16, 5), "by_columns": pointer(2, torch.bfloat16, 1)}
    parts = [Part(ROWS, lambda program: (program, 0, 0)), Part(COLUMNS, lambda program: (ROWS + program, 0, 0))]
    arguments = {"x": x, **sums, "N": COLUMNS, "ROWS": ROWS, "BLOCK": 1024}
    counted["combined"] = count(sums_of_rows_and_columns, (ROWS + COLUMNS,), arguments, parts)
    print(json.dumps({name: [t.read, t.written, t.sectors, t.once] for name, t in counted.items()}))


if __name__ == "__main__":
    main()
