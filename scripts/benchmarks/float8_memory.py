"""The memory of float8 against bf16 on one GPU, estimated without one: what a layer keeps for backward, and the peak of
a whole step, with each recipe, eager and compiled.

    python scripts/benchmarks/float8_memory.py --output docs/benchmarks/float8_memory.json

Llama 3 8B cut to --layers layers and to half of them, with its vocabulary, in sequences of 8192 tokens. Each estimate
is a step of the trainer on tensors without data (``COMM_MODE=fake``), which is of active memory.
What a layer keeps is the difference of the two peaks, per layer, less parameters, optimizer state, and the weights that
FSDP2 has gathered.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import results
from benchmark_models import FAMILY, FLAVORS
from harness import RECIPES

from titanlite.config import load_config
from titanlite.metrics.device import GIB
from titanlite.plan.estimate import estimate

MIB = 2**20
CHECKPOINTING = {
    "none": ["--activation_checkpoint.mode=none"],
    "selective op": ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"],
}
# Of a block's parameters: float32 masters, two moments, and the gathered bfloat16 weights.
BYTES_PER_PARAMETER = 4 + 8 + 2


def block_parameters(flavor: str) -> int:
    args = FLAVORS[flavor]
    kv = args.n_kv_heads * args.head_size
    return 2 * args.dim * (args.dim + kv) + 3 * args.dim * args.ffn_dim + 2 * args.dim


def peak(flavor: str, config: str, compiled: bool, checkpointing: str, seq_len: int) -> int:
    """Of a step with one sequence, in bytes."""
    given = [
        "--experimental.custom_import=benchmark_models",
        f"--model.name={FAMILY}",
        f"--model.flavor={flavor}",
        f"--training.seq_len={seq_len}",
        "--training.local_batch_size=1",
        f"--training.compile={str(compiled).lower()}",
        *CHECKPOINTING[checkpointing],
    ]
    if config != "bf16":
        given += ["--model.converters=float8", f"--float8.recipe_name={config}", "--float8.filter_fqns=output"]
    return estimate(load_config(given), 1).peak


def rows(layers: int, seq_len: int) -> list[dict[str, Any]]:
    found = []
    for checkpointing, compiled in itertools.product(CHECKPOINTING, (False, True)):
        base: dict[str, Any] = {}
        for config in ("bf16", *RECIPES):
            whole, half = (peak(f"8B-{n}", config, compiled, checkpointing, seq_len) for n in (layers, layers // 2))
            kept = (whole - half) / (layers - layers // 2) - BYTES_PER_PARAMETER * block_parameters(f"8B-{layers}")
            row: dict[str, Any] = {"system": "titanlite", "config": config, "compile": compiled}
            row |= {"activation_checkpoint": checkpointing, "layers": layers, "batch": 1, "seq_len": seq_len}
            row |= {"estimated_peak_gib": round(whole / GIB, 3)}
            if checkpointing == "none":  # else the peak may be in backward, where gradients are, too
                row["kept_per_layer_mib"] = round(kept / MIB, 1)
            base = base or row
            row["peak_over_bf16"] = round(row["estimated_peak_gib"] / base["estimated_peak_gib"], 4)
            if "kept_per_layer_mib" in row:
                row["kept_over_bf16"] = round(row["kept_per_layer_mib"] / base["kept_per_layer_mib"], 3)
            print(*(f"{key} {value}" for key, value in row.items() if key not in ("system", "batch")), flush=True)
            found.append(row)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=int, default=16, choices=range(2, 33), metavar="2..32", help="layers of the model"
    )
    parser.add_argument("--seq_len", type=int, default=8192, help="tokens per sequence")
    parser.add_argument("--output", type=Path, help="write the results here")
    args = parser.parse_args(argv)
    found = rows(args.layers, args.seq_len)
    if args.output:
        results.write("float8_memory", found, args.output, kind="cpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
