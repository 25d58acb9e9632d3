"""The distribution of a model over devices: tensor and context parallelism, activation checkpointing, compile per
block, FSDP2, in this order. Each function takes the whole model or, under pipeline parallelism, one part of it, and the
:class:`~titanlite.models.layers.Layout` that declares its parts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import PrepareModuleInput, SequenceParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from titanlite.config import JobConfig
from titanlite.config.data_rules import masks_documents
from titanlite.config.refuse import refuse
from titanlite.config.schema import ActivationCheckpoint, Compile, Parallelism
from titanlite.distributed.activation_checkpoint import apply_activation_checkpoint
from titanlite.distributed.compile import compile_blocks
from titanlite.distributed.context_parallel import ContextParallel
from titanlite.distributed.data_parallel import apply_fsdp
from titanlite.distributed.document_attention import document_attention
from titanlite.distributed.expert_parallel import spread_mixtures
from titanlite.distributed.experts import balance_loss, check_experts, pool_of
from titanlite.distributed.mesh import Mesh
from titanlite.distributed.tensor_parallel import (
    ReplicatedNorm,
    SummedGradient,
    VocabParallelEmbedding,
    column_parallel,
    enable_async_tensor_parallel,
    gathered_input,
    row_parallel,
)
from titanlite.errors import ConfigError, counted
from titanlite.models.layers import (
    AttentionSlot,
    Core,
    Experts,
    FeedForward,
    Layout,
    Mixture,
    causal_attention,
)
from titanlite.quant.linear import quant_layers
from titanlite.quant.reuse import share_first_input
from titanlite.quant.swiglu import swiglu_linear


def parallelize(model: nn.Module, layout: Layout, mesh: Mesh, config: JobConfig) -> None:
    """Apply what ``config`` asks for to ``model`` in place."""
    spread_mixtures(model, mesh)
    if mesh.tp.size() > 1:
        apply_tensor_parallel(model, layout, mesh, config.parallelism)
    blocks: nn.ModuleDict = getattr(model, layout.blocks)
    if quant_layers(model):
        for block in blocks.values():
            for part in layout.parts:
                share_first_input(block.get_submodule(part))
    _fill_slots(model, blocks, mesh, config)
    _checkpoint_and_compile(blocks, mesh, config.activation_checkpoint, config.compile_options("model"))
    apply_fsdp(
        model,
        mesh,
        config.training,
        config.parallelism.fsdp_reshard_after_forward,
        groups=_gathered_together(model, layout),
    )


def _fill_slots(model: nn.Module, blocks: nn.ModuleDict, mesh: Mesh, config: JobConfig) -> None:
    """Fill the slots of attention, feed-forward, experts, masks and positions."""
    args: Any = model.args
    core: Core | None = None
    positions = None
    if masks_documents(config):
        model.mask_of, core = document_attention(mesh.device_type, config.compile_options("model") is not None)  # type: ignore[assignment]
    if mesh.cp.size() > 1:
        _refuse_blocks_without_slot(blocks, mesh.cp.size())
        # The same object for all blocks: only then can torch.compile share code between them.
        rotate_method = config.parallelism.context_parallel_rotate_method
        context = ContextParallel(mesh.cp, rotate_method, grouped=not mesh.target.is_cpu)
        core, positions = context.attention, context.positions(args.max_seq_len)
    elif attends_in_float32(args.head_size, mesh, config.training.mixed_precision_param):
        core = partial(float32_attention, core or causal_attention)
    if positions is None and mesh.pp.size() > 1:  # a later stage cannot derive them from its input
        positions = torch.arange(args.max_seq_len, device=mesh.device_type)
    model.positions = positions  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, AttentionSlot) and core is not None:
            module.core = core
        if isinstance(module, FeedForward):
            module.swiglu = swiglu_linear  # it calls layers that are not quantized as before
        if isinstance(module, Mixture):
            module.balance_loss = balance_loss(module.args, config.experts)
            module.pool = pool_of(module.balance_loss, mesh)


def _refuse_blocks_without_slot(blocks: nn.ModuleDict, degree: int) -> None:
    """Refuse context parallelism where a block's attention would see this rank's part of the sequence alone."""
    for name, block in blocks.items():
        if not any(isinstance(module, AttentionSlot) for module in block.modules()):
            raise ConfigError(
                f"block {name} has no AttentionSlot (titanlite.models.layers), so its attention cannot see the whole "
                "sequence; give it one, or choose another dimension",
                key="parallelism.context_parallel_degree",
                value=degree,
            )


def attends_in_float32(head_size: int, mesh: Mesh, param_dtype: str) -> bool:
    """Return whether attention is faster in float32 than in the parameters' dtype, as it is for small heads on the CPU.

    The backward of PyTorch's bfloat16 CPU kernel has a cost per head that does not depend on the head's size (torch
    2.11 and 2.13, a processor with bfloat16 instructions; docs/internals/cpu-step.md). From size 64 it is not slower.
    """
    return mesh.target.is_cpu and head_size < 64 and param_dtype == "bfloat16"


def float32_attention(
    core: Core, q: Tensor, k: Tensor, v: Tensor, window: int | None = None, documents: Any = None
) -> Tensor:
    """Compute ``core`` in float32."""
    return core(q.float(), k.float(), v.float(), window, documents).to(q.dtype)


def _checkpoint_and_compile(
    blocks: nn.ModuleDict, mesh: Mesh, checkpointing: ActivationCheckpoint, compiling: Compile | None
) -> None:
    """Checkpoint the blocks, and compile them.

    The checkpointed block is compiled, so that recomputation is fused with the backward. Only where whole blocks of
    DTensors are recomputed, the compiled block is checkpointed instead: otherwise the compiler would save the DTensors'
    mesh for backward as if it were a tensor (torch 2.13: "expected all tensors_saved_with_vc_check to be Tensors").
    """
    per_op = checkpointing.mode == "selective" and checkpointing.selective_ac_option == "op"
    compile_first = (mesh.tp.size() > 1 or mesh.degrees.expert_parallel > 1) and not per_op
    if compiling and compile_first:
        compile_blocks(blocks, compiling)
    apply_activation_checkpoint(blocks, checkpointing)
    if compiling and not compile_first:
        compile_blocks(blocks, compiling)


def _gathered_together(model: nn.Module, layout: Layout) -> list[list[nn.Module]]:
    """Return the modules that FSDP2 gathers together, in the order of the forward."""
    blocks = [[block] for block in getattr(model, layout.blocks).values()]
    if model.args.tie_embeddings:  # type: ignore[union-attr]
        # Both ends of the model use a tied embedding, so the root gathers it, once for forward and backward.
        return blocks
    ends = ([layout.embedding], [layout.norm, layout.output])
    before, after = ([m for name in end if (m := getattr(model, name)) is not None] for end in ends)
    return [group for group in (before, *blocks, after) if group]


def chain(model: nn.Module, layout: Layout) -> list[tuple[str, ...]]:
    """Return the module names in the order of the forward. A pipeline can cut between tuples, not within one."""
    blocks = [(f"{layout.blocks}.{name}",) for name in getattr(model, layout.blocks)]
    return [(layout.embedding,), *blocks, (layout.output, layout.norm)]


def check(args: Any, layout: Layout, mesh: Mesh, config: JobConfig) -> None:
    """Check the degrees and the checkpointing against the sizes of the model ``args``.

    Raises:
        ConfigError: a degree does not divide the model, or checkpointing would select no layer.
    """
    tp, pp, ac = mesh.tp.size(), mesh.pp.size(), config.activation_checkpoint
    check_experts(args, mesh, config)
    if ac.mode == "selective" and ac.selective_ac_option != "op" and int(ac.selective_ac_option) > args.n_layers:
        refuse(
            config,
            "activation_checkpoint.selective_ac_option",
            f"the model has {counted(args.n_layers, 'layer')}, so none would be checkpointed; use a smaller number, "
            '"op", or activation_checkpoint.mode = "none"',
        )
    for name in layout.divisible:
        size = attrgetter(name)(args)
        if size is not None and size % tp:
            raise ConfigError(
                f"must divide the model's {name} = {size}; choose another degree or flavor",
                key="parallelism.tensor_parallel_degree",
                value=tp,
            )
    window = getattr(args, "sliding_window", None)
    if mesh.cp.size() > 1 and window is not None and window < args.max_seq_len:
        raise ConfigError(
            f"this flavor's attention has a sliding window of {window} positions, and the exchange of keys and values "
            f"over a sequence of {args.max_seq_len} computes causal attention without one; shard with "
            "data_parallel_shard_degree, or choose another flavor",
            key="parallelism.context_parallel_degree",
            value=mesh.cp.size(),
        )
    if args.tie_embeddings and pp > 1:
        raise ConfigError(
            "this flavor's embedding is also its output projection (tied), and its two uses would be on different "
            "processes; shard with data_parallel_shard_degree, or choose another flavor",
            key="parallelism.pipeline_parallel_degree",
            value=pp,
        )


def apply_tensor_parallel(model: nn.Module, layout: Layout, mesh: Mesh, parallelism: Parallelism) -> None:
    """Shard attention heads, the hidden features of feed-forward and the vocabulary; between them, in norms and the
    residual stream, the sequence is sharded (Korthikanti et al., "Reducing Activation Recomputation in Large
    Transformer Models", 2022)."""
    tp = mesh.tp
    embedding, output = getattr(model, layout.embedding), getattr(model, layout.output)
    plan: dict[str, ParallelStyle] = {}
    if embedding is not None:
        plan[layout.embedding] = VocabParallelEmbedding()
    if output is not None:
        plan[layout.norm] = SequenceParallel()
        vocabulary = Replicate() if parallelism.disable_loss_parallel else Shard(-1)
        plan[layout.output] = column_parallel(output, input_layouts=Shard(1), output_layouts=vocabulary)
    try:
        parallelize_module(model, tp, plan)
        for block in getattr(model, layout.blocks).values():
            parallelize_module(block, tp, _plan_of_block(block, layout))
    except ValueError as e:
        raise ConfigError(str(e), key="parallelism.tensor_parallel_degree", value=tp.size()) from e
    for block, (name, projections) in itertools.product(getattr(model, layout.blocks).values(), layout.parts.items()):
        if projections.shared_by_heads:
            setattr(block.get_submodule(name), projections.shared_by_heads, SummedGradient(tp))
    if model.args.tie_embeddings:  # type: ignore[union-attr]
        embedding.weight = output.weight  # both ends shard the vocabulary, each a copy of its own until here
    experts = {param for module in model.modules() if isinstance(module, Experts) for param in module.parameters()}
    for name, param in model.named_parameters():
        if (
            not isinstance(param, DTensor) and param not in experts
        ):  # each rank would train it with the gradient of its own part
            raise ConfigError(
                f"the model's layout does not say how to shard {name}; add it there, or choose another dimension",
                key="parallelism.tensor_parallel_degree",
                value=tp.size(),
            )
    if parallelism.enable_async_tensor_parallel:
        enable_async_tensor_parallel(model, tp)


def _plan_of_block(block: nn.Module, layout: Layout) -> dict[str, ParallelStyle]:
    plan: dict[str, ParallelStyle] = {name: SequenceParallel() for name in layout.norms}
    for part, projections in layout.parts.items():
        mixture = block.get_submodule(part)
        if isinstance(mixture, Mixture):  # its router and its experts have a part of the sequence on each process
            plan[part] = PrepareModuleInput(
                input_layouts=Shard(1), desired_input_layouts=Shard(1), use_local_output=True
            )
            if mixture.shared is None:
                continue
            part += ".shared"
        columns = _present(block, part, projections.columns)
        latents = _present(block, part, projections.latents.values())
        of_latents = {f"{part}.{column}" for column, name in projections.latents.items() if f"{part}.{name}" in latents}
        takers = [*latents.values(), *(layer for name, layer in columns.items() if name not in of_latents)]
        plan[part] = gathered_input(takers, arguments=projections.arguments)
        plan |= {name: column_parallel(layer) for name, layer in columns.items()}
        plan |= {name: column_parallel(layer, output_layouts=Replicate()) for name, layer in latents.items()}
        plan |= {name: ReplicatedNorm() for name in _present(block, part, projections.latent_norms)}
        # The dimension that is sharded is not the sequence here, but the heads.
        heads = _present(block, part, projections.head_norms)
        plan |= {name: SequenceParallel(sequence_dim=2, use_local_output=True) for name in heads}
        rows = _present(block, part, projections.rows)
        plan |= {name: row_parallel(layer, output_layouts=Shard(1)) for name, layer in rows.items()}
    return plan


def _present(block: nn.Module, part: str, names: Iterable[str]) -> dict[str, nn.Module]:
    """Return those children of a part that this model has, by their names in the block."""
    children = {f"{part}.{name}": getattr(block.get_submodule(part), name) for name in names}
    return {name: child for name, child in children.items() if child is not None}
