"""Hold the estimates of ``COMM_MODE=fake`` against published measurements.

    python scripts/benchmarks/memory_estimates.py --output docs/benchmarks/memory_estimates.json

The figures are those that torchtitan logged, on H100 GPUs: *reserved* memory, which is what the allocator took from the
device, fragmentation included. The estimates are of *active* memory, which is what tensors take of it.

Then estimate what ``training.loss_chunks`` saves, in whole steps and of the output projection with its loss alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import harness
import results
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel

from titanlite.config import Degrees, JobConfig, load_config
from titanlite.config.schema import MEMORY_BACKEND, Compile
from titanlite.distributed.chunked_loss import ChunkedCrossEntropy
from titanlite.distributed.mesh import Mesh, build_mesh
from titanlite.metrics.device import GIB
from titanlite.optim import cross_entropy_loss
from titanlite.plan.estimate import estimate
from titanlite.plan.lone_rank import lone_process_group
from titanlite.plan.memory import MemoryTracker
from titanlite.training.build import build_loss

TUTORIAL = "docs.pytorch.org/ao, Pretraining with float8, the log of Llama 3 8B, step 10 (June 2025)"
TORCHAO = "torchao, torchao/float8/README.md, training benchmarks (2025)"
REPORT = "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md (December 2024), table "


class Case(NamedTuple):
    """The options of a run, and a figure published for one like it, or none.

    Attributes:
        loss: "compiled"; "eager", as before torchtitan compiled it; or "eager, DTensor", which under tensor parallelism
            is PyTorch's ``loss_parallel`` in place of titanlite's.
    """

    source: str
    published_gib: float | None
    file: str
    gpus: int
    batch: int
    options: tuple[str, ...]
    loss: str = "compiled"
    chunks: int = 1


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

CHUNKS = tuple(
    Case("", None, file, gpus, batch, options, loss, chunks)
    for file, gpus, batch, options in (
        ("llama3_8b", 8, 1, SELECTIVE_OP),
        ("llama3_8b", 8, 2, SELECTIVE_OP),
        ("llama3_70b", 256, 8, (*FULL, *TP8)),
    )
    for loss in ("compiled", "eager")
    for chunks in (1, 4, 16)
)
TOKENS, VOCABULARY, DIM = 8192, 128256, 4096  # of Llama 3 8B


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
    options = [*case.options, f"--training.local_batch_size={case.batch}", f"--training.loss_chunks={case.chunks}"]
    if case.loss == "eager" and "--training.compile=false" not in options:
        options.append("--compile.components=model")
    config = load_config(options, str(harness.ROOT / "train_configs" / f"{case.file}.toml"))
    start = time.perf_counter()
    loss = dtensor_loss if case.loss == "eager, DTensor" else None
    memory = estimate(config, case.gpus, loss_builder=loss)
    seconds = time.perf_counter() - start
    ac = config.activation_checkpoint
    peak = memory.peak / GIB
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
        "loss_chunks": case.chunks,
        "activation_checkpoint": ac.mode + (f" {ac.selective_ac_option}" if ac.mode == "selective" else ""),
        "estimated_gib": round(peak, 2),
        "at_peak_gib": {kind: round(n / GIB, 2) for kind, n in max(memory.ranks, key=lambda r: r.peak).at_peak.items()},
        "seconds": round(seconds),
    }
    keys = "model", "batch", "config", "loss", "loss_chunks", "activation_checkpoint"
    print(*(row[k] for k in keys), f"{peak:.2f} GiB, {seconds:.0f} s", flush=True)
    if case.published_gib is None:
        return row
    difference = round(100 * (peak / case.published_gib - 1), 1)
    return {**row, "published_gib": case.published_gib, "difference_pct": difference, "source": case.source}


def projection_and_loss(loss: str, chunks: int) -> dict[str, Any]:
    """Count what the output projection and its loss hold beside the hidden states and the weight, in forward and
    backward on one device, by tensors without data."""
    mesh = build_mesh(Degrees(1, 1, 1, 1, 1), "cpu")
    compiling = Compile(backend=MEMORY_BACKEND) if loss == "compiled" else None
    config = load_config(
        [f"--training.compile={str(loss == 'compiled').lower()}", f"--compile.backend={MEMORY_BACKEND}"]
    )
    one_pass = build_loss(config, mesh)
    assert one_pass is not None
    chunked = ChunkedCrossEntropy(chunks, mesh.tp, gather=False, compiling=compiling)
    with FakeTensorMode(allow_non_fake_inputs=True), MemoryTracker() as tracker:
        hidden = torch.empty(1, TOKENS, DIM, dtype=torch.bfloat16).requires_grad_()
        weight = torch.empty(VOCABULARY, DIM, dtype=torch.bfloat16).requires_grad_()
        labels, before = torch.empty(1, TOKENS, dtype=torch.int64), tracker.live
        total = one_pass(hidden @ weight.t(), labels) if chunks == 1 else chunked(hidden, weight, labels)
        total.backward()
    held = round((tracker.peak - before) / GIB, 2)
    print("output projection and loss,", loss, chunks, f"{held} GiB", flush=True)
    return {"system": "titanlite", "part": "projection and loss", "loss": loss, "loss_chunks": chunks, "held_gib": held}


def main() -> None:
    args = harness.parser(__doc__).parse_args()
    rows = [run(case) for case in (*CASES, *CHUNKS)]
    with lone_process_group(0, 1):
        parts = [projection_and_loss(loss, chunks) for loss in ("compiled", "eager") for chunks in (1, 4, 16)]
    results.save("memory_estimates", [*rows, *parts], args)


if __name__ == "__main__":
    main()
