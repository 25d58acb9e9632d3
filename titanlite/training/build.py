"""Build the sharded model, the loss and the pipeline of a configuration, on the meta device. Nothing is allocated
before :func:`titanlite.distributed.data_parallel.allocate`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from titanlite.config import JobConfig, global_batch_size, pipeline_microbatches
from titanlite.config.refuse import refuse
from titanlite.converters import ModelConverter, build_converters
from titanlite.distributed.chunked_loss import compute_loss_in_chunks
from titanlite.distributed.compile import compiled
from titanlite.distributed.data_parallel import reduces_each_microbatch, whole_gradient_bytes
from titanlite.distributed.describe import describe
from titanlite.distributed.mesh import Mesh
from titanlite.distributed.parallelize import chain, check, parallelize
from titanlite.distributed.pipeline import Pipeline, boundary_of, part_of
from titanlite.distributed.pipeline_plan import Plan, plan_pipeline
from titanlite.distributed.tensor_parallel import VocabParallelCrossEntropy
from titanlite.distributed.waiting import NotedStage
from titanlite.models.layers import ModelSize
from titanlite.models.spec import ModelSpec
from titanlite.optim import cross_entropy_loss
from titanlite.training.step import LossFunction

logger = logging.getLogger()


@dataclass
class BuiltModel:
    """This process's share of a model.

    Attributes:
        parts: the model as one module, or the modules of this process's pipeline stages.
        size: the size of the whole model.
        plan: the plan of the pipeline; None without one.
        reduce_each: gradients are reduced after each microbatch.
        about: the conversions, the pipeline and the parallelism in words, for the log.
    """

    parts: list[nn.Module]
    size: ModelSize
    converters: dict[str, ModelConverter]
    plan: Plan | None = None
    reduce_each: bool = False
    about: dict[str, str] = field(default_factory=dict)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [named for part in self.parts for named in part.named_parameters()]

    def parameters(self) -> list[nn.Parameter]:
        return [param for _, param in self.named_parameters()]


def build_model(spec: ModelSpec, args: Any, config: JobConfig, mesh: Mesh) -> BuiltModel:
    """Build the model on the meta device, convert it, cut it into pipeline stages, and shard it.

    Args:
        args: the model's arguments: a flavor that ``spec.configure`` has completed.
    """
    check(args, spec.layout, mesh, config)
    if mesh.cp.size() > 1 and mesh.device_type == "cuda" and config.training.mixed_precision_param == "float32":
        refuse(
            config,
            "training.mixed_precision_param",
            f"and parallelism.context_parallel_degree = {mesh.cp.size()}: flash attention on GPUs takes 16-bit "
            "numbers; use bfloat16, or another dimension",
        )
    with torch.device("meta"):
        model: Any = spec.build(args)
    built = BuiltModel([model], model.size(), build_converters(config, mesh))
    for name, converter in built.converters.items():
        built.about[f"converter {name}"] = converter.convert(model)
    if config.model.print_after_conversion:
        logger.info("the model after conversion:\n%s", model)
    if config.training.loss_chunks > 1:
        built.about["loss"] = compute_loss_in_chunks(model, spec.layout, mesh, config)
    if mesh.pp.size() > 1:
        built.plan = plan_pipeline(model, chain(model, spec.layout), config, mesh.pp.size())
        local = built.plan.of(mesh.pp.get_local_rank())
        built.parts = [part_of(model, built.plan.stages[stage]) for stage in local]
        built.about["pipeline"] = f"{config.parallelism.pipeline_parallel_schedule}, {built.plan}"
    for part in built.parts:
        parallelize(part, spec.layout, mesh, config)
    built.about |= describe(args, mesh, config)
    _choose_reduction(built, config, mesh)
    return built


def _choose_reduction(built: BuiltModel, config: JobConfig, mesh: Mesh) -> None:
    """Choose when the gradients of accumulated microbatches are reduced, and say so."""
    per_microbatch = mesh.degrees.data_parallel * config.training.local_batch_size
    microbatches = global_batch_size(config, mesh.degrees.data_parallel) // per_microbatch
    if built.plan is not None or microbatches == 1:
        return
    extra = whole_gradient_bytes(built.parameters(), mesh, config.training)
    built.reduce_each = reduces_each_microbatch(config.parallelism.fsdp_reduce_gradients, extra)
    if mesh.fsdp.size() > 1:
        when, verb = ("each", "saves") if built.reduce_each else ("the last", "takes")
        built.about["gradients"] = (
            f"reduced after {when} of {microbatches} microbatches, which {verb} {extra / (1 << 30):.3f} GiB per device"
        )


def build_loss(config: JobConfig, mesh: Mesh) -> LossFunction | None:
    """Return the loss function of this process's logits and labels: the sum over the labels. None: the model computes
    the loss (``training.loss_chunks``)."""
    if config.training.loss_chunks > 1:
        return None
    loss_fn: LossFunction = cross_entropy_loss
    if mesh.tp.size() > 1 and not config.parallelism.disable_loss_parallel:
        loss_fn = VocabParallelCrossEntropy(mesh.tp)
    compiling = config.compile_options("loss")
    return loss_fn if compiling is None else compiled(loss_fn, compiling)


def build_pipeline(
    built: BuiltModel,
    loss_fn: LossFunction | None,
    config: JobConfig,
    mesh: Mesh,
    device: torch.device,
    stage_type: type[NotedStage] = NotedStage,
) -> Pipeline | None:
    """Build the schedule of this process's stages; None without pipeline parallelism."""
    if built.plan is None:
        return None
    count = pipeline_microbatches(config, mesh.degrees.data_parallel)
    boundary = boundary_of(built.size, mesh, config.training, config.parallelism)
    return Pipeline(built.plan, built.parts, boundary, mesh, device, config.parallelism, count, loss_fn, stage_type)
