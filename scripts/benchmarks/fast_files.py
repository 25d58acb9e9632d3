"""Estimate the memory of the packaged files, with the ``_fast`` ones beside them, on H100s of 80 GB: what a plan says,
by which ``activation_checkpoint.mode = "auto"`` goes there, and what a step on tensors without data holds.

python scripts/benchmarks/fast_files.py --output docs/benchmarks/fast_files.json

The vocabulary is that of Llama 3.
"""

from __future__ import annotations

from typing import Any

import harness
import results

from titanlite.config import load_config
from titanlite.metrics.device import GIB
from titanlite.plan.auto_checkpoint import choose
from titanlite.plan.depth import peak_memory
from titanlite.plan.predicted import reserved_peak

VOCAB_SIZE = 128256
DEVICES = {"llama3_8b": 8, "llama3_70b": 256, "llama3_405b": 512}


def run(file: str, devices: int) -> dict[str, Any]:
    config = load_config([], file)
    auto = config.activation_checkpoint.mode == "auto"
    if auto:
        choose(config, devices, VOCAB_SIZE, round(config.memory_estimation.device_gib * GIB), known=True).apply(config)
    planned = reserved_peak(config, devices, VOCAB_SIZE)
    assert planned is not None
    options = config.activation_checkpoint
    row = {
        "system": "titanlite",
        "file": file,
        "gpus": devices,
        "config": config.float8.recipe_name if config.model.converters else "bf16",
        "batch": config.training.local_batch_size,
        "activation_checkpoint": options.mode + (f" {options.selective_ac_option}" * (options.mode == "selective")),
        "auto": auto,
        "chosen": options.chosen,
        "planned_gib": round(planned / GIB, 2),
        "estimated_gib": round(peak_memory(config, devices, VOCAB_SIZE) / GIB, 2),
    }
    print(*row.values(), flush=True)
    return row


def main() -> None:
    args = harness.parser(__doc__).parse_args()
    files = [(f"{file}{fast}", devices) for file, devices in DEVICES.items() for fast in ("", "_fast")]
    results.save("fast_files", [run(*file) for file in files], args)


if __name__ == "__main__":
    main()
