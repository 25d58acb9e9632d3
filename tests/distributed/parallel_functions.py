"""A worker: checks on four processes, one after the other; reports what each raised."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.utils._python_dispatch import TorchDispatchMode

from titanlite.config import JobConfig, load_config
from titanlite.config.parallelism import Degrees
from titanlite.distributed.chunked_loss import ChunkedCrossEntropy, compute_loss_in_chunks
from titanlite.distributed.data_parallel import allocate, reduce_gradients_after
from titanlite.distributed.gradients import gradient_scale
from titanlite.distributed.init import WeightInit
from titanlite.distributed.mesh import Mesh, build_mesh
from titanlite.distributed.parallelize import parallelize
from titanlite.distributed.tensor_parallel import VocabParallelCrossEntropy, VocabParallelEmbedding
from titanlite.float8 import (
    CastConfig,
    Float8Linear,
    Float8LinearConfig,
    ScalingType,
    convert_to_float8_training,
    sync_float8_amax_and_scale_history,
)
from titanlite.models.layers import LAYOUT, Decoder, DecoderArgs
from titanlite.optim import IGNORED, cross_entropy_loss, update_parameters

CHECKS: dict[str, Callable[[], None]] = {}
SMALL = DecoderArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=64, max_seq_len=8)


def check(function: Callable[..., None]) -> Callable[..., None]:
    CHECKS[function.__name__] = function
    return function


def cases(**named: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A check of each of these."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for name, value in named.items():
            CHECKS[f"{function.__name__}[{name}]"] = partial(function, value)
        return function

    return register


_MESHES: dict[Degrees, Mesh] = {}


def mesh_of(replicate: int = 1, shard: int = 1, cp: int = 1, tp: int = 1, pp: int = 1) -> Mesh:
    degrees = Degrees(replicate, shard, cp, tp, pp)
    if degrees not in _MESHES:
        _MESHES[degrees] = build_mesh(degrees, "cpu")
    return _MESHES[degrees]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def everybody(value: Any) -> list[Any]:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# ---- the mesh


@cases(
    fsdp={"shard": 4},
    hsdp={"replicate": 2, "shard": 2},
    fsdp_tp={"shard": 2, "tp": 2},
    hsdp_tp={"replicate": 2, "tp": 2},
    fsdp_cp={"shard": 2, "cp": 2},
    replicate_cp={"replicate": 2, "cp": 2},
    cp_tp={"cp": 2, "tp": 2},
    pp_replicate={"pp": 2, "replicate": 2},
    pp_cp={"pp": 2, "cp": 2},
    pp_tp={"pp": 2, "tp": 2},
    tp={"tp": 4},
)
def mesh_layout(given: dict[str, int]) -> None:
    mesh = mesh_of(**given)
    rank, size = dist.get_rank(), {**dict.fromkeys(("pp", "replicate", "shard", "cp", "tp"), 1), **given}
    where, rest = {}, rank
    for name in ("tp", "cp", "shard", "replicate", "pp"):  # the innermost first
        rest, where[name] = divmod(rest, size[name])
    places, reads = everybody(where), everybody(mesh.data_parallel_rank)

    def neighbours(*along: str) -> list[int]:
        """The ranks that differ from this one in nothing but these dimensions."""
        return [r for r, there in enumerate(places) if all(there[n] == where[n] for n in size if n not in along)]

    for part, along in (
        (mesh.tp, ["tp"]),
        (mesh.cp, ["cp"]),
        (mesh.pp, ["pp"]),
        (mesh.fsdp, ["shard", "cp"]),
        (mesh.data_parallel, ["replicate", "shard", "cp"]),
        (mesh.stage, ["replicate", "shard", "cp", "tp"]),
        (mesh.world, [*size]),
    ):
        assert part.mesh.flatten().tolist() == neighbours(*along), along
        if part.ndim == 1:
            assert dist.get_process_group_ranks(part.get_group()) == neighbours(*along), along
            assert part.get_local_rank() == neighbours(*along).index(rank)
    assert mesh.data_parallel.ndim == (2 if size["replicate"] > 1 else 1)
    if size["replicate"] > 1:  # FSDP2 replicates over the first dimension, and shards over the second
        assert mesh.data_parallel.shape == (size["replicate"], size["shard"] * size["cp"])
    assert mesh.data_parallel_rank == where["replicate"] * size["shard"] + where["shard"]
    assert sorted({*reads}) == [*range(mesh.degrees.data_parallel)]


# ---- the loss over a sharded vocabulary


def compare_losses(loss_fn: Callable[..., Tensor], tp: Any, logits: Tensor, labels: Tensor) -> None:
    """Value, and gradient of three times it, with those of float64."""
    whole = logits.double().requires_grad_()
    expected = F.cross_entropy(whole.flatten(0, 1), labels.flatten(), reduction="sum")
    (3 * expected).backward()
    assert whole.grad is not None
    local = logits.chunk(tp.size(), -1)[tp.get_local_rank()].clone().requires_grad_()
    before = local.detach().clone()
    loss = loss_fn(local, labels)
    (3 * loss).backward()
    assert local.grad is not None
    assert torch.equal(local, before)
    assert loss.dtype == torch.float32
    assert local.grad.dtype == logits.dtype
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6 * labels.numel())
    wanted = whole.grad.chunk(tp.size(), -1)[tp.get_local_rank()]
    bound = 2**-8 if logits.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(local.grad.double(), wanted, rtol=bound, atol=1e-8 * labels.numel())
    assert len({*everybody(loss.item())}) == 1


@cases(eager=False, compiled=True)
def cross_entropy(compiled: bool) -> None:
    # The first and last token of each part, then some of each.
    labels = torch.tensor([[0, 15, 16, 31, 32, 47, 48, 63], [1, 20, 40, 60, 5, 25, 45, 62]])
    for mesh in [mesh_of(tp=4)] if compiled else [mesh_of(tp=4), mesh_of(shard=2, tp=2)]:
        loss_fn: Callable[..., Tensor] = VocabParallelCrossEntropy(mesh.tp)
        if compiled:
            torch._dynamo.reset()
            loss_fn = torch.compile(loss_fn, backend="aot_eager", fullgraph=True)
        for dtype in (torch.float32, torch.bfloat16):
            logits = (5 * random(2, 8, 64)).to(dtype)
            compare_losses(loss_fn, mesh.tp, logits, labels)
            compare_losses(loss_fn, mesh.tp, logits, torch.full_like(labels, 17))  # all in one part
            compare_losses(loss_fn, mesh.tp, logits, labels.where(labels % 5 > 0, IGNORED))
            compare_losses(loss_fn, mesh.tp, logits, torch.full_like(labels, IGNORED))
            extreme = torch.where(random(2, 8, 64, seed=1) > 1.5, 1e4, -1e4).to(dtype)
            compare_losses(loss_fn, mesh.tp, extreme, labels)
            compare_losses(loss_fn, mesh.tp, torch.zeros(2, 8, 64, dtype=dtype), labels)


@check
def cross_entropy_of_a_part_that_is_not_finite() -> None:
    """Is nobody's finite number."""
    tp = mesh_of(tp=4).tp
    for value in (float("nan"), float("inf")):
        for rank in (0, 3):
            logits = random(1, 4, 16)
            if tp.get_local_rank() == rank:
                logits[0, 1, 2] = value
            assert not VocabParallelCrossEntropy(tp)(logits, torch.tensor([[0, 20, 40, 63]])).isfinite()


