"""Predict the memory of the fine-tuning recipes on 8 GPUs, by ``COMM_MODE=fake``.

    python scripts/benchmarks/finetune_memory.py --output docs/benchmarks/finetune_memory.json

The shapes are flavors, which are those of the published folders (a test compares them).
"""

from __future__ import annotations

from typing import Any

import harness
import results
from memory_estimates import Case, run

from titanlite.config import load_config, packaged

GPUS = 8
FLAVORS = {
    "llama3_1_8b": "3.1-8B",
    "mistral_7b": "7B-v0.1",
    "mistral_nemo": "Nemo-2407",
    "qwen2_5_7b": "7B",
    "phi_4": "phi-4",
}


def predict(model: str, recipe: str) -> dict[str, Any]:
    training = load_config([], packaged.find(recipe)).training
    case = Case("", None, f"finetune/{recipe}", GPUS, training.local_batch_size, (f"--model.flavor={FLAVORS[model]}",))
    microbatches = training.global_batch_size // (training.local_batch_size * GPUS)
    return {"recipe": recipe, "microbatches": microbatches, **run(case)}


def main() -> None:
    args = harness.parser(__doc__).parse_args()
    recipes = [(model, f"{model}_hellaswag{suffix}") for model in FLAVORS for suffix in ("", "_float8")]
    results.save("finetune_memory", [predict(*recipe) for recipe in recipes], args)


if __name__ == "__main__":
    main()
