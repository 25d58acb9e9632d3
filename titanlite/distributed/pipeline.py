"""Pipeline parallelism: the parts of a model become stages of PyTorch's schedules."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    _PipelineScheduleRuntime,
    get_schedule_class,
)

from titanlite.config.parallelism import SPLIT_BACKWARD_SCHEDULES, V_SCHEDULES
from titanlite.config.schema import Parallelism, Training
from titanlite.distributed.data_parallel import DTYPES
from titanlite.distributed.mesh import Mesh
from titanlite.distributed.pipeline_plan import Plan
from titanlite.distributed.waiting import Messages, NotedStage
from titanlite.errors import ConfigError
from titanlite.models.layers import ModelSize

logging.getLogger("torch.distributed.pipelining").setLevel(logging.WARNING)  # it announces each stage


def part_of(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Return a copy of ``model`` that shares only the children, and entries of a ``ModuleDict``, in ``names``. The
    other children are None."""
    part = copy.copy(model)
    # The dictionaries of children, buffers and hooks are copied, because FSDP2 puts hooks on each part.
    vars(part).update({key: copy.copy(value) for key, value in vars(model).items() if isinstance(value, (dict, set))})
    for child_name, child in model.named_children():
        if isinstance(child, nn.ModuleDict):
            kept = {key: module for key, module in child.items() if f"{child_name}.{key}" in names}
            part._modules[child_name] = nn.ModuleDict(kept)
        elif child_name not in names:
            part._modules[child_name] = None
    return part


@dataclass(frozen=True)
class Boundary:
    """The shapes of a stage's input and output for one microbatch, so that buffers need no trial run."""

    tokens: tuple[int, ...]
    hidden: tuple[int, ...]
    logits: tuple[int, ...]
    dtype: torch.dtype
    ends_in_loss: bool = False

    def input(self, stage: int) -> Tensor:
        if stage == 0:
            return torch.empty(self.tokens, dtype=torch.int64, device="meta")
        return torch.empty(self.hidden, dtype=self.dtype, device="meta", requires_grad=True)

    def output(self, stage: int, stages: int) -> Tensor:
        if stage == stages - 1 and self.ends_in_loss:
            return torch.empty((), device="meta", requires_grad=True)
        shape = self.logits if stage == stages - 1 else self.hidden
        return torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True)