@cases(sharded=False, gathered=True)
def cross_entropy_in_chunks(gather: bool) -> None:
    """Has the loss and the gradients of float64: each rank those of its weight, and a part of those of the hidden
    states."""
    labels = torch.tensor([[0, 15, 16, 31, 32, 47, 48, 63], [1, 20, 40, 60, 5, 25, 45, IGNORED]])
    for mesh in (mesh_of(tp=4), mesh_of(shard=2, tp=2)):
        tp = mesh.tp
        exact = [(3 * random(2, 8, 24)).double().requires_grad_(), random(64, 24, seed=1).double().requires_grad_()]
        expected = F.cross_entropy((exact[0] @ exact[1].t()).flatten(0, 1), labels.flatten(), reduction="sum")
        (3 * expected).backward()
        hidden = exact[0].detach().float().requires_grad_()
        weight = exact[1].detach().float().chunk(tp.size())[tp.get_local_rank()].clone().requires_grad_()
        with Counted() as comm:
            loss = ChunkedCrossEntropy(2, tp, gather, None)(hidden, weight, labels)
            (3 * loss).backward()
        assert (comm.of("allgather"), comm.of("allreduce")) == ((2, 0) if gather else (0, 2))
        assert hidden.grad is not None
        dist.all_reduce(hidden.grad, group=tp.get_group())
        assert len({*everybody(loss.item())}) == 1
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(hidden.grad.double(), exact[0].grad, rtol=1e-5, atol=1e-5)
        wanted = exact[1].grad.chunk(tp.size())[tp.get_local_rank()]  # type: ignore[union-attr]
        torch.testing.assert_close(weight.grad.double(), wanted, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]


