"""Time a block of a model with each value of an option.

``python -m titanlite.doctor.time_blocks FILE OPTION VALUE...``: the file has the options of a run, and the option
belongs to the section of a number format. It prints one JSON object, a
:class:`~titanlite.doctor.timed_choice.Timing`. It is a process of its own, so that neither a crash nor memory that it
takes reaches the run that asks.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titanlite.config import JobConfig, import_custom, load_config, resolve_degrees
from titanlite.config.schema import Parallelism
from titanlite.converters.linears import AUTO_FILTER
from titanlite.distributed.attention_kernel import preferred_kernels
from titanlite.distributed.mesh import Mesh, build_mesh
from titanlite.doctor.clock import time_in_turn
from titanlite.doctor.layers import built_step, linear_kinds
from titanlite.doctor.machine import find_device
from titanlite.doctor.probe import for_one_process
from titanlite.doctor.shallow import has_room, least_depth
from titanlite.doctor.timed_choice import Timing
from titanlite.models.layers import DecoderArgs
from titanlite.plan.estimate import ASSUMED_VOCAB_SIZE
from titanlite.plan.lone_rank import end_with
from titanlite.quant.convertible import name_matches
from titanlite.training.model_shape import choose_shape

_SECONDS = 1.0  # of all rounds


def measure(config: JobConfig, device: torch.device, option: str, kinds: Sequence[str]) -> Timing:
    """Time forward and backward of the fewest blocks of the configured model, compiled as it is configured, on random
    tokens of a microbatch. Parallelism is left out: one process has whole blocks. Call it in a process group of one.

    Args:
        option: ``section.key``; the section is called as its converter.
        kinds: the values of the option.

    Raises:
        ValueError: the model is no decoder, or does not fit beside two others like it.
    """
    mesh = build_mesh(resolve_degrees(Parallelism(), 1), device.type)
    section, _, key = option.rpartition(".")
    config = _of_few_blocks(config, section, mesh, device)
    exact = _gradients(_step(_in_high_precision(config, section), mesh, device))
    errors: dict[str, float] = {}
    steps: dict[str, Callable[[], list[Tensor]]] = {}
    for kind in kinds:
        setattr(config.section(section), key, kind)
        steps[kind] = _step(config, mesh, device)
        errors[kind] = _distance(_gradients(steps[kind]), exact)
    del exact
    return Timing(config.model.args.n_layers or 0, time_in_turn(steps, device, _SECONDS), errors)


def _of_few_blocks(config: JobConfig, name: str, mesh: Mesh, device: torch.device) -> JobConfig:
    changed, section = for_one_process(config), copy.deepcopy(config.section(name))
    changed.model.converters = config.model.converters
    setattr(changed, name, section)
    changed.compile.components = ["model"]
    changed.training.loss_chunks = 1
    flavor = choose_shape(changed).flavor
    if not isinstance(flavor, DecoderArgs):
        raise ValueError(f"model.name = {config.model.name} is no decoder, whose blocks could be timed")
    changed.model.args.n_layers = least_depth(changed, flavor)
    changed.model.args.vocab_size = ASSUMED_VOCAB_SIZE  # the output projection is not of interest
    if not has_room(changed, changed.model.args.n_layers, device):
        raise ValueError("a block takes too much of the device's memory to be timed")
    names = [kind.name.replace("*", "0") for kind in linear_kinds(changed, mesh, None)]
    section.filter_fqns = [  # those that name layers of other blocks would match none, which is an error
        entry
        for entry in section.filter_fqns
        if entry == AUTO_FILTER or any(name_matches(entry, name) for name in names)
    ]
    return changed


def _in_high_precision(config: JobConfig, converter: str) -> JobConfig:
    """Return ``config`` without a converter, and not compiled."""
    changed = copy.deepcopy(config)
    changed.model.converters = [name for name in config.model.converters if name != converter]
    changed.training.compile = False
    return changed


def _step(config: JobConfig, mesh: Mesh, device: torch.device) -> Callable[[], list[Tensor]]:
    """Return a function that runs forward and backward, and returns the gradients; the same weights and tokens for each
    configuration."""
    torch.manual_seed(0)
    built, runner, batch = built_step(config, mesh, device, config.training.local_batch_size)
    parameters: list[nn.Parameter] = built.parameters()

    def step() -> list[Tensor]:
        runner.forward_backward(batch)
        gradients = [p.grad for p in parameters if p.grad is not None]
        for parameter in parameters:
            parameter.grad = None
        return gradients

    return step


def _gradients(step: Callable[[], list[Tensor]]) -> list[Tensor]:
    return [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in step()]


def _distance(gradients: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest distance of a gradient, over the norm of the exact one; those of zeros, of experts without
    tokens, are left out."""
    norms = [(float((a.double() - b).norm()), float(b.double().norm())) for a, b in zip(gradients, exact, strict=True)]
    return float(torch.tensor([distance / norm for distance, norm in norms if norm]).max())


def main() -> int:
    end_with(os.getppid())
    config = load_config([], sys.argv[1])
    import_custom(config)
    device, _ = find_device()
    store = dist.HashStore()  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    with preferred_kernels(device):
        timing = measure(config, device, sys.argv[2], sys.argv[3:])
    dist.destroy_process_group()
    print(json.dumps(timing._asdict()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
