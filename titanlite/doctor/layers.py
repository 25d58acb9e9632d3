"""The linear layers of a configured model, and shallow steps of it, in high precision and in number formats."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from titanlite.config import JobConfig
from titanlite.converters import build_converters
from titanlite.data import Batch
from titanlite.distributed.data_parallel import allocate
from titanlite.distributed.gradients import gradient_scale
from titanlite.distributed.init import WeightInit
from titanlite.distributed.mesh import Mesh
from titanlite.optim import build_optimizer, update_parameters
from titanlite.plan.estimate import ASSUMED_VOCAB_SIZE, build
from titanlite.quant.format import Format
from titanlite.quant.linear import QuantLinear
from titanlite.training.build import BuiltModel, build_loss
from titanlite.training.model_shape import choose_shape
from titanlite.training.step import StepRunner

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class LinearKind:
    """The linear layers of one name and size in the blocks of a model.

    Attributes:
        name: the name with * for the number of a block, such as layers.*.attention.wq.
        layer: one of them, on the meta device.
    """

    name: str
    count: int
    layer: nn.Linear

    @property
    def suffix(self) -> str:
        """The name as an entry of filter_fqns."""
        return self.name.rpartition("*.")[2]

    @property
    def sizes(self) -> tuple[int, int]:
        return self.layer.in_features, self.layer.out_features


def linear_kinds(config: JobConfig, mesh: Mesh, converter: str | None) -> list[LinearKind]:
    """Return the kinds of linear layers of the configured model, as ``converter`` leaves them.

    Raises:
        ConfigError: the converter refuses its options or this device, or converts nothing.
    """
    config = copy.deepcopy(config)
    config.model.converters = [converter] if converter else []
    shape = choose_shape(config)
    args = shape.spec.configure(shape.flavor, 0, config.training.seq_len)
    if getattr(args, "vocab_size", None) == 0:
        args = shape.spec.configure(shape.flavor, ASSUMED_VOCAB_SIZE, config.training.seq_len)
    with torch.device("meta"):
        model = shape.spec.build(args)
    for built in build_converters(config, mesh).values():
        built.convert(model)
    kinds: dict[str, LinearKind] = {}
    counts: Counter[str] = Counter()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
            counts[kind] += 1
            kinds[kind] = LinearKind(kind, counts[kind], layer)
    return [*kinds.values()]


def format_of(kinds: list[LinearKind]) -> Format | None:
    """Return the number format among the layers; None if all are in high precision."""
    return next((kind.layer.format for kind in kinds if isinstance(kind.layer, QuantLinear)), None)


def layer_step(layer: nn.Linear, tokens: int, dtype: torch.dtype, device: torch.device, compiled: bool) -> Any:
    """Return a function that runs the forward and backward of a layer as large as ``layer``, on random numbers."""
    layer = copy.deepcopy(layer)
    for name, parameter in layer.named_parameters():
        setattr(layer, name, nn.Parameter(0.02 * torch.randn(parameter.shape, device=device, dtype=dtype)))
    for name, buffer in layer.named_buffers():  # scales with a state
        setattr(layer, name, torch.zeros(buffer.shape, device=device, dtype=buffer.dtype))
    x = torch.randn(tokens, layer.in_features, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, layer.out_features, device=device, dtype=dtype)
    if compiled:
        layer.compile()

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x), (x, *layer.parameters()), grad)

    return step


def model_step(config: JobConfig, mesh: Mesh, device: torch.device, sequences: int) -> Callable[[], object]:
    """Return a function that makes a whole training step of ``config`` on random tokens: forward, backward, clipping,
    and the optimizer."""
    built, runner, batch = built_step(config, mesh, device, sequences)
    optimizer = build_optimizer(built.named_parameters(), copy.deepcopy(config.optimizer))
    return partial(_train, built.parameters(), config, mesh, runner, optimizer, batch)


def built_step(
    config: JobConfig, mesh: Mesh, device: torch.device, sequences: int
) -> tuple[BuiltModel, StepRunner, Batch]:
    """Return the model of ``config`` with weights on ``device``, what runs its forward and backward, and random
    tokens. Weights are those of the seed 0."""
    built, _ = build(config, mesh, None)
    loss_fn = build_loss(config, mesh)
    for part in built.parts:
        allocate(part, device, False)
        part.init_weights(WeightInit(part, 0))  # type: ignore[operator]
        part.train()
    runner = StepRunner(built.parts, loss_fn, None, None, device)
    tokens = torch.randint(0, built.size.vocab_size, (2, 1, sequences, config.training.seq_len))
    return built, runner, Batch(*tokens)


def _train(
    parameters: list[nn.Parameter],
    config: JobConfig,
    mesh: Mesh,
    runner: StepRunner,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
) -> None:
    loss = runner.forward_backward(batch)
    scale = gradient_scale(parameters, config.training.max_norm, mesh, *loss)
    update_parameters(optimizer, scale.divisor)
    optimizer.zero_grad()
