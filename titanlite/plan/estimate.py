"""Estimate memory and traffic of each device, without devices.

The model is built and sharded as for training, one rank of each pipeline stage after the other, over a process group
that does not communicate. Then one step (forward, backward and optimizer) runs on tensors with a shape and a dtype but
no data, and every storage and every collective is counted (:mod:`titanlite.plan.memory`).
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from titanlite.config import (
    Degrees,
    JobConfig,
    check_config,
    global_batch_size,
    import_custom,
    resolve_degrees,
)
from titanlite.config.number_formats import formats_of
from titanlite.config.refuse import refuse
from titanlite.config.schema import MEMORY_BACKEND
from titanlite.data import Batch
from titanlite.distributed.data_parallel import DTYPES, allocate
from titanlite.distributed.expert_parallel import ExpertParallel
from titanlite.distributed.experts import ExpertBalance
from titanlite.distributed.gradients import gradient_scale
from titanlite.distributed.mesh import Mesh, build_mesh
from titanlite.distributed.one_shard import InPlace, gather_in_place
from titanlite.distributed.target import H100
from titanlite.metrics.device import GIB
from titanlite.metrics.flops import flops_per_token
from titanlite.models.layers import Mixture, ModelSize
from titanlite.optim import build_optimizer, update_parameters
from titanlite.plan import compiled_memory as compiled_memory  # it registers its backend
from titanlite.plan.lone_rank import LoneStage, fused_norm, in_a_process, lone_process_group
from titanlite.plan.memory import (
    ACTIVATIONS,
    GATHERED,
    GRADIENTS,
    OPTIMIZER,
    PARAMETERS,
    TEMPORARY,
    UNREDUCED,
    Collective,
    MemoryTracker,
    Traffic,
)
from titanlite.quant.tensor import inner_tensors
from titanlite.training.build import BuiltModel, build_loss, build_model, build_pipeline
from titanlite.training.model_shape import choose_shape
from titanlite.training.step import LossFunction, StepRunner

# The vocabulary size of the tokenizer that titanlite ships, for flavors without one; no tokenizer is opened.
ASSUMED_VOCAB_SIZE = 2048
LossBuilder = Callable[[JobConfig, Mesh], LossFunction | None]
DEVICE = torch.device("cpu")  # in place of a GPU, which tensors without data do not need

NOT_COUNTED = (
    "The peak is that of one moment, when gradients may not be there yet, and of what torch calls active memory. Not "
    "counted: the CUDA context, buffers of NCCL and cuBLAS, and what the allocator rounds up and cannot reuse "
    "(reserved memory)."
)

ASYNCHRONOUS = (
    "With parallelism.enable_async_tensor_parallel the collectives of tensor parallelism send as much, in parts. Not "
    "counted: the buffers that the GPUs share for it."
)


@dataclass
class RankEstimate:
    """The estimate of one rank, in bytes.

    Attributes:
        rank: the first rank of its pipeline stages. The others have as much, or less if shards are uneven.
        parameters: its parameters and buffers, with the padding of uneven shards.
        gradients, optimizer: its gradients and optimizer state, with the padding of uneven shards.
        peak: the largest memory during a step.
        at_peak: the memory at the peak, by kind.
        traffic: the collectives of one step.
        in_place: one process computes with its parameters themselves (titanlite/distributed/one_shard.py).
        worst_peak: the peak if all tokens choose experts of this rank; None without expert parallelism.
    """

    rank: int
    parameters: int
    gradients: int
    optimizer: int
    peak: int
    at_peak: dict[str, int]
    traffic: dict[Collective, Traffic]
    in_place: bool
    worst_peak: int | None = None

    @property
    def activations(self) -> int:
        """Activations that forward keeps for backward, and temporaries, at the peak."""
        return self.at_peak.get(ACTIVATIONS, 0) + self.at_peak.get(TEMPORARY, 0)

    @property
    def movable(self) -> int:
        """The state that training.enable_cpu_offload moves to host memory, without the parameters that are in place:
        with offload they are copied to the device."""
        return self.optimizer + (0 if self.in_place else self.parameters)

    @property
    def gathered(self) -> int:
        """Parameters that FSDP has gathered, and gradients that it has not reduced yet, at the peak."""
        return self.at_peak.get(GATHERED, 0) + self.at_peak.get(UNREDUCED, 0)


@dataclass
class Estimate:
    """The estimate of a configuration: one :class:`RankEstimate` for each rank of the pipeline, FLOPs per step and
    device (see :func:`titanlite.metrics.flops.flops_per_token`), a description, and notes."""

    world_size: int
    ranks: list[RankEstimate]
    flops_per_device: int
    about: dict[str, str]
    notes: list[str]

    @property
    def peak(self) -> int:
        return max(rank.peak for rank in self.ranks)


def estimate(
    config: JobConfig, world_size: int, vocab_size: int | None = None, loss_builder: LossBuilder | None = None
) -> Estimate:
    """Build, shard and run one step of ``config`` for ``world_size`` devices; nothing of the model's size is allocated.

    Args:
        vocab_size: the size of the tokenizer's vocabulary, for flavors without one; None: ``ASSUMED_VOCAB_SIZE``.
        loss_builder: makes the loss; a function of a module, as it goes to other processes. None: the trainer's loss.

    Raises:
        ConfigError: training with this configuration on as many devices would raise it, or it is not modelled.
    """
    check_config(config, world_size, train=False)
    check_modelled(config)
    degrees = resolve_degrees(config.parallelism, world_size)
    ranks, notes = [], [*config.notices, NOT_COUNTED]
    if config.parallelism.enable_async_tensor_parallel:
        notes.append(ASYNCHRONOUS)
    for stage in range(degrees.pipeline_parallel):
        rank = stage * (world_size // degrees.pipeline_parallel)
        rank_estimate, size, model_about, rank_notes = in_a_process(
            _estimate_rank, config, degrees, rank, world_size, vocab_size, loss_builder
        )
        ranks.append(rank_estimate)
        notes += [note for note in rank_notes if note not in notes]
    if any(rank.worst_peak for rank in ranks):
        notes.append(
            "Experts have equal load here. If all tokens of the devices of expert parallelism choose experts of one of "
            f"them, in all mixtures, its peak is {max(r.worst_peak or 0 for r in ranks) / GIB:.2f} GiB."
        )
    tokens = global_batch_size(config, degrees.data_parallel) * config.training.seq_len
    flops = flops_per_token(size, config.training.seq_len) * tokens // world_size
    about = {
        "model": model_about.pop("model"),
        "degrees": " x ".join(f"{name} {n}" for name, n in dimensions_of(degrees).items() if n > 1) or "1",
        **model_about,
        "tokens per step": f"{tokens:,}",
        "FLOPs per step and device": f"{flops:.4g}",
    }
    return Estimate(world_size, ranks, flops, about, notes)


def dimensions_of(degrees: Degrees) -> dict[str, int]:
    """Return the dimensions whose product is the number of processes."""
    return {name: n for name, n in degrees._asdict().items() if name != "expert_parallel"}


def _estimate_rank(
    config: JobConfig,
    degrees: Degrees,
    rank: int,
    world_size: int,
    vocab_size: int | None,
    loss_builder: LossBuilder | None,
) -> tuple[RankEstimate, ModelSize, dict[str, str], list[str]]:
    with lone_mesh(config, degrees, rank, world_size) as mesh:
        config = for_memory(config)
        built, notes = build(config, mesh, vocab_size)
        about = {name: text.replace(MEMORY_BACKEND, "inductor") for name, text in built.about.items()}
        loss_fn = (loss_builder or build_loss)(config, mesh)
        tracker = MemoryTracker(dimensions(mesh))
        return measure(built, loss_fn, config, mesh, tracker), built.size, about, notes


@contextmanager
def lone_mesh(config: JobConfig, degrees: Degrees, rank: int, world_size: int) -> Iterator[Mesh]:
    """Make the mesh of one rank on H100s, in a process that estimates and ends."""
    warnings.simplefilter("ignore")  # warnings about a step matter only in training
    import_custom(config)
    with fused_norm(), lone_process_group(rank, world_size):
        experts = getattr(choose_shape(config).flavor, "mixture", None) is not None
        yield build_mesh(degrees, DEVICE.type, H100, experts=experts)


def check_modelled(config: JobConfig) -> None:
    if config.activation_checkpoint.mode == "auto":
        refuse(config, "activation_checkpoint.mode", "has not been resolved (titanlite.plan.auto_checkpoint)")
    if config.training.enable_cpu_offload:
        refuse(config, "training.enable_cpu_offload", "is not modelled by estimates; leave it out for one")


def for_memory(config: JobConfig) -> JobConfig:
    """Return ``config`` with a compiler that counts memory in place of the default one, and without the asynchronous
    tensor parallelism that the default one would make."""
    config = copy.deepcopy(config)
    config.parallelism.enable_async_tensor_parallel = False
    if config.compile.backend == "inductor":
        config.compile.backend, config.compile.mode = MEMORY_BACKEND, "default"
    return config


def build(config: JobConfig, mesh: Mesh, vocab_size: int | None) -> tuple[BuiltModel, list[str]]:
    """Build the model as the trainer does; return it with notes on the estimate."""
    shape = choose_shape(config)
    spec, flavor, notes = shape.spec, shape.flavor, []
    args = spec.configure(flavor, vocab_size or 0, config.training.seq_len)
    if getattr(args, "vocab_size", None) == 0:
        args = spec.configure(flavor, ASSUMED_VOCAB_SIZE, config.training.seq_len)
        notes.append(
            f"The flavor {config.model.flavor} takes its vocabulary from the tokenizer, which is not opened: "
            f"{ASSUMED_VOCAB_SIZE} tokens are assumed, as many as the one that titanlite ships has."
        )
    built = build_model(spec, args, config, mesh)
    built.about["model"] = f"{shape.about}, {built.size.params:,} parameters"
    if uneven := _uneven(built.parameters()):
        notes.append(
            f"{uneven} of {len(built.parameters())} parameters do not divide into shards of one size: the last ranks "
            "have less optimizer state than is shown, and as much of the rest, which is padded."
        )
    notes += [f"{number_format.name} is computed as on an H100." for number_format in formats_of(config)]
    return built, notes


def dimensions(mesh: Mesh) -> dict[str, str]:
    """Return the dimension of parallelism of each process group, by group name; the last one if a group has two."""
    meshes = {
        "all ranks": mesh.world,
        "pipeline stage": mesh.stage,
        "pipeline parallel": mesh.pp,
        "context parallel": mesh.cp,
        "tensor parallel": mesh.tp,
        "replicas (HSDP)": mesh.world["dp_replicate"],
        **({"expert parallel": mesh.experts.ep, "FSDP of experts": mesh.experts.fsdp} if mesh.experts else {}),
        "FSDP": mesh.fsdp,
    }
    return {m.get_group().group_name: name for name, m in meshes.items() if m.ndim == 1 and m.size() > 1}


class WholeShardWithoutData(InPlace, FakeTensor):
    """A shard without data that is gathered in place."""


def _whole_shard(local: Tensor) -> Tensor | None:
    if type(local) is not FakeTensor:
        return None
    local.__class__ = WholeShardWithoutData  # torch cannot view a tensor without data as a subclass
    return local


def measure(
    built: BuiltModel, loss_fn: LossFunction | None, config: JobConfig, mesh: Mesh, tracker: MemoryTracker
) -> RankEstimate:
    """Allocate the state of this rank, then run a step as :class:`titanlite.train.Trainer` does."""
    pipeline = build_pipeline(built, loss_fn, config, mesh, DEVICE, LoneStage)
    parameters = built.parameters()
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:
        with tracker.kind(PARAMETERS):
            for part in built.parts:
                allocate(part, DEVICE, config.training.enable_cpu_offload)
                part.train()
        training, in_place = config.training, False
        if mesh.world.size() == 1:  # as the trainer does
            dtypes = DTYPES[training.mixed_precision_param], DTYPES[training.mixed_precision_reduce]
            in_place = gather_in_place(built.parts[0], *dtypes, _whole_shard)
        optimizer = build_optimizer(built.named_parameters(), config.optimizer)
        with tracker.kind(OPTIMIZER):
            _make_state(optimizer)
        tracker.restart_peak()
        worst = assume_load(built.parts, worst=False)
        runner = StepRunner(built.parts, loss_fn, pipeline, None, DEVICE, mesh, built.reduce_each)
        runner.in_place = in_place
        loss = runner.forward_backward(_batch(config, mesh))
        # Those that are on one device alone, as experts can be, pass no reduction that would tell what they are.
        tracker.name([*_local(p.grad for p in parameters)], GRADIENTS)
        sharded_gradients = _bytes(p.grad for p in parameters)
        tracker.mark("clip")
        with tracker.kind(TEMPORARY, "all ranks"):
            scale = gradient_scale(parameters, config.training.max_norm, mesh, *loss)
        tracker.mark("optimizer")
        with tracker.kind(TEMPORARY):
            update_parameters(optimizer, scale.divisor)
            optimizer.zero_grad()
            ExpertBalance(built.parts, config.experts, mesh).step_done(bad=torch.zeros(()))
            for converter in built.converters.values():
                for part in built.parts:
                    converter.post_optimizer_hook(part)
        result = RankEstimate(
            rank=dist.get_rank(),
            parameters=_bytes(t for part in built.parts for t in (*part.parameters(), *part.buffers())),
            gradients=sharded_gradients,
            optimizer=_bytes(optimizer.state.values()),
            peak=tracker.peak,
            at_peak=dict(tracker.at_peak()),
            traffic=dict(tracker.traffic),
            in_place=in_place,
        )
        if worst:
            assume_load(built.parts, worst=True)
            tracker.restart_peak()
            runner.forward_backward(_batch(config, mesh))
            result.worst_peak = max(tracker.peak, result.peak)
        return result


def assume_load(parts: Iterable[nn.Module], *, worst: bool) -> bool:
    """Let experts be computed for the rows of an equal load, or for the most that can come: each token of all processes
    of expert parallelism chooses as many experts here as it can. Return whether there is expert parallelism."""
    spread = [m for part in parts for m in part.modules() if isinstance(m, Mixture) and m.spread is not None]
    for mixture in spread:
        exchange, args = mixture.spread, mixture.args
        assert isinstance(exchange, ExpertParallel)
        most = min(args.experts_per_token, args.n_experts // exchange.ranks)
        exchange.assumed = exchange.ranks * most / args.experts_per_token if worst else 1.0
    return bool(spread)


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the optimizer state of a first step; its gradients and temporaries are freed."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.zero_grad()


def _batch(config: JobConfig, mesh: Mesh) -> Batch:
    """Return the tokens of a step, already cut by context parallelism."""
    training, degrees = config.training, mesh.degrees
    count = global_batch_size(config, degrees.data_parallel) // degrees.data_parallel // training.local_batch_size
    shape = count, training.local_batch_size, training.seq_len // degrees.context_parallel
    return Batch(*(torch.zeros(shape, dtype=torch.int64) for _ in range(2)))


def _bytes(tree: Any) -> int:
    """Return the bytes of this rank's storages of the tensors in ``tree``, each once, with padding of uneven shards."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _local(tree)}
    return sum(storages.values())


def _local(tree: Any) -> Iterator[Tensor]:
    """Yield this rank's parts of the tensors in ``tree``, as plain tensors."""
    for leaf in tree_leaves(list(tree)):
        if isinstance(leaf, Tensor):
            yield from inner_tensors(leaf.to_local() if isinstance(leaf, DTensor) else leaf)


def _uneven(parameters: Iterable[nn.Parameter]) -> int:
    """Count the parameters that do not divide into shards of equal size."""
    count = 0
    for param in parameters:
        shards: Counter[int] = Counter()
        if isinstance(param, DTensor):
            for size, placement in zip(param.device_mesh.shape, param.placements, strict=True):
                dim = getattr(placement, "dim", None)  # a shard, strided or not
                if dim is not None:
                    shards[dim] = max(shards[dim], 1) * size
        count += any(param.shape[dim] % n for dim, n in shards.items())
    return count
