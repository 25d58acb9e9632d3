"""Estimate the memory of the packaged files, with the ``_fast`` ones beside them, on GPUs of 80 GB.

python scripts/benchmarks/fast_files.py --output docs/benchmarks/fast_files.json
"""

from __future__ import annotations

from typing import Any

import harness
import results

from titanlite.config import load_config
from titanlite.metrics.device import GIB
from titanlite.plan.auto_checkpoint import choose
from titanlite.plan.depth import peak_memory

DEVICES = {"llama3_8b": 8, "llama3_70b": 256, "llama3_405b": 512}


def run(file: str, devices: int) -> dict[str, Any]:
    config = load_config([], file)
    auto = config.activation_checkpoint.mode == "auto"
    if auto:
        choose(config, devices, None, round(config.memory_estimation.device_gib * GIB)).apply(config)
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
        "estimated_gib": round(peak_memory(config, devices, None) / GIB, 2),
    }
    print(*row.values(), flush=True)
    return row


def main() -> None:
    args = harness.parser(__doc__).parse_args()
    files = [(f"{file}{fast}", devices) for file, devices in DEVICES.items() for fast in ("", "_fast")]
    results.save("fast_files", [run(*file) for file in files], args)


if __name__ == "__main__":
    main()
