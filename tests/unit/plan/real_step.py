"""A worker: what one process of a real step holds and sends."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from tests.support.runs import ROOT
from titanlite.config import load_config
from titanlite.plan.estimate import _bytes, _local, dimensions
from titanlite.plan.memory import MemoryTracker
from titanlite.quant.compiled import CompiledFunction
from titanlite.train import Trainer


def report(argv: list[str]) -> dict[str, Any]:
    """Run a step of the debug model with these options; return bytes by kind, and of forward and backward the
    collectives, and the peak without optimizer state."""
    # What eager code compiles, the update of float8 moments for example, takes seconds in every process.
    CompiledFunction._call = lambda self, *args: self.plain(*args)  # type: ignore[method-assign]
    trainer = Trainer(load_config(argv, str(ROOT / "train_configs" / "debug_model.toml")))
    batch = next(trainer.loader)
    trainer.runner.forward_backward(batch)  # in the first step, pipeline stages also agree about what they will send
    trainer.optimizer.zero_grad()
    parameters = [p for part in trainer.model_parts for p in part.parameters()]
    buffers = [b for part in trainer.model_parts for b in part.buffers()]
    with MemoryTracker(dimensions(trainer.mesh)) as tracker:
        tracker.add([*_local([*parameters, *buffers])])
        trainer.runner.forward_backward(batch)
    gradients = _bytes(p.grad for p in parameters)
    trainer.optimizer.step()
    measurements = {
        "parameters": _bytes([*parameters, *buffers]),
        "gradients": gradients,
        "optimizer": _bytes(trainer.optimizer.state.values()),
        "peak": tracker.peak,
        "traffic": sorted([*c, t.calls, t.nbytes, t.sent] for c, t in tracker.traffic.items()),
    }
    trainer.close()
    dist.destroy_process_group()
    return measurements
