"""What can be held against itself, or against the number of processes, before anything is built."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from titanlite.config.schema import Float8, JobConfig, Parallelism
from titanlite.errors import ConfigError

# Keys of the schema that this version has no implementation for: the value at which each does nothing, and what
# to do instead. Asking for more than that is an error, never silently ignored. (Keys that only say how, such as
# checkpoint.interval, ask for nothing by themselves, and files of the period carry them.)
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "profiling.enable_memory_snapshot": (False, "take traces with profiling.enable_profiling"),
    "metrics.enable_wandb": (False, "read metrics.jsonl or TensorBoard"),
    "optimizer.early_step_in_backward": (False, "leave it out"),
    "training.enable_cpu_offload": (False, "shard over more devices"),
    "parallelism.data_parallel_replicate_degree": (1, "shard with data_parallel_shard_degree"),
    "parallelism.enable_compiled_autograd": (False, "use training.compile"),
    "parallelism.disable_loss_parallel": (False, "leave it out"),
    "parallelism.pipeline_parallel_split_points": ([], "leave it out"),
    "parallelism.pipeline_parallel_layers_per_stage": (None, "leave it out"),
    "parallelism.pipeline_parallel_schedule": ("1F1B", "leave it out"),
    "parallelism.pipeline_parallel_schedule_csv": ("", "leave it out"),
    "parallelism.pipeline_parallel_microbatch_size": (1, "leave it out"),
    "parallelism.context_parallel_rotate_method": ("allgather", "leave it out"),
    "parallelism.tensor_parallel_degree": (1, "shard with data_parallel_shard_degree"),
    "parallelism.enable_async_tensor_parallel": (False, "leave it out"),
    "parallelism.pipeline_parallel_degree": (1, "shard with data_parallel_shard_degree"),
    "parallelism.context_parallel_degree": (1, "shorten training.seq_len"),
    "checkpoint.enable_checkpoint": (False, "leave it out"),
    "checkpoint.create_seed_checkpoint": (False, "set training.seed: the same seed gives the same weights"),
    "checkpoint.initial_load_path": (None, "leave it out"),
    "checkpoint.async_mode": ("disabled", "leave it out"),
    "checkpoint.load_step": (-1, "leave it out"),
    "checkpoint.exclude_from_loading": ([], "leave it out"),
    "checkpoint.enable_first_step_checkpoint": (False, "leave it out"),
    "memory_estimation.enabled": (False, "leave it out"),
    "memory_estimation.disable_fake_mode": (False, "leave it out"),
    "fault_tolerance.enable": (False, "leave it out"),
    "fault_tolerance.replica_id": (0, "leave it out"),
    "fault_tolerance.group_size": (0, "leave it out"),
    "fault_tolerance.semi_sync_method": (None, "leave it out"),
    "mx.recipe_name": ("mxfp8", "leave it out"),
}


class Degrees(NamedTuple):
    """The size of each dimension of parallelism; their product is the number of processes."""

    data_parallel_replicate: int
    data_parallel_shard: int
    context_parallel: int
    tensor_parallel: int
    pipeline_parallel: int

    @property
    def data_parallel(self) -> int:
        """The number of processes that read different data."""
        return self.data_parallel_replicate * self.data_parallel_shard


def resolve_degrees(parallelism: Parallelism, world_size: int) -> Degrees:
    """The degrees with -1 inferred, or a :class:`ConfigError` that shows the arithmetic."""
    given = {
        "data_parallel_replicate_degree": parallelism.data_parallel_replicate_degree,
        "data_parallel_shard_degree": parallelism.data_parallel_shard_degree,
        "context_parallel_degree": parallelism.context_parallel_degree,
        "tensor_parallel_degree": parallelism.tensor_parallel_degree,
        "pipeline_parallel_degree": parallelism.pipeline_parallel_degree,
    }
    others = 1
    for name, degree in given.items():
        others *= degree if name != "data_parallel_shard_degree" else 1
    shown = " x ".join(f"{name} {degree}" for name, degree in given.items())
    if given["data_parallel_shard_degree"] == -1:
        if world_size % others:
            raise ConfigError(
                f"[parallelism] {shown}: the degrees other than data_parallel_shard_degree multiply to {others}, which "
                f"does not divide the {world_size} processes (NGPU={world_size})"
            )
        given["data_parallel_shard_degree"] = world_size // others
    product = others * given["data_parallel_shard_degree"]
    if product != world_size:
        raise ConfigError(
            f"[parallelism] {shown} = {product}, but there are {world_size} processes: set NGPU={product}, or "
            "data_parallel_shard_degree = -1 to take what the other degrees leave"
        )
    return Degrees(*given.values())


def global_batch_size(config: JobConfig, data_parallel: int) -> int:
    """Sequences per optimizer step, or a :class:`ConfigError` where the microbatches do not fill it."""
    per_microbatch = config.training.local_batch_size * data_parallel
    wanted = config.training.global_batch_size
    if wanted == -1:
        return per_microbatch
    if wanted % per_microbatch:
        below = wanted // per_microbatch * per_microbatch
        raise ConfigError(
            f"training.global_batch_size = {wanted} ({config.origin('training.global_batch_size')}): must be a "
            f"multiple of training.local_batch_size x the data-parallel degree = {config.training.local_batch_size} x "
            f"{data_parallel} = {per_microbatch}, for example {below or per_microbatch}"
        )
    return wanted


def check_config(config: JobConfig, world_size: int) -> None:
    """Refuse what this machine or this version cannot do; the missing file first, which is the user's to fetch."""
    _check_tokenizer(config)
    degrees = resolve_degrees(config.parallelism, world_size)
    for name, (inert, instead) in UNSUPPORTED.items():
        section, key = name.split(".")
        value = getattr(getattr(config, section), key)
        if value != inert:
            raise ConfigError(
                f"{name} = {str(value).lower() if value is True else value} ({config.origin(name)}): this version of "
                f"titanlite does not implement it; {instead}"
            )
    _check_float8(config)
    global_batch_size(config, degrees.data_parallel)


