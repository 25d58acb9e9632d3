"""The memory of weights that are stored in int8, by what is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tests.support.forks import on_ranks
from titanlite.config.schema import Optimizer
from titanlite.optim import build_optimizer, update_parameters
from titanlite.plan.memory import MemoryTracker
from titanlite.quant.int8.weights import Int8Weights
from titanlite.quant.linear import QuantLinear, convert_linears

LAYERS, SIZE = 24, 128


def weight_memory() -> dict[str, Any]:
    """The bytes of weights: between steps, with all of them gathered for a forward, and at the peak of an update."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (1,))
    result = {}
    for stored in (False, True):
        with torch.device("meta"):
            model = nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS)))
        if stored:
            format = Int8Weights()
            convert_linears(
                model,
                format,
                lambda layer: QuantLinear.from_linear(layer, format, gather_quantized=True),  # noqa: B023
                lambda *_: None,
                gather_quantized=True,
            )
        fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16), reshard_after_forward=False)
        with MemoryTracker() as tracker:
            model.to_empty(device="cpu")
            between = tracker.live
            with torch.no_grad():
                model(torch.zeros(1, SIZE, dtype=torch.bfloat16))
            gathered = tracker.live
            model.reshard()  # type: ignore[operator]
            optimizer = build_optimizer(model.named_parameters(), Optimizer(implementation="for-loop"))
            for param in model.parameters():
                param.grad = torch.zeros_like(param)
            update_parameters(optimizer, torch.tensor(1.0))
            tracker.restart_peak()
            update_parameters(optimizer, torch.tensor(1.0))
            result["int8" if stored else "bf16"] = {
                "between": between,
                "gathered": gathered,
                "update": tracker.peak - tracker.live,
            }
    dist.destroy_process_group()
    return result


def test_weights_take_less_than_half(tmp_path: Path) -> None:
    """Of a bfloat16 run's float32 weights and gathered bfloat16 ones; and an update holds a few weights in float32, not
    the model."""
    (result,) = on_ranks(1, tmp_path / "ranks", {}, weight_memory)
    bf16, int8, weight = result["bf16"], result["int8"], SIZE * SIZE
    assert bf16["between"] >= 4 * LAYERS * weight
    assert int8["between"] < 0.27 * bf16["between"]
    assert int8["gathered"] < 0.5 * bf16["gathered"]
    assert int8["update"] < 4 * weight * 10  # of Adam without the compiler
