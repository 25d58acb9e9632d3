"""One process of the float8 all-gather tests: trains a small model in every variant and reports what it saw."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import partial
from typing import Any

import torch
import torch._dynamo.testing
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from titanlite.float8 import (
    Float8LinearConfig,
    convert_to_float8_training,
    precompute_float8_dynamic_scale_for_fsdp,
)

STEPS, MICROBATCHES, BATCH, TOKENS, DIM, HIDDEN = 5, 2, 4, 24, 64, 160


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(DIM)
        self.w1 = nn.Linear(DIM, HIDDEN, bias=False)
        self.w3 = nn.Linear(DIM, HIDDEN, bias=False)
        self.w2 = nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


def linear_elements(model: nn.Module) -> int:
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


class Traffic:
    """Counts what the collectives move, and lets them move it."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.gathered = 0
        # FSDP2 gathers by all_gather_into_tensor, from torch 2.13 on by its new name.
        for name in {"all_gather_into_tensor", "all_gather_single"} & set(dir(dist)):
            setattr(dist, name, partial(self._all_gather, getattr(dist, name)))
        dist.all_reduce = partial(self._all_reduce, dist.all_reduce)

    def _all_gather(self, original: Any, output: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.gathered += output.numel() * output.element_size()
        return original(output, *args, **kwargs)

    def _all_reduce(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls["all_reduce"] += 1
        return original(*args, **kwargs)

    def reset(self) -> None:
        self.calls.clear()
        self.gathered = 0


def losses_after_writes(model: nn.Module) -> list[float]:
    """The loss as it is, after halving the weights in two ways that no optimizer is part of, and after undoing that."""
    x = torch.randn(BATCH, TOKENS, DIM, generator=torch.Generator().manual_seed(1)).bfloat16()

    def loss() -> float:
        with torch.no_grad():
            return model(x).float().square().mean().item()  # type: ignore[no-any-return]

    losses = [loss()]
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})
    losses.append(loss())
    for value in model.state_dict().values():  # as a checkpoint is loaded in place
        value.to_local().mul_(0.5)
    losses.append(loss())
    model.load_state_dict({name: value * 4 for name, value in model.state_dict().items()})
    return [*losses, loss()]


def run(traffic: Traffic, recipe: str, gather: bool, precompute: bool, compiled: bool) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    elements = linear_elements(model)
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), enable_fsdp_float8_all_gather=gather)
    convert_to_float8_training(model, config=config)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager_decomp_partition")
    if compiled:  # eager casts stay compiled
        torch._dynamo.reset()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for block in model:
        if compiled:
            block.forward = torch.compile(block.forward, fullgraph=True, backend=counter)  # type: ignore[method-assign]
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses, norms, frames = [], [], []
    for step in range(STEPS):
        traffic.reset()
        total = torch.zeros(())
        for microbatch in range(MICROBATCHES):
            generator = torch.Generator().manual_seed(100 * step + microbatch)
            data = torch.randn(2, BATCH, TOKENS, DIM, generator=generator).bfloat16()
            x, target = (part.chunk(world)[rank] for part in data)
            loss = F.mse_loss(model(x).float(), target.float()) / MICROBATCHES
            loss.backward()
            total += loss.detach()
        calls, gathered = dict(traffic.calls), traffic.gathered
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        norms.append(norm.full_tensor().item())  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad()
        traffic.reset()
        if precompute:
            precompute_float8_dynamic_scale_for_fsdp(model)
        hook = dict(traffic.calls)
        dist.all_reduce(total)
        losses.append((total / world).item())
        frames.append(counter.frame_count)
    after_writes = losses_after_writes(model)
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    state = model.state_dict()
    local = {name: value.to_local() for name, value in state.items()}  # type: ignore[attr-defined]
    return {
        "losses": losses,
        "norms": norms,
        "frames": frames,
        # of the last step, by then in a steady state
        "calls": calls,
        "hook_calls": hook,
        # each block is gathered for forward and for backward of each microbatch
        "bytes_per_element": gathered / (2 * MICROBATCHES) / elements,
        "plain_state": all(type(value) is Tensor for value in local.values()),
        "plain_moments": all(type(value.to_local()) is Tensor for value in moments),
        "after_writes": after_writes,
        "weights": {name: value.double().sum().item() for name, value in local.items()},
    }


def report(variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
    dist.init_process_group("gloo")
    traffic = Traffic()
    results = [{"variant": variant, **run(traffic, **variant)} for variant in variants]
    dist.destroy_process_group()
    return results
