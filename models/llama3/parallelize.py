"""How a Llama 3 is spread over devices: tensor and context parallelism, activation checkpointing, compile per block,
FSDP2, in this order. Each function takes the whole model or, under pipeline parallelism, one part of it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from titanlite.config import JobConfig
from titanlite.config.refuse import refuse
from titanlite.distributed.blocks import checkpoint_and_compile
from titanlite.distributed.context_parallel import ContextParallel
from titanlite.distributed.data_parallel import apply_fsdp
from titanlite.distributed.mesh import Mesh
from titanlite.distributed.tensor_parallel import (
    VocabParallelEmbedding,
    column_parallel,
    enable_async_tensor_parallel,
    gathered_input,
    row_parallel,
)
from titanlite.errors import ConfigError
from titanlite.models.llama3.model import Llama3, Llama3Args, TransformerBlock, causal_attention
from titanlite.quant.swiglu import swiglu_linear


def parallelize(model: nn.Module, mesh: Mesh, config: JobConfig) -> dict[str, str]:
    """Apply what ``config`` asks for to ``model`` in place; returns what was done, for the log."""
    assert isinstance(model, Llama3)
    done: dict[str, str] = {}
    if mesh.tp.size() > 1:
        done["tensor parallelism"] = apply_tensor_parallel(model, mesh, config)
    positions = None
    if mesh.cp.size() > 1:
        method = config.parallelism.context_parallel_rotate_method
        context = ContextParallel(mesh.cp, method, grouped=not mesh.target.is_cpu)
        for layer in model.layers.values():
            assert isinstance(layer, TransformerBlock)
            layer.attention.attend = context.attention  # type: ignore[method-assign, assignment]
        positions = context.positions(model.args.max_seq_len)
        done["context parallelism"] = f"{mesh.cp.size()} processes, {method}"
    elif mesh.pp.size() > 1:
        positions = torch.arange(model.args.max_seq_len, device=mesh.device_type)
    for layer in model.layers.values():
        assert isinstance(layer, TransformerBlock)
        layer.feed_forward.swiglu = swiglu_linear  # type: ignore[method-assign]
    if mesh.cp.size() == 1 and attends_in_float32(model.args, mesh, config):
        for layer in model.layers.values():
            assert isinstance(layer, TransformerBlock)
            layer.attention.attend = float32_attention  # type: ignore[method-assign]
        done["attention"] = f"float32, the faster one on the CPU for heads of {model.args.head_dim}"
    if positions is not None:
        # Bound here: they are the same in every step, and a later stage cannot tell them from what it is given.
        model.forward = partial(model.forward, positions=positions)  # type: ignore[method-assign]
    done |= checkpoint_and_compile(model.layers, mesh, config)
    ends: tuple[list[nn.Module | None], ...] = [model.tok_embeddings], [model.norm, model.output]
    before, after = ([module for module in end if module is not None] for end in ends)
    groups: list[list[nn.Module]] = [before, *([layer] for layer in model.layers.values()), after]
    if model.args.tie_embeddings:
        # A tied embedding belongs to both ends of the model: the root gathers it, once for forward and backward.
        groups = groups[1:-1]
    done["FSDP2"] = apply_fsdp(model, mesh, config, groups=filter(None, groups))
    return done


def attends_in_float32(args: Llama3Args, mesh: Mesh, config: JobConfig) -> bool:
    """Whether attention is faster in float32 than in the parameters' dtype. On the CPU that is so for small heads: the
    backward of PyTorch's bfloat16 kernel has a cost per head that does not depend on its size (torch 2.11 and 2.13, a
    processor with bfloat16 instructions; docs/performance.md). From heads of 64 on it is no longer slower."""
    return mesh.target.is_cpu and args.head_dim < 64 and config.training.mixed_precision_param == "bfloat16"


def float32_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """:func:`causal_attention`, computed in float32."""
    return causal_attention(q.float(), k.float(), v.float()).to(q.dtype)


def check(args: Llama3Args, mesh: Mesh, config: JobConfig) -> None:
    """Refuse degrees that do not divide this model, and checkpointing that would choose none of its layers.

    Raises:
        ConfigError: with the sizes.
    """
    tp, pp, ac = mesh.tp.size(), mesh.pp.size(), config.activation_checkpoint
    if ac.mode == "selective" and ac.selective_ac_option != "op" and int(ac.selective_ac_option) > args.n_layers:
        refuse(
            config,
            "activation_checkpoint.selective_ac_option",
            f"the model has {args.n_layers} layers, so none would be checkpointed; use a smaller number, "
            '"op", or activation_checkpoint.mode = "none"',
        )
    for what in ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size"):
        size = getattr(args, what)
        if size % tp:
            raise ConfigError(
                f"must divide the model's {what} = {size}; choose another degree or flavor",
                key="parallelism.tensor_parallel_degree",
                value=tp,
            )
    if args.tie_embeddings and pp > 1:
        raise ConfigError(
            "this flavor's embedding is also its output projection (tied), and its two uses would be on different "
            "processes; shard with data_parallel_shard_degree, or choose another flavor",
            key="parallelism.pipeline_parallel_degree",
            value=pp,
        )


def apply_tensor_parallel(model: nn.Module, mesh: Mesh, config: JobConfig) -> str:
    """Attention heads, the hidden features of feed-forward and the vocabulary are sharded; between them, in norms and
    the residual stream, the sequence is (Korthikanti et al., "Reducing Activation Recomputation in Large Transformer
    Models", 2022)."""
    assert isinstance(model, Llama3)
    tp = mesh.tp
    plan: dict[str, ParallelStyle] = {}
    if model.tok_embeddings is not None:
        plan["tok_embeddings"] = VocabParallelEmbedding()
    if model.output is not None:
        plan["norm"] = SequenceParallel()
        vocabulary = Replicate() if config.parallelism.disable_loss_parallel else Shard(-1)
        plan["output"] = column_parallel(model.output, input_layouts=Shard(1), output_layouts=vocabulary)
    try:
        parallelize_module(model, tp, plan)
        for layer in model.layers.values():
            assert isinstance(layer, TransformerBlock)
            a, f = layer.attention, layer.feed_forward
            parallelize_module(
                layer,
                tp,
                {
                    "attention_norm": SequenceParallel(),
                    "attention": gathered_input([a.wq, a.wk, a.wv], arguments=2),
                    "attention.wq": column_parallel(a.wq),
                    "attention.wk": column_parallel(a.wk),
                    "attention.wv": column_parallel(a.wv),
                    "attention.wo": row_parallel(a.wo, output_layouts=Shard(1)),
                    "ffn_norm": SequenceParallel(),
                    "feed_forward": gathered_input([f.w1, f.w3], arguments=1),
                    "feed_forward.w1": column_parallel(f.w1),
                    "feed_forward.w3": column_parallel(f.w3),
                    "feed_forward.w2": row_parallel(f.w2, output_layouts=Shard(1)),
                },
            )
    except ValueError as e:
        raise ConfigError(str(e), key="parallelism.tensor_parallel_degree", value=tp.size()) from e
    if model.args.tie_embeddings:  # both ends shard the vocabulary, each a copy of its own until here
        assert model.tok_embeddings is not None
        assert model.output is not None
        model.tok_embeddings.weight = model.output.weight
    if config.parallelism.enable_async_tensor_parallel:
        enable_async_tensor_parallel(model, tp)
    loss = "whole logits" if config.parallelism.disable_loss_parallel else "loss parallel"
    overlapped = ", asynchronous" if config.parallelism.enable_async_tensor_parallel else ""
    return f"{tp.size()} processes, sequence parallel, {loss}{overlapped}"
