"""Forward and backward of one bias-free linear layer, M tokens of K features to N: each float8 recipe against bfloat16
and against torchao.

    python scripts/benchmarks/linear.py --out docs/benchmarks/linear.json
    python scripts/benchmarks/linear.py --m=16384 --kn=5120x5120,5120x13824 --recipes=rowwise --modes=compile

titanlite casts by its Triton kernels and by plain operations ("inductor"), torchao (where it is installed) by its own;
eager and compiled. The weight is cast in each step; in eager mode also with its copies ``kept``, as they are from one
microbatch to the next while gradients accumulate. The systems of one recipe take turns with bfloat16 in the same mode.

Calls run one right after the other. Compiled, they are launched ahead, so that the device's time alone counts, as in a
model that is compiled by blocks; eager, the host's time counts where it is the longer one, as it does in training.

Outputs and both gradients are compared, in the same run and on the same random data, with those of the emulated layer,
which multiplies the same quantized values in float32: ``sqnr_db`` is the worst signal-to-noise ratio of the three, and
less than 40 dB (an error of 1%; for many features less, as fast accumulation has it, see matmul.py) is a failure.
``sqnr_bf16_db`` is the same against bfloat16: what float8 costs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import harness
import matmul
import results
import torch
from torch import Tensor, nn

from titanlite.float8 import Float8LinearConfig, convert_to_float8_training

RECIPES = ("rowwise", "tensorwise", "rowwise_with_gw_hp")
MODES = ("compile", "eager")
# The two that the targets are about, and then the others of Llama 3 8B and 70B.
KN = ("4096x4096", "4096x14336", "14336x4096", "4096x1024", "8192x8192", "8192x28672", "4096x128256")
FIRST = 2  # shapes that are measured in every way before the others are begun
TOY_KN = ("64x64", "64x160")
CALLS = 5  # one right after the other

Step = Callable[[], tuple[Tensor, ...]]


class System(NamedTuple):
    """One way to compute the layer; ``kernels`` is what casts, None where there is no choice."""

    system: str
    config: str
    kernels: str | None
    compile: bool
    kept: bool


class Data(NamedTuple):
    """x [m, k] and w [n, k] in bfloat16, and the gradient of the output [m, n]."""

    x: Tensor
    w: Tensor
    grad: Tensor


def data_of(m: int, k: int, n: int, device: str) -> Data:
    """Random, of the magnitudes that training has."""
    random = functools.partial(torch.randn, device=device, dtype=torch.bfloat16)
    return Data(random(m, k), random(n, k) * k**-0.5, random(m, n) * 1e-3)


def systems(recipe: str, mode: str) -> list[System]:
    """Return the systems of one recipe, bfloat16 first."""
    compile = mode == "compile"
    kept = (False,) if compile else (False, True)
    recipe_systems = [System("torch", "bf16", None, compile, False)]
    recipe_systems += [
        System("titanlite", recipe, by, compile, k) for k, by in itertools.product(kept, ("triton", "inductor"))
    ]
    if find_spec("torchao"):
        recipe_systems.append(System("torchao", recipe, None, compile, False))
    return recipe_systems


def layer_of(system: System, w: Tensor, device: str, emulate: bool = False) -> nn.Module:
    """The layer with the weight ``w``, in training mode."""
    linear = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta", dtype=w.dtype)
    linear.weight = nn.Parameter(w.clone())
    if system.system == "titanlite":
        config = Float8LinearConfig.from_recipe_name(system.config)
        options: dict[str, Any] = {"emulate": True} if emulate else {"kernels": system.kernels}
        convert_to_float8_training(linear, config=dataclasses.replace(config, **options))
    if system.system == "torchao":
        return _torchao(linear, system.config, device)
    return linear


def _torchao(linear: nn.Linear, recipe: str, device: str) -> nn.Module:
    from torchao.float8 import Float8LinearConfig as Config
    from torchao.float8 import convert_to_float8_training as convert

    config = Config.from_recipe_name(recipe)
    if device == "cpu":  # ours finds out by itself
        config = dataclasses.replace(config, emulate=True)
    return convert(nn.Sequential(linear), config=config)[0]  # type: ignore[no-any-return]


def step_of(layer: nn.Module, data: Data, compile: bool, kept: bool) -> Step:
    """Forward and backward; returns the output and the gradients of x and w.

    Args:
        kept: a gradient is there from the microbatch before, so that copies of the weight made for that one still hold.
    """
    x = data.x.detach().requires_grad_()
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if kept:
        weight.grad = torch.zeros_like(weight)
    # All of it or an error: what falls back to eager mode would pass for compiled.
    forward = torch.compile(layer, fullgraph=True, dynamic=False) if compile else layer

    def step() -> tuple[Tensor, ...]:
        out = forward(x)
        # Not backward(), which would add to what is there: a pass over the weight that has nothing to do with float8.
        return out.detach(), *torch.autograd.grad(out, (x, weight), data.grad)

    return step


def sqnr(outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The least signal-to-quantization-noise ratio of the pairs, 10 log10(‖b‖² / ‖a − b‖²), in dB; at most 200, for the
    same numbers, and NaN where there is one."""
    worst = 200.0
    for a, b in zip(outputs, expected, strict=True):
        signal, noise = (t.float().norm().item() for t in (b, a.float() - b.float()))
        if not math.isfinite(signal + noise):
            return math.nan
        worst = min(worst, 20 * math.log10(signal / max(noise, signal * 1e-10)))
    return worst


