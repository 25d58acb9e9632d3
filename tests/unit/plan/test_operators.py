"""The operators of a step without data are those of a real step, and those of the arithmetic."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from titanlite.config import JobConfig, load_config, resolve_degrees
from titanlite.distributed.mesh import build_mesh
from titanlite.doctor.layers import model_step
from titanlite.errors import ConfigError
from titanlite.plan.estimate import ASSUMED_VOCAB_SIZE, estimate
from titanlite.plan.memory import copies_to_itself
from titanlite.plan.operators import Operators, operators_of

DEVICE = torch.device("cpu")


def read(*options: str) -> JobConfig:
    return load_config(["--training.seq_len=64", "--training.local_batch_size=2", *options], "debug_model")


class Calls(TorchDispatchMode):
    """Counts the operators of a step that is really made."""

    def __init__(self) -> None:
        super().__init__()
        self.names = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, Tensor) and t not in (Tensor, torch.nn.Parameter) for t in types):
            return NotImplemented
        if not (func.is_view or copies_to_itself(func, args)):
            self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def counted() -> Operators:
    return operators_of(read(), 1, ASSUMED_VOCAB_SIZE)


def test_they_are_those_of_a_real_step(counted: Operators) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        config = read()
        step = model_step(config, build_mesh(resolve_degrees(config.parallelism, 1), "cpu"), DEVICE, 2)
        step()  # makes the optimizer's state
        with Calls() as calls:
            step()
    finally:
        dist.destroy_process_group()
    names = Counter[str]()
    for operator, count in counted.computed:
        names[operator.name] += count
    free = ("c10d.", "_c10d", "profiler.", "aten.empty")
    real, without_data = (
        Counter({name: count for name, count in counter.items() if not name.startswith(free)})
        for counter in (calls.names, names)
    )
    assert without_data - real == {"aten.zeros.default": 3}  # the batch
    assert not real - without_data


def test_matmuls_are_those_of_the_arithmetic(counted: Operators) -> None:
    """Each linear layer has three matmuls. The embedding has none: it looks up."""
    flops = sum(
        2 * count * operator.args[0].shape[0] * operator.args[0].shape[1] * operator.args[1].shape[1]
        for operator, count in counted.computed
        if operator.name == "aten.mm.default"
    )
    dim, ffn, layers, tokens = 256, 768, 6, 128
    weights = layers * (4 * dim * dim + 3 * dim * ffn) + dim * ASSUMED_VOCAB_SIZE
    assert flops == 3 * 2 * weights * tokens


def test_messages_are_those_of_the_estimate() -> None:
    counted = operators_of(read(), 2, ASSUMED_VOCAB_SIZE)
    (rank,) = estimate(read(), 2).ranks
    sent = Counter[str]()
    for message, count in counted.messages.items():
        sent[message.name] += count * message.nbytes
    expected = Counter[str]()
    for collective, traffic in rank.traffic.items():
        expected[collective.name] += traffic.nbytes
    assert sent == expected
    assert sent["all-gather"]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["--training.compile"], "training.compile"),
        (["--parallelism.pipeline_parallel_degree=2"], "parallelism.pipeline_parallel_degree"),
        (["--parallelism.tensor_parallel_degree=2"], "parallelism.tensor_parallel_degree"),
    ],
)
def test_what_is_not_modelled_is_refused(options: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        operators_of(read(*options), 2, ASSUMED_VOCAB_SIZE)
    assert error.value.key == key
