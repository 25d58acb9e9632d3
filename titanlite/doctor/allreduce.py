"""The speed of an all-reduce among the processes of this machine.

``python -m titanlite.doctor.allreduce FILE`` is one of them, with torchrun's RANK and WORLD_SIZE; they meet in FILE.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from titanlite.doctor.clock import time_in_turn

_ELEMENTS = {"cpu": 4 << 20, "cuda": 64 << 20}  # float32


def start(processes: int, folder: str) -> list[subprocess.Popen[str]]:
    """Start the processes; the first one prints the result as JSON."""
    command = [sys.executable, "-m", "titanlite.doctor.allreduce", str(Path(folder, "rendezvous"))]
    return [
        subprocess.Popen(
            command,
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(processes)
    ]


def measure(processes: int, seconds: float) -> dict[str, Any]:
    """Return ``processes``, ``backend``, ``bytes_per_s`` (of the bus: what each process sends) and ``latency_s``, of an
    all-reduce of a few numbers; or ``why`` there is no result."""
    with tempfile.TemporaryDirectory() as folder:
        workers = start(processes, folder)
        try:
            output, _ = workers[0].communicate(timeout=seconds)
            return {"processes": processes, **json.loads(output.strip().splitlines()[-1])}
        except subprocess.TimeoutExpired:
            return {"processes": processes, "why": f"no result within {seconds:.0f} s"}
        except (ValueError, IndexError):
            return {"processes": processes, "why": f"the first process ended with status {workers[0].poll()}"}
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()


def main() -> int:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gpu = torch.cuda.device_count() >= world_size
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    backend = "nccl" if gpu else "gloo"
    dist.init_process_group(backend, init_method=f"file://{sys.argv[1]}", rank=rank, world_size=world_size)
    large = torch.ones(_ELEMENTS[device.type], device=device)
    small = torch.ones(8, device=device)
    # As many rounds in every process: who stopped earlier would leave the others waiting.
    ways = {"large": partial(dist.all_reduce, large), "small": partial(dist.all_reduce, small)}
    taken = time_in_turn(ways, device, float("inf"), most=7)
    if rank == 0:
        sent = 2 * (world_size - 1) / world_size * large.nbytes
        rate = sent / min(taken["large"])
        print(json.dumps({"backend": backend, "bytes_per_s": rate, "latency_s": min(taken["small"])}))
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