class Problem(NamedTuple):
    m: int
    k: int
    n: int
    recipe: str
    mode: str

    def __str__(self) -> str:
        return f"{self.m} x {self.k} x {self.n} {self.recipe}, {self.mode}"


def measure(problem: Problem, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each system."""
    m, k, n, recipe, mode = problem
    torch._dynamo.reset()  # whose limit of compilations per function is lower than there are shapes
    data = data_of(m, k, n, args.device)
    plain = System("torch", "bf16", None, False, False)
    in_bf16 = step_of(layer_of(plain, data.w, args.device), data, False, False)()
    ours = System("titanlite", recipe, None, False, False)
    emulated = step_of(layer_of(ours, data.w, args.device, emulate=True), data, False, False)()
    rows: dict[System, dict[str, Any]] = {}
    steps: dict[System, Step] = {}
    for system in systems(recipe, mode):
        row = rows[system] = {**system._asdict(), "m": m, "k": k, "n": n}
        try:
            step = step_of(layer_of(system, data.w, args.device), data, system.compile, system.kept)
            outputs = step()
        except Exception as e:  # whatever a compiler raises, and no memory left
            row["failed"] = harness.failure(e)
            continue
        row["sqnr_db"] = sqnr(outputs, in_bf16 if system.config == "bf16" else emulated)
        row["sqnr_bf16_db"] = sqnr(outputs, in_bf16)
        least = -20 * math.log10(matmul.bound(k, fast_accum=system.config != "bf16"))
        if not row["sqnr_db"] >= least:
            row["failed"] = f"wrong: {row['sqnr_db']:.1f} dB from the reference, less than {least:.0f}"
        steps[system] = step
    del in_bf16, emulated
    seconds = harness.time_running(steps, args.device, args.rounds, CALLS, ahead=mode == "compile")
    bf16 = next((s for system, s in seconds.items() if system.config == "bf16"), None)
    torchao = next((s for system, s in seconds.items() if system.system == "torchao"), None)
    for system, row in rows.items():
        if system in seconds:
            row |= {"us": seconds[system] * 1e6, "tflops": 6 * m * k * n / seconds[system] / 1e12}
            row["speedup_over_bf16"] = None if bf16 is None else bf16 / seconds[system]
            if system.system == "titanlite" and torchao is not None:
                row["speedup_over_torchao"] = torchao / seconds[system]
        yield row


def problems(args: argparse.Namespace) -> Iterator[Problem]:
    """The most telling first: the first shapes in every way, and then the others."""
    shapes = [(m, *(int(size) for size in kn.split("x"))) for m, kn in itertools.product(args.m, args.kn)]
    for some in (shapes[:FIRST], shapes[FIRST:]):
        for mode, recipe, shape in itertools.product(args.modes, args.recipes, some):
            yield Problem(*shape, recipe, mode)  # type: ignore[call-arg]  # shape has its three sizes


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.gpu_parser(__doc__)
    parser.add_argument("--m", type=harness.numbers, default=None, help="tokens, by default 8192")
    parser.add_argument(
        "--kn", type=harness.words, default=None, metavar="KxN", help=f"features, by default {','.join(KN)}"
    )
    parser.add_argument("--recipes", type=harness.words, default=list(RECIPES), help=",".join(RECIPES))
    parser.add_argument("--modes", type=harness.words, default=list(MODES), help=",".join(MODES))
    parser.add_argument("--rounds", type=int, default=7, help=f"how often each layer is timed, {CALLS} calls at a time")
    args = parser.parse_args(argv)
    toy = args.device == "cpu"
    args.m = args.m or ([32] if toy else [8192])
    args.kn = args.kn or list(TOY_KN if toy else KN)
    harness.check_known(parser, args, recipes=RECIPES, modes=MODES)
    for kn in args.kn:
        sizes = kn.split("x")
        if len(sizes) != 2 or not all(size.isdecimal() and int(size) and int(size) % 16 == 0 for size in sizes):
            parser.error(f"--kn: {kn} must be two multiples of 16, for example 4096x14336")
    harness.check_device(parser, args.device)
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    torch.manual_seed(0)
    budget = harness.Budget(args.seconds)
    rows: list[dict[str, Any]] = []
    about: dict[str, Any] = {"torchao": results.version("torchao"), "left_out": budget.left_out}
    # The first of all starts the compiler's workers, which the others need not wait for.
    for problem in budget.within(problems(args), str, share=0.7):
        rows += measure(problem, args)
        results.save("linear", rows, args, **about)
    columns = ("us", "tflops", "speedup_over_bf16", "speedup_over_torchao", "sqnr_db", "sqnr_bf16_db")
    harness.report(rows, (*System._fields, "m", "k", "n"), columns, budget)
    if not find_spec("torchao"):
        print("torchao is not installed: pip install torchao, to compare with it")
    results.save("linear", rows, args, **about)
    return int(not rows or any("failed" in row for row in rows if row["system"] == "titanlite"))


if __name__ == "__main__":
    sys.exit(main())