def _check_float8(config: JobConfig) -> None:
    """Refuse options of [float8] that would have no effect."""
    float8 = config.float8

    def refuse(key: str, reason: str) -> NoReturn:
        value, name = getattr(float8, key), f"float8.{key}"
        shown = str(value).lower() if value is True else value
        raise ConfigError(f"{name} = {shown} ({config.origin(name)}): {reason}")

    if "float8" not in config.model.converters:
        for field in dataclasses.fields(Float8):
            # filter_fqns alone asks for nothing: published files carry it beside converters = [].
            if field.name != "filter_fqns" and getattr(float8, field.name) != field.default:
                refuse(field.name, "has no effect without the converter; add float8 to model.converters")
        return
    if float8.precompute_float8_dynamic_scale_for_fsdp and not float8.enable_fsdp_float8_all_gather:
        refuse(
            "precompute_float8_dynamic_scale_for_fsdp",
            "has no effect unless weights are gathered in float8; set float8.enable_fsdp_float8_all_gather too",
        )
    for operand in ("input", "weight", "grad_output"):
        scaling, scale = getattr(float8, f"scaling_type_{operand}"), getattr(float8, f"static_scale_{operand}")
        if scaling != "dynamic" and float8.recipe_name not in (None, "tensorwise"):
            refuse(
                f"scaling_type_{operand}",
                f'the scales of rows (float8.recipe_name = "{float8.recipe_name}") are dynamic; use tensorwise',
            )
        if scaling == "static" and scale is None:
            refuse(f"scaling_type_{operand}", f"needs the scale; set float8.static_scale_{operand}")
        if scaling != "static" and scale is not None:
            refuse(f"static_scale_{operand}", f'has no effect; set float8.scaling_type_{operand} = "static"')
    if float8.enable_fsdp_float8_all_gather and float8.scaling_type_weight != "dynamic":
        refuse(
            "enable_fsdp_float8_all_gather",
            f'weights gathered in float8 have dynamic scales, and float8.scaling_type_weight = "'
            f'{float8.scaling_type_weight}"; use one or the other',
        )


def _check_tokenizer(config: JobConfig) -> None:
    path = config.model.tokenizer_path
    if path and not Path(path).expanduser().exists():
        raise ConfigError(
            f'model.tokenizer_path = "{path}" ({config.origin("model.tokenizer_path")}): there is no such file or '
            f"folder (relative to {Path.cwd()}); fetch it with\n"
            "    python scripts/download_tokenizer.py --repo_id meta-llama/Llama-3.1-8B --hf_token=...\n"
            "or leave the option empty for the tokenizer that titanlite ships"
        )
