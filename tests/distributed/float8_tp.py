"""One process of the tests of float8 tensor parallelism: runs every case and reports what it saw."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._dynamo.testing
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.distributed.float8_fsdp import Traffic, linear_elements
from titanlite.distributed.activation_checkpoint import _op_contexts
from titanlite.float8 import (
    CastConfig,
    Float8Linear,
    Float8LinearConfig,
    ScalingType,
    convert_to_float8_training,
    precompute_float8_dynamic_scale_for_fsdp,
)
from titanlite.float8.float8_tensor_parallel import (
    Float8ColwiseParallel,
    Float8RowwiseParallel,
    PrepareFloat8ModuleInput,
)
from titanlite.quant import autograd
from titanlite.quant.float8.matmul import cast as cast_operand
from titanlite.quant.format import Operand
from titanlite.quant.tensor import QuantTensor

BATCH, TOKENS, DIM, HIDDEN = 2, 32, 64, 128
RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]
POWER_OF_2 = "tensorwise, power of 2"
DELAYED = "tensorwise, delayed"
STEPS = 4

Plan = dict[str, ParallelStyle]

_c10d = torch.ops._c10d_functional
COLLECTIVES = {
    _c10d.all_reduce.default,
    _c10d.all_gather_into_tensor.default,
    _c10d.reduce_scatter_tensor.default,
    _c10d.all_to_all_single.default,
    _c10d.broadcast.default,
}


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(DIM, HIDDEN)
        self.w3 = nn.Linear(DIM, HIDDEN, bias=False)
        self.w2 = nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(DIM)
        self.ff = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ff(self.norm(x))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(DIM)
        self.output = nn.Linear(DIM, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.norm(x))


def recipe_config(recipe: str, gather: bool = False) -> Float8LinearConfig:
    config = Float8LinearConfig.from_recipe_name(recipe.split(",")[0])
    if recipe == POWER_OF_2:
        config = dataclasses.replace(config, round_scales_to_power_of_2=True)
    if recipe == DELAYED:
        cast = CastConfig(scaling_type=ScalingType.DELAYED)
        casts = {f.name: cast for f in dataclasses.fields(config) if f.name.startswith("cast_config")}
        config = dataclasses.replace(config, **casts)
    return dataclasses.replace(config, enable_fsdp_float8_all_gather=gather)


def prepare(dim: int = 1, **options: Any) -> PrepareFloat8ModuleInput:
    return PrepareFloat8ModuleInput(input_layouts=Shard(dim), desired_input_layouts=Replicate(), **options)


def prepared(dim: int = 1, **output: Any) -> Plan:
    """Sequence parallelism as a trainer applies it: gathered once for w1 and w3."""
    return {
        "norm": SequenceParallel(sequence_dim=dim),
        "ff": prepare(dim),
        "ff.w1": Float8ColwiseParallel(**output),
        "ff.w3": Float8ColwiseParallel(**output),
        "ff.w2": Float8RowwiseParallel(output_layouts=Shard(dim), **output),
    }


@dataclasses.dataclass
class Case:
    """How a model is parallelized, and how its input and output then lie."""

    plan: Callable[[], Plan]
    model: type[nn.Module] = Block
    input: Placement = Shard(1)  # noqa: RUF009  # immutable
    output: Placement = Shard(1)  # noqa: RUF009
    shape: tuple[int, ...] = (BATCH, TOKENS, DIM)
    dtensors: bool = False
    partial: bool = False  # the gradients of parameters are to be summed over the ranks


def own(dim: int = 1) -> Plan:
    """Each layer gathers its own input."""
    return prepared(dim) | {
        "norm": SequenceParallel(sequence_dim=dim, use_local_output=True),
        "ff.w1": Float8ColwiseParallel(input_layouts=Shard(dim)),
        "ff.w3": Float8ColwiseParallel(input_layouts=Shard(dim)),
    }


def without_prepare(plan: Plan) -> Plan:
    del plan["ff"]
    return plan


def head(**output: Any) -> Plan:
    return {"norm": SequenceParallel(), "output": Float8ColwiseParallel(input_layouts=Shard(1), **output)}


def gathered() -> Plan:
    """torch's own sequence parallelism, with DTensors between the layers."""
    return {
        "norm": SequenceParallel(),
        "ff": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        "ff.w1": ColwiseParallel(use_local_output=False),
        "ff.w3": ColwiseParallel(use_local_output=False),
        "ff.w2": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }


