"""The degrees of parallelism, and the options that cannot be combined: checked before anything is built."""

from __future__ import annotations

import math
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from titanlite.config.data_rules import masks_documents
from titanlite.config.number_formats import formats_of, gathers_quantized
from titanlite.config.refuse import refuse
from titanlite.config.schema import JobConfig, Parallelism
from titanlite.errors import ConfigError, counted, shown
from titanlite.registry import nearest

# The schedules by their pipeline stages per process: one, several, or two in V shape. SPLIT_BACKWARD schedules compute
# the gradients of inputs and of weights at different times.
SINGLE_STAGE_SCHEDULES = ("1F1B", "GPipe")
LOOPED_SCHEDULES = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble")
V_SCHEDULES = ("ZBVZeroBubble",)
CSV_SCHEDULE = "PipelineScheduleMulti"
SPLIT_BACKWARD_SCHEDULES = ("InterleavedZeroBubble", "ZBVZeroBubble")
_NO_LABELS = "before torch 2.13, stages take no labels then", "choose another schedule or a later torch"
_ONE_BACKWARD = "before torch 2.13, its layers have one backward", "choose another schedule or a later torch"


class Degrees(NamedTuple):
    """The size of each dimension of parallelism. The product of all but ``expert_parallel``, whose processes are those
    of other dimensions, is the number of processes."""

    data_parallel_replicate: int
    data_parallel_shard: int
    context_parallel: int
    tensor_parallel: int
    pipeline_parallel: int
    expert_parallel: int = 1

    @property
    def data_parallel(self) -> int:
        """The number of processes that read different data."""
        return self.data_parallel_replicate * self.data_parallel_shard

    @property
    def model_shards(self) -> int:
        """The number of processes that share one copy of the weights, gradients and optimizer state."""
        return self.data_parallel_shard * self.context_parallel * self.tensor_parallel * self.pipeline_parallel


def resolve_degrees(parallelism: Parallelism, world_size: int) -> Degrees:
    """Return the degrees, with -1 inferred; raise :class:`ConfigError` with the arithmetic if they do not fit."""
    degrees = {
        "data_parallel_replicate_degree": parallelism.data_parallel_replicate_degree,
        "data_parallel_shard_degree": parallelism.data_parallel_shard_degree,
        "context_parallel_degree": parallelism.context_parallel_degree,
        "tensor_parallel_degree": parallelism.tensor_parallel_degree,
        "pipeline_parallel_degree": parallelism.pipeline_parallel_degree,
    }
    fixed = 1  # the product of the other degrees
    for name, degree in degrees.items():
        fixed *= degree if name != "data_parallel_shard_degree" else 1
    shown = " x ".join(f"{name} {degree}" for name, degree in degrees.items())
    if degrees["data_parallel_shard_degree"] == -1:
        if world_size % fixed:
            raise ConfigError(
                f"[parallelism] {shown}: the degrees other than data_parallel_shard_degree multiply to {fixed}, which "
                f"does not divide the {counted(world_size, 'process')} (NGPU={world_size}); use a multiple of {fixed} "
                "processes, or smaller degrees"
            )
        degrees["data_parallel_shard_degree"] = world_size // fixed
    product = fixed * degrees["data_parallel_shard_degree"]
    if product != world_size:
        raise ConfigError(
            f"[parallelism] {shown} = {product}, but there {'is' if world_size == 1 else 'are'} "
            f"{counted(world_size, 'process')}: set NGPU={product}, or data_parallel_shard_degree = -1 to take what "
            "the other degrees leave"
        )
    return Degrees(*degrees.values())._replace(expert_parallel=parallelism.expert_parallel_degree)


def global_batch_size(config: JobConfig, data_parallel: int) -> int:
    """Return the sequences per optimizer step; raise :class:`ConfigError` if microbatches cannot fill it."""
    per_microbatch = config.training.local_batch_size * data_parallel
    requested = config.training.global_batch_size
    if requested == -1:
        return per_microbatch
    if requested % per_microbatch:
        below = requested // per_microbatch * per_microbatch
        refuse(
            config,
            "training.global_batch_size",
            "must be a multiple of training.local_batch_size x the data-parallel degree = "
            f"{config.training.local_batch_size} x {data_parallel} = {per_microbatch}, for example "
            f"{below or per_microbatch}",
        )
    return requested


def pipeline_microbatches(config: JobConfig, data_parallel: int) -> int:
    """Return the pipeline microbatches of one optimizer step. They include those of gradient accumulation, so that
    there is one bubble per step and not one per local batch."""
    return (
        global_batch_size(config, data_parallel)
        // data_parallel
        // config.parallelism.pipeline_parallel_microbatch_size
    )


