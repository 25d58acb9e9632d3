"""The quantization kernels: GB/s, and the share of the bandwidth of a copy, on activations of Llama 3 8B and 70B.

    python scripts/benchmarks/casts.py --out docs/benchmarks/casts.json
    python scripts/benchmarks/casts.py --sweep       # which tiles are best, for quant/kernels/launch.py

Of x (m, k) in bfloat16: the cast by rows, by columns and both, with tensor and with vector scales, to e4m3 and e5m2;
the rescaling of a product; of SwiGLU, the cast by rows of a product with silu(gate), and in backward the gradients of
both factors with the cast by columns. ``bytes`` is what titanlite's kernel has to move by its design: what it reads,
once or twice, and what it writes. The other systems are held against the same bytes, so that GB/s compare as times do:
the same formulas in plain operations under torch.compile; torchao's own under torch.compile, where it is installed (it
has no rescaling and no SwiGLU of its own). ``of_copy`` is the share of what a copy of x from device to device moves per
second, where x is read once and written once, in the same turns.

Calls run one right after the other, launched ahead, on several inputs in turn, so that no read comes from the cache by
chance. What each system puts out is compared with quant.kernels.reference in the same run, on random x;
``mismatch`` is the share of numbers that differ, and more than rounding explains (for titanlite any, but in SwiGLU,
whose exponential functions differ) is a failure.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import harness
import results
import torch
from torch import Tensor

from titanlite.quant import kernels
from titanlite.quant.kernels import reference
from titanlite.quant.kernels.outputs import in_one_pass

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Outputs = tuple[Tensor, ...]
ELEMENTS = 128 << 20  # of all inputs together, at least: in bfloat16 four times the second-level cache of an H200
COPY, OURS, COMPILED, TORCHAO = "copy", "titanlite", "torch.compile", "torchao"
# The largest share of numbers that may differ from the reference. The compiler's division is not IEEE's; torchao's
# powers of two are one off where log2 rounds up to a whole number.
BOUNDS = {OURS: 0.0, COMPILED: 1e-3, TORCHAO: 1e-2}
SWIGLU, SWIGLU_BACKWARD = "swiglu", "swiglu backward"
SWIGLU_BOUND = 1e-3  # of numbers rounded to bfloat16 or less


class Kernel(NamedTuple):
    """``scales``: "tensor" or "vector"; vector scales are rounded to powers of two, as the recipes have it."""

    kernel: str
    scales: str
    dtype: torch.dtype

    def layouts(self) -> tuple[str, str]:
        return layouts(self.kernel, self.scales)


def layouts(kernel: str, scales: str) -> tuple[str, str]:
    """Return by_rows and by_columns of :func:`titanlite.quant.kernels.cast`."""
    return (
        scales if kernel in ("cast rows", "cast both") else "none",
        scales if kernel in ("cast columns", "cast both") else "none",
    )


SCALES = ("vector", "tensor")
CASTS = [
    Kernel(kernel, scales, dtype)
    for dtype, scales, kernel in itertools.product((E4M3, E5M2), SCALES, ("cast both", "cast rows", "cast columns"))
]
RESCALE = Kernel("rescale", "vector", torch.bfloat16)
SWIGLUS = [Kernel(kernel, scales, E4M3) for kernel in (SWIGLU, SWIGLU_BACKWARD) for scales in SCALES]


def reads(by_rows: str, by_columns: str, columns: int) -> int:
    """Return how often a cast reads its input."""
    return 1 if in_one_pass(columns, by_rows, by_columns) else 2


def swiglu_reads(first: str, second: str, columns: int) -> int:
    """Return how often the cast of SwiGLU's product reads both factors: for the first layout's copy, and once for the
    largest magnitudes of the second, which backward makes."""
    return reads(first, "none", columns) + (second != "none" and not first == second == "tensor")


def bytes_per_element(by_rows: str, by_columns: str, columns: int = 0, itemsize: int = 2) -> int:
    """That a cast moves for each element of its input, whose elements have ``itemsize`` bytes; scales left out."""
    return itemsize * reads(by_rows, by_columns, columns) + (by_rows != "none") + (by_columns != "none")


def bound(system: str, kernel: Kernel) -> float:
    """The largest share of numbers that may differ from the reference."""
    return max(BOUNDS[system], SWIGLU_BOUND if kernel in SWIGLUS else 0.0)


class Input(NamedTuple):
    """``x`` [m, k]; scales for the rescaling: [m, 1], [1, k]; for SwiGLU, of which x is one factor, the other, the
    gradient of the product, and the product's largest magnitudes by columns."""

    x: Tensor
    row_scale: Tensor
    column_scale: Tensor
    gate: Tensor
    grad: Tensor
    amaxes: dict[str, Tensor]