def gathered_each() -> Plan:
    return {
        "norm": SequenceParallel(use_local_output=True),
        "ff.w1": ColwiseParallel(input_layouts=Shard(1)),
        "ff.w3": ColwiseParallel(input_layouts=Shard(1)),
        "ff.w2": RowwiseParallel(output_layouts=Shard(1)),
    }


def by_tokens() -> Plan:
    return {"norm": SequenceParallel(), "output": SequenceParallel()}


STOCK = {
    "torch's": Case(
        lambda: {"ff.w1": ColwiseParallel(), "ff.w3": ColwiseParallel(), "ff.w2": RowwiseParallel()},
        input=Replicate(),
        output=Replicate(),
    ),
    "torch's, DTensors": Case(gathered, dtensors=True),
    "torch's, each": Case(gathered_each),
    "torch's, head": Case(
        lambda: {
            "norm": SequenceParallel(),
            "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        },
        model=Head,
        output=Replicate(),
    ),
    "torch's, tokens": Case(by_tokens, model=Head, dtensors=True, partial=True),
    "torch's, DTensors, 5 tokens": Case(gathered, dtensors=True, shape=(BATCH, 5, DIM)),
    "torch's, tokens, 5 tokens": Case(by_tokens, model=Head, dtensors=True, partial=True, shape=(BATCH, 5, DIM)),
}
"""Cases with the styles of torch.distributed.tensor.parallel."""

CASES = {
    "prepared": Case(prepared),
    "prepared, 2-D": Case(lambda: prepared(0), input=Shard(0), output=Shard(0), shape=(TOKENS, DIM)),
    "prepared, DTensors": Case(lambda: prepared(use_local_output=False), dtensors=True),
    "prepared, local": Case(lambda: prepared() | {"ff": prepare(use_local_output=True)}),
    "own": Case(lambda: without_prepare(own())),
    "own, 2-D": Case(lambda: without_prepare(own(0)), input=Shard(0), output=Shard(0), shape=(TOKENS, DIM)),
    # The layers are told nothing of how their input lies: it is a DTensor, which says so itself.
    "own, DTensors": Case(lambda: without_prepare(prepared(use_local_output=False)), dtensors=True),
    "plain": Case(
        lambda: {
            "ff.w1": Float8ColwiseParallel(),
            "ff.w3": Float8ColwiseParallel(),
            "ff.w2": Float8RowwiseParallel(),
        },
        input=Replicate(),
        output=Replicate(),
    ),
    "stock prepare": Case(
        lambda: prepared() | {"ff": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())}
    ),
    "head, sharded": Case(head, model=Head, output=Shard(2)),
    "head": Case(lambda: head(output_layouts=Replicate()), model=Head, output=Replicate()),
    "head, DTensors": Case(
        lambda: head(output_layouts=Replicate(), use_local_output=False),
        model=Head,
        output=Replicate(),
        dtensors=True,
    ),
    **STOCK,
}


PAIRS = [(name, recipe) for name in CASES for recipe in RECIPES] + [("prepared", DELAYED)]


