"""The trainer's own checks of a layout, without a process group."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, cast

import torch

from titanlite.config import Degrees, JobConfig, check_config, resolve_degrees
from titanlite.config.number_formats import formats_of
from titanlite.config.refuse import refuse
from titanlite.distributed.parallelize import chain, check
from titanlite.distributed.pipeline_plan import plan_pipeline
from titanlite.models.layers import DecoderArgs
from titanlite.models.spec import ModelSpec
from titanlite.plan.devices import Device
from titanlite.plan.estimate import ASSUMED_VOCAB_SIZE, build, for_memory, lone_mesh
from titanlite.plan.lone_rank import in_a_process
from titanlite.training.model_shape import choose_shape


@dataclass(frozen=True)
class _Dimension:
    """The size of one dimension of a mesh that nobody has made."""

    count: int

    def size(self) -> int:
        return self.count


@dataclass(frozen=True)
class PlannedModel:
    """The model of a plan. ``args`` are its configured arguments, ``about`` its name for the user."""

    spec: ModelSpec
    args: DecoderArgs
    about: str

    @cached_property
    def meta(self) -> Any:
        """The model on the meta device."""
        with torch.device("meta"):
            return self.spec.build(self.args)

    def check(self, config: JobConfig, devices: int) -> None:
        """Check a layout as the trainer does before it builds the model.

        Raises:
            ConfigError: the trainer would refuse it, or its time is not modelled.
        """
        check_config(config, devices, train=False)
        check_time_is_modelled(config, self.args)
        degrees = resolve_degrees(config.parallelism, devices)
        check(self.args, self.spec.layout, mesh_of(degrees), config)
        if degrees.pipeline_parallel > 1:
            plan_pipeline(self.meta, chain(self.meta, self.spec.layout), config, degrees.pipeline_parallel)


def check_time_is_modelled(config: JobConfig, args: DecoderArgs) -> None:
    """Refuse what the cost model does not cover.

    Raises:
        ConfigError: there is some of it.
    """
    for number_format in formats_of(config):
        if number_format.cost is None:
            refuse(config, "model.converters", f"the time of {number_format.name} is not modelled")
    for name in ("split_points", "layers_per_stage", "schedule_csv"):
        if config.value(key := f"parallelism.pipeline_parallel_{name}"):
            refuse(config, key, "the time of stages other than the trainer's own is not modelled; leave it out")


def check_units(config: JobConfig, args: DecoderArgs, device: Device) -> None:
    """Refuse formats that a device emulates: the time of that is not modelled.

    Raises:
        ConfigError: there is one.
    """
    for number_format in formats_of(config):
        cost = number_format.cost(config) if number_format.cost else None
        if not (device.fp8_tflops and cost and cost.is_native(device.architecture)):
            why = f"{device.name} has no units for {number_format.name}, and the time of emulation is not modelled"
            refuse(config, "model.converters", f"{why}; leave it out")
        if cost.emulated:
            refuse(config, f"{number_format.name}.emulate", "the time of emulation is not modelled; leave it out")
        if cost.moe_fqns and args.mixture and device.architecture not in cost.grouped_on:
            refuse(
                config,
                f"{number_format.name}.moe_fqns",
                f"{device.name} has no grouped matmul in {number_format.name}, and the time of emulation is not "
                "modelled; leave it out",
            )


def planned_model(config: JobConfig) -> PlannedModel:
    """Return the model of a configuration.

    Raises:
        ConfigError: there is none, or it is no decoder, whose sizes plans are made from.
    """
    shape = choose_shape(config)
    if not isinstance(shape.flavor, DecoderArgs):
        refuse(config, "model.name", "plans are made for decoders, and this family is none")
    check_time_is_modelled(config, shape.flavor)
    vocab_size = shape.flavor.vocab_size or ASSUMED_VOCAB_SIZE
    args: DecoderArgs = shape.spec.configure(shape.flavor, vocab_size, config.training.seq_len)
    return PlannedModel(shape.spec, args, shape.about)


def check_by_building(config: JobConfig, devices: int) -> None:
    """Build and shard the model of a layout, as the trainer does, in a process that ends.

    Raises:
        ConfigError: the trainer would raise it.
    """
    degrees = resolve_degrees(config.parallelism, devices)
    in_a_process(_build, config, degrees, devices)


def _build(config: JobConfig, degrees: Degrees, devices: int) -> None:
    with lone_mesh(config, degrees, 0, devices) as mesh:
        build(for_memory(config), mesh, None)


def mesh_of(degrees: Degrees) -> Any:
    """Return an object with the sizes of the dimensions of a mesh, which is all that checks ask for."""
    sizes = {
        "tp": degrees.tensor_parallel,
        "cp": degrees.context_parallel,
        "pp": degrees.pipeline_parallel,
        "fsdp": degrees.data_parallel_shard * degrees.context_parallel,
    }
    dimensions = {name: _Dimension(count) for name, count in sizes.items()}
    spread = degrees.expert_parallel
    shards = sizes["fsdp"] * degrees.tensor_parallel // spread
    experts = SimpleNamespace(ep=_Dimension(spread), fsdp=_Dimension(shards))
    return cast(Any, SimpleNamespace(degrees=degrees, experts=experts, **dimensions))