def check_parallelism(config: JobConfig, degrees: Degrees) -> None:
    """Refuse options that cannot be combined, or would have no effect; the message has the options and the reason."""
    _check_sequence(config, degrees)
    _check_tensor_parallel(config, degrees)
    _check_expert_parallel(config, degrees)
    _check_pipeline(config, degrees)
    p = config.parallelism
    if p.fsdp_reduce_gradients == "microbatch" and degrees.pipeline_parallel > 1:
        refuse(
            config,
            "parallelism.fsdp_reduce_gradients",
            f"and parallelism.pipeline_parallel_degree = {degrees.pipeline_parallel}: a pipeline reduces the "
            'gradients of its stages once per step; leave it at "default"',
        )
    if degrees.context_parallel == 1 and p.context_parallel_rotate_method != "allgather":
        _no_effect(config, "context_parallel_rotate_method", "context_parallel_degree")
    if degrees.context_parallel > 1 and masks_documents(config):
        refuse(
            config,
            "data.document_mask" if config.data.document_mask else "data.packing",
            f"and parallelism.context_parallel_degree = {degrees.context_parallel}: attention over a sequence that "
            "several processes share does not know the documents in it; shard with data_parallel_shard_degree, or "
            "leave one of them out",
        )
    if config.training.enable_cpu_offload and gathers_quantized(config):
        refuse(
            config,
            "training.enable_cpu_offload",
            "weights in host memory that are gathered in their number format (for float8: "
            "float8.enable_fsdp_float8_all_gather = true) would be quantized again, with an all-reduce each, whenever "
            "they are gathered; use one or the other",
        )


def _no_effect(config: JobConfig, key: str, without: str) -> None:
    refuse(
        config,
        f"parallelism.{key}",
        f"has no effect with parallelism.{without} = 1; set that, or leave this out",
    )