def with_gate(i: Input, gate: Tensor) -> Input:
    return i._replace(gate=gate, amaxes={scales: reference.amaxes(i.x, "none", scales, gate) for scales in SCALES})


def fresh(i: Input) -> Input:
    """With a gradient that may be overwritten."""
    return i._replace(grad=i.grad.clone())


def inputs_of(m: int, k: int, device: str) -> list[Input]:
    """Enough of them that none is in the cache when its turn comes again; rows of different magnitudes."""
    count = 2 if device == "cpu" else max(-(-ELEMENTS // (m * k)), 2)

    def one() -> Input:
        x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        x *= torch.randn(m, 1, device=device, dtype=torch.bfloat16).exp()
        row_scale, column_scale = torch.rand(m, 1, device=device) + 0.5, torch.rand(1, k, device=device) + 0.5
        # Backward overwrites the gradient with itself times silu(gate), again and again: which is 1 at 1.2785.
        gate = 1.2785 + 0.02 * torch.randn_like(x)
        return with_gate(Input(x, row_scale, column_scale, gate, torch.randn_like(x), {}), gate)

    return [one() for _ in range(count)]


# ---- the systems


def ours(kernel: Kernel, i: Input) -> Outputs:
    if kernel == RESCALE:
        return (kernels.rescale(i.x, i.row_scale, i.column_scale, kernel.dtype),)
    scales: Any = kernel.scales
    power_of_2 = scales == "vector"
    if kernel.kernel == SWIGLU:
        return kernels.swiglu_cast(i.gate, i.x, kernel.dtype, scales, scales, power_of_2)
    if kernel.kernel == SWIGLU_BACKWARD:
        return kernels.swiglu_backward(i.grad, i.gate, i.x, i.amaxes[scales], kernel.dtype, scales, power_of_2)
    by_rows, by_columns = kernel.layouts()
    return kernels.cast(i.x, kernel.dtype, by_rows, by_columns, power_of_2)  # type: ignore[arg-type]


def plain(kernel: Kernel, i: Input) -> Outputs:
    if kernel.kernel == SWIGLU:
        scales, power_of_2 = kernel.scales, kernel.scales == "vector"
        product = reference.swiglu(i.gate, i.x)
        data, scale, *_ = reference.cast(product, kernel.dtype, scales, "none", power_of_2)
        return data, scale, reference.amaxes(product, "none", scales)
    return computed_by(reference, kernel, i)


def computed_by(module: Any, kernel: Kernel, i: Input) -> Outputs:
    """By the functions of ``module``, which is :mod:`reference` or launch.py; all but SwiGLU's forward."""
    if kernel == RESCALE:
        return (module.rescale(i.x, i.row_scale, i.column_scale, kernel.dtype),)
    scales, power_of_2 = kernel.scales, kernel.scales == "vector"
    if kernel.kernel == SWIGLU_BACKWARD:
        arguments = (i.amaxes[scales], kernel.dtype, scales, power_of_2)
        grad_gate, *copy = module.swiglu_backward(i.grad, i.gate, i.x, *arguments)
        return grad_gate, i.grad, *copy
    return module.cast(i.x, kernel.dtype, *kernel.layouts(), power_of_2)  # type: ignore[no-any-return]


def torchao_cast(kernel: Kernel, i: Input) -> Outputs:
    """As torchao's Float8Linear casts; the layout that float8 units need is made by its matmul, and so here."""
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated

    vector = kernel.scales == "vector"
    granularity = ScalingGranularity.AXISWISE if vector else ScalingGranularity.TENSORWISE
    out: list[Tensor] = []
    for layout, dim in zip(kernel.layouts(), (-1, 0)):
        if layout == "none":
            out += [i.x.new_empty(0, dtype=kernel.dtype), i.x.new_empty(0, dtype=torch.float32)]
            continue
        scale = tensor_to_scale(
            i.x,
            kernel.dtype,
            scaling_granularity=granularity,
            axiswise_dim=dim if vector else None,
            round_scales_to_power_of_2=vector,
        )
        data = to_fp8_saturated(i.x.to(torch.float32) * scale, kernel.dtype)
        out += [data if dim else data.t().contiguous(), scale]
    return tuple(out)


def systems(kernel: Kernel, against: bool) -> dict[str, Callable[[Input], Outputs]]:
    """With the peers if ``against``, which compile for seconds."""
    functions: dict[str, Callable[[Input], Outputs]] = {OURS: functools.partial(ours, kernel)}
    if against:
        torch._dynamo.reset()  # whose limit of compilations per function is lower than there are kernels and shapes
        compile = functools.partial(torch.compile, fullgraph=True, dynamic=False)
        functions[COMPILED] = compile(functools.partial(plain, kernel))
        if kernel in CASTS and find_spec("torchao"):
            functions[TORCHAO] = compile(functools.partial(torchao_cast, kernel))
    return functions


def copy(i: Input, out: Tensor) -> Tensor:
    return out.copy_(i.x)


def mismatch(outputs: Outputs, expected: Outputs) -> float:
    """The share of numbers that are not the same to the bit; 1 where shape, dtype or memory layout is another."""
    different = total = 0
    for a, b in zip(outputs, expected, strict=True):
        if (a.shape, a.dtype, a.is_contiguous()) != (b.shape, b.dtype, b.is_contiguous()):
            return 1.0
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.itemsize]
        different += int((a.view(bits) != b.view(bits)).sum())
        total += a.numel()
    return different / total


# ---- measuring


def moved(kernel: Kernel, x: Tensor, outputs: Outputs) -> int:
    """Bytes that titanlite's kernel moves: reads of ``x``, and what is as large, and writes of ``outputs``."""
    if kernel.kernel == SWIGLU:
        times = 2 * swiglu_reads(kernel.scales, kernel.scales, x.shape[1])
    elif kernel.kernel == SWIGLU_BACKWARD:
        times = 3
    else:
        times = 1 if kernel == RESCALE else reads(*kernel.layouts(), x.shape[1])
    return times * x.nbytes + sum(out.nbytes for out in outputs)


def measure(kernel: Kernel, inputs: list[Input], against: bool, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each system, on the same inputs."""
    x = inputs[0].x
    m, k = x.shape
    about: dict[str, Any] = {
        "kernel": kernel.kernel,
        "scales": kernel.scales,
        "dtype": str(kernel.dtype).removeprefix("torch."),
    }
    checked = with_gate(inputs[0], torch.randn_like(x))
    expected = plain(kernel, fresh(checked))
    size = moved(kernel, x, expected)
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {COPY: over(inputs, functools.partial(copy, out=torch.empty_like(x)))}
    for system, function in systems(kernel, against).items():
        row = rows[system] = {"system": system, **about, "m": m, "k": k, "bytes": size}
        try:
            row["mismatch"] = mismatch(function(fresh(checked)), expected)
        except Exception as e:  # whatever a compiler raises
            row["failed"] = harness.failure(e)
            continue
        if not row["mismatch"] <= bound(system, kernel):
            row["failed"] = f"wrong: {row['mismatch']:.3g} of the numbers differ from the reference"
            continue
        calls[system] = over(inputs, function)
    del expected, checked
    seconds = harness.time_running(calls, args.device, args.rounds, 2 * len(inputs))
    copied = 2 * x.nbytes / seconds[COPY]
    for system, row in rows.items():
        if system in seconds:
            rate = size / seconds[system]
            row |= {"us": seconds[system] * 1e6, "gbps": rate / 1e9, "of_copy": rate / copied}
            row |= {"copy_gbps": copied / 1e9, "speed_over_titanlite": seconds.get(OURS, math.nan) / seconds[system]}
        yield row


def over(inputs: list[Input], function: Callable[[Input], Any]) -> Callable[[], Any]:
    """``function`` of the next input, each time."""
    turn = itertools.cycle(inputs)
    return lambda: function(next(turn))


def shapes(args: argparse.Namespace) -> list[tuple[int, int]]:
    return [(32, 64), (48, 160)] if args.device == "cpu" else list(itertools.product(args.m, args.k))


class Problem(NamedTuple):
    """``against``: with the peers."""

    against: bool
    shape: tuple[int, int]
    kernel: Kernel

    def __str__(self) -> str:
        peers = ", peers" if self.against else ""
        return f"{self.shape[0]} x {self.shape[1]} {self.kernel.kernel}, {self.kernel.scales}{peers}"


def problems(args: argparse.Namespace) -> Iterator[Problem]:
    """The most telling first: our own kernels on all shapes, and then against what has to be compiled for each."""
    for against, shape in itertools.product((False, True) if args.against else (False,), shapes(args)):
        for kernel in (*CASTS[:6], RESCALE, *SWIGLUS, *CASTS[6:]):
            yield Problem(against, shape, kernel)


def benchmark(args: argparse.Namespace) -> int:
    budget = harness.Budget(args.seconds)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    inputs: list[Input] = []
    last: tuple[int, int] | None = None
    about: dict[str, Any] = {"left_out": budget.left_out, "torchao": results.version("torchao")}
    # What is compiled first takes longer than what follows; a problem of each kind is begun in any case.
    for problem in budget.within(problems(args), str, kind=lambda problem: problem.against):
        if problem.shape != last:
            inputs.clear()
            inputs, last = inputs_of(*problem.shape, args.device), problem.shape
        for row in measure(problem.kernel, inputs, problem.against, args):
            key = (row["system"], *problem.shape, *problem.kernel)
            rows[key] = row
        results.save("casts", [*rows.values()], args, **about)
    results.save("casts", [*rows.values()], args, **about)
    columns = ("us", "gbps", "copy_gbps", "of_copy", "speed_over_titanlite", "mismatch")
    harness.report([*rows.values()], ("system", "kernel", "scales", "dtype", "m", "k"), columns, budget)
    if args.against and not find_spec("torchao"):
        print("torchao is not installed: pip install torchao, to compare with it")
    return int(not rows or any("failed" in row for row in rows.values() if row["system"] == OURS))


def main(argv: list[str] | None = None) -> int:
    parser = harness.gpu_parser(__doc__)
    parser.add_argument("--m", type=harness.numbers, default=[8192, 16384], help="tokens, by default 8192,16384")
    parser.add_argument(
        "--k",
        type=harness.numbers,
        default=[4096, 8192, 14336, 28672],
        help="features, by default 4096,8192,14336,28672",
    )
    parser.add_argument("--rounds", type=int, default=10, help="how often each kernel is timed")
    parser.add_argument("--no-against", dest="against", action="store_false", help="titanlite's kernels alone")
    parser.add_argument("--sweep", action="store_true", help="time tiles instead, and print the best for launch.py")
    args = parser.parse_args(argv)
    harness.check_device(parser, args.device)
    torch.manual_seed(0)
    if args.sweep:
        import cast_sweep

        cast_sweep.check(parser, args.device)
        return cast_sweep.sweep(args)
    return benchmark(args)


if __name__ == "__main__":
    sys.exit(main())
