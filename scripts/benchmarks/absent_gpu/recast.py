"""The compiled cast of gathered float8 weights along their other dimension, on a GPU that is not there: prints what it
launches, reads and writes, by recipe, as JSON.

A child process of gather_casts.py, with the environment of :func:`absent_gpu.device.environment`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os

import torch
from torch import Tensor

from absent_gpu import device, recorder
from titanlite.float8 import Float8LinearConfig
from titanlite.quant.format import Format, Operand


def count(format: Format, rows: int, columns: int) -> dict[str, float]:
    def recast(data: Tensor, scale: Tensor) -> tuple[Tensor, Tensor | None]:
        again = format.recast(Operand(data, scale), "weight")
        return again.data.t().contiguous(), again.scale  # as the units take it

    with recorder.recording() as record:
        data = torch.zeros(rows, columns, device="cuda", dtype=torch.float8_e4m3fn)
        scale = torch.ones(rows, 1, device="cuda")
        record.launches.clear()
        torch.compile(recast, fullgraph=True)(data, scale)
    totals = (sum(getattr(launch.traffic, kind) for launch in record.launches) for kind in ("total", "sectors"))
    return {"launches": len(record.launches), "bytes": max(totals)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", choices=device.ARCHITECTURES, default="sm_90")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--columns", type=int, required=True)
    options = parser.parse_args()
    device.install(options.architecture)
    recorder.install()
    counts = {}
    for recipe in ("rowwise", "rowwise_with_gw_hp"):
        config = Float8LinearConfig.from_recipe_name(recipe)
        config = dataclasses.replace(config, target=options.architecture, kernels="inductor")
        counts[recipe] = count(config.format, options.rows, options.columns)
    print(json.dumps(counts), flush=True)
    os._exit(0)  # the compiler's threads can abort an orderly end


if __name__ == "__main__":
    main()
