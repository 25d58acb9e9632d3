"""The seconds of a training step on the CPU, from those of its operators, each timed alone.

All processes time the same operator (:mod:`titanlite.plan.operators`) at the same time, as they share the machine's
memory and processors in training too.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import tempfile
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from titanlite.config import JobConfig, global_batch_size, resolve_degrees
from titanlite.distributed.runtime import keep_freed_memory
from titanlite.errors import ConfigError, counted
from titanlite.metrics.device import GIB, host_memory
from titanlite.plan.estimate import ASSUMED_VOCAB_SIZE
from titanlite.plan.operators import Message, Operator, Operators, Shaped, operators_of

_SECONDS, _MOST, _LEAST = 0.05, 30, 3  # of the calls of one operator, and how many
_CACHE = 64 << 20  # bytes: the arguments of two calls are apart by as much, where an operator has as large ones
_COPIES = 4  # sets of arguments, at most
_LIMIT = 600  # seconds for all operators
_CHAIN, _SHARDED = 100, 16  # layers, of which the host's part is timed, and of which FSDP2's
_MATMULS, _ATTENTION = ("mm", "addmm", "bmm", "_int_mm", "_grouped_mm"), "attention"


class CpuTime(NamedTuple):
    """Seconds of a step on the CPU.

    Attributes:
        matmuls, attention, others: of the operators.
        host: Python's, autograd's and FSDP2's, between them.
        communication: of the collectives, of which nothing is hidden: the processors that would compute send.
        failed: names of operators that could not be timed alone; they count as nothing.
    """

    matmuls: float
    attention: float
    others: float
    host: float
    communication: float
    failed: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return self.matmuls + self.attention + self.others + self.host + self.communication


class CpuPlan(NamedTuple):
    """The configured layout on the CPU of this machine.

    Attributes:
        tokens_per_step: of all processes.
        peak: bytes of the tensors of one process, at most.
    """

    time: CpuTime
    processes: int
    tokens_per_step: int
    peak: int

    def row(self, tokens: float) -> dict[str, Any]:
        """Return the prediction for ``tokens`` in all, with the keys of a layout in :mod:`titanlite.plan.report`."""
        seconds = self.time.seconds
        return {
            "options": {},
            "fits": True,  # else there is no plan
            "tps_per_device": self.tokens_per_step / seconds / self.processes,
            "mfu_pct": None,  # a CPU's peak is not known
            "memory_gib": self.peak / GIB,
            "step_time_s": seconds,
            "step_parts_s": {name: value for name, value in self.time._asdict().items() if name != "failed"},
            "not_timed": list(self.time.failed),
            "tokens_per_step": self.tokens_per_step,
            "days": tokens / self.tokens_per_step * seconds / 86400,
            "cost": None,
        }


def describe(plan: CpuPlan, tokens: float) -> str:
    """Format the prediction for printing."""
    row = plan.row(tokens)
    lines = [
        f"predicted on {counted(plan.processes, 'process')} of this machine, not measured: "
        f"{1e3 * row['step_time_s']:.1f} ms for a step, {row['tps_per_device']:,.0f} tokens/s of each process, "
        f"{row['days']:.3g} days for {tokens:,.0f} tokens; tensors take {row['memory_gib']:.2f} GiB of each",
        *(f"    {name:<14}{1e3 * seconds:9.1f} ms" for name, seconds in row["step_parts_s"].items()),
    ]
    if plan.time.failed:
        lines.append(f"Not timed, and counted as nothing: {', '.join(plan.time.failed)}")
    return "\n".join(lines)


def plan_cpu(config: JobConfig, processes: int, vocab_size: int = ASSUMED_VOCAB_SIZE) -> CpuPlan:
    """Return the plan of ``config`` on as many processes of this machine, whose operators are timed.

    Raises:
        ConfigError: training with this configuration would raise it, it is not modelled, the machine has too little
            memory, or its operators cannot be timed.
    """
    operators = operators_of(config, processes, vocab_size)
    needed, there = operators.peak * processes / GIB, host_memory() / GIB
    if needed > there:
        why = f"the tensors of {counted(processes, 'process')} take {needed:.1f} GiB, and this machine has {there:.1f}"
        raise ConfigError(f"{why}; plan a smaller model.flavor or batch", key="--device", value="cpu")
    degrees = resolve_degrees(config.parallelism, processes)
    tokens = global_batch_size(config, degrees.data_parallel) * config.training.seq_len
    return CpuPlan(_time_in_processes(operators, processes), processes, tokens, operators.peak)


def _time_in_processes(operators: Operators, processes: int) -> CpuTime:
    """Time the operators in as many new processes at once."""
    context = multiprocessing.get_context("spawn")
    results, threads = context.SimpleQueue(), max(1, len(os.sched_getaffinity(0)) // processes)
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(processes, str(Path(folder, "rendezvous")), threads)
        workers = [
            context.Process(target=_work, args=(rank, ranks, operators, results), daemon=True)
            for rank in range(processes)
        ]
        for worker in workers:
            worker.start()
        end = time.monotonic() + _LIMIT
        while any(worker.exitcode is None for worker in workers):
            if any(worker.exitcode for worker in workers) or time.monotonic() > end:
                for worker in workers:
                    worker.kill()  # it would wait for the others
            time.sleep(0.05)
    if any(worker.exitcode for worker in workers):
        why = f"the operators of a step could not be timed within {_LIMIT} s; what failed stands above"
        raise ConfigError(why, key="--device", value="cpu")
    timed: CpuTime = results.get()
    return timed


class Ranks(NamedTuple):
    """The processes that time operators: how many, the file by which they find each other, and the threads of each."""

    number: int
    rendezvous: str
    threads: int


def _work(rank: int, ranks: Ranks, operators: Operators, results: Any) -> None:
    """Be one of the processes; the first one puts the result into the queue ``results``."""
    warnings.simplefilter("ignore")  # torch renames collectives; both names do the same
    keep_freed_memory()
    torch.manual_seed(0)
    torch.set_num_threads(ranks.threads)
    dist.init_process_group("gloo", init_method=f"file://{ranks.rendezvous}", rank=rank, world_size=ranks.number)
    result = time_operators(operators)
    if rank == 0:
        results.put(result)
    dist.barrier()
    dist.destroy_process_group()


class OperatorClock:
    """Times operators in all processes at once."""

    def __init__(self) -> None:
        self._ranks = dist.get_world_size()

    def seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        """Return the median seconds of the calls, which take turns. Their results are kept for a while, as a step keeps
        them for backward: those of a later call are written to memory that no cache has."""
        begin = time.perf_counter()
        result = calls[0]()
        first = torch.tensor(time.perf_counter() - begin)
        kept = deque[object](maxlen=min(_MOST, _CACHE // max(1, _nbytes(result))))
        if self._ranks > 1:
            dist.all_reduce(first, dist.ReduceOp.MAX)  # all make as many, and begin together
        count = min(_MOST, max(_LEAST, int(_SECONDS / max(first.item(), 1e-6))))
        taken = []
        for i in range(count):
            call = calls[i % len(calls)]
            begin = time.perf_counter()
            result = call()
            taken.append(time.perf_counter() - begin)
            kept.append(result)
        return median(taken)


def time_operators(operators: Operators) -> CpuTime:
    """Return the seconds of a step with these operators, in each of the processes of the default group."""
    clock, failed = OperatorClock(), set[str]()
    kinds = {"matmuls": 0.0, "attention": 0.0, "others": 0.0}
    for operator, count in operators.computed:
        try:
            calls = _calls(operator)
        except (RuntimeError, TypeError, ValueError, IndexError):
            failed.add(operator.name)
            continue
        kinds[_kind(operator.name)] += count * clock.seconds(calls)
    host = operators.calls * host_overhead() + operators.groups * sharding_overhead()
    return CpuTime(**kinds, host=host, communication=_seconds_of(operators.messages), failed=(*sorted(failed),))


def _nbytes(result: object) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor))


def _kind(name: str) -> str:
    base = name.split(".")[1]
    return "matmuls" if base in _MATMULS else "attention" if _ATTENTION in base else "others"


def _calls(operator: Operator) -> list[Callable[[], object]]:
    """Return calls of the operator with several sets of arguments; one is made to see that it can be."""
    namespace, packet, overload = operator.name.split(".")
    function = getattr(getattr(getattr(torch.ops, namespace), packet), overload)

    def call() -> Callable[[], object]:
        args, kwargs = (tree_map(_filled, tree, is_leaf=_is_shaped) for tree in operator[1:])
        return lambda: function(*args, **kwargs)

    shaped = [leaf for leaf in tree_leaves(operator[1:], is_leaf=_is_shaped) if _is_shaped(leaf)]
    nbytes = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in shaped)
    first = call()
    first()
    copies = max(1, min(_COPIES, _CACHE // max(1, nbytes)))
    return [first, *(call() for _ in range(copies - 1))]


def _is_shaped(leaf: Any) -> bool:
    return isinstance(leaf, Shaped)


def _filled(leaf: Any) -> Any:
    """Return a tensor with numbers in place of one without."""
    if not isinstance(leaf, Shaped):
        return leaf
    elements = 1 + sum((n - 1) * s for n, s in zip(leaf.shape, leaf.stride)) if math.prod(leaf.shape) else 0
    if leaf.dtype.is_floating_point:
        data = torch.rand(elements).add_(0.5).to(leaf.dtype)
    else:
        data = torch.zeros(elements, dtype=leaf.dtype)
    return data.as_strided(leaf.shape, leaf.stride)


def _send(message: Message) -> Callable[[], object]:
    ranks = dist.get_world_size()
    part = torch.zeros(max(1, message.nbytes // 4 // ranks))
    whole = torch.zeros(len(part) * ranks)
    if message.name == "all-gather":
        return lambda: dist.all_gather_into_tensor(whole, part)
    if message.name == "reduce-scatter":
        return lambda: dist.reduce_scatter_tensor(part, whole)
    return lambda: dist.all_reduce(whole)


class _Counted(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


class _Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class _Chain(NamedTuple):
    """A model of many layers with 8 numbers each, which has nearly nothing but the host's part.

    Attributes:
        seconds: of its forward and backward.
        calls: the operators that they call.
    """

    seconds: float
    calls: int


def _time_chain(layers: int, *, sharded: bool) -> _Chain:
    model = nn.Sequential(*(_Tiny() for _ in range(layers)))
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (*model, model):
            fully_shard(layer, mesh=mesh)
    x = torch.ones(8)

    def step() -> None:
        model(x).sum().backward()
        model.zero_grad()

    step()
    with _Counted() as counted:
        step()
    return _Chain(OperatorClock().seconds([step]), counted.calls)


def _seconds_of_one() -> float:
    """Return those of a call of an operator on 8 numbers."""
    one = torch.ones(8)
    calls = [lambda: [torch.ops.aten.mul.Tensor(one, one) for _ in range(_CHAIN)]]
    return OperatorClock().seconds(calls) / _CHAIN


def host_overhead() -> float:
    """Return the seconds that the host needs for each operator of a model in forward and backward, beyond a call of the
    operator: modules, autograd's graph, and its engine."""
    chain = _time_chain(_CHAIN, sharded=False)
    return max(0.0, chain.seconds / chain.calls - _seconds_of_one())


def sharding_overhead() -> float:
    """Return the seconds of a step that the host needs for each module that FSDP2 shards, beyond the operators and
    collectives that it calls."""
    plain, sharded = _time_chain(_SHARDED, sharded=False), _time_chain(_SHARDED, sharded=True)
    seconds = sharded.seconds - plain.seconds - (sharded.calls - plain.calls) * _seconds_of_one()
    if dist.get_world_size() > 1:
        messages = Counter({Message("all-gather", 32): 2 * _SHARDED, Message("reduce-scatter", 32): _SHARDED})
        seconds -= _seconds_of(messages)
    return max(0.0, seconds / _SHARDED)


def _seconds_of(messages: Counter[Message]) -> float:
    clock = OperatorClock()
    return sum(count * clock.seconds([_send(message)]) for message, count in messages.items())
