"""Every option of titanlite: one dataclass per TOML section, one field per key.

The string under a field is its help text. Sections, keys and defaults are torchtitan's of June and July 2025, so that
its Llama 3 files of that time load unchanged; differences are noted. Keys that it renamed are in
:mod:`titanlite.config.aliases`. Keys without a help text have no implementation here
(:mod:`titanlite.config.unsupported`). This file is data: no logic, no torch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from titanlite.config.data_sections import Data, Sample, Validation
from titanlite.config.format_sections import MX, Float8, Int8
from titanlite.config.model_sections import Experts, Model
from titanlite.config.value_rules import (
    AnyPath,
    Beta,
    CheckpointOption,
    Fraction,
    InnerFolder,
    Int32,
    Limit,
    LoadStep,
    Name,
    NotNegative,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
    PositiveOrAuto,
    Seconds,
)


@dataclass
class Job:
    config_file: AnyPath | None = None
    """The TOML file to start from. A file may name another one to build on: base = "other.toml"."""
    dump_folder: AnyPath = "./outputs"
    """The run folder: config.toml, metrics.jsonl, tb/, profiles. One job, one folder."""
    name: Name | None = None
    """What this run is called in TensorBoard and by titanlite compare. Unset: the name of the TOML file, and the
    options of the command line. (torchtitan does not have it.)"""
    description: str = "default job"
    """A description of the job, for people."""
    use_for_integration_test: bool = False
    """Informative only."""
    print_args: bool = False
    """Log the effective configuration at the start."""


@dataclass
class Profiling:
    enable_profiling: bool = False
    """Write torch.profiler traces (Chrome format), one per rank and period."""
    save_traces_folder: InnerFolder = "profile_traces"
    """The folder of the traces, in the run folder."""
    profile_freq: Positive = 10
    """The period of traces and memory snapshots, in steps. They record the last step of each period, traces after
    three steps of warm-up."""
    enable_memory_snapshot: bool = False
    """Write snapshots of allocated memory with stack traces, for pytorch.org/memory_viz: one file per rank and period,
    and one when memory runs out. Only on GPUs."""
    save_memory_snapshot_folder: InnerFolder = "memory_snapshot"
    """The folder of the snapshots, in the run folder."""


@dataclass
class Metrics:
    log_freq: Positive = 10
    """Log every N steps."""
    enable_tensorboard: bool = True
    """Write TensorBoard events. (torchtitan's default is false.)"""
    disable_color_printing: bool = False
    """Use no colors on the console, even if it is a terminal."""
    save_tb_folder: InnerFolder = "tb"
    """The folder of TensorBoard events, in the run folder."""
    save_for_all_ranks: bool = False
    """Write TensorBoard events from every rank (tb/rank_N), not only from rank 0."""
    enable_wandb: bool = False
    """Write a run of Weights & Biases, from rank 0 (needs the package wandb). WANDB_PROJECT, WANDB_TEAM and
    WANDB_RUN_NAME name it; WANDB_MODE=offline keeps it in the run folder."""


@dataclass
class Optimizer:
    name: str = "AdamW"
    """AdamW, Adam or SGD (without momentum), or one registered by experimental.custom_import."""
    lr: PositiveFloat = 8e-4
    """The peak learning rate."""
    beta1: Beta = 0.9
    """The decay of the average of gradients."""
    beta2: Beta = 0.95
    """The decay of the average of squared gradients."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator of the update."""
    weight_decay: NotNegativeFloat = 0.1
    """Weight decay; applied to every parameter, as in torchtitan."""
    implementation: Literal["fused", "foreach", "for-loop"] = "fused"
    """fused: one kernel for all parameters; foreach: one per operation; for-loop: one per operation and parameter.
    With moments of low precision, fused is one compiled kernel per parameter."""
    moments: Literal["float32", "bfloat16", "float8_e4m3fn"] = "float32"
    """The dtype of the moments of Adam and AdamW, rounded stochastically. float8_e4m3fn: with a scale for each
    64 elements of a row."""
    early_step_in_backward: bool = False


@dataclass
class LRScheduler:
    warmup_steps: NotNegative = 200
    """The learning rate rises linearly over this many steps."""
    decay_ratio: Fraction | None = None
    """The last part of the run, as a fraction of its steps, over which the learning rate decays. Unset: all
    steps after the warm-up; 0: no decay."""
    decay_type: str = "linear"
    """The shape of the decay: linear, sqrt (1 - sqrt(progress)), cosine, or one that custom_import registers."""
    lr_min: Fraction = 0.0
    """The learning rate at the end, as a fraction of optimizer.lr."""


@dataclass
class Training:
    dataset: str = "pystdlib"
    """The data source: pystdlib (the Python standard library's own source text), text, json, parquet, or a
    hub set (c4, fineweb_edu, hub:owner/name, hub:owner/name:subset). (torchtitan's default is c4_test.)"""
    dataset_path: AnyPath | None = None
    """The file, folder or glob that text, json and parquet read; for a hub set, a local copy of it. A name that
    exists is never a glob."""
    local_batch_size: Positive = 8
    """Sequences per device and microbatch."""
    global_batch_size: PositiveOrAuto = -1
    """Sequences per optimizer step over all devices; more than local_batch_size times the data-parallel
    degree accumulates gradients. -1: exactly that product."""
    seq_len: Positive = 2048
    """Tokens per sequence. Documents that share a sequence attend to each other."""
    max_norm: Limit = 1.0
    """The largest gradient norm; larger gradients are scaled down to it. inf: none are."""
    steps: Positive = 10000
    """Optimizer steps."""
    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory."""
    dtype: str = "float32"
    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """The dtype of parameters and activations in forward and backward; master weights are float32. It
    applies with one device too."""
    mixed_precision_reduce: Literal["float32"] = "float32"
    """The dtype in which gradients are reduced."""
    loss_chunks: Positive = 1
    """Parts of the vocabulary in which the output projection and the loss are computed, one after the other: logits
    and their gradient take that much less memory. The loss is the same; the projection is computed twice. 1 is off."""
    compile: bool = False
    """torch.compile the model block by block, and the loss; see [compile]."""
    gc_freq: Positive = 50
    """Collect Python's garbage every N steps, on all ranks at once, and never in between."""
    gc_debug: bool = False
    """Log the result of each garbage collection."""
    seed: NotNegative | None = None
    """The seed of weights, data order and everything random. Unset: a random seed, which is logged and
    written to config.toml."""
    deterministic: bool = False
    """Use only deterministic algorithms: two runs give byte-identical losses."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """The reaction to a loss or gradients that are not finite, or to a spike of the loss. stop: end with an error;
    skip: leave parameters and optimizer state unchanged, and continue. Unless optimizer.implementation is fused, skip
    makes every step wait for the device."""
    spike_sigmas: NotNegativeFloat = 6.0
    """A spike is a loss more than this many standard deviations above the mean of the last 128 good steps. Before 128
    good steps, no loss is a spike. 0: no loss is ever a spike."""
    max_skipped_in_a_row: Positive = 10
    """With on_bad_step = skip: end the run after this many skipped steps in a row."""


@dataclass
class Parallelism:
    data_parallel_replicate_degree: Positive = 1
    """Groups of devices that hold the same shards (HSDP); 1 is off."""
    data_parallel_shard_degree: PositiveOrAuto = -1
    """Devices over which FSDP2 shards the model; -1: all devices that the other degrees do not use."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Free a block's gathered parameters after its forward. default: always, but not under pipeline parallelism,
    and not with a single shard on the device, where gathering only copies."""
    fsdp_reduce_gradients: Literal["default", "microbatch", "step"] = "default"
    """When a step of several microbatches reduces gradients to their shards: after each one (microbatch, less
    memory), or once (step, fewer messages). default: after each one if whole gradients take over 1 GiB more than
    their shards. A pipeline reduces them once. (torchtitan does not have it.)"""
    enable_compiled_autograd: bool = False
    tensor_parallel_degree: Positive = 1
    """Devices over which each layer is split; 1 is off."""
    disable_loss_parallel: bool = False
    """Gather the logits before the loss under tensor parallelism."""
    enable_async_tensor_parallel: bool = False
    """Overlap tensor parallelism's communication with its matmuls (needs compile and NVLink)."""
    pipeline_parallel_degree: Positive = 1
    """Devices over which the layers are split; 1 is off."""
    pipeline_parallel_split_points: list[str] = field(default_factory=list)
    """The first module of each stage after the first, for example layers.2,layers.4."""
    pipeline_parallel_layers_per_stage: Positive | None = None
    """Layers per pipeline stage, if there are no split points. Neither is set: stages of about equal work."""
    pipeline_parallel_schedule: str = "1F1B"
    """The pipeline schedule: 1F1B, GPipe, Interleaved1F1B, LoopedBFS, InterleavedZeroBubble, ZBVZeroBubble; or
    PipelineScheduleMulti, with the schedule in pipeline_parallel_schedule_csv."""
    pipeline_parallel_schedule_csv: AnyPath = ""
    """A CSV file with a schedule: a row per process, a cell per time slot, such as 0F1 (stage 0, forward,
    microbatch 1), 0B1 (backward), or 0I1 and 0W1 (its two halves)."""
    pipeline_parallel_microbatch_size: Positive = 1
    """Sequences per pipeline microbatch."""
    context_parallel_degree: Positive = 1
    """Devices over which each sequence is split; 1 is off."""
    context_parallel_rotate_method: Literal["allgather", "alltoall"] = "allgather"
    """The exchange of keys and values: all at once (allgather), or one process's at a time (alltoall, less memory)."""
    expert_parallel_degree: Positive = 1
    """Devices over which the experts of a mixture are split; 1 is off. They are those of data_parallel_shard, context
    and tensor parallelism: it must divide their product. Tokens travel to their experts and back."""
    expert_tensor_parallel_degree: int = 1
    module_fqns_per_model_part: object | None = None
    pipeline_parallel_first_stage_less_layers: int = 1
    pipeline_parallel_last_stage_less_layers: int = 1


@dataclass
class Checkpoint:
    enable_checkpoint: bool = False
    """Save checkpoints, and continue from the latest one in the run folder."""
    keep_model: bool = False
    """Without checkpoints, save the weights after the last step, in the folder model of the run folder. The next run in
    that folder moves them to earlier/, with the other files. (torchtitan does not have it.)"""
    folder: InnerFolder = "checkpoint"
    """The folder of the checkpoints, in the run folder."""
    initial_load_path: AnyPath | None = None
    """The start if the run folder has no checkpoint: a checkpoint of any run, a folder of checkpoints (the latest is
    used), a Hugging Face folder (config.json and *.safetensors), or a folder that torchtitan saved."""
    initial_load_model_weights_only: bool = True
    """Load only the weights from initial_load_path; false: load everything, and continue from its step."""
    initial_load_in_hf: bool = False
    """Insist that initial_load_path is a Hugging Face folder. Unless this is set, such a folder is recognized."""
    interval: Positive = 500
    """Save every N steps, and after the last step."""
    last_save_model_weights_only: bool = False
    """Save only the weights at the last step. (torchtitan's default is true. With false, a finished run
    can be continued.)"""
    export_dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    """The dtype of a weights-only last save."""
    last_save_in_hf: bool = False
    create_seed_checkpoint: bool = False
    """Save the initial weights as step 0, then end the run."""
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """Save while training continues, from a copy of the state in host memory; pinned memory is faster on GPUs."""
    keep_latest_k: NotNegative = 10
    """The number of latest checkpoints to keep; 0 keeps all."""
    load_step: LoadStep = -1
    """The step to continue from; -1: the latest. Later checkpoints are moved aside."""
    exclude_from_loading: list[Literal["optimizer", "lr_scheduler", "dataloader", "train_state", "tokenizer"]] = field(  # type: ignore[assignment]
        default_factory=list
    )
    """Parts that are not loaded: optimizer, lr_scheduler, dataloader, train_state (the step). The learning rate follows
    from the step, so lr_scheduler requires train_state. tokenizer: train the weights of initial_load_path with another
    one, model.tokenizer_path."""
    enable_first_step_checkpoint: bool = False
    """Save after the first step too."""
    verify: bool = True
    """Verify every file's checksum before loading; the log has the time that it took."""
    fallback: bool = False
    """If a checkpoint is damaged, continue from the one before it; false: end the run."""
    on_save_failure: Literal["continue", "stop"] = "continue"
    """The reaction to a checkpoint that cannot be written (disk full, folder deleted). An error at the end of a run."""


@dataclass
class ActivationCheckpoint:
    mode: Literal["none", "full", "selective", "auto"] = "selective"
    """none: keep all activations; full: recompute every block; selective: see selective_ac_option. auto: the first of
    none, selective "op", selective "2" and full whose estimated memory fits the device."""
    selective_ac_option: CheckpointOption = "2"
    """"op": recompute all but the results of the expensive operations; "N": recompute every Nth block."""
    chosen: str = ""
    """Informative: what auto has chosen, with its estimate, as config.toml of the run folder says it."""
    per_op_sac_force_recompute_mm_shapes_by_fqns: list[str] = field(default_factory=lambda: ["moe.router.gate"])


@dataclass
class Comm:
    init_timeout_seconds: Seconds = 300
    """The timeout of collectives until the first step is done."""
    train_timeout_seconds: Seconds = 100
    """The timeout of collectives after the first step."""
    trace_buf_size: Int32 = 20000
    """Entries of the NCCL flight recorder; 0 is off."""
    save_traces_folder: str = "comm_traces"


@dataclass
class MemoryEstimation:
    enabled: bool = False
    """Estimate the memory of a configuration instead of training."""
    device_gib: PositiveFloat = 79.0
    """The memory of a device, in GiB, for activation_checkpoint.mode = "auto" in an estimate: what torch finds on a GPU
    of 80 GB."""
    disable_fake_mode: bool = False


@dataclass
class FaultTolerance:
    enable: bool = False
    process_group: str = "gloo"
    process_group_timeout_ms: int = 10000
    replica_id: int = 0
    group_size: int = 0
    min_replica_size: int = 1
    semi_sync_method: str | None = None
    sync_steps: int = 5
    should_quantize: bool = False
    fragment_sync_delay: int = 0
    fragment_update_alpha: float = 0.0


@dataclass
class Experimental:
    custom_import: str = ""
    """A Python module to import first; it may register models, converters, optimizers and data sources."""
    custom_args_module: str = ""
    """A Python module whose dataclass JobConfig adds sections and keys to this one."""


MEMORY_BACKEND = "titanlite_memory"  # stands for inductor in estimates (titanlite.plan.compiled_memory)


@dataclass
class Compile:
    """Options that torchtitan of June 2025 does not have."""

    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """torch.compile's mode."""
    fullgraph: bool = True
    """Raise an error on a graph break in a block."""
    dynamic: bool | None = None
    """Dynamic shapes: true, false, or unset: torch.compile detects them."""
    backend: str = "inductor"
    """torch.compile's backend."""
    components: list[Literal["model", "loss"]] = field(default_factory=lambda: ["model", "loss"])  # type: ignore[assignment]
    """The parts that training.compile compiles."""
    block_fusion: bool = True
    """On GPUs: fuse by rules for transformer blocks, which move fewer bytes in fewer launches (docs/performance.md);
    false: by the compiler's own rules alone."""

    @property
    def fuses_blocks(self) -> bool:
        """True if the code for GPUs is fused by rules for transformer blocks."""
        return self.block_fusion and self.by_inductor

    @property
    def by_inductor(self) -> bool:
        """True if PyTorch's own compiler generates code, or an estimate counts the memory of that."""
        return self.backend in ("inductor", MEMORY_BACKEND)


@dataclass
class JobConfig:
    job: Job = field(default_factory=Job)
    profiling: Profiling = field(default_factory=Profiling)
    metrics: Metrics = field(default_factory=Metrics)
    model: Model = field(default_factory=Model)
    experts: Experts = field(default_factory=Experts)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    training: Training = field(default_factory=Training)
    data: Data = field(default_factory=Data)
    validation: Validation = field(default_factory=Validation)
    compile: Compile = field(default_factory=Compile)
    sample: Sample = field(default_factory=Sample)
    parallelism: Parallelism = field(default_factory=Parallelism)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    float8: Float8 = field(default_factory=Float8)
    int8: Int8 = field(default_factory=Int8)
    mx: MX = field(default_factory=MX)
    comm: Comm = field(default_factory=Comm)
    memory_estimation: MemoryEstimation = field(default_factory=MemoryEstimation)
    fault_tolerance: FaultTolerance = field(default_factory=FaultTolerance)
    experimental: Experimental = field(default_factory=Experimental)

    def __post_init__(self) -> None:
        self.origins: dict[str, str] = {}
        self.notices: list[str] = []  # of renamed options and replaced files, for the log
        self.run_config: Path | None = None  # the run folder's config.toml that this was loaded from

    def compile_options(self, component: Literal["model", "loss"]) -> Compile | None:
        """Return the options with which ``component`` is compiled; None if it is not."""
        return self.compile if self.training.compile and component in self.compile.components else None

    def section(self, name: str) -> Any:
        """Return the dataclass of a section; a section in another is "outer.inner"."""
        return functools.reduce(getattr, name.split("."), self)

    def value(self, name: str) -> Any:
        """Return the value of ``section.key``."""
        section, _, key = name.rpartition(".")
        return getattr(self.section(section), key)

    def origin(self, name: str) -> str:
        """Return the origin of ``section.key``, for messages: a file and line, an argument, or "the default"."""
        return self.origins.get(name, "the default")
