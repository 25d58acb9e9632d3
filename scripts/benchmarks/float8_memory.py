"""The memory of float8 against bf16 on one GPU, estimated without one: what a layer keeps for backward, and the peak of
a whole step, with each recipe, eager and compiled.

    python scripts/benchmarks/float8_memory.py --output docs/benchmarks/float8_memory.json

Llama 3 8B cut to --layers layers and to half of them, with its vocabulary, in sequences of 8192 tokens. Each estimate
is a step of the trainer on tensors without data (``COMM_MODE=fake``), which is of active memory.
What a layer keeps is the difference of the two peaks, per layer, less parameters, optimizer state, and the weights that
FSDP2 has gathered.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import harness
import results
from benchmark_models import FLAVORS, options

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
    """Return the peak memory of a step with one sequence, in bytes."""
    given = options(flavor, config, seq_len=seq_len, batch=1, compile=compiled)
    return estimate(load_config([*given, *CHECKPOINTING[checkpointing]]), 1).peak


def rows(layers: int, seq_len: int) -> list[dict[str, Any]]:
    table = []
    for checkpointing, compiled in itertools.product(CHECKPOINTING, (False, True)):
        base: dict[str, Any] = {}
        for config in harness.CONFIGS:
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
            table.append(row)
    return table


def main(argv: list[str] | None = None) -> int:
    parser = harness.parser(__doc__)
    parser.add_argument(
        "--layers", type=int, default=16, choices=range(2, 33), metavar="2..32", help="layers of the model"
    )
    parser.add_argument("--seq_len", type=int, default=8192, help="tokens per sequence")
    args = parser.parse_args(argv)
    results.save("float8_memory", rows(args.layers, args.seq_len), args, kind="cpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
