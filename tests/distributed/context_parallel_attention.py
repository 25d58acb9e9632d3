"""One process of the tests of context-parallel attention: runs every case and reports what it saw."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch._dynamo.testing
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from titanlite.distributed.activation_checkpoint import _op_contexts
from titanlite.distributed.context_parallel import METHODS, ContextParallel

WORLD, SEQ_LEN, HEADS, HEAD_DIM = 4, 32, 4, 16
SIZES = [1, 2, 4]
KV_HEADS = [4, 2, 1]
BATCHES = [1, 2]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NAMES = ("out", "dq", "dk", "dv")
STEPS = 2


class Recorder(TorchDispatchMode):
    """What this rank gives to collectives, as (operator, bytes), in each phase."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.calls: dict[str, list[Any]] = {"forward": [], "backward": []}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "_c10d_functional" and func._opname != "wait_tensor":
            self.calls[self.phase].append([func._opname, args[0].nbytes])
        return func(*args, **(kwargs or {}))


class Layer(nn.Module):
    def __init__(self, cp: ContextParallel) -> None:
        super().__init__()
        self.cp = cp
        self.w = nn.Linear(HEADS * HEAD_DIM, (HEADS + 2 * 2) * HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.w(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        out = self.cp.attention(*heads.split((HEADS, 2, 2), 1))
        return x + out.transpose(1, 2).flatten(2)


def data(batch: int, kv_heads: int) -> list[Tensor]:
    """q, k, v and a gradient of the output, of the whole sequence, in float64. The scores are as large as those of a
    trained model, and larger at some positions: a rank's log-sum-exp is far from another's."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, SEQ_LEN, HEAD_DIM) for heads in (HEADS, kv_heads, kv_heads, HEADS)]
    q, k, v, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [2 * q, k * torch.linspace(0.2, 3, SEQ_LEN)[torch.randperm(SEQ_LEN, generator=generator), None], v, grad]


def forward_backward(attention: Any, inputs: list[Tensor], mode: Recorder | None = None) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    *qkv, grad = (t.detach().clone() for t in inputs)
    for t in qkv:
        t.requires_grad_()
    with mode or Recorder() as mode:
        out = attention(*qkv)
        mode.phase = "backward"
        out.backward(grad)
    return [out.detach(), *(t.grad for t in qkv)]  # type: ignore[misc]


def errors(got: list[Tensor], exact: list[Tensor], cp: ContextParallel | None = None) -> dict[str, float]:
    """The largest differences, as fractions of the largest numbers of the whole sequence; ``got`` is the whole or, with
    ``cp``, this rank's share."""
    differences = {}
    for name, a, b in zip(NAMES, got, exact, strict=True):
        differences[name] = ((a.double() - (cp.shard(b, 2) if cp else b)).abs().max() / b.abs().max()).item()
    return differences


def parity(cp: ContextParallel, dtype: torch.dtype, inputs: list[Tensor]) -> dict[str, Any]:
    """The errors of this rank's share and, in ``dtype``, of torch's own attention to the whole sequence."""
    sdpa, recorder = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True), Recorder()
    exact, torchs = forward_backward(sdpa, inputs), forward_backward(sdpa, [t.to(dtype) for t in inputs])
    ours = forward_backward(cp.attention, [cp.shard(t, 2).to(dtype) for t in inputs], recorder)
    return {
        "ours": errors(ours, exact, cp),
        "torch": errors(torchs, exact),
        "dtypes": [str(t.dtype) for t in ours],
        "sums": [t.double().sum().item() for t in ours],
        **recorder.calls,
    }


def large_scores(cp: ContextParallel) -> dict[str, Any]:
    """Scores beyond what exp can represent in float32."""
    q, k, v, grad = data(1, HEADS)
    return parity(cp, torch.float32, [20 * q, 20 * k, v, grad])


def partly(cp: ContextParallel) -> bool:
    """Whether the output without gradients, and the gradients of some inputs, are those of all."""
    inputs = [cp.shard(t, 2).float() for t in data(2, 2)]
    out, *grads = forward_backward(cp.attention, inputs)
    *qkv, grad = inputs
    with torch.no_grad():
        same = [torch.equal(cp.attention(*qkv), out), not cp.attention(*qkv).requires_grad]
    for needed in ([0], [1], [2], [0, 2]):
        given = [t.clone().requires_grad_(i in needed) for i, t in enumerate(qkv)]
        cp.attention(*given).backward(grad)
        same += [given[i].grad is not None and torch.equal(given[i].grad, grads[i]) for i in needed]
        same += [given[i].grad is None for i in range(3) if i not in needed]
    return all(same)


def layers(cp: ContextParallel, dtype: torch.dtype, wrap: Any = None) -> list[list[Tensor]]:
    """Steps of two layers, each of the output and all gradients; ``wrap`` is given the forward of each layer."""
    torch.manual_seed(0)
    model = nn.Sequential(Layer(cp), Layer(cp)).to(dtype)
    for layer in model if wrap else ():
        layer.forward = wrap(layer.forward)  # type: ignore[method-assign]
    results = []
    for step in range(STEPS):
        x = torch.randn(2, SEQ_LEN, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(step)).to(dtype)
        x = cp.shard(x, 1).requires_grad_()
        model.zero_grad()
        out = model(x)
        out.square().sum().backward()
        results.append([out.detach(), *(t.grad for t in (x, *model.parameters()))])
    return results  # type: ignore[return-value]


def equal(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return all(torch.equal(x, y) for s, t in zip(a, b, strict=True) for x, y in zip(s, t, strict=True))


def checkpointed(cp: ContextParallel) -> dict[str, bool]:
    matches = {}
    for dtype in DTYPES:
        plain = layers(cp, DTYPES[dtype])
        for name, options in (("full", {}), ("op", {"context_fn": _op_contexts})):
            again = layers(cp, DTYPES[dtype], lambda f, o=options: partial(checkpoint, f, use_reentrant=False, **o))
            matches[f"{name}/{dtype}"] = equal(plain, again)
    return matches


def compiled(cp: ContextParallel) -> dict[str, Any]:
    """The two ranks that have shards both before and after theirs compile, to save time; the others run as they are."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    wrap = partial(torch.compile, fullgraph=True, backend=counter) if cp.rank in (1, 2) else None
    made = layers(cp, torch.float32, wrap)
    return {"same": equal(made, layers(cp, torch.float32)), "frames": counter.frame_count}


def all_cases(meshes: dict[int, DeviceMesh]) -> dict[str, Any]:
    results: dict[str, Any] = {
        "parity": {},
        "partly": {},
        "checkpointed": {},
        "compiled": {},
        "large": {},
        "shards": {},
    }
    for size, mesh in meshes.items():
        for method in METHODS:
            cp, key = ContextParallel(mesh, method), f"{size}/{method}"
            for dtype in DTYPES:
                results["parity"] |= {
                    f"{key}/{dtype}/{batch}/{kv_heads}": parity(cp, DTYPES[dtype], data(batch, kv_heads))
                    for batch in BATCHES
                    for kv_heads in KV_HEADS
                }
            results["large"][key] = large_scores(cp)
            results["partly"][key] = partly(cp)
            results["checkpointed"][key] = checkpointed(cp)
            if size == WORLD:
                results["compiled"][method] = compiled(cp)
        tokens = torch.arange(2 * SEQ_LEN).view(2, SEQ_LEN)
        results["shards"][size] = [cp.rank, cp.positions(SEQ_LEN).tolist(), cp.shard(tokens, 1)[1].tolist()]
    return results


def report() -> dict[str, Any]:
    dist.init_process_group("gloo")
    meshes = {size: init_device_mesh("cpu", (WORLD // size, size), mesh_dim_names=("dp", "cp"))["cp"] for size in SIZES}
    results = all_cases(meshes)
    dist.destroy_process_group()
    return results
