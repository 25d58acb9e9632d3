"""Predict the memory of published mixtures of experts on as many GPUs as docs/moe.md has recipes for, by
``COMM_MODE=fake``, and the time that the prediction takes.

    python scripts/benchmarks/moe_memory.py --output docs/benchmarks/moe_memory.json
"""

from __future__ import annotations

import sys
import time
from typing import Any, NamedTuple

import harness
import results

from titanlite.config import load_config
from titanlite.metrics.device import GIB
from titanlite.plan.estimate import estimate


class Recipe(NamedTuple):
    family: str
    flavor: str
    gpus: int
    expert_parallel: int
    options: tuple[str, ...] = ()


COMMON = (
    "--training.seq_len=4096",
    "--training.local_batch_size=1",
    "--training.compile",
    "--activation_checkpoint.mode=full",
)
RECIPES = (
    Recipe("qwen3_moe", "30B-A3B", 8, 8),
    Recipe("qwen3_moe", "235B-A22B", 2048, 8),
    Recipe("deepseek_v3", "671B", 2048, 64),
)


def predict(recipe: Recipe) -> dict[str, Any]:
    """The peak of memory at equal load, and with all tokens on one device, and the seconds until it was known."""
    chosen = (f"--model.name={recipe.family}", f"--model.flavor={recipe.flavor}")
    degree = f"--parallelism.expert_parallel_degree={recipe.expert_parallel}"
    config = load_config([*chosen, degree, *COMMON, *recipe.options])
    start = time.perf_counter()
    ranks = estimate(config, recipe.gpus).ranks
    row = {
        "system": "titanlite",
        "config": "bf16",
        "model": recipe.flavor,
        "gpus": recipe.gpus,
        "expert_parallel": recipe.expert_parallel,
        "seq_len": config.training.seq_len,
        "estimated_gib": round(max(rank.peak for rank in ranks) / GIB, 2),
        "worst_gib": round(max(rank.worst_peak or rank.peak for rank in ranks) / GIB, 2),
        "seconds": round(time.perf_counter() - start),
    }
    print(*row.values(), flush=True)
    return row


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--models", help="those to predict, separated by commas; by default all")
    args = parser.parse_args()
    models = args.models.split(",") if args.models else [recipe.flavor for recipe in RECIPES]
    results.save("moe_memory", [predict(recipe) for recipe in RECIPES if recipe.flavor in models], args, "cpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
