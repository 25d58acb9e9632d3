"""Int8 on the CPU against bfloat16 and against torchao: linear layers, and steps of the trainer.

    python scripts/benchmarks/int8_cpu.py --output docs/benchmarks/int8_cpu.json
    python scripts/benchmarks/int8_cpu.py --part layers --kn=768x2048 --pairs=5
    python scripts/benchmarks/int8_cpu.py --part step --isa amx --models=20M

- **layers**: forward and backward of a bias-free layer, 2,048 tokens, in bfloat16. The systems take turns; the ratio is
  the median over pairs with bfloat16 in the same mode, above 1 where int8 is faster. What a layer's time goes to is
  timed apart: its matmuls without scales, in both dtypes, and its casts.
- **step**: the trainer's whole step, of models of about 100M and 20M parameters: in bfloat16, with the converter int8,
  and with a converter that puts torchao's layers in the same places. They take turns too, compiled and eager.

Whether int8 gains depends on what the processor has for bfloat16: with AMX, its matmuls are nearly as fast as those in
int8. On a processor with AMX each part therefore also runs in a process whose oneDNN takes none (``isa``), as on
processors before Sapphire Rapids and on AMD's.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks

import harness
import results
import torch
from loops import quiet_trainer
from torch import nn

from titanlite.config import JobConfig
from titanlite.converters.registry import register_converter
from titanlite.distributed.mesh import Mesh
from titanlite.quant.format import OperandName, Use
from titanlite.quant.int8.format import Int8Format
from titanlite.quant.linear import QuantLinear

TOKENS = 2048
KN = ("768x768", "768x2048", "2048x2048")
ISA = {"amx": {}, "without amx": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}}
Operands = Mapping[OperandName, torch.Tensor]
SHAPES = {
    "100M": ["--model.flavor=100M", "--model.args.n_layers=12", "--model.args.vocab_size=8192"],
    "20M": ["--model.flavor=20M"],
}
STEP = [
    "--training.seq_len=512",
    "--training.local_batch_size=4",
    "--activation_checkpoint.mode=none",  # the fastest
    "--metrics.log_freq=1000",
    "--training.mixed_precision_param=bfloat16",
]
CONVERTERS = {"titanlite bf16": "", "titanlite int8": "int8", "torchao int8": "torchao_int8"}


@register_converter("torchao_int8")
class TorchAOConverter:
    """torchao's int8 layers in the places of the converter int8."""

    def __init__(self, config: JobConfig, mesh: Mesh) -> None:
        pass

    def convert(self, model: nn.Module) -> str:
        count = 0
        for name, layer in list(model.named_modules()):
            if type(layer) is nn.Linear and name != "output":
                with torch.device("meta"):
                    model.set_submodule(name, empty_torchao_layer(layer))
                count += 1
        return f"{count} layers are torchao's"

    def post_optimizer_hook(self, model: nn.Module) -> None:
        pass


def empty_torchao_layer(linear: nn.Linear) -> nn.Module:
    from torchao.prototype.quantized_training import int8_mixed_precision as mixed

    config = mixed.Int8MixedPrecisionTrainingConfig()
    sizes = linear.in_features, linear.out_features
    layer: nn.Module = mixed.Int8MixedPrecisionTrainingLinear(*sizes, bias=False, config=config)
    return layer


def torchao_layer(linear: nn.Linear) -> nn.Module:
    layer = empty_torchao_layer(linear)
    layer.load_state_dict(linear.state_dict())
    return layer.bfloat16()


