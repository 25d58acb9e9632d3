"""Scaled float8 matmuls against bfloat16's, on the shapes of Llama 3 8B and 70B: TFLOP/s, and the fraction of the peak.

    python scripts/benchmarks/matmul.py --out docs/benchmarks/matmul.json

Of every kind of linear layer (wq and wo, wk and wv, w1 and w3, w2, output), at 8192 and 16384 tokens, the three matmuls
of forward and backward: output, grad_input, grad_weight. Scales per tensor, and per row of what is contracted, with
fast accumulation and without; by ``torch._scaled_mm`` alone, and through ``quant.float8.matmul.scaled_mm``, which
inverts the scales; and as that does where the kernel for scales of rows is slow or missing, "row, after": the product
is scaled in a pass of its own. Casting is no part of it. All
ways to compute a product take turns on the same random data, and what each puts out is compared with a float64 product
of the same operands, on rows and columns drawn at random; a way that is wrong, or not there, is a row that says so.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import harness
import results
import torch
from torch import Tensor

from titanlite.metrics.device import peak_flops
from titanlite.quant.float8.devices import has_native_float8
from titanlite.quant.float8.matmul import multiply_then_scale, scaled_mm
from titanlite.quant.float8.numerics import amax_of, amax_to_scale, quantize
from titanlite.quant.format import Operand

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
GEMMS = ("output", "grad_input", "grad_weight")
SAMPLE = 128  # rows, and columns, of a product that are compared with the reference


def bound(k: int, fast_accum: bool) -> float:
    """The largest ‖out − reference‖ / ‖reference‖ of a sum of ``k`` products. bfloat16 keeps 8 bits of a result; fast
    accumulation keeps about 14 of its parts, and cuts off the rest, which adds up with k (a simulation with 13 bits,
    cut after every 32 products, gives 0.8e-6 k)."""
    return max(1e-2, 1.5e-6 * k if fast_accum else 0.0)


class Shape(NamedTuple):
    """``n_in`` features in, ``n_out`` out."""

    model: str
    layer: str
    n_in: int
    n_out: int


def _of(model: str, dim: int, kv: int, ffn: int, vocab: int) -> list[Shape]:
    sizes = {"wq, wo": (dim, dim), "wk, wv": (dim, kv), "w1, w3": (dim, ffn), "w2": (ffn, dim), "output": (dim, vocab)}
    return [Shape(model, layer, *size) for layer, size in sizes.items()]


SHAPES = [*_of("8B", 4096, 1024, 14336, 128256), *_of("70B", 8192, 1024, 28672, 128256)]
TOY = [Shape("toy", "wq, wo", 64, 64), Shape("toy", "w1, w3", 64, 160)]


class Way(NamedTuple):
    """A way to compute a product; ``scales`` is "none" for bfloat16, else a key of what ``measure`` prepares."""

    system: str
    scales: str
    fast_accum: bool


BF16 = Way("torch", "none", False)
SCALED = [Way(*way) for way in itertools.product(("torch", "titanlite"), ("tensor", "row"), (True, False))]
AFTER = Way("titanlite", "row, after", False)
WAYS = [BF16, *SCALED, AFTER]


def operands(gemm: str, tokens: int, shape: Shape, device: str) -> tuple[Tensor, Tensor, torch.dtype]:
    """Random a (m, k) and b (k, n) in bfloat16, laid out as float8 units need them, a row-major and b column-major, and
    the dtype of a in the tensorwise recipe."""
    m, k, n, dtype = {
        "output": (tokens, shape.n_in, shape.n_out, E4M3),
        "grad_input": (tokens, shape.n_out, shape.n_in, E5M2),
        "grad_weight": (shape.n_out, tokens, shape.n_in, E5M2),
    }[gemm]
    a = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    return a, torch.randn(n, k, device=device, dtype=torch.bfloat16).t(), dtype


def quantized(x: Tensor, dtype: torch.dtype, contracted: int | None) -> Operand:
    scale = amax_to_scale(amax_of(x, contracted), dtype, contracted is not None)
    return Operand(quantize(x, scale, dtype), scale)


def raw(a: Operand, b: Operand, fast_accum: bool) -> Callable[[], Tensor]:
    """``torch._scaled_mm``, with its scales made beforehand."""
    assert a.scale is not None
    assert b.scale is not None
    scales = {"scale_a": a.scale.reciprocal().contiguous(), "scale_b": b.scale.reciprocal().contiguous()}
    return functools.partial(
        torch._scaled_mm, a.data, b.data, **scales, out_dtype=torch.bfloat16, use_fast_accum=fast_accum
    )


def ours(a: Operand, b: Operand, fast_accum: bool, emulate: bool) -> Callable[[], Tensor]:
    return functools.partial(scaled_mm, a, b, out_dtype=torch.bfloat16, fast_accum=fast_accum, emulate=emulate)


def error(out: Tensor, a: Tensor, b: Tensor) -> float:
    """‖out − ab‖ / ‖ab‖ over rows and columns drawn at random, the larger of the two; NaN where anything is not finite.

    Args:
        a, b: what the operands stand for, in any dtype; multiplied in float64.
    """
    if not out.isfinite().all():
        return float("nan")
    rows = torch.randperm(a.shape[0], device=a.device)[:SAMPLE]
    columns = torch.randperm(b.shape[1], device=b.device)[:SAMPLE]
    errors = []
    for part, left, right in ((out[rows], a[rows], b), (out[:, columns], a, b[:, columns])):
        reference = left.double() @ right.double()
        errors.append(((part.double() - reference).norm() / reference.norm()).item())
    return max(errors)


def dequantized(operand: Operand) -> Tensor:
    """In float32: a float8 number times the inverse of its scale, which rounds by far less than what is looked for."""
    assert operand.scale is not None
    return operand.data.float() / operand.scale


def measure(gemm: str, tokens: int, shape: Shape, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each way to compute one product."""
    emulate = args.device == "cpu" or not has_native_float8(torch.device(args.device))
    a, b, dtype = operands(gemm, tokens, shape, args.device)
    m, k, n = *a.shape, b.shape[1]
    scaled = {
        "tensor": (quantized(a, dtype, None), quantized(b, E4M3, None)),
        "row": (quantized(a, E4M3, 1), quantized(b, E4M3, 0)),
    }
    functions: dict[Way, Callable[[], Tensor]] = {BF16: functools.partial(torch.mm, a, b)}
    for way in SCALED:
        x, y = scaled[way.scales]
        functions[way] = raw(x, y, way.fast_accum) if way.system == "torch" else ours(x, y, way.fast_accum, emulate)
    functions[AFTER] = functools.partial(multiply_then_scale, *scaled["row"], torch.bfloat16, False)
    stands_for = {"none": (a, b), **{name: tuple(map(dequantized, pair)) for name, pair in scaled.items()}}
    stands_for[AFTER.scales] = stands_for["row"]
    problem = {"model": shape.model, "layer": shape.layer, "gemm": gemm, "m": m, "k": k, "n": n}
    rows = {way: {**way._asdict(), **problem} for way in functions}
    for way, function in list(functions.items()):
        try:
            rows[way]["error"] = error(function(), *stands_for[way.scales])
        except (RuntimeError, NotImplementedError, ValueError) as e:
            rows[way]["failed"] = harness.failure(e)
            del functions[way]
            continue
        most = bound(k, way.fast_accum)
        if not rows[way]["error"] <= most:
            rows[way]["failed"] = f"wrong: error {rows[way]['error']:.3g}, more than {most:.3g}"
    del stands_for
    seconds = harness.time_in_turn(functions, args.device, args.rounds)
    peak = None if args.device == "cpu" else peak_flops(results.device())
    for way, row in rows.items():
        if way in seconds:
            rate = 2 * m * k * n / seconds[way]
            # Float8 units do twice what bfloat16's do, by the data sheet of every device whose peak is known.
            best = None if peak is None else peak * (1 if way is BF16 else 2)
            row |= {"us": seconds[way] * 1e6, "tflops": rate / 1e12, "of_peak": None if best is None else rate / best}
            row["speedup_over_bf16"] = seconds[BF16] / seconds[way]
        yield row


