"""The operators of a training step on the CPU, counted while the step runs on tensors without data.

They are what a plan for the CPU is made of: :mod:`titanlite.doctor.cpu_time` times each of them alone.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_map

from titanlite.config import JobConfig, check_config, import_custom, resolve_degrees
from titanlite.config.refuse import refuse
from titanlite.distributed.mesh import build_mesh
from titanlite.plan.estimate import DEVICE, build, check_modelled, dimensions, measure
from titanlite.plan.lone_rank import in_a_process, lone_process_group
from titanlite.plan.memory import MemoryTracker, collective_of, copies_to_itself
from titanlite.training.build import build_loss

_NO_WORK = ("profiler", "prim")  # marks of a trace; questions about a tensor, of which fakes ask more


class Shaped(NamedTuple):
    """A tensor in an operator's arguments, without data."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Operator(NamedTuple):
    """An operator with its arguments, in which tensors are :class:`Shaped`.

    Attributes:
        name: with its namespace and overload, such as aten.mm.default.
    """

    name: str
    args: Any
    kwargs: Any


class Message(NamedTuple):
    """A collective over all processes, of FSDP2 or of the norm of the gradients.

    Attributes:
        name: such as all-gather.
        nbytes: of the whole tensor.
    """

    name: str
    nbytes: int


@dataclass
class Operators:
    """The operators and collectives that one process calls in a step, and their numbers.

    Attributes:
        computed: those that read or write data.
        views: how many change nothing but shapes.
        messages: the collectives.
        groups: the modules whose parameters FSDP2 gathers together.
        peak: bytes of the tensors that exist at once, at most.
    """

    computed: list[tuple[Operator, int]] = field(default_factory=list)
    views: int = 0
    messages: Counter[Message] = field(default_factory=Counter)
    groups: int = 0
    peak: int = 0

    @property
    def calls(self) -> int:
        return sum(count for _, count in self.computed) + self.views


class OperatorTracker(MemoryTracker):
    """Counts the operators of a step."""

    def __init__(self, dimensions: dict[str, str]) -> None:
        super().__init__(dimensions)
        self._operators: dict[str, tuple[Operator, int]] = {}
        self.views, self.messages = 0, Counter[Message]()

    def restart_peak(self) -> None:
        """Forget what was called before the step."""
        super().restart_peak()
        self._operators.clear()
        self.views = 0
        self.messages.clear()

    def operators(self) -> Operators:
        return Operators([*self._operators.values()], self.views, Counter(self.messages))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if out is NotImplemented or self._paused or func.namespace in _NO_WORK:
            return out
        collective = collective_of(func, args, out)
        if collective is not None:
            group, name, nbytes = collective
            if group.size() > 1:
                self.messages[Message(name, nbytes)] += 1
        elif func.is_view or func.namespace in ("c10d", "_c10d_functional") or copies_to_itself(func, args):
            self.views += 1
        else:
            operator = Operator(str(func), tree_map(_shaped, args), tree_map(_shaped, kwargs or {}))
            key = repr(operator)
            self._operators[key] = operator, self._operators.get(key, (operator, 0))[1] + 1
        return out


def _shaped(leaf: Any) -> Any:
    return Shaped(tuple(leaf.shape), leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else leaf


def operators_of(config: JobConfig, processes: int, vocab_size: int) -> Operators:
    """Return the operators of a step of ``config`` on the CPU, of rank 0 of so many processes.

    Raises:
        ConfigError: training with this configuration would raise it, or it is not modelled.
    """
    check_config(config, processes, train=False)
    check_modelled(config)
    if config.training.compile:
        refuse(config, "training.compile", "the time of compiled code on the CPU is not modelled; leave it out")
    for key in (
        "pipeline_parallel",
        "tensor_parallel",
        "context_parallel",
        "expert_parallel",
        "data_parallel_replicate",
    ):
        if getattr(config.parallelism, f"{key}_degree") > 1:
            refuse(config, f"parallelism.{key}_degree", "only FSDP is modelled on the CPU; set 1")
    return in_a_process(_count, config, processes, vocab_size)  # type: ignore[no-any-return]


def _count(config: JobConfig, processes: int, vocab_size: int) -> Operators:
    warnings.simplefilter("ignore")  # warnings about a step matter only in training
    import_custom(config)
    with lone_process_group(0, processes):
        mesh = build_mesh(resolve_degrees(config.parallelism, processes), DEVICE.type)
        built, _ = build(config, mesh, vocab_size)
        tracker = OperatorTracker(dimensions(mesh))
        estimated = measure(built, build_loss(config, mesh), config, mesh, tracker)
        groups = sum(isinstance(module, FSDPModule) for part in built.parts for module in part.modules())
        return replace(tracker.operators(), groups=groups, peak=estimated.peak)
