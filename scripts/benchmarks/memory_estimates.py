"""Hold the estimates of ``COMM_MODE=fake`` against published measurements.

    python scripts/benchmarks/memory_estimates.py --output docs/benchmarks/memory_estimates.json

The figures are those that torchtitan logged, on H100 GPUs: *reserved* memory, which is what the allocator took from the
device, fragmentation included. The estimates are of *active* memory, which is what tensors take of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import harness
import results
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel

from titanlite.config import JobConfig, load_config
from titanlite.distributed.mesh import Mesh
from titanlite.metrics.device import GIB
from titanlite.optim import cross_entropy_loss
from titanlite.plan.estimate import estimate

TUTORIAL = "docs.pytorch.org/ao, Pretraining with float8, the log of Llama 3 8B, step 10 (June 2025)"
TORCHAO = "torchao, torchao/float8/README.md, training benchmarks (2025)"
REPORT = "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md (December 2024), table "


class Case(NamedTuple):
    """A published figure and the options of a run like it.

    Attributes:
        loss: "compiled"; "eager", as before torchtitan compiled it; or "eager, DTensor", which under tensor parallelism
            is PyTorch's ``loss_parallel`` in place of titanlite's.
    """

    source: str
    published_gib: float
    file: str
    gpus: int
    batch: int
    options: tuple[str, ...]
    loss: str = "compiled"


SELECTIVE_OP = ("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op")
SELECTIVE_2 = ("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=2")
NONE, FULL = ("--activation_checkpoint.mode=none",), ("--activation_checkpoint.mode=full",)
FLOAT8 = ("--model.converters=float8",)
TP8 = ("--parallelism.tensor_parallel_degree=8",)

CASES = (
    *(Case(TUTORIAL, 30.89, "llama3_8b", 8, 1, options) for options in (FULL, SELECTIVE_OP, SELECTIVE_2, NONE)),
    *(Case(TORCHAO, 47.65, "llama3_8b", 8, 1, SELECTIVE_OP, loss) for loss in ("compiled", "eager")),
    Case(REPORT + "1", 82.4, "llama3_8b", 8, 2, (*SELECTIVE_OP, "--training.compile=false"), "eager"),
    *(Case(REPORT + "1", 77.0, "llama3_8b", 8, 2, o, "eager") for o in (SELECTIVE_OP, SELECTIVE_2)),
    Case(REPORT + "1", 76.8, "llama3_8b", 8, 2, (*SELECTIVE_OP, *FLOAT8), "eager"),
    Case(REPORT + "4", 71.9, "llama3_70b", 256, 16, (*FULL, *TP8, *FLOAT8)),
    Case(
        REPORT + "4", 71.9, "llama3_70b", 256, 16, (*FULL, *TP8, *FLOAT8, "--training.compile=false"), "eager, DTensor"
    ),
)


def dtensor_loss(config: JobConfig, mesh: Mesh) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss as torchtitan computed it under tensor parallelism: by ``loss_parallel``, in eager mode."""
    # Entered for good: backward needs it too, and the process ends with its estimate.
    loss_parallel().__enter__()

    def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
        sharded = DTensor.from_local(logits, mesh.tp, [Shard(-1)], run_check=False)
        loss = cross_entropy_loss(sharded, labels)
        assert isinstance(loss, DTensor)
        return loss.to_local()

    return loss_fn


def run(case: Case) -> dict[str, Any]:
    options = [*case.options, f"--training.local_batch_size={case.batch}"]
    if case.loss == "eager" and "--training.compile=false" not in options:
        options.append("--compile.components=model")
    config = load_config(options, str(harness.ROOT / "train_configs" / f"{case.file}.toml"))
    start = time.perf_counter()
    loss = dtensor_loss if case.loss == "eager, DTensor" else None
    found = estimate(config, case.gpus, loss_builder=loss)
    seconds = time.perf_counter() - start
    ac = config.activation_checkpoint
    peak = found.peak / GIB
    row = {
        "system": "titanlite",
        "config": "tensorwise" if config.model.converters else "bf16",
        "model": config.model.flavor,
        "gpus": case.gpus,
        "tensor_parallel": config.parallelism.tensor_parallel_degree,
        "batch": case.batch,
        "seq_len": config.training.seq_len,
        "compile": config.compile.components if config.training.compile else [],
        "loss": case.loss,
        "activation_checkpoint": ac.mode + (f" {ac.selective_ac_option}" if ac.mode == "selective" else ""),
        "estimated_gib": round(peak, 2),
        "at_peak_gib": {kind: round(n / GIB, 2) for kind, n in max(found.ranks, key=lambda r: r.peak).at_peak.items()},
        "published_gib": case.published_gib,
        "difference_pct": round(100 * (peak / case.published_gib - 1), 1),
        "source": case.source,
        "seconds": round(seconds),
    }
    print(*(row[k] for k in ("model", "batch", "config", "loss", "activation_checkpoint")), end=": ")
    print(
        f"{peak:.2f} GiB, published {case.published_gib} ({row['difference_pct']:+.1f}%), {seconds:.0f} s", flush=True
    )
    return row


def main() -> None:
    args = harness.parser(__doc__).parse_args()
    results.save("memory_estimates", [run(case) for case in CASES], args)


if __name__ == "__main__":
    main()
