"""Tensor and sequence parallelism: the styles for plain and quantized layers, and the loss over a sharded
vocabulary."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel
from torch.distributed.tensor.parallel.style import ParallelStyle

from titanlite.distributed.chunked_loss import ChunkedOutput, ChunkedOutputParallel
from titanlite.errors import ConfigError
from titanlite.optim.loss import IGNORED
from titanlite.quant.linear import QuantLinear, quant_layers
from titanlite.quant.tensor_parallel import PrepareQuantInput, QuantColwiseParallel, QuantRowwiseParallel

logger = logging.getLogger()

_c10d = torch.ops._c10d_functional


def column_parallel(layer: nn.Module, **layouts: Any) -> ParallelStyle:
    """Return the style that shards the output features of ``layer``; arguments as of ``ColwiseParallel``."""
    if isinstance(layer, ChunkedOutput):
        return ChunkedOutputParallel(**layouts)
    return (QuantColwiseParallel if isinstance(layer, QuantLinear) else ColwiseParallel)(**layouts)


def row_parallel(layer: nn.Module, **layouts: Any) -> ParallelStyle:
    """Return the style that shards the input features of ``layer``; arguments as of ``RowwiseParallel``."""
    return (QuantRowwiseParallel if isinstance(layer, QuantLinear) else RowwiseParallel)(**layouts)


class VocabParallelEmbedding(RowwiseParallel):
    """A style that shards the vocabulary of an ``nn.Embedding``, and the output over the sequence, dimension 1."""

    def __init__(self) -> None:
        super().__init__(input_layouts=Replicate(), output_layouts=Shard(1))

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, device_mesh)
        # The output is an AsyncCollectiveTensor. For the gradient of such an input, a compiled block returns zeros
        # (torch 2.13, AOTAutograd). A copy is a plain tensor; it is one of the smallest activations.
        module.register_forward_hook(lambda module, inputs, output: output.clone())
        return module


class ReplicatedNorm(ParallelStyle):
    """A style for a norm that every rank computes, of the same plain features. (``SequenceParallel`` has a part of the
    sequence on each.)"""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        whole = partial(DTensor.from_local, device_mesh=device_mesh, placements=(Replicate(),), run_check=False)

        def replicate(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
            for key, param in module.named_parameters(recurse=False):
                module.register_parameter(key, nn.Parameter(whole(param)))

        return distribute_module(
            *(module, device_mesh, replicate),
            lambda module, inputs, mesh: (whole(inputs[0]),),  # type: ignore[arg-type]
            lambda module, output, mesh: output.to_local(),
        )


class SummedGradient:
    """The slot :attr:`LatentAttention.for_heads`: the features themselves, which every rank of ``mesh`` has. Each rank
    has the gradient of its heads, and the sum is that of all. One object serves all blocks."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def __call__(self, x: Tensor) -> Tensor:
        whole = DTensor.from_local(x, self.mesh, (Replicate(),), run_check=False)
        return whole.to_local(grad_placements=(Partial(),))


def gathered_input(consumers: Sequence[nn.Module], arguments: int) -> ParallelStyle:
    """Return the style that gathers the first of a module's ``arguments`` along the sequence, dimension 1, once for all
    ``consumers``: in their number format if all of them have one."""
    style = PrepareQuantInput if all(isinstance(c, QuantLinear) for c in consumers) else PrepareModuleInput
    others: tuple[Placement | None, ...] = (None,) * (arguments - 1)
    return style(input_layouts=(Shard(1), *others), desired_input_layouts=(Replicate(), *others))


def enable_async_tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Let the compiler split tensor parallelism's collectives, and overlap the parts with the matmuls.

    Raises:
        ConfigError: the devices cannot access each other's memory (symmetric memory needs NVLink).
    """
    key = "parallelism.enable_async_tensor_parallel"
    if mesh.device_type != "cuda":
        why = f"needs GPUs that reach each other's memory, and this runs on {mesh.device_type}"
        raise ConfigError(why, key=key, value=True)
    if quant_layers(model):
        logger.warning("%s: inductor overlaps only the layers in high precision, not gathers in a number format", key)
    import torch._inductor.config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    current, count = torch.cuda.current_device(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    apart = [d for d in range(count) if d != current and not torch.cuda.can_device_access_peer(current, d)]
    if count % mesh.size() or apart:
        raise ConfigError(
            f"needs all {mesh.size()} GPUs of parallelism.tensor_parallel_degree in one machine and reaching each "
            f"other's memory; of the {count} used here GPU {current} does not reach {apart or 'those elsewhere'}",
            key=key,
            value=True,
        )
    torch._inductor.config._micro_pipeline_tp = True
    enable_symm_mem_for_group(mesh.get_group().group_name)


class _CrossEntropy(torch.autograd.Function):
    """The cross-entropy of sharded logits: two all-reduces exchange three numbers per token, instead of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first: int, group: str) -> Tensor:
        x = logits.float()
        largest = _c10d.wait_tensor(_c10d.all_reduce(x.amax(1), "max", group))
        x = x - largest[:, None]
        local_labels = labels - first
        here = (local_labels >= 0) & (local_labels < x.shape[1])
        local_labels = torch.where(here, local_labels, 0)
        target = torch.where(here, x.gather(1, local_labels[:, None])[:, 0], 0.0)
        x = x.exp_()
        total, target = _c10d.wait_tensor(_c10d.all_reduce(torch.stack((x.sum(1), target)), "sum", group)).unbind()
        scored = labels != IGNORED
        ctx.save_for_backward(x, total, local_labels, here, scored)
        ctx.dtype = logits.dtype
        return torch.where(scored, total.log() - target, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, total, local_labels, here, scored = ctx.saved_tensors
        per_token = torch.where(scored, grad, 0.0)
        out = x * (per_token / total)[:, None]
        out.scatter_add_(1, local_labels[:, None], torch.where(here, -per_token, 0.0)[:, None])
        return out.to(ctx.dtype), None, None, None


class VocabParallelCrossEntropy:
    """The sum of the negative log-likelihoods in nats, computed in float32, of logits with a sharded vocabulary. Labels
    equal to ``IGNORED`` are not scored.

    (``torch.distributed.tensor.parallel.loss_parallel`` needs DTensors, and a context around the backward. Plain
    tensors can be the output of a pipeline stage, and can be compiled.)

    Args:
        mesh: the mesh of tensor parallelism; rank r has the r-th part of the vocabulary.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.rank, self.group = mesh.get_local_rank(), mesh.get_group().group_name

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss, a scalar, the same on all ranks. ``logits``: [batch, seq_len, vocab_size / degree] of any
        floating dtype; ``labels``: int64 [batch, seq_len]."""
        first = self.rank * logits.shape[-1]
        loss: Tensor = _CrossEntropy.apply(logits.flatten(0, 1), labels.flatten(0, 1), first, self.group)
        return loss