# ---- the norm of the gradients


def gradients_of(mesh: Mesh, all_tp: bool = True) -> nn.Sequential:
    """Layers whose rows the shards divide evenly, unevenly, and leave some with none; with gradients.

    Args:
        all_tp: whether the last layer too is on the mesh of tensor parallelism, or only on that of FSDP2.
    """
    torch.manual_seed(mesh.pp.get_local_rank())
    model = nn.Sequential(nn.RMSNorm(96), nn.Linear(96, 200), nn.Linear(200, 7), nn.Linear(7, 2, bias=False))
    x = random(3, 4, 96, seed=dist.get_rank() // mesh.tp.size())
    if mesh.tp.size() > 1:
        styles: dict[str, ParallelStyle] = {
            "0": SequenceParallel(),
            "1": ColwiseParallel(input_layouts=Shard(1)),
            "2": RowwiseParallel(output_layouts=Shard(1) if all_tp else None),
        }
        last: dict[str, ParallelStyle] = {"3": SequenceParallel(use_local_output=True)} if all_tp else {}
        parallelize_module(model, mesh.tp, styles | last)
        x = x.chunk(mesh.tp.size(), 1)[mesh.tp.get_local_rank()]
    for layer in model:
        fully_shard(layer, mesh=mesh.data_parallel)
    fully_shard(model, mesh=mesh.data_parallel)
    model(x).square().sum().backward()
    return model


def loss_of(mesh: Mesh, labels: int = 4) -> tuple[Tensor, Tensor, int]:
    """The total loss of labels that are all scored, which only the last pipeline stage has: in part i each is i + 1."""
    is_last = mesh.pp.get_local_rank() == mesh.pp.size() - 1
    each = float(is_last) * (mesh.stage.get_local_rank() // mesh.tp.size() + 1)
    return torch.tensor(labels * each, requires_grad=True), torch.tensor(labels * is_last), labels


def expected_loss(mesh: Mesh) -> float:
    parts = mesh.stage.size() // mesh.tp.size()
    return (parts + 1) / 2


WAYS: dict[str, dict[str, Any]] = {
    "fsdp": {"shard": 4},
    "hsdp": {"replicate": 2, "shard": 2},
    "replicas": {"replicate": 4},
    "fsdp_cp": {"shard": 2, "cp": 2},
    "fsdp_tp": {"shard": 2, "tp": 2},
    "replicate_tp": {"replicate": 2, "tp": 2},
    "tp": {"tp": 4},
    "pp_fsdp": {"pp": 2, "shard": 2},
    "pp_tp": {"pp": 2, "tp": 2},
    "a layer without tensor parallelism": {"shard": 2, "tp": 2, "all_tp": False},
}


@cases(**WAYS)
def clip(given: dict[str, Any]) -> None:
    all_tp = given.pop("all_tp", True)
    mesh = mesh_of(**given)
    for max_norm in (1e-3, 1e6):
        model = gradients_of(mesh, all_tp)
        whole = [p.grad.full_tensor().clone() for p in model.parameters()]  # type: ignore[union-attr]
        stages = {mesh.pp.get_local_rank(): nn.utils.get_total_norm([g.double() for g in whole]).item()}
        stages = {k: v for there in everybody(stages) for k, v in there.items()}
        assert len(stages) == len({*stages.values()}) == mesh.pp.size()
        expected = torch.tensor([*stages.values()], dtype=torch.float64).norm()
        asked = dist.get_rank() == 2
        loss = loss_of(mesh)
        scale = gradient_scale(model.parameters(), max_norm, mesh, *loss, stop=asked)
        norm, mean_loss, divisor = scale.norm, scale.loss, scale.divisor
        assert scale.stops == 1
        assert scale.scored == sum(everybody(loss[1].item()))
        assert norm.dtype == torch.float32
        assert norm.ndim == mean_loss.ndim == 0
        assert mean_loss == expected_loss(mesh)
        torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
        assert len({*everybody(norm.item())}) == 1
        reference = [nn.Parameter(p.full_tensor().detach().clone()) for p in model.parameters()]  # type: ignore[attr-defined]
        for param, grad in zip(reference, whole):
            param.grad = grad.clone()
        nn.utils.clip_grads_with_norm_(reference, max_norm, expected.float())
        # This eps makes the update depend on the size of the gradients.
        update_parameters(torch.optim.AdamW(model.parameters(), eps=1.0, fused=True), divisor)
        torch.optim.AdamW(reference, eps=1.0).step()
        for param, wanted, before in zip(model.parameters(), reference, whole):
            clipped = param.grad.full_tensor()  # type: ignore[union-attr]
            torch.testing.assert_close(clipped, wanted.grad, rtol=1e-6, atol=0)
            torch.testing.assert_close(param.full_tensor(), wanted, rtol=1e-6, atol=1e-8)  # type: ignore[attr-defined]
            if max_norm == 1e6:
                assert torch.equal(clipped, before)
    if given == {"shard": 4}:
        sizes = everybody([p.to_local().numel() for p in model.parameters()])  # type: ignore[attr-defined]
        assert any(0 in rank for rank in sizes)
        assert sizes[0] != sizes[3]
    if given == {"replicate": 4}:  # more than is added up at once
        assert max(p.to_local().numel() for p in model.parameters()) > 2 * 8192  # type: ignore[attr-defined]


@cases(fsdp={"shard": 4}, fsdp_tp={"shard": 2, "tp": 2}, pp={"pp": 4}, hsdp={"replicate": 2, "shard": 2})
def clip_what_is_not_finite(given: dict[str, int]) -> None:
    mesh = mesh_of(**given)
    for value in (float("nan"), float("inf"), float("-inf")):
        for rank in (0, 3):
            model = gradients_of(mesh)
            if dist.get_rank() == rank:
                grad = model[1].weight.grad
                assert isinstance(grad, DTensor)
                grad.to_local()[-1, -1] = value
            scale = gradient_scale(model.parameters(), 1.0, mesh, *loss_of(mesh))
            norm, mean_loss = scale.norm.item(), scale.loss.item()
            assert mean_loss == expected_loss(mesh)
            assert norm == float("inf") if abs(value) == float("inf") else norm != norm


@check
def clip_passes_over_parameters_without_a_gradient() -> None:
    mesh = mesh_of(shard=4)
    model = gradients_of(mesh)
    model[1].weight.grad = None  # type: ignore[union-attr, assignment]
    whole = [p.grad.full_tensor() for p in model.parameters() if isinstance(p.grad, DTensor)]
    norm = gradient_scale(model.parameters(), 1e6, mesh, *loss_of(mesh)).norm
    torch.testing.assert_close(norm, nn.utils.get_total_norm(whole), rtol=1e-6, atol=0)


# ---- FSDP2's communication


def config_of(reshard: str, chunks: int = 1) -> JobConfig:
    given = {
        "training.loss_chunks": chunks,
        "training.mixed_precision_param": "float32",
        "training.seq_len": 8,
        "activation_checkpoint.mode": "none",
        "parallelism.fsdp_reshard_after_forward": reshard,
    }
    return load_config([f"--{key}={value}" for key, value in given.items()])


def sharded(mesh: Mesh, args: DecoderArgs = SMALL, reshard: str = "default", chunks: int = 1) -> Decoder:
    config = config_of(reshard, chunks)
    with torch.device("meta"):
        model = Decoder(args)
    if chunks > 1:
        compute_loss_in_chunks(model, LAYOUT, mesh, config)
    parallelize(model, LAYOUT, mesh, config)
    allocate(model, torch.device("cpu"), False)
    model.init_weights(WeightInit(model, 0))
    return model


def tokens(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    both = torch.randint(SMALL.vocab_size, (rows, 9), generator=torch.Generator().manual_seed(seed))
    return both[:, :-1], both[:, 1:]


class Counted(TorchDispatchMode):
    """Counts collectives, by the names of their operators without underscores: allgatherbase, reducescatterbase, ..."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.calls[func._opname.replace("_", "")] += 1
        return func(*args, **(kwargs or {}))

    def of(self, kind: str) -> int:
        return sum(count for name, count in self.calls.items() if name.startswith(kind))


@cases(fsdp={"shard": 4}, hsdp={"replicate": 2, "shard": 2})
def gradients_are_reduced_once_per_step_or_microbatch(given: dict[str, int]) -> None:
    mesh, counts, gradients = mesh_of(**given), {}, {}
    inputs, labels = tokens(3, seed=mesh.data_parallel_rank)
    for microbatches, each in ((1, False), (3, False), (3, True)):
        model = sharded(mesh)
        with Counted() as comm:
            for i, (x, y) in enumerate(zip(inputs.chunk(microbatches), labels.chunk(microbatches)), 1):
                reduce_gradients_after(model, i == microbatches, each)
                (cross_entropy_loss(model(x), y) / labels.numel()).backward()
                assert i == microbatches or all(p.grad is None for p in model.parameters()) != (
                    each and "replicate" not in given
                )
                for module in model.modules():  # nothing is kept whole where each microbatch is reduced
                    state = getattr(module, "_get_fsdp_state", lambda: None)()
                    for group in [] if state is None else state._fsdp_param_groups:
                        # In the accumulated ones, or with one dtype for all in the parameter's.
                        gathered = [(p, getattr(p, "_unsharded_param", None)) for p in group.fsdp_params]
                        whole = [
                            p.unsharded_accumulated_grad is not None or getattr(param, "grad", None) is not None
                            for p, param in gathered
                        ]
                        assert any(whole) == (not each and i < microbatches), whole
        counts[microbatches, each] = comm.of("reducescatter"), comm.of("allreduce")
        gradients[microbatches, each] = [p.grad.full_tensor() for p in model.parameters()]  # type: ignore[union-attr]
    groups = SMALL.n_layers + 2
    replicas = groups if "replicate" in given else 0
    assert counts == {(1, False): (groups, replicas), (3, False): (groups, replicas), (3, True): (3 * groups, replicas)}
    every = everybody((inputs, labels))
    one = Decoder(SMALL)
    one.init_weights(WeightInit(one, 0))
    x, y = (torch.cat([pair[i] for pair in every]) for i in (0, 1))
    (cross_entropy_loss(one(x), y) / y.numel()).backward()
    for param, whole, parts, shards in zip(one.parameters(), *gradients.values(), strict=True):
        torch.testing.assert_close(whole, param.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(parts, param.grad, rtol=1e-4, atol=1e-6)
        difference = torch.linalg.vector_norm(shards - parts) / torch.linalg.vector_norm(parts)
        assert difference < 1e-7, difference


@cases(always="always", default="default", never="never")
def resharding(when: str) -> None:
    groups = SMALL.n_layers + 2
    # The last group is used again at once; and what was kept is freed after backward.
    gathered = {"always": 2 * groups, "default": 2 * groups - 1, "never": groups}[when]
    model = sharded(mesh_of(shard=4), reshard=when)
    for _ in range(2):
        with Counted() as comm:
            out = model(tokens(1, seed=0)[0])
            kept = [name for name, param in model.named_parameters() if not isinstance(param, DTensor)]
            out.sum().backward()
        assert comm.of("allgather") == gathered
        if when == "default":
            assert kept == ["norm.weight", "output.weight"]
        else:
            assert len(kept) == (len([*model.parameters()]) if when == "never" else 0)


# ---- the embedding over a sharded vocabulary


@cases(eager=False, compiled=True)
def embedding(compiled: bool) -> None:
    """Has the gradient of a whole one, whoever takes its output."""
    tp = mesh_of(shard=2, tp=2).tp
    whole, consumer = nn.Embedding(64, 16), nn.Linear(16, 16)
    for i, param in enumerate([whole.weight, *consumer.parameters()]):
        param.data = random(*param.shape, seed=i)
    x = tokens(3, seed=5)[0]
    consumer(whole(x)).square().sum().backward()
    split = nn.Embedding(64, 16)
    split.weight.data = whole.weight.data.clone()
    parallelize_module(split, tp, VocabParallelEmbedding())
    out = split(x)
    assert compiled or type(out) is Tensor  # not an AsyncCollectiveTensor, nor a DTensor
    assert torch.equal(out, whole(x).chunk(2, 1)[tp.get_local_rank()])
    function = torch.compile(consumer, backend="aot_eager", fullgraph=True) if compiled else consumer
    function(split(x)).square().sum().backward()
    assert isinstance(split.weight.grad, DTensor)
    torch.testing.assert_close(split.weight.grad.full_tensor(), whole.weight.grad)
    assert split.weight.grad.full_tensor().abs().max() > 1


def losses_of(model: Decoder, mesh: Mesh | None, loss_fn: Callable[[Tensor, Tensor], Tensor] | None) -> list[float]:
    """Without a ``loss_fn``, the model computes the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(3):
        x, y = tokens(4, seed=step)
        if mesh is not None:
            degree, rank = mesh.degrees.data_parallel, mesh.data_parallel_rank
            x, y = x.chunk(degree)[rank], y.chunk(degree)[rank]
        loss = (model(x, labels=y) if loss_fn is None else loss_fn(model(x), y)) / y.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if mesh is not None:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(mean.item())
    return losses


@cases(
    tied={},
    biases={"qkv_bias": True},
    norms_of_heads={"qk_norm": True},
    in_chunks={"chunks": 3},
    everything={"qkv_bias": True, "qk_norm": True, "sliding_window": 3, "partial_rotary_factor": 0.5},
)
def a_sharded_model_trains_as_a_whole_one(options: dict[str, Any]) -> None:
    """And its tied embeddings stay one parameter."""
    chunks = options.get("chunks", 1)
    options = {name: value for name, value in options.items() if name != "chunks"}
    args, mesh = replace(SMALL, tie_embeddings=True, **options), mesh_of(shard=2, tp=2)
    one = Decoder(args)
    one.init_weights(WeightInit(one, 0))
    model = sharded(mesh, args, chunks=chunks)
    assert model.tok_embeddings is not None
    assert model.output is not None
    assert model.output.weight is model.tok_embeddings.weight
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in one.named_parameters()]
    for ours, theirs in zip(model.parameters(), one.parameters()):
        assert torch.equal(ours.full_tensor(), theirs)  # type: ignore[attr-defined]
    many = losses_of(model, mesh, VocabParallelCrossEntropy(mesh.tp) if chunks == 1 else None)
    alone = losses_of(one, None, cross_entropy_loss)
    torch.testing.assert_close(many, alone, rtol=1e-5, atol=0)
    assert len({*alone}) == len(alone)
    assert model.output.weight is model.tok_embeddings.weight
    for ours, theirs in zip(model.parameters(), one.parameters()):
        torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-4, atol=1e-5)  # type: ignore[attr-defined]


# ---- delayed scaling in a pipeline


def delayed(layers: int) -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(layers)))
    cast = CastConfig(scaling_type=ScalingType.DELAYED)
    casts: dict[str, Any] = {"cast_config_input": cast, "cast_config_weight": cast, "cast_config_grad_output": cast}
    convert_to_float8_training(model, config=Float8LinearConfig(**casts, emulate=True))
    return model


