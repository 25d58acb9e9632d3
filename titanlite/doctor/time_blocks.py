"""Time a block of a model with each value of an option.

``python -m titanlite.doctor.time_blocks PARENT FILE OPTION VALUE...``: the file has the options of a run, the option
belongs to the section of a number format, and the process ends with the process ``PARENT``. It is a process of its own,
so that neither a crash nor memory that it takes reaches the run that asks.

It prints one JSON object: a :class:`~titanlite.doctor.timed_choice.Timing`; or why there is none, as "skipped" where
there is nothing to time, and as "error" where something failed.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
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
from titanlite.doctor.timed_choice import NothingToTime, Timing
from titanlite.models.layers import DecoderArgs
from titanlite.plan.estimate import ASSUMED_VOCAB_SIZE
from titanlite.plan.lone_rank import end_with
from titanlite.quant.convertible import name_matches
from titanlite.quant.linear import quant_layers_by_name
from titanlite.training.model_shape import choose_shape

_SECONDS = 1.0  # of all rounds


def measure(config: JobConfig, device: torch.device, option: str, kinds: Sequence[str]) -> Timing:
    """Time forward and backward of the fewest blocks of the configured model, compiled as it is configured, on random
    tokens of a microbatch. Parallelism is left out: one process has whole blocks. Call it in a process group of one.

    Args:
        option: ``section.key``; the section is called as its converter.
        kinds: the values of the option.

    Raises:
        NothingToTime: the model is no decoder, does not fit, or has no layer in the format.
    """
    mesh = build_mesh(resolve_degrees(Parallelism(), 1), device.type)
    section, _, key = option.rpartition(".")
    config = _of_few_blocks(config, mesh, device)
    exact = _gradients(_step(_in_high_precision(config, section), mesh, device))
    errors: dict[str, float] = {}
    steps: dict[str, Callable[[], list[Tensor]]] = {}
    for kind in kinds:
        setattr(config.section(section), key, kind)
        steps[kind] = _step(config, mesh, device)
        errors[kind] = _distance(_gradients(steps[kind]), exact)
    del exact
    return Timing(config.model.args.n_layers or 0, time_in_turn(steps, device, _SECONDS), errors)


def _of_few_blocks(config: JobConfig, mesh: Mesh, device: torch.device) -> JobConfig:
    """Return ``config`` for one process and the fewest blocks, with the tokens of a microbatch."""
    changed = for_one_process(config)
    changed.model.converters = config.model.converters
    changed.compile.components, changed.compile.mode = ["model"], "default"  # tuning matmuls takes minutes
    changed.training.loss_chunks = 1
    changed.training.seq_len = config.training.seq_len // max(1, config.parallelism.context_parallel_degree)
    if config.parallelism.pipeline_parallel_degree > 1:
        changed.training.local_batch_size = config.parallelism.pipeline_parallel_microbatch_size
    flavor = choose_shape(changed).flavor
    if not isinstance(flavor, DecoderArgs):
        raise NothingToTime(f"model.name = {config.model.name} is no decoder")
    changed.model.args.n_layers = least_depth(changed, flavor)
    changed.model.args.vocab_size = ASSUMED_VOCAB_SIZE  # the output projection is not of interest
    if not has_room(changed, changed.model.args.n_layers, device):
        raise NothingToTime("a block takes too much of the device's memory")
    names = [kind.name.replace("*", "0") for kind in linear_kinds(changed, mesh, None)]
    for converter in changed.model.converters:
        section: Any = copy.deepcopy(getattr(config, converter, None))
        if section is None:
            continue
        setattr(changed, converter, section)
        section.filter_fqns = [
            entry
            for entry in section.filter_fqns
            if entry == AUTO_FILTER or (not _names_a_block(entry) and any(name_matches(entry, n) for n in names))
        ]
        if getattr(section, "moe_fqns", None):
            section.moe_fqns = [entry for entry in section.moe_fqns if not _names_a_block(entry)]
    return changed


def _names_a_block(entry: str) -> bool:
    """Return whether a filter names a block by its number. Such a filter is left out: often the first and the last
    block are left in high precision, and the others are of interest."""
    return any(part.isdigit() for part in entry.split("."))


def _in_high_precision(config: JobConfig, converter: str) -> JobConfig:
    """Return ``config`` without a converter, and not compiled."""
    changed = copy.deepcopy(config)
    changed.model.converters = [name for name in config.model.converters if name != converter]
    changed.training.compile = False
    return changed


def _step(config: JobConfig, mesh: Mesh, device: torch.device) -> Callable[[], list[Tensor]]:
    """Return a function that runs forward and backward, and returns the gradients of the blocks' matrices. Weights and
    tokens are the same for each configuration."""
    torch.manual_seed(0)
    built, runner, batch = built_step(config, mesh, device, config.training.local_batch_size)
    (model,) = built.parts
    if config.training.compile and not any("layers." in name for name in quant_layers_by_name(model)):
        raise NothingToTime("no linear layer of a block is in the format")
    matrices = [p for name, p in built.named_parameters() if "layers." in name and p.ndim > 1]

    def step() -> list[Tensor]:
        runner.forward_backward(batch)
        gradients = [p.grad for p in matrices if p.grad is not None]
        for parameter in built.parameters():
            parameter.grad = None
        return gradients

    return step


def _gradients(step: Callable[[], list[Tensor]]) -> list[Tensor]:
    return [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in step()]


def _distance(gradients: list[Tensor], exact: list[Tensor]) -> float:
    """Return the distance of each gradient over the norm of the exact one, as the root of the mean of the squares.
    Gradients of zeros, such as those of experts without tokens, are left out."""
    norms = [(float((a.double() - b).norm()), float(b.double().norm())) for a, b in zip(gradients, exact, strict=True)]
    ratios = [distance / norm for distance, norm in norms if norm]
    return math.sqrt(sum(ratio**2 for ratio in ratios) / len(ratios))


def main(argv: Sequence[str]) -> int:
    parent, file, option, *kinds = argv
    end_with(int(parent))
    try:
        print(json.dumps(_timing(load_config([], file), option, kinds)._asdict()), flush=True)
    except NothingToTime as e:
        print(json.dumps({"skipped": str(e)}), flush=True)
    except Exception as e:  # of a compiler or a driver, for example
        print(json.dumps({"error": f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"}), flush=True)
    return 0


def _timing(config: JobConfig, option: str, kinds: Sequence[str]) -> Timing:
    import_custom(config)
    device, remark = find_device()
    if device.type != "cuda":
        raise RuntimeError(remark or "there is no GPU")
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        with preferred_kernels(device):
            return measure(config, device, option, kinds)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
