"""The compiled loss on a GPU that is not there: prints what it launches, reads and writes, as JSON.

A child process of whole_step.py, with the environment of :func:`absent_gpu.device.environment`.
"""

from __future__ import annotations

import argparse
import json
import os

import torch

from absent_gpu import device, recorder
from titanlite.optim import cross_entropy_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", choices=device.ARCHITECTURES, default="sm_90")
    for name, default in {"tokens": 8192, "vocab-size": 128256}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    device.install(options.architecture)
    recorder.install()
    with recorder.recording() as record:
        shape = (1, options.tokens, options.vocab_size)
        logits = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        labels = torch.zeros(shape[:2], device="cuda", dtype=torch.int64)
        record.launches.clear()
        torch.compile(cross_entropy_loss, fullgraph=True)(logits, labels).backward()
    launches = record.launches
    mb = max(sum(launch.traffic.total for launch in launches), sum(launch.traffic.sectors for launch in launches)) / 1e6
    print(json.dumps({"launches": len(launches), "mb": mb}), flush=True)
    os._exit(0)  # the compiler's threads can abort an orderly end


if __name__ == "__main__":
    main()