def synchronized(layers: int, group: dist.ProcessGroup | None) -> float:
    """The latest amax of the first layer's input, which has been rank + 1 here."""
    model = delayed(layers)
    x = torch.full((16, 16), dist.get_rank() + 1.0, requires_grad=True)
    model(x).sum().backward()
    sync_float8_amax_and_scale_history(model, group=group)
    for layer in model:
        assert isinstance(layer, Float8Linear)
        for operand in ("input", "weight", "grad_output"):
            assert layer.get_buffer(f"fp8_amax_{operand}") == 0
            assert layer.get_buffer(f"fp8_scale_{operand}") > 0
    latest = model[0].get_buffer("fp8_amax_history_input")[0]
    assert model[0].get_buffer("fp8_scale_input") == 448 / latest
    return latest.item()


@check
def delayed_scales_are_those_of_the_stage() -> None:
    stage = mesh_of(pp=2, shard=2).stage.get_group()
    second = dist.get_rank() >= 2
    # The stages need not have as many layers.
    assert synchronized(3 if second else 1, stage) == (4 if second else 2)
    assert synchronized(1, None) == 4


def report() -> dict[str, str]:
    """The traceback of each check that failed on this rank, else "". A rank that hangs in a check ends them all."""
    dist.init_process_group("gloo")
    rank, results = dist.get_rank(), {}
    store = dist.distributed_c10d._get_default_store()
    for name, function in CHECKS.items():
        try:
            function()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
            print(f"rank {rank}, {name}: {results[name]}")
        store.set(f"{name}/{rank}", "done")
        # The others may wait for what this rank has not come to.
        store.wait([f"{name}/{other}" for other in range(dist.get_world_size())], timedelta(seconds=60))
    dist.barrier()  # rank 0 has the store, which the others may still be asking
    dist.destroy_process_group()
    return results
