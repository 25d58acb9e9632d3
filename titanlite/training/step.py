"""Forward and backward of one optimizer step: the one place where microbatches are looped over, and where their losses
are summed and divided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from titanlite.data import Batch
from titanlite.distributed.context_parallel import ContextParallel
from titanlite.distributed.data_parallel import reduce_gradients_after
from titanlite.distributed.pipeline import Pipeline
from titanlite.optim.loss import IGNORED

LossFunction = Callable[[Tensor, Tensor], Tensor]  # of the logits and labels of a microbatch: the sum over its labels


class StepLoss(NamedTuple):
    """The loss of this rank's tokens; zeros on a rank that has not the last pipeline stage.

    Attributes:
        total: the sum over the labels that are scored; float32 scalar on the device.
        scored: how many these are; int64 scalar on the device.
        labels: how many labels there are, scored or not.
    """

    total: Tensor
    scored: Tensor
    labels: int

    def mean(self) -> Tensor:
        """Over the labels of this rank that are scored; 0 where there are none."""
        return self.total / self.scored.clamp(min=1)


class StepRunner:
    """Runs the microbatches of a step through this process's part of the model.

    Args:
        parts: the model, or the modules of this process's pipeline stages.
        loss_fn: not called where there is a pipeline, which has its own.
        context: cuts sequences under context parallelism.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        loss_fn: LossFunction,
        pipeline: Pipeline | None,
        context: ContextParallel | None,
        device: torch.device,
    ) -> None:
        self.parts, self.pipeline = parts, pipeline
        self._loss_fn, self._context, self._device = loss_fn, context, device

    @property
    def has_loss(self) -> bool:
        """Whether this rank has the last pipeline stage."""
        return self.pipeline is None or self.pipeline.is_last

    def forward_backward(self, batch: Batch) -> StepLoss:
        """Leave in the parameters the gradients of the step's loss: the sum over the labels of all ranks, divided by
        the number of all labels, scored or not. (FSDP2 takes the mean over its ranks, each of which divides by its own
        number.) :func:`~titanlite.distributed.gradients.clip_gradients` corrects the divisor to those that are scored,
        in a pass over the gradients that it makes anyway, with a count from an all-reduce that it makes anyway."""
        inputs, labels = self._share(batch)
        if self.pipeline is not None:
            total = self.pipeline.step(inputs.flatten(0, 1), labels.flatten(0, 1)) * labels.numel()
            return self._step_loss(total, labels)
        (model,), count = self.parts, inputs.shape[0]
        losses = []
        for i in range(count):
            reduce_gradients_after(model, last=i == count - 1)
            logits = model(inputs[i].to(self._device, non_blocking=True))
            loss = self._loss_fn(logits, labels[i].to(self._device, non_blocking=True))
            del logits  # before backward: it is the largest activation
            (loss / labels.numel()).backward()
            losses.append(loss.detach())
        return self._step_loss(torch.stack(losses).sum(), labels)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> StepLoss:
        """The loss alone, with the model as it is."""
        inputs, labels = self._share(batch)
        if self.pipeline is not None:
            return self._step_loss(self.pipeline.evaluate(inputs.flatten(0, 1), labels.flatten(0, 1)), labels)
        (model,), losses = self.parts, []
        for tokens, targets in zip(inputs, labels, strict=True):
            logits = model(tokens.to(self._device, non_blocking=True))
            losses.append(self._loss_fn(logits, targets.to(self._device, non_blocking=True)))
            del logits  # before the next ones
        return self._step_loss(torch.stack(losses).sum(), labels)

    def _share(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """This rank's part of the sequences."""
        if self._context is None:
            return batch.inputs, batch.labels
        return self._context.shard(batch.inputs, -1), self._context.shard(batch.labels, -1)

    def _step_loss(self, total: Tensor, labels: Tensor) -> StepLoss:
        scored = labels.ne(IGNORED).sum() if self.has_loss else torch.zeros((), dtype=torch.int64)
        return StepLoss(total, scored.to(self._device, non_blocking=True), labels.numel())