def boundary_of(size: ModelSize, mesh: Mesh, training: Training, parallelism: Parallelism) -> Boundary:
    """Return the boundary of the stages of a model whose hidden states tensor parallelism shards over the sequence, and
    whose logits it shards over the vocabulary."""
    sequences, tp = parallelism.pipeline_parallel_microbatch_size, mesh.tp.size()
    seq_len = training.seq_len // mesh.cp.size()
    vocab_size = size.vocab_size // (1 if parallelism.disable_loss_parallel else tp)
    return Boundary(
        tokens=(sequences, seq_len),
        hidden=(sequences, seq_len // tp, size.dim),
        logits=(sequences, seq_len, vocab_size),
        dtype=DTYPES[training.mixed_precision_param],
        ends_in_loss=training.loss_chunks > 1,
    )


class Pipeline:
    """This process's stages and the schedule that runs them.

    Args:
        parts: the modules of the stages ``plan.of(rank)``, in order.
        microbatches: their number in one step; all go through the pipeline in one run, with one gradient reduction.
        loss_fn: (output, labels) of a microbatch -> the sum of the labels' losses. None: the last stage takes the
            labels, and returns it.
        stage_type: the class of a stage; an estimate has stages without neighbours.

    Attributes:
        messages: what this process has asked its neighbours for.

    Raises:
        ConfigError: the schedule cannot be built with these stages and microbatches.
    """

    def __init__(
        self,
        plan: Plan,
        parts: Sequence[nn.Module],
        boundary: Boundary,
        mesh: Mesh,
        device: torch.device,
        parallelism: Parallelism,
        microbatches: int,
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None,
        stage_type: type[NotedStage] = NotedStage,
    ) -> None:
        self.messages = Messages()
        count, local = len(plan.stages), plan.of(mesh.pp.get_local_rank())
        self.is_first, self.is_last = 0 in local, count - 1 in local
        self.microbatches = microbatches
        self._device = device
        self._parts = dict(zip(local, parts, strict=True))
        self._ranks, self._group = plan.ranks, mesh.pp.get_group()
        self._boundary, self._loss_fn = boundary, loss_fn
        stages = [
            stage_type(
                part,
                stage,
                count,
                device,
                input_args=boundary.input(stage),
                output_args=boundary.output(stage, count),
                group=self._group,
            )
            for stage, part in self._parts.items()
        ]
        for stage in stages:
            stage.messages = self.messages
        # Dividing the loss of each microbatch saves a pass over the gradients.
        total = microbatches * math.prod(boundary.tokens)
        options: dict[str, Any] = {
            "n_microbatches": microbatches,
            "loss_fn": lambda output, labels: (output if loss_fn is None else loss_fn(output, labels)) / total,
            "scale_grads": False,
        }
        schedule, csv = parallelism.pipeline_parallel_schedule, parallelism.pipeline_parallel_schedule_csv
        if schedule in V_SCHEDULES and device.type == "cpu" and torch.__version__ < "2.13":
            # It first sends to the neighbours of each stage, and a gloo process cannot send to itself.
            raise ConfigError(
                f"on the CPU needs torch 2.13 or later, and this is {torch.__version__}; choose another schedule",
                key="parallelism.pipeline_parallel_schedule",
                value=schedule,
            )
        if csv or schedule in SPLIT_BACKWARD_SCHEDULES:
            # A compiled backward runs for the gradients of inputs, and again for those of weights.
            torch._functorch.config.donated_buffer = False
        self._schedule: PipelineScheduleSingle | PipelineScheduleMulti
        try:
            if csv:
                self._schedule = _PipelineScheduleRuntime(stages, **options)
                self._schedule._load_csv(str(Path(csv).expanduser()))
            else:
                kind = get_schedule_class(schedule)
                single = issubclass(kind, PipelineScheduleSingle)
                self._schedule = kind(stages[0] if single else stages, **options)
        except (ValueError, RuntimeError, AssertionError) as e:
            file = f"{csv}: " if csv else ""
            raise ConfigError(
                f"{file}{e}; choose another schedule", key="parallelism.pipeline_parallel_schedule", value=schedule
            ) from e

    def step(self, inputs: Tensor, labels: Tensor, starts: Tensor | None = None) -> Tensor:
        """Run forward and backward of all microbatches. Return the sum of their losses divided by the number of labels,
        a scalar; 0 without the last stage.

        Args:
            inputs, labels: int64 [sequences, seq_len], in the order of the microbatches.
            starts: the argument of the stages' forward, int64 [sequences, seq_len]. Every process passes its own copy,
                so that it need not travel.
        """
        with self.messages:
            return self._step(inputs, labels, starts)

    def _step(self, inputs: Tensor, labels: Tensor, starts: Tensor | None) -> Tensor:
        losses: list[Tensor] = []
        documents: dict[str, Any] = {} if starts is None else {"starts": starts.to(self._device, non_blocking=True)}
        local_inputs = (inputs.to(self._device, non_blocking=True),) if self.is_first else ()
        if self.is_last:
            labels = labels.to(self._device, non_blocking=True)
            given = {**documents, "labels": labels} if self._loss_fn is None else documents
            self._schedule.step(*local_inputs, target=labels, losses=losses, return_outputs=False, **given)
            return torch.stack([loss.detach() for loss in losses]).sum()
        self._schedule.step(*local_inputs, return_outputs=False, **documents)
        return torch.zeros((), device=self._device)

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, labels: Tensor, starts: Tensor | None = None) -> Tensor:
        """Run forward of any number of microbatches. Return the sum of the labels' losses, a scalar; 0 without the last
        stage. Arguments as of :meth:`step`.

        The schedule's own ``eval`` is not used: it also runs the backward and reduces gradients that do not exist
        (torch 2.11), and rebuilds its buffers at each change between training and evaluation (torch 2.13). Here every
        process runs a microbatch through all its stages before the next one begins. This order excludes deadlocks.
        """
        with self.messages:
            return self._evaluate(inputs, labels, starts)

    def _evaluate(self, inputs: Tensor, labels: Tensor, starts: Tensor | None) -> Tensor:
        size, last = self._boundary.tokens[0], len(self._ranks) - 1
        losses: list[Tensor] = []
        sent: list[tuple[Tensor, dist.Work | None]] = []
        for i, (tokens, targets) in enumerate(zip(inputs.split(size), labels.split(size), strict=True)):
            rows = slice(i * size, (i + 1) * size)
            documents = {} if starts is None else {"starts": starts[rows].to(self._device, non_blocking=True)}
            for stage, part in self._parts.items():
                if stage == 0:
                    x = tokens.to(self._device, non_blocking=True)
                elif stage - 1 not in self._parts:
                    x = torch.empty(self._boundary.hidden, dtype=self._boundary.dtype, device=self._device)
                    self.messages.add(f"receive microbatch {i} of a validation from stage {stage - 1}")
                    dist.recv(x, group=self._group, group_src=self._ranks[stage - 1])
                if stage == last:
                    losses.append(self._loss(part, x, targets.to(self._device, non_blocking=True), documents))
                    continue
                x = part(x, **documents)
                if stage + 1 not in self._parts:
                    x = x.contiguous()
                    self.messages.add(f"send microbatch {i} of a validation to stage {stage + 1}")
                    sent.append((x, dist.isend(x, group=self._group, group_dst=self._ranks[stage + 1])))
            _wait(sent, keep=len(self._parts))
        _wait(sent, keep=0)
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self._device)

    def _loss(self, part: nn.Module, x: Tensor, labels: Tensor, documents: dict[str, Tensor]) -> Tensor:
        if self._loss_fn is None:
            return part(x, labels=labels, **documents)  # type: ignore[no-any-return]
        return self._loss_fn(part(x, **documents), labels)


def _wait(sent: list[tuple[Tensor, dist.Work | None]], keep: int) -> None:
    """Wait for all but the last ``keep`` sends, and release their tensors."""
    while len(sent) > keep:
        _, work = sent.pop(0)
        assert work is not None  # this process is in the group
        work.wait()