def build(case: Case, recipe: str | None, mesh: DeviceMesh | None, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = case.model().to(dtype)
    if recipe is not None:
        convert_to_float8_training(model, config=recipe_config(recipe))
    return model if mesh is None else parallelize_module(model, mesh, case.plan())


def data(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An input and a gradient of the output, growing with the tokens: each rank's share has another amax."""
    generator = torch.Generator().manual_seed(1)
    features = DIM if case.model is Block else HIDDEN
    x = torch.randn(*case.shape, generator=generator)
    grad = torch.randn(*case.shape[:-1], features, generator=generator)
    growing = torch.linspace(0.5, 4, case.shape[-2])[:, None]
    return (x * growing).to(dtype), (grad * growing).to(dtype)


def share(x: Tensor, layout: Placement, mesh: DeviceMesh) -> Tensor:
    if not isinstance(layout, Shard):
        return x
    # Contiguous, as data are: strides that differ from those of the next block's input would be compiled as dynamic,
    # on which DTensor's rms_norm fails (torch 2.13).
    return x.chunk(mesh.size(), layout.dim)[mesh.get_local_rank()].contiguous()


def whole(x: Tensor, layout: Placement, mesh: DeviceMesh) -> Tensor:
    """What the ranks hold together; of what they should all hold, what this one does."""
    if not isinstance(layout, Shard):
        return x
    parts: list[Any] = [None] * mesh.size()
    dist.all_gather_object(parts, x, group=mesh.get_group())  # the parts may be uneven
    return torch.cat(parts, layout.dim)


def forward_backward(
    model: nn.Module, case: Case, mesh: DeviceMesh | None, dtype: torch.dtype, mode: Recorder | None = None
) -> dict[str, Tensor]:
    """The output, the gradient of the input, and the gradients of the parameters, all of the whole."""
    x, grad = data(case, dtype)
    if mesh is not None:
        shapes = [{"shape": t.shape, "stride": t.stride()} for t in (x, grad)]
        x, grad = share(x, case.input, mesh), share(grad, case.output, mesh)
        if case.dtensors:
            x, grad = (
                DTensor.from_local(t.clone(), mesh, (layout,), run_check=False, **shape)
                for t, layout, shape in zip((x, grad), (case.input, case.output), shapes, strict=True)
            )
    x = x.detach().clone().requires_grad_()
    with mode or Recorder() as mode:
        out = model(x)
        mode.phase = "backward"
        out.backward(grad)
    assert x.grad is not None
    results = {"output": out.detach(), "input": x.grad}
    if mesh is not None:
        for (name, t), layout in zip(results.items(), (case.output, case.input), strict=True):
            if isinstance(t, DTensor) != case.dtensors:
                raise TypeError(f"{name} is a {type(t).__name__}")
            results[name] = whole(t.to_local() if isinstance(t, DTensor) else t, layout, mesh)
    for name, param in model.named_parameters():
        g = param.grad
        assert g is not None
        if isinstance(g, DTensor):
            assert isinstance(param, DTensor)
            # What a rank holds of the gradient is what the optimizer takes it to be. (Of a norm's weight, torch's
            # SequenceParallel leaves the sum to FSDP2.)
            if "norm" not in name and not case.partial and g.placements != param.placements:
                raise ValueError(f"gradient of {name}: {g.placements}, the parameter: {param.placements}")
            g = g.full_tensor()
        results[name] = g
    return results


class Recorder(TorchDispatchMode):
    """What is communicated, as (operator, dtype, elements of the larger side), and how often something is cast to
    float8, in each phase."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.calls: dict[str, list[Any]] = {"forward": [], "backward": []}
        self.casts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, (DTensor, QuantTensor)) for t in types):
            return NotImplemented  # they do it in terms of plain tensors, which comes here again
        out = func(*args, **(kwargs or {}))
        if func in COLLECTIVES:
            elements = max(args[0].numel(), out.numel())
            self.calls[self.phase].append([func._opname, str(out.dtype).removeprefix("torch."), elements])
        if func is torch.ops.aten._to_copy.default and out.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            self.casts[self.phase] += 1
        return out


def sqnr(got: Tensor, expected: Tensor) -> float:
    noise = (got.double() - expected.double()).square().sum().item()
    return 10 * math.log10(expected.double().square().sum().item() / noise) if noise else 999.0


def parity(name: str, recipe: str, mesh: DeviceMesh) -> dict[str, Any]:
    case = CASES[name]
    exact = forward_backward(build(case, None, None, torch.float32), case, None, torch.float32)
    one = forward_backward(build(case, recipe, None, torch.float32), case, None, torch.float32)
    ours = forward_backward(build(case, recipe, mesh, torch.float32), case, mesh, torch.float32)
    assert ours.keys() == exact.keys()
    return {
        key: {
            "ours": sqnr(ours[key], exact[key]),
            "one": sqnr(one[key], exact[key]),
            "to one": sqnr(ours[key], one[key]),
        }
        for key in exact
    }


def traffic(name: str, recipe: str, mesh: DeviceMesh) -> dict[str, Any]:
    recorder = Recorder()
    model = build(CASES[name], recipe, mesh, torch.bfloat16)
    forward_backward(model, CASES[name], mesh, torch.bfloat16, recorder)
    return {**recorder.calls, "casts": recorder.casts}


def arrived(recipe: str, mesh: DeviceMesh) -> dict[str, Any]:
    """What reaches w1 and, as the gradient, w2, against the cast of the whole; e.g. "float8, same data, same scale"."""
    case = CASES["prepared"]
    model = build(case, recipe, mesh, torch.bfloat16)
    assert isinstance(model, Block)
    config = recipe_config(recipe)
    seen: dict[str, Any] = {}
    model.ff.w1.register_forward_pre_hook(lambda _, inputs: seen.update(input=inputs[0]))
    model.norm.register_forward_hook(lambda _, inputs, out: seen.update(norm=out.to_local()))
    original = autograd.cast_grad_output

    def spy(layer: nn.Module, grad: Tensor | Operand, *args: Any) -> Any:
        if layer is model.ff.w2:
            seen["grad"] = grad
        return original(layer, grad, *args)  # type: ignore[arg-type]

    autograd.cast_grad_output = spy
    forward_backward(model, case, mesh, torch.bfloat16)
    autograd.cast_grad_output = original
    x, grad = whole(seen["norm"].detach(), Shard(1), mesh), data(case, torch.bfloat16)[1]
    arrivals: dict[str, Any] = {}
    for key, plain, cast_config in (
        ("input", x, config.cast_config_input),
        ("grad", grad, config.cast_config_grad_output),
    ):
        got = seen[key].operand() if isinstance(seen[key], QuantTensor) else seen[key]
        if isinstance(got, Operand):
            rounded = config.round_scales_to_power_of_2
            expected = cast_operand(plain.flatten(0, -2), cast_config, contracted=1, power_of_2=rounded, emulate=True)
            data8, scale = got
            assert scale is not None
            assert expected.scale is not None
            arrivals[key] = {
                "dtype": str(data8.dtype).removeprefix("torch."),
                "data": torch.equal(data8.view(torch.uint8), expected.data.view(torch.uint8)),
                "scale": torch.equal(scale, expected.scale),
                "scales": list(scale.shape),
                "power of 2": bool((torch.frexp(scale).mantissa == 0.5).all()),
            }
        else:
            local = got.to_local() if isinstance(got, DTensor) else got
            arrivals[key] = {"dtype": str(got.dtype).removeprefix("torch."), "data": torch.equal(local, plain)}
    return arrivals


def same_bits(recipe: str, mesh: DeviceMesh) -> dict[str, bool]:
    """Whether activation checkpointing, full and per operator, and inference leave every bit as it is."""
    case = CASES["prepared"]
    expected = forward_backward(build(case, recipe, mesh, torch.bfloat16), case, mesh, torch.bfloat16)
    same = {}
    for name, options in (("full", {}), ("op", {"context_fn": _op_contexts})):
        model = build(case, recipe, mesh, torch.bfloat16)
        model.forward = partial(checkpoint, model.forward, use_reentrant=False, **options)  # type: ignore[method-assign]
        got = forward_backward(model, case, mesh, torch.bfloat16)
        same[name] = all(torch.equal(got[key], expected[key]) for key in expected)
    model = build(case, recipe, mesh, torch.bfloat16).eval()
    with torch.inference_mode():
        out = model(share(data(case, torch.bfloat16)[0], Shard(1), mesh))
    return {**same, "inference": torch.equal(out, share(expected["output"], Shard(1), mesh))}


def poisoned(recipe: str, value: float, mesh: DeviceMesh) -> dict[str, bool]:
    """One element that is not finite, in the last rank's tokens: whether all ranks see it in what is computed of it."""
    torch.manual_seed(0)
    linears = nn.Sequential(nn.Linear(DIM, HIDDEN, bias=False), nn.Linear(HIDDEN, DIM, bias=False))
    convert_to_float8_training(linears, config=recipe_config(recipe))
    column, row = Float8ColwiseParallel(input_layouts=Shard(1)), Float8RowwiseParallel(output_layouts=Shard(1))
    parallelize_module(linears, mesh, {"0": column, "1": row})
    x, grad = data(CASES["prepared"], torch.float32)
    grad[0, -1, 3] = value
    x_bad = x.clone()
    x_bad[0, -1, 3] = value
    out = linears[0](share(x_bad, Shard(1), mesh))
    hidden = linears[0](share(x, Shard(1), mesh)).detach().requires_grad_()
    linears[1](hidden).backward(share(grad, Shard(1), mesh))
    assert hidden.grad is not None
    return {"forward": bool(out[0, -1].isnan().all()), "backward": bool(hidden.grad[0, -1].isnan().all())}


def broadcast(gather: bool, mesh: DeviceMesh) -> bool:
    """Whether the first rank's weights become everybody's, as parallelize_module promises."""
    first = build(CASES["prepared"], None, None, torch.float32).state_dict()
    torch.manual_seed(dist.get_rank())
    model = convert_to_float8_training(Block(), config=recipe_config("tensorwise", gather))
    parallelize_module(model, mesh, without_prepare(prepared()))
    state = {name: value.full_tensor() for name, value in model.state_dict().items() if "norm" not in name}
    return all(torch.equal(value, first[name]) for name, value in state.items())


def train_steps(model: nn.Module, mesh: DeviceMesh, counter: Any) -> dict[str, Any]:
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "norm" not in n], lr=0.3)
    losses, frames = [], []
    for _ in range(STEPS):
        generator = torch.Generator().manual_seed(0)
        x, target = torch.randn(2, BATCH, TOKENS, DIM, generator=generator).bfloat16()
        loss = F.mse_loss(model(share(x, Shard(1), mesh)).float(), share(target, Shard(1), mesh).float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        dist.all_reduce(total)
        losses.append(total.item())
        frames.append(counter.frame_count)
    return {"losses": losses, "frames": frames}


def compiled(recipe: str, backend: str, mesh: DeviceMesh) -> dict[str, Any]:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    eager = train_steps(build(CASES["prepared"], recipe, mesh, torch.bfloat16), mesh, counter)
    block = build(CASES["prepared"], recipe, mesh, torch.bfloat16)
    block.forward = torch.compile(block.forward, fullgraph=True, backend=counter)  # type: ignore[method-assign]
    return {"eager": eager["losses"], **train_steps(block, mesh, counter)}


def autocast(recipe: str, mesh: DeviceMesh) -> dict[str, Any]:
    """Float32 parameters and input under autocast to bfloat16."""
    case, results = CASES["prepared"], {}
    for key, over in (("one", None), ("ours", mesh)):
        recorder = Recorder()
        with torch.autocast("cpu", torch.bfloat16):
            results[key] = forward_backward(
                build(case, recipe, over, torch.float32), case, over, torch.float32, recorder
            )
    return {
        "to one": {key: sqnr(results["ours"][key], results["one"][key]) for key in results["one"]},
        "forward": recorder.calls["forward"],
    }


def named(mesh: DeviceMesh) -> dict[str, Any]:
    """Layers that cast their input differently, all following one of them."""
    case, made = CASES["prepared"], {}
    for key, over in (("exact", None), ("ours", mesh)):
        model = build(case, None, None, torch.float32)
        if over is not None:
            for name, recipe in (("w1", "tensorwise"), ("w3", "rowwise"), ("w2", "tensorwise")):
                Float8Linear.from_float(model.get_submodule(f"ff.{name}"), recipe_config(recipe))  # type: ignore[arg-type]
            parallelize_module(model, mesh, prepared() | {"ff": prepare(fwd_config_submodule_fqn="w3")})
        recorder = Recorder()
        made[key] = forward_backward(model, case, over, torch.float32, recorder)
    return {"sqnr": {k: sqnr(made["ours"][k], made["exact"][k]) for k in made["exact"]}, **recorder.calls}


# ---- with FSDP2, on 4 processes


def four(recipe: str, mode: str, traffic: Traffic, meshes: tuple[DeviceMesh, DeviceMesh]) -> dict[str, Any]:
    """A few steps of Adam of two blocks.

    Args:
        mode: "one" process; float8 all-gather "off" or "on"; "compiled", which is on; or with torch's styles.
        meshes: of all processes, and of this one.
    """
    mesh, alone = meshes
    tp = mesh["tp"]  # one object for both blocks, for compiled code to be shared
    one, gather = mode == "one", mode in ("on", "compiled", "torch's, on")
    torch.manual_seed(0)
    initial = nn.Sequential(Block(), Block()).state_dict()
    elements = linear_elements(nn.Sequential(Block(), Block()))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    with torch.device("meta"):
        model = nn.Sequential(Block(), Block())
    convert_to_float8_training(model, config=recipe_config(recipe, gather))
    dp, policy = alone if one else mesh["dp"], MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for block in model:
        if not one:
            parallelize_module(block, tp, gathered_each() if mode.startswith("torch's") else prepared())
        if mode == "compiled":
            block.forward = torch.compile(block.forward, fullgraph=True, backend=counter)  # type: ignore[method-assign]
        fully_shard(block, mesh=dp, mp_policy=policy)
    fully_shard(model, mesh=dp, mp_policy=policy)
    model.to_empty(device="cpu")
    set_model_state_dict(model, dict(initial), options=StateDictOptions(full_state_dict=True))
    loaded = all(torch.equal(value.full_tensor(), initial[name]) for name, value in model.state_dict().items())  # type: ignore[attr-defined]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses, norms, frames = [], [], []
    for _ in range(STEPS):
        traffic.reset()
        generator = torch.Generator().manual_seed(0)  # the same data in each step: it learns
        x, target = torch.randn(2, 2 * BATCH, TOKENS, DIM, generator=generator).bfloat16()
        if not one:
            x, target = (share(share(t, Shard(0), mesh["dp"]), Shard(1), tp) for t in (x, target))
        x.requires_grad_()  # as of an embedding: then both blocks share their compiled code
        # Under tensor parallelism the gradients of its ranks' tokens are summed, not averaged as FSDP2's.
        loss = F.mse_loss(model(x).float(), target.float()) / (1 if one else tp.size())
        loss.backward()
        gathered, calls = traffic.gathered, dict(traffic.calls)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        norms.append(norm.full_tensor().item())  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad()
        traffic.reset()
        precompute_float8_dynamic_scale_for_fsdp(model)
        hook_calls = dict(traffic.calls)
        total = loss.detach()
        if not one:
            dist.all_reduce(total)
            total /= mesh["dp"].size()
        losses.append(total.item())
        frames.append(counter.frame_count)
    state = model.state_dict()
    local = {name: value.to_local() for name, value in state.items()}  # type: ignore[attr-defined]
    optimizer_state = [t for s in optimizer.state.values() for t in s.values() if t.ndim]
    return {
        "losses": losses,
        "norms": norms,
        "frames": frames,
        # each block is gathered for forward and for backward
        "bytes_per_element": gathered / 2 / (elements if one else elements / tp.size()),
        "calls": calls,  # of the last step
        "hook_calls": hook_calls,
        "loaded": loaded,
        "plain_state": all(type(value) is Tensor for value in local.values())
        and all(type(t.to_local()) is Tensor for t in optimizer_state),
        "moments": len(optimizer_state),
        "weights": {name: value.double().sum().item() for name, value in local.items()},
    }


def two_processes() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    return {
        "parity": {f"{name}/{recipe}": parity(name, recipe, mesh) for name, recipe in PAIRS},
        "traffic": {f"{name}/{recipe}": traffic(name, recipe, mesh) for name, recipe in PAIRS},
        "arrived": {recipe: arrived(recipe, mesh) for recipe in [*RECIPES, POWER_OF_2]},
        "same": {recipe: same_bits(recipe, mesh) for recipe in RECIPES},
        "poisoned": {
            f"{recipe}/{value}": poisoned(recipe, value, mesh)
            for recipe in RECIPES
            for value in (math.nan, math.inf, -math.inf)
        },
        "broadcast": {gather: broadcast(gather, mesh) for gather in (False, True)},
        "autocast": {recipe: autocast(recipe, mesh) for recipe in RECIPES},
        "named": named(mesh),
        "compiled": compiled_all("aot_eager", ["tensorwise"], mesh),
    }


def compiled_all(backend: str, recipes: list[str], mesh: DeviceMesh) -> dict[str, Any]:
    return {recipe: compiled(recipe, backend, mesh) for recipe in recipes}


def four_processes(compiled: bool) -> dict[str, Any]:
    moved = Traffic()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    alone = init_device_mesh("cpu", (4, 1), mesh_dim_names=("all", "one"))["one"]
    modes = ("on", "compiled") if compiled else ("one", "off", "on", "torch's, off", "torch's, on")
    return {
        f"{recipe}/{mode}": four(recipe, mode, moved, (mesh, alone))
        for recipe in (["rowwise"] if compiled else RECIPES)
        for mode in modes
    }


def report(compiled: bool = False) -> dict[str, Any]:
    """Return the results of this rank of 2 or 4. With 4, ``compiled`` adds those of compiled blocks."""
    dist.init_process_group("gloo")
    results = two_processes() if dist.get_world_size() == 2 else four_processes(compiled)
    dist.destroy_process_group()
    return results


def report_inductor() -> Any:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    results = compiled_all("inductor", ["rowwise", "rowwise_with_gw_hp"], mesh)
    dist.destroy_process_group()
    return results