def _check_sequence(config: JobConfig, degrees: Degrees) -> None:
    """Check that the sequence divides: context parallelism cuts it into two chunks per process, and tensor parallelism
    divides the share of each of those processes again."""
    cp, tp, seq_len = degrees.context_parallel, degrees.tensor_parallel, config.training.seq_len
    unit = cp * math.lcm(2, tp) if cp > 1 else tp
    if seq_len % unit:
        rules = [f"2 x context_parallel_degree = {2 * cp}"] if cp > 1 else []
        if tp > 1:
            both = "context_parallel_degree x tensor_parallel_degree" if cp > 1 else "tensor_parallel_degree"
            rules.append(f"{both} = {cp * tp}")
        multiple = -(-seq_len // unit) * unit
        refuse(config, "training.seq_len", f"must be a multiple of {' and of '.join(rules)}, for example {multiple}")


def _check_tensor_parallel(config: JobConfig, degrees: Degrees) -> None:
    p = config.parallelism
    if degrees.tensor_parallel == 1:
        for key in ("disable_loss_parallel", "enable_async_tensor_parallel"):
            if getattr(p, key):
                _no_effect(config, key, "tensor_parallel_degree")
    if p.enable_async_tensor_parallel:
        key = "parallelism.enable_async_tensor_parallel"
        if not config.training.compile or "model" not in config.compile.components:
            refuse(
                config,
                key,
                "it is the compiler that overlaps the communication with the matmuls; set training.compile too",
            )
        if config.compile.backend != "inductor":
            refuse(config, key, f'and compile.backend = "{config.compile.backend}": only inductor overlaps them')


def _check_expert_parallel(config: JobConfig, degrees: Degrees) -> None:
    ep = degrees.expert_parallel
    lenders = {
        "data_parallel_shard_degree": degrees.data_parallel_shard,
        "context_parallel_degree": degrees.context_parallel,
        "tensor_parallel_degree": degrees.tensor_parallel,
    }
    lent = math.prod(lenders.values())
    if lent % ep:
        shown = " x ".join(f"{name} {degree}" for name, degree in lenders.items())
        refuse(
            config,
            "parallelism.expert_parallel_degree",
            f"borrows the processes of other dimensions, and must divide {shown} = {lent}",
        )


def _check_pipeline(config: JobConfig, degrees: Degrees) -> None:
    p, pp = config.parallelism, degrees.pipeline_parallel
    inert: dict[str, Any] = {
        "pipeline_parallel_split_points": [],
        "pipeline_parallel_layers_per_stage": None,
        "pipeline_parallel_schedule": "1F1B",
        "pipeline_parallel_schedule_csv": "",
        "pipeline_parallel_microbatch_size": 1,
    }
    if pp == 1:
        for key, value in inert.items():
            if getattr(p, key) != value:
                _no_effect(config, key, "pipeline_parallel_degree")
        return

    mode = config.compile.mode
    if config.training.compile and mode in ("reduce-overhead", "max-autotune"):
        refuse(
            config,
            "parallelism.pipeline_parallel_degree",
            f'several microbatches are under way at a time, and compile.mode = "{mode}" '
            f"({config.origin('compile.mode')}) has one set of buffers for all (CUDA graphs); use "
            '"max-autotune-no-cudagraphs" or "default"',
        )
    schedule = p.pipeline_parallel_schedule
    known = (*SINGLE_STAGE_SCHEDULES, *LOOPED_SCHEDULES, *V_SCHEDULES, CSV_SCHEDULE)
    if schedule not in known:
        refuse(
            config,
            "parallelism.pipeline_parallel_schedule",
            f"there is no such schedule{nearest(schedule, known)}; known: {', '.join(known)}",
        )
    csv = p.pipeline_parallel_schedule_csv
    if csv and schedule != CSV_SCHEDULE:
        refuse(
            config,
            "parallelism.pipeline_parallel_schedule_csv",
            f'needs parallelism.pipeline_parallel_schedule = "{CSV_SCHEDULE}"',
        )
    if schedule == CSV_SCHEDULE and not csv:
        refuse(
            config,
            "parallelism.pipeline_parallel_schedule",
            "needs the schedule; set parallelism.pipeline_parallel_schedule_csv",
        )
    if csv and not Path(csv).expanduser().is_file():
        refuse(
            config,
            "parallelism.pipeline_parallel_schedule_csv",
            f"there is no such file (relative to {Path.cwd()}); correct the path",
        )
    if p.pipeline_parallel_split_points and p.pipeline_parallel_layers_per_stage is not None:
        refuse(
            config,
            "parallelism.pipeline_parallel_layers_per_stage",
            f"the stages are given already, by parallelism.pipeline_parallel_split_points = "
            f"{p.pipeline_parallel_split_points}; use one or the other",
        )
    if schedule in SPLIT_BACKWARD_SCHEDULES and (reason := whole_backward(config)):
        refuse(config, "parallelism.pipeline_parallel_schedule", reason)
    _check_microbatches(config, degrees)


def whole_backward(config: JobConfig, torch_version: str = version("torch")) -> str | None:
    """Return the reason why gradients of inputs and of weights must be computed together; None if they need not.

    Tried on gloo processes with torch 2.11, 2.12 and 2.13. Both halves run the whole backward of a compiled block, and
    recompute a checkpointed one.
    """
    compiled = config.compile_options("model") is not None
    checkpointing = config.activation_checkpoint
    per_op = checkpointing.mode == "selective" and checkpointing.selective_ac_option == "op"
    formats = [number_format.name for number_format in formats_of(config)]
    old = tuple(map(int, torch_version.split(".")[:2])) < (2, 13)
    for name, on, why, way_out in (
        (
            "activation_checkpoint.selective_ac_option",
            per_op and not compiled,
            "what it keeps of a block that is not compiled can be used once",
            "choose another schedule or another option, or compile",
        ),
        ("training.compile", old and compiled, *_ONE_BACKWARD),
        ("model.converters", old and formats, *_ONE_BACKWARD),
        ("training.loss_chunks", old and config.training.loss_chunks > 1, *_NO_LABELS),
    ):
        if on:
            value = shown(config.value(name))
            return (
                "runs the gradients of inputs and of weights at different times, which does not go with "
                f"{name} = {value} ({config.origin(name)}): {why}; {way_out}"
            )
    return None


def _check_microbatches(config: JobConfig, degrees: Degrees) -> None:
    p, pp = config.parallelism, degrees.pipeline_parallel
    local, size = config.training.local_batch_size, p.pipeline_parallel_microbatch_size
    if local % size:
        refuse(
            config,
            "parallelism.pipeline_parallel_microbatch_size",
            f"must divide training.local_batch_size = {local}",
        )
    count, schedule = pipeline_microbatches(config, degrees.data_parallel), p.pipeline_parallel_schedule
    shown = (
        f"{counted(count, 'microbatch')} per step (training.local_batch_size = {local}, microbatches of {size}, "
        f"training.global_batch_size = {global_batch_size(config, degrees.data_parallel)} over {degrees.data_parallel})"
    )
    least = pp if schedule == "1F1B" else 1
    if count < least:
        refuse(
            config,
            "parallelism.pipeline_parallel_schedule",
            f"over {pp} processes needs at least {counted(least, 'microbatch')}, not {shown}; raise "
            "training.local_batch_size or training.global_batch_size",
        )
    rounds = max(1, count // pp)
    if schedule in ("Interleaved1F1B", "InterleavedZeroBubble") and count % rounds:
        refuse(
            config,
            "parallelism.pipeline_parallel_schedule",
            f"over {pp} processes takes the microbatches in {count} // {pp} = {rounds} rounds of the same size, not "
            f"{shown}; a multiple of {pp} always fits",
        )