class Problem(NamedTuple):
    gemm: str
    tokens: int
    shape: Shape

    def __str__(self) -> str:
        return f"{self.shape.model} {self.shape.layer} {self.gemm}, {self.tokens} tokens"


def problems(args: argparse.Namespace) -> Iterator[Problem]:
    """The most telling first: 8B, then 70B, and then the same with more tokens."""
    shapes = TOY if args.device == "cpu" else SHAPES
    for tokens in (32,) if args.device == "cpu" else args.tokens:
        for shape, gemm in itertools.product(shapes, GEMMS):
            yield Problem(gemm, tokens, shape)


def main(argv: list[str] | None = None) -> int:
    parser = harness.gpu_parser(__doc__)
    parser.add_argument(
        "--tokens", type=harness.numbers, default=[8192, 16384], help="tokens per step, by default 8192,16384"
    )
    parser.add_argument("--rounds", type=int, default=20, help="how often each product is timed")
    args = parser.parse_args(argv)
    harness.check_device(parser, args.device)
    torch.manual_seed(0)
    budget = harness.Budget(args.seconds)
    rows: list[dict[str, Any]] = []
    for problem in budget.within(problems(args), str):
        rows += measure(*problem, args)
        results.save("matmul", rows, args, left_out=budget.left_out)
    case = ("model", "layer", "gemm", "m", "k", "n", *Way._fields)
    harness.report(rows, case, ("us", "tflops", "of_peak", "speedup_over_bf16", "error"), budget)
    results.save("matmul", rows, args, left_out=budget.left_out)
    return int(not rows or any(row.get("failed", "").startswith("wrong") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
