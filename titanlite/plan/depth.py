"""The peak memory of a deep model, from two shallow ones.

All blocks of a decoder are alike, but for dense ones before those with experts, which both shallow models have. So at
each moment of a step the memory is linear in the number of the others. The step is cut into segments at the blocks. The
peak of every segment is estimated at two depths and continued to the whole depth; the largest is the peak of the step.
(The peak of the whole step cannot be continued itself: it may be at another moment in a shallow model, where the logits
count for more.)
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from torch import nn

from titanlite.config import Degrees, JobConfig, check_config, resolve_degrees
from titanlite.config.number_formats import formats_of
from titanlite.models.layers import DecoderArgs
from titanlite.plan.estimate import (
    build,
    check_modelled,
    dimensions,
    estimate,
    for_memory,
    lone_mesh,
    measure,
)
from titanlite.plan.lone_rank import in_a_process
from titanlite.plan.memory import MemoryTracker
from titanlite.training.build import build_loss
from titanlite.training.model_shape import choose_shape

_ENDS = 2  # blocks at each end whose segments count. FSDP2 gathers one block ahead, so the outermost ones differ.
_MIDDLE = "a block in the middle"


def peak_memory(config: JobConfig, world_size: int, vocab_size: int | None) -> int:
    """Return the largest peak of a rank in bytes, as :func:`titanlite.plan.estimate.estimate` does, sooner where the
    model has many blocks that are alike and no pipeline.

    Raises:
        ConfigError: as ``estimate``.
    """
    check_config(config, world_size, train=False)
    check_modelled(config)
    degrees, period = resolve_degrees(config.parallelism, world_size), _period(config)
    flavor = choose_shape(config).flavor
    if degrees.pipeline_parallel == 1 and isinstance(flavor, DecoderArgs) and not _names_a_block(config):
        least = _first(flavor) + _ENDS
        shallow = least + (flavor.n_layers - least) % period
        deeper = shallow + period
        if deeper < flavor.n_layers:
            depths = shallow, deeper
            first, second = in_a_process(_segments, config, degrees, world_size, vocab_size, depths)
            steps = (flavor.n_layers - shallow) // period
            return max(peak + steps * (more - peak) for peak, more in zip(first, second, strict=True))
    return estimate(config, world_size, vocab_size).peak


def _period(config: JobConfig) -> int:
    """Return after how many blocks activation checkpointing repeats."""
    options = config.activation_checkpoint
    return (
        int(options.selective_ac_option) if options.mode == "selective" and options.selective_ac_option != "op" else 1
    )


def _first(args: DecoderArgs) -> int:
    """Return the number of blocks at the beginning whose segments count: dense ones before experts, and as many more as
    at the end."""
    return _ENDS + (0 if args.mixture is None else args.mixture.n_dense_layers)


def _names_a_block(config: JobConfig) -> bool:
    """Return whether a converter is for the layers or experts of some blocks only."""
    sections = [getattr(config, format.name) for format in formats_of(config)]
    entries = [entry for section in sections for entry in (*section.filter_fqns, *getattr(section, "moe_fqns", ()))]
    return any(part.isdigit() for entry in entries for part in entry.split("."))


def _segments(
    config: JobConfig, degrees: Degrees, world_size: int, vocab_size: int | None, depths: tuple[int, ...]
) -> list[list[int]]:
    """Return, for each depth, the peaks in bytes of the segments that all depths have."""
    with lone_mesh(config, degrees, 0, world_size) as mesh:
        config, peaks = for_memory(config), []
        for depth in depths:
            shallow = copy.deepcopy(config)
            shallow.model.args.n_layers = depth
            built, _ = build(shallow, mesh, vocab_size)
            tracker = MemoryTracker(dimensions(mesh))
            model: Any = built.parts[0]
            first = _first(model.args)
            for i, block in enumerate(model.layers.children()):
                middle = first <= i < depth - _ENDS
                name = _MIDDLE if middle else f"block {i if i < first else i - depth}"
                block.register_forward_pre_hook(partial(_mark, tracker, name))
            measure(built, build_loss(shallow, mesh), shallow, mesh, tracker)
            peaks.append([peak for name, peak in tracker.segments if name != _MIDDLE])
    return peaks


def _mark(tracker: MemoryTracker, name: str, block: nn.Module, args: tuple[Any, ...]) -> None:
    """Begin a segment at the forward of a block, and another at the end of its backward."""
    tracker.mark(name)
    if args[0].requires_grad:
        args[0].register_hook(lambda _: tracker.mark(name))
