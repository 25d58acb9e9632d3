"""A description for the log of how a configuration spreads a model over devices."""

from __future__ import annotations

from typing import Any

import torch

from titanlite.config import JobConfig
from titanlite.config.data_rules import masks_documents
from titanlite.distributed.activation_checkpoint import checkpointed_blocks
from titanlite.distributed.attention_kernel import AttentionInputs, describe_kernel
from titanlite.distributed.experts import balance_loss
from titanlite.distributed.mesh import Mesh
from titanlite.distributed.parallelize import attends_in_float32
from titanlite.errors import counted


def describe(args: Any, mesh: Mesh, config: JobConfig) -> dict[str, str]:
    """Return what :func:`titanlite.distributed.parallelize.parallelize` does to the whole model, by kind.

    Args:
        args: the model's arguments.
    """
    parallelism, training = config.parallelism, config.training
    about: dict[str, str] = {}
    if mesh.tp.size() > 1:
        loss = "whole logits" if parallelism.disable_loss_parallel else "loss parallel"
        overlapped = ", asynchronous" if parallelism.enable_async_tensor_parallel else ""
        about["tensor parallelism"] = f"{counted(mesh.tp.size(), 'process')}, sequence parallel, {loss}{overlapped}"
    if mesh.cp.size() > 1:
        about["context parallelism"] = (
            f"{counted(mesh.cp.size(), 'process')}, {parallelism.context_parallel_rotate_method}"
        )
    mixture = getattr(args, "mixture", None)
    if mixture is not None:
        balance = balance_loss(mixture, config.experts)
        about["experts"] = (
            f"{mixture.experts_per_token} of {counted(mixture.n_experts, 'expert')} for each token, "
            f"{training.mixed_precision_param}{_where(mesh)}; balance loss {balance.coefficient:g}, "
            f"z-loss {balance.z_coefficient:g}"
        )
    attention = []
    window = getattr(args, "sliding_window", None)
    masked = window is not None and window < args.max_seq_len
    if mesh.device_type == "cuda":
        attention.append(_kernel(args, mesh, config, masked))
    if masked:
        attention.append(f"a sliding window of {window} positions")
    if mesh.cp.size() == 1 and attends_in_float32(args.head_size, mesh, training.mixed_precision_param):
        attention.append(f"float32, the faster one on the CPU for heads of {args.head_size}")
    if attention:
        about["attention"] = "; ".join(attention)
    about["activation checkpointing"] = _checkpointing(args.n_layers, config)
    if options := config.compile_options("model"):
        about["compile"] = f"{counted(args.n_layers, 'block')}, {options.backend}"
    about["FSDP2"] = _sharding(mesh, config)
    return about


def _where(mesh: Mesh) -> str:
    if mesh.experts is None or mesh.experts.ep.size() == 1:
        return ""
    shards = f", {mesh.experts.fsdp.size()} shards of each" if mesh.experts.fsdp.size() > 1 else ""
    return f", spread over {counted(mesh.experts.ep.size(), 'process')}{shards}"


def _kernel(args: Any, mesh: Mesh, config: JobConfig, masked: bool) -> str:
    if masks_documents(config):
        return "FlexAttention"
    heads = args.n_heads // mesh.tp.size(), getattr(args, "n_kv_heads", args.n_heads) // mesh.tp.size()
    dtype = getattr(torch, config.training.mixed_precision_param)
    inputs = AttentionInputs(*heads, args.head_size, dtype, masked, getattr(args, "value_size", None))
    return describe_kernel(inputs, torch.device("cuda"), ring=mesh.cp.size() > 1)


def _checkpointing(blocks: int, config: JobConfig) -> str:
    options = config.activation_checkpoint
    chosen = len(checkpointed_blocks(map(str, range(blocks)), options))
    if options.mode == "none":
        return "none"
    per_op = options.mode == "selective" and options.selective_ac_option == "op"
    count = counted(blocks, "block")
    return f"selective per op, {count}" if per_op else f"{options.mode}, {chosen} of {count}"


def _sharding(mesh: Mesh, config: JobConfig) -> str:
    replicas = mesh.degrees.data_parallel_replicate
    shards = "not sharded" if mesh.fsdp.size() == 1 else f"{mesh.fsdp.size()} shards"
    shards += f" x {replicas} replicas" if replicas > 1 else ""
    where = ""
    if config.training.enable_cpu_offload:
        where = ", in host memory" + (" (all there is here)" if mesh.device_type == "cpu" else "")
    return f"{shards}, {config.training.mixed_precision_param} parameters{where}"
