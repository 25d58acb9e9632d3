"""Forward and backward of one optimizer step. This is the only place that loops over microbatches, and that sums and
divides their losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titanlite.data import Batch
from titanlite.distributed.context_parallel import ContextParallel
from titanlite.distributed.data_parallel import reduce_gradients_after
from titanlite.distributed.mesh import Mesh
from titanlite.distributed.one_shard import take_gradients
from titanlite.distributed.pipeline import Pipeline
from titanlite.models.layers import Mixture
from titanlite.optim.loss import IGNORED

LossFunction = Callable[[Tensor, Tensor], Tensor]  # (logits, labels) of a microbatch: the loss, summed


class StepLoss(NamedTuple):
    """The loss of this rank's tokens; zeros on a rank without the last pipeline stage.

    Attributes:
        total: the sum over the scored labels; float32 scalar on the device.
        scored: the number of scored labels; int64 scalar on the device.
        labels: the number of all labels, scored or not.
    """

    total: Tensor
    scored: Tensor
    labels: int

    def mean(self) -> Tensor:
        """Return the mean over the scored labels of this rank; 0 if there are none."""
        return self.total / self.scored.clamp(min=1)


class StepRunner:
    """Runs the microbatches of a step through this process's part of the model.

    Args:
        parts: the model, or the modules of this process's pipeline stages.
        loss_fn: the loss of a microbatch. None: the model takes the labels, and returns it. A pipeline has its own
            loss, and this one is not called.
        context: cuts sequences under context parallelism.
        mesh: the processes of the run; None: this one alone.
        reduce_each: reduce gradients after each microbatch, not after the last one only. A pipeline reduces them once.

    Attributes:
        in_place: the weights are in place (``one_shard.gather_in_place``), so FSDP2 reduces no gradients.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        loss_fn: LossFunction | None,
        pipeline: Pipeline | None,
        context: ContextParallel | None,
        device: torch.device,
        mesh: Mesh | None = None,
        reduce_each: bool = False,
    ) -> None:
        self.parts, self.pipeline = parts, pipeline
        self._reduce_each, self.in_place = reduce_each, False
        self._loss_fn, self._context, self._device, self._mesh = loss_fn, context, device, mesh
        mixtures = [module for part in parts for module in part.modules() if isinstance(module, Mixture)]
        self._all_mixtures = mixtures
        self._mixtures = [mixture for mixture in mixtures if mixture.balance_loss.has_gradient]

    @property
    def has_loss(self) -> bool:
        """True if this rank has the last pipeline stage."""
        return self.pipeline is None or self.pipeline.is_last

    def forward_backward(self, batch: Batch) -> StepLoss:
        """Compute the gradients of the step's loss: the sum over the labels of all ranks, divided by the number of all
        labels, scored or not. (Each rank divides by its own number, and FSDP2 takes the mean over the ranks.)
        :func:`~titanlite.distributed.gradients.gradient_scale` corrects the divisor to the number of scored labels. It
        needs no extra pass over the gradients and no extra all-reduce for that."""
        inputs, labels = self._share(batch)
        self._weigh_balance(batch.labels, inputs.shape[0] if self.pipeline is None else self.pipeline.microbatches)
        if self.pipeline is not None:
            total = self.pipeline.step(*_sequences(inputs, labels, batch.starts)) * labels.numel()
            return self._step_loss(total, labels)
        (model,), count = self.parts, inputs.shape[0]
        losses, real = [], self._real_tokens(batch)
        for i in range(count):
            for mixture in self._all_mixtures:
                mixture.real = None if real is None else real[i].to(self._device, non_blocking=True)
            reduce_gradients_after(model, last=i == count - 1, each=self._reduce_each, in_place=self.in_place)
            loss = self._loss(model, inputs[i], labels[i], batch.starts, i)
            (loss / labels.numel()).backward()
            losses.append(loss.detach())
        if self.in_place:
            take_gradients(model)
        for mixture in self._all_mixtures:
            mixture.real = None
        return self._step_loss(torch.stack(losses).sum(), labels)

    def _real_tokens(self, batch: Batch) -> Tensor | None:
        """Return which of the tokens that this process has between layers are no padding, bool [microbatches, batch,
        seq_len]; None: all, or the model has no experts."""
        if not self._all_mixtures or batch.lengths is None:
            return None
        real = torch.arange(batch.inputs.shape[-1]) < batch.lengths[..., None]
        real = real if self._context is None else self._context.shard(real, -1)
        tp = None if self._mesh is None else self._mesh.tp
        return real if tp is None or tp.size() == 1 else real.chunk(tp.size(), -1)[tp.get_local_rank()]

    def _weigh_balance(self, labels: Tensor, microbatches: int) -> None:
        """Let the balance losses of a step count as its mean over the microbatches of all processes, which is added to
        the mean of the loss.

        Later, gradients are divided by the share of labels that are scored, on all processes. So these losses, which
        are means over sequences whatever their labels, are multiplied by it. Their mean over the processes of one
        sequence is the mean over its tokens; tensor parallelism sums it.
        """
        if not self._mixtures:
            return
        counts = torch.stack((labels.ne(IGNORED).sum(), torch.tensor(labels.numel())))
        counts = counts.to(self._device, torch.float32, non_blocking=True)
        tp = 1
        if self._mesh is not None:
            tp = self._mesh.tp.size()
            if self._mesh.degrees.data_parallel > 1:
                dist.all_reduce(counts, group=self._mesh.stage.get_group())
        weight = counts[0].clamp(min=1) / counts[1] / (microbatches * tp)
        for mixture in self._mixtures:
            mixture.loss_weight = weight

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> StepLoss:
        """Compute the loss without gradients. The mode of the model is not changed."""
        inputs, labels = self._share(batch)
        if self.pipeline is not None:
            return self._step_loss(self.pipeline.evaluate(*_sequences(inputs, labels, batch.starts)), labels)
        (model,) = self.parts
        losses = [
            self._loss(model, tokens, targets, batch.starts, i)
            for i, (tokens, targets) in enumerate(zip(inputs, labels, strict=True))
        ]
        return self._step_loss(torch.stack(losses).sum(), labels)

    def _loss(self, model: nn.Module, tokens: Tensor, labels: Tensor, starts: Tensor | None, microbatch: int) -> Tensor:
        """Return the loss of a microbatch. Its logits, the largest activation, end here, before backward."""
        tokens, labels = (t.to(self._device, non_blocking=True) for t in (tokens, labels))
        given = {} if starts is None else {"starts": starts[microbatch].to(self._device, non_blocking=True)}
        if self._loss_fn is None:
            return model(tokens, labels=labels, **given)  # type: ignore[no-any-return]
        return self._loss_fn(model(tokens, **given), labels)

    def _share(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return this rank's part of the sequences."""
        if self._context is None:
            return batch.inputs, batch.labels
        return self._context.shard(batch.inputs, -1), self._context.shard(batch.labels, -1)

    def _step_loss(self, total: Tensor, labels: Tensor) -> StepLoss:
        scored = labels.ne(IGNORED).sum() if self.has_loss else torch.zeros((), dtype=torch.int64)
        return StepLoss(total, scored.to(self._device, non_blocking=True), labels.numel())


def _sequences(inputs: Tensor, labels: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the sequences of all microbatches in one dimension."""
    return inputs.flatten(0, 1), labels.flatten(0, 1), None if starts is None else starts.flatten(0, 1)
