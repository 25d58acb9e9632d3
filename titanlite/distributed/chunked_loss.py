"""The output projection and the loss, computed a chunk of the vocabulary at a time (``training.loss_chunks``).

Logits and their gradient are often the largest tensors of a step: 2.1 GB each for 8,192 tokens and a vocabulary of
128,256 in bfloat16. Here only those of one chunk exist at a time. Forward adds the logits of each chunk to the sums of
the softmax and drops them. Backward computes them again, and from them the gradients.

The chunks are of the vocabulary, and not of the tokens, because a part of the weight then has its whole gradient from
one chunk: it is rounded once, as without chunks, and needs no sum. Chunks of tokens would need the sum of the weight's
gradients in float32, 2.1 GB for the model above. Over chunks of the vocabulary only the gradient of the hidden states
is summed, in float32: 0.13 GB. The price is that the projection is computed twice: 2% more FLOPs for Llama 3 8B.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.parallel import ColwiseParallel

from titanlite.config import JobConfig
from titanlite.config.refuse import refuse
from titanlite.config.schema import Compile
from titanlite.distributed.compile import compiled
from titanlite.distributed.mesh import Mesh
from titanlite.models.layers import Layout
from titanlite.optim.loss import IGNORED
from titanlite.quant.convertible import change_class, why_not_changeable

_c10d = torch.ops._c10d_functional

# Chunks have a multiple of this many entries: matrices with rows of 16 bytes are multiplied faster.
_MULTIPLE = 8


class _Statistics(NamedTuple):
    """The numbers that the loss of each token takes from its logits in some chunks; float32 [tokens] each.

    Attributes:
        largest: the largest logit.
        total: the sum of exp(logit - largest). (Not the log-sum-exp, which has the rounding of a large number.)
        target: the logit of the label; -inf if the label is in none of the chunks.
    """

    largest: Tensor
    total: Tensor
    target: Tensor

    def merged(self, other: _Statistics) -> _Statistics:
        """Return the statistics of the chunks of both."""
        largest = torch.maximum(self.largest, other.largest)
        return _Statistics(
            largest, self.scaled(largest) + other.scaled(largest), torch.maximum(self.target, other.target)
        )

    def scaled(self, largest: Tensor) -> Tensor:
        """Return ``total`` for another ``largest``."""
        return self.total * (self.largest - largest).exp()


def _statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the :class:`_Statistics` of a chunk.

    Args:
        logits: [tokens, entries of the chunk].
        labels: int64 [tokens], counted from the first entry of the chunk.
    """
    largest = logits.amax(1).float()
    total = (logits - largest[:, None]).exp_().sum(1)
    here = (labels >= 0) & (labels < logits.shape[1])
    target = logits.gather(1, torch.where(here, labels, 0)[:, None])[:, 0].float()
    return largest, total, torch.where(here, target, -torch.inf)