def steps_of_layers(k: int, n: int) -> dict[tuple[str, str, bool], Callable[[], None]]:
    """Forward and backward, by system, config and whether it is compiled."""
    linear = nn.Linear(k, n, bias=False, dtype=torch.bfloat16)
    layers: dict[tuple[str, str], nn.Module] = {
        ("titanlite", "bf16"): linear,
        ("titanlite", "int8"): QuantLinear.from_linear(copy.deepcopy(linear), Int8Format()),
        ("torchao", "int8"): torchao_layer(linear),
    }
    x = torch.randn(TOKENS, k, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(TOKENS, n, dtype=torch.bfloat16)

    def step(layer: nn.Module) -> None:
        torch.autograd.grad(layer(x), (x, *layer.parameters()), grad)

    def make(layer: nn.Module, compiled: bool) -> Callable[[], None]:
        if compiled:
            layer = copy.deepcopy(layer)
            layer.compile()
        return lambda: step(layer)

    return {(*key, compiled): make(layer, compiled) for key, layer in layers.items() for compiled in (False, True)}


def parts_of_layers(k: int, n: int) -> dict[str, Callable[[], None]]:
    """The three matmuls of a layer in bfloat16 and in int8, without scales, and the six casts."""
    x, weight = torch.randn(TOKENS, k, dtype=torch.bfloat16), torch.randn(n, k, dtype=torch.bfloat16)
    grad = torch.randn(TOKENS, n, dtype=torch.bfloat16)
    int8 = Int8Format()
    tensors: dict[OperandName, torch.Tensor] = {"input": x, "weight": weight, "grad_output": grad}
    by_rows, by_columns = ({name: int8.cast(t, Use(name, i)).data for name, t in tensors.items()} for i in (1, 0))

    def multiply(mm: Callable[..., object], rows: Operands, columns: Operands) -> None:
        mm(rows["input"], rows["weight"].t())
        mm(rows["grad_output"], columns["weight"])
        mm(columns["grad_output"].t(), columns["input"])

    def cast() -> None:
        for name, tensor in tensors.items():
            int8.cast_both(tensor, name)

    return {
        "bf16_matmuls_ms": lambda: multiply(torch.mm, tensors, tensors),
        "int8_matmuls_ms": lambda: multiply(torch._int_mm, by_rows, by_columns),
        "casts_ms": cast,
    }


def time_in_turn(steps: Mapping[Any, Callable[[], object]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of each step in each of ``rounds`` rounds, in which they take turns."""
    seconds: dict[Any, list[float]] = {key: [] for key in steps}
    for step in steps.values():
        harness.repeat(step, 3)
    for _ in range(rounds):
        for key, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[key].append(time.perf_counter() - start)
    return seconds


def measure_layers(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for shape in args.kn:
        k, n = map(int, shape.split("x"))
        seconds = time_in_turn(steps_of_layers(k, n), args.pairs)
        parts = {name: median(t) * 1e3 for name, t in time_in_turn(parts_of_layers(k, n), args.pairs).items()}
        print(f"{shape:10} " + ", ".join(f"{name} {ms:.1f}" for name, ms in parts.items()), flush=True)
        for (system, config, compiled), times in seconds.items():
            base = seconds["titanlite", "bf16", compiled]
            ratio = median(bf16 / duration for bf16, duration in zip(base, times, strict=True))
            rows.append(
                {"part": "layers", "system": system, "config": config, "compile": compiled, "m": TOKENS, "k": k, "n": n}
                | {"ms": median(times) * 1e3, "ratio_to_bf16": ratio, **parts}
            )
            print(f"{shape:10} {system:9} {config:5} {'compiled' if compiled else 'eager':8} {ratio:.2f}x", flush=True)
    return rows


def measure_steps(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for model, compiled in itertools.product(args.models, (True, False)):
        with ExitStack() as stack:
            trainers = {}
            for system, converter in CONVERTERS.items():
                options = [*SHAPES[model], *STEP, f"--training.compile={str(compiled).lower()}"]
                options += [f"--model.converters={converter}"] if converter else []
                if converter == "torchao_int8":  # the compiler cannot trace its layers whole
                    options.append("--compile.fullgraph=false")
                trainers[system] = stack.enter_context(quiet_trainer(options))
            steps: dict[Any, Callable[[], object]] = {system: trainer.advance for system, trainer in trainers.items()}
            seconds = time_in_turn(steps, args.pairs)
            first = trainers["titanlite bf16"]
            tokens = first.global_batch_size * first.config.training.seq_len
            shape = {"part": "step", "model": model, "params": first.size.params, "compile": compiled}
        for system, times in seconds.items():
            ratio = median(bf16 / duration for bf16, duration in zip(seconds["titanlite bf16"], times, strict=True))
            name, config = system.split()
            speed = {"step_ms": median(times) * 1e3, "tps": tokens / median(times), "ratio_to_bf16": ratio}
            rows.append({"system": name, "config": config, **shape, **speed})
            mode = "compiled" if compiled else "eager"
            print(f"{model:5} {shape['params']:,} {system:15} {mode:8} {ratio:.2f}x", flush=True)
    return rows


def in_children(args: argparse.Namespace, argv: list[str]) -> list[dict[str, Any]]:
    """The rows of each instruction set, from a process of its own: oneDNN reads it when it starts."""
    rows = []
    for isa in args.isa:
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder, "part.json")
            command = [sys.executable, __file__, *argv, "--child", f"--output={part}"]
            print(f"{isa}:", flush=True)
            subprocess.run(command, env={**os.environ, **ISA[isa]}, check=True)
            rows += [{"isa": isa, **row} for row in json.loads(part.read_text())["results"]]
    return rows


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--part", choices=("layers", "step"), nargs="+", default=["layers", "step"])
    possible = [*ISA] if torch.cpu._is_amx_tile_supported() else ["without amx"]
    parser.add_argument("--isa", choices=possible, nargs="+", default=possible)
    parser.add_argument("--kn", type=harness.words, default=[*KN], help="features of the layers, as 768x2048,2048x768")
    parser.add_argument("--models", type=harness.words, default=[*SHAPES], help="of the steps: 100M,20M")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.child:
        results.save("int8_cpu", in_children(args, sys.argv[1:]), args)
        return 0
    rows: list[dict[str, Any]] = []
    for part in args.part:
        rows += measure_layers(args) if part == "layers" else measure_steps(args)
    results.save("int8_cpu", rows, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
