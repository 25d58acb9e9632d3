"""The memory of a step of several microbatches: estimated for Llama 3 8B on 8 GPUs, and counted in real gloo processes.

    python scripts/benchmarks/accumulation.py --output docs/benchmarks/accumulation.json

The estimates are those of ``COMM_MODE=fake``: one step on tensors without data. The real processes train the debug
model, and every tensor that a step allocates is followed (titanlite/plan/memory.py). What a step of several
microbatches holds beyond that of one is compared with the gradients of a process. It takes about five minutes.
"""

from __future__ import annotations

import tempfile
from typing import Any, NamedTuple

import harness
import results
from thousand_ranks import in_processes

from titanlite.checkpoint.state import local_bytes
from titanlite.config import load_config
from titanlite.metrics.device import GIB
from titanlite.plan.estimate import dimensions, estimate
from titanlite.plan.memory import MemoryTracker
from titanlite.train import Trainer

GPUS, MANY = 8, 16
PROCESSES = 2


class Case(NamedTuple):
    """A step of ``microbatches``, whose gradients are ``reduced`` (``parallelism.fsdp_reduce_gradients``)."""

    microbatches: int
    reduced: str
    options: tuple[str, ...] = ()


CASES = (
    Case(1, "step"),
    Case(MANY, "step"),
    Case(MANY, "microbatch"),
    Case(MANY, "microbatch", ("--training.loss_chunks=4",)),
    Case(MANY, "microbatch", ("--optimizer.moments=bfloat16",)),
    Case(MANY, "microbatch", ("--optimizer.moments=bfloat16", "--training.loss_chunks=4")),
    Case(MANY, "microbatch", ("--activation_checkpoint.mode=full",)),
)
REAL = (Case(1, "step"), Case(4, "step"), Case(4, "microbatch"))


def estimated(case: Case) -> dict[str, Any]:
    options = ["--training.local_batch_size=1", f"--training.global_batch_size={GPUS * case.microbatches}"]
    options += [f"--parallelism.fsdp_reduce_gradients={case.reduced}", *case.options]
    config = load_config(options, str(harness.ROOT / "train_configs" / "llama3_8b.toml"))
    (rank,) = estimate(config, GPUS).ranks
    parts = {kind: round(n / GIB, 2) for kind, n in rank.at_peak.items()}
    row = {"part": "estimate", "model": "8B", "gpus": GPUS, **_named(case)}
    return {**row, "peak_gib": round(rank.peak / GIB, 2), "at_peak_gib": parts}


def counted(case: Case) -> dict[str, Any]:
    """Count in real processes what a step allocates at most, and the gradients that it leaves."""
    peak, gradients = max(in_processes(PROCESSES, _step, case))
    row = {"part": "counted", "model": "debugmodel", "processes": PROCESSES, **_named(case)}
    return {**row, "peak_bytes": peak, "gradients_bytes": gradients}


def _named(case: Case) -> dict[str, Any]:
    return {"microbatches": case.microbatches, "reduced": case.reduced, "options": list(case.options)}


def _step(case: Case) -> tuple[int, int]:
    with tempfile.TemporaryDirectory() as folder:
        options = [f"--job.dump_folder={folder}/run", "--training.seq_len=512", "--training.local_batch_size=4"]
        options += ["--training.seed=0", f"--training.global_batch_size={4 * PROCESSES * case.microbatches}"]
        options += [f"--parallelism.fsdp_reduce_gradients={case.reduced}", *case.options]
        trainer = Trainer(load_config(options, str(harness.ROOT / "train_configs" / "debug_model.toml")))
        batch = next(trainer.loader)
        trainer.runner.forward_backward(batch)  # the first step allocates what later ones keep
        trainer.optimizer.zero_grad()
        with MemoryTracker(dimensions(trainer.mesh)) as tracker:
            trainer.runner.forward_backward(batch)
        named = ((name, p.grad) for part in trainer.model_parts for name, p in part.named_parameters())
        gradients = local_bytes({name: grad for name, grad in named if grad is not None})
        trainer.close()
    return tracker.peak, gradients


def main() -> None:
    args = harness.parser(__doc__).parse_args()
    rows = []
    for case in CASES:
        rows.append(estimated(case))
        print(rows[-1], flush=True)
    for case in REAL:
        rows.append(counted(case))
        print(rows[-1], flush=True)
    results.save("accumulation", rows, args, kind="cpu")


if __name__ == "__main__":
    main()