def _gradient(logits: Tensor, largest: Tensor, total: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """Return the gradient of the logits of a chunk, (softmax - one-hot) * scale, in their dtype."""
    out = (logits - largest[:, None]).exp_().div_(total[:, None])
    # No scatter: a comparison is fused by the compiler.
    out.add_(labels[:, None] == torch.arange(logits.shape[1], device=logits.device), alpha=-1)
    return out.mul_(scale[:, None]).to(logits.dtype)


class ChunkedCrossEntropy:
    """The sum of the negative log-likelihoods in nats, computed in float32, from hidden states and the weight of the
    output projection. Labels equal to ``IGNORED`` are not scored. A label that no rank has gives an infinite loss.

    Args:
        chunks: the number of parts of the vocabulary of each rank.
        tp: the mesh of tensor parallelism; rank r has the r-th part of the weight.
        gather: gather the logits of each chunk from all ranks (``parallelism.disable_loss_parallel``), instead of
            three numbers per token.
        compiling: the options to compile what is computed from logits with; None: not at all.
    """

    def __init__(self, chunks: int, tp: DeviceMesh, gather: bool, compiling: Compile | None) -> None:
        self.chunks, self.gather = chunks, gather
        self.rank, self.ranks, self.group = tp.get_local_rank(), tp.size(), tp.get_group().group_name
        self.statistics, self.gradient = _statistics, _gradient
        if compiling is not None:
            self.statistics, self.gradient = compiled(_statistics, compiling), compiled(_gradient, compiling)

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """Return the loss, a float32 scalar, the same on all ranks.

        Args:
            hidden: [batch, seq_len, dim], the same on all ranks. Each rank has a part of the sum that is its gradient.
            weight: [entries of this rank, dim].
            labels: int64 [batch, seq_len].
        """
        loss: Tensor = _Function.apply(hidden.flatten(0, 1), weight, labels.flatten(), self)
        return loss

    def parts(self, weight: Tensor) -> Iterator[slice]:
        """Return the rows of ``weight`` of each chunk."""
        entries = weight.shape[0]
        size = -(-entries // (self.chunks * _MULTIPLE)) * _MULTIPLE
        return (slice(first, min(first + size, entries)) for first in range(0, entries, size))

    def local_labels(self, labels: Tensor, part: slice, rank: int, weight: Tensor) -> Tensor:
        """Return ``labels`` counted from the first word of a chunk of ``rank``."""
        return labels - (rank * weight.shape[0] + part.start)

    def statistics_of(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> _Statistics:
        """Return the statistics of all logits of each token."""
        nothing = hidden.new_full(labels.shape, -torch.inf, dtype=torch.float32)
        whole = _Statistics(nothing, torch.zeros_like(nothing), nothing)
        for part in self.parts(weight):
            for rank, logits in self._logits(hidden, weight[part]):
                local_labels = self.local_labels(labels, part, rank, weight)
                whole = whole.merged(_Statistics(*self.statistics(logits, local_labels)))
        if self.ranks > 1 and not self.gather:
            largest, target = self._all_reduce(torch.stack((whole.largest, whole.target)), "max").unbind()
            whole = _Statistics(largest, self._all_reduce(whole.scaled(largest), "sum"), target)
        return whole

    def _logits(self, hidden: Tensor, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Return the logits of a chunk of this rank, or of all, with the rank."""
        logits = F.linear(hidden, weight)
        if not self.gather:
            return iter([(self.rank, logits)])
        whole = _c10d.wait_tensor(_c10d.all_gather_into_tensor(logits, self.ranks, self.group))
        return enumerate(whole.chunk(self.ranks))

    def _all_reduce(self, numbers: Tensor, operation: str) -> Tensor:
        out: Tensor = _c10d.wait_tensor(_c10d.all_reduce(numbers, operation, self.group))
        return out


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, loss: ChunkedCrossEntropy) -> Tensor:
        largest, total, target = loss.statistics_of(hidden, weight, labels)
        ctx.save_for_backward(hidden, weight, labels, largest, total)
        ctx.loss = loss
        return torch.where(labels != IGNORED, total.log() + (largest - target), 0.0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the loss in chunks has no second derivative: leave out create_graph=True, or training.loss_chunks"
            )
        hidden, weight, labels, largest, total = ctx.saved_tensors
        loss: ChunkedCrossEntropy = ctx.loss
        scale = torch.where(labels != IGNORED, grad, 0.0)
        for_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        for_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for part in loss.parts(weight):
            local_labels = loss.local_labels(labels, part, loss.rank, weight)
            of_logits = loss.gradient(F.linear(hidden, weight[part]), largest, total, local_labels, scale)
            for_hidden += of_logits @ weight[part]
            if for_weight is not None:
                torch.mm(of_logits.t(), hidden, out=for_weight[part])
            del of_logits  # before the next logits are allocated
        return for_hidden.to(hidden.dtype), for_weight, None, None


class ChunkedOutput(nn.Linear):
    """An output projection that, given labels, returns their loss in place of logits.

    FSDP2 and tensor parallelism gather for a module that is called. So the loss is computed inside of it: the weight is
    gathered once, and its gradient reduced once.
    """

    loss: ChunkedCrossEntropy

    def forward(self, input: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return super().forward(input)
        weight: Tensor = self.weight
        if isinstance(input, DTensor):
            input = input.to_local(grad_placements=[Partial()])
        if isinstance(weight, DTensor):
            weight = weight.to_local()
        return self.loss(input, weight, labels)


class ChunkedOutputParallel(ColwiseParallel):
    """The style ``ColwiseParallel`` for a :class:`ChunkedOutput`, whose loss is the same on all ranks."""

    @staticmethod
    def _prepare_output_fn(layouts: Any, use_local_output: bool, module: Any, output: Tensor, mesh: Any) -> Any:
        if not isinstance(output, DTensor):
            return output
        return ColwiseParallel._prepare_output_fn(layouts, use_local_output, module, output, mesh)


def compute_loss_in_chunks(model: nn.Module, layout: Layout, mesh: Mesh, config: JobConfig) -> str:
    """Let the output projection of ``model`` compute the loss in ``training.loss_chunks`` chunks; return a description.

    Raises:
        ConfigError: the projection is no plain linear layer, the model passes no labels to it, or there are more chunks
            than the vocabulary can have.
    """
    key, chunks = "training.loss_chunks", config.training.loss_chunks
    output = getattr(model, layout.output)
    if "labels" not in inspect.signature(type(model).forward).parameters:
        refuse(config, key, f"the forward of {type(model).__name__} takes no labels; leave this out")
    reason = why_not_changeable(output) if isinstance(output, nn.Linear) else f"is a {type(output).__name__}"
    if not reason and output.bias is not None:
        reason = "has a bias"
    if reason:
        refuse(
            config,
            key,
            f"the loss is computed from a plain linear layer, and the model's {layout.output} {reason}; leave "
            f"{layout.output} in high precision (for float8: float8.filter_fqns = {layout.output}), or leave this out",
        )
    entries = output.out_features // mesh.tp.size()
    if chunks * _MULTIPLE > entries:
        most = entries // _MULTIPLE
        refuse(
            config,
            key,
            f"a device has {entries} entries of the vocabulary, and a chunk at least {_MULTIPLE}; use at most {most}",
        )
    chunked = change_class(output, ChunkedOutput)
    gather = config.parallelism.disable_loss_parallel
    chunked.loss = ChunkedCrossEntropy(chunks, mesh.tp, gather, config.compile_options("loss"))
    return f"in {chunks} chunks of the vocabulary"
