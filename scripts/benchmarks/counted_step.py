"""Predict steps from what the compiled code of a block moves, and from assumed ceilings; nothing is measured.

    python scripts/benchmarks/counted_step.py --out docs/benchmarks/counted_step.json

It reads the counts of compiled_block.py. Each part of a step takes its time alone, one after the other:

- *matmuls* and *attention*: their FLOPs at the ceilings, as in roofline.py (step_floor.py), with those that activation
  checkpointing computes again;
- *block*: the bytes of the block's other kernels, in whole sectors of 32 bytes, at the speed of a copy;
- *ends*: the bytes of the embeddings, the last norm, the logits and the optimizer, the same for every system.

Two systems differ in *block* alone, so their ratio has the error of what is left out: launches, overlap, and matmuls
that reach less than the ceiling.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import harness
import results
import step_floor
from benchmark_models import FLAVORS
from cost import BF16, Ceilings

COUNTS = harness.ROOT / "docs" / "benchmarks" / "compiled_block.json"
BF16_PEER = "torchtitan"


def is_of_default(row: dict[str, Any]) -> bool:
    """Return whether a row of the counts is of the code that its system runs by default."""
    return row["architecture"] == "sm_90" and row["fusion"] == ("block" if row["system"] == "titanlite" else "compiler")


def predicted(row: dict[str, Any], layers: int, at: Ceilings, attention_rate: float) -> dict[str, Any]:
    """The parts of a step, in seconds, with blocks as in ``row`` of the counts."""
    args, clock = FLAVORS[f"8B-{layers}"], step_floor.Given(at, attention_rate)
    tokens, batch = row["tokens"], row["tokens"] // step_floor.SEQ_LEN
    once, again = step_floor.step_gemms(args, row["config"], tokens)
    again = again if row["ac"] == "op" else []
    ends = tokens * BF16 * (2 * args.dim + 5 * args.dim + 2 * args.vocab_size)
    ends += step_floor.PER_PARAMETER * step_floor.parameters_of(args)
    parts = {
        "matmul_s": sum(map(clock.gemm, [*once, *again])),
        "attention_s": layers * clock.attention(args, batch, step_floor.SEQ_LEN),
        "block_s": layers * max(row["mb"], row["sectors_mb"]) * 1e6 / at.bandwidth,
        "ends_s": ends / at.bandwidth,
    }
    step = sum(parts.values())
    keys = ("system", "config", "ac", "tokens")
    return {**{key: row[key] for key in keys}, "layers": layers, **parts, "step_s": step, "tps": tokens / step}


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to titanlite's rows their speed over that of the peer, and over titanlite's bf16."""
    speeds = {(r["system"], r["config"], r["ac"], r["tokens"]): r["tps"] for r in rows}
    for row in (row for row in rows if row["system"] == "titanlite"):
        config, ac, tokens = row["config"], row["ac"], row["tokens"]
        peer = speeds.get((BF16_PEER if config == "bf16" else "torchao", config, ac, tokens))
        row["over_peer"] = row["tps"] / peer if peer else None
        row["over_bf16"] = row["tps"] / speeds["titanlite", "bf16", ac, tokens]
    return rows


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--counts", type=Path, default=COUNTS, help="a result of compiled_block.py")
    parser.add_argument("--bf16-tflops", type=float, default=790)
    parser.add_argument("--fp8-tflops", type=float, default=1500, help="with fast accumulation")
    parser.add_argument("--fp8-full-tflops", type=float, default=1400, help="with full accumulation")
    parser.add_argument("--attention-tflops", type=float, default=550, help="without what is masked")
    parser.add_argument("--bandwidth-gbs", type=float, default=4300, help="of a copy")
    parser.add_argument("--layers", type=int, default=16)
    args = parser.parse_args()
    rates = [rate * 1e12 for rate in (args.bf16_tflops, args.fp8_tflops, args.fp8_full_tflops)]
    at = Ceilings(rates[0], rates[1], rates[2], args.bandwidth_gbs * 1e9)
    counts = json.loads(args.counts.read_text(encoding="utf-8"))["results"]
    rows = [predicted(row, args.layers, at, args.attention_tflops * 1e12) for row in counts if is_of_default(row)]
    rows = with_ratios(rows)
    print(harness.show(rows, ("system", "config", "ac", "tokens", "block_s", "step_s", "over_peer", "over_bf16")))
    results.save("counted_step", rows, args, "assumed ceilings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
