"""Every option of titanlite: one dataclass per TOML section, one field per key.

The string under a field is its help text. Sections, keys and defaults are torchtitan's of June 2025, so that
its TOML files of that time load unchanged; what differs says so. This file is data: no logic, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Annotated, Any, Literal, NamedTuple


class Rule(NamedTuple):
    """A condition on a value, carried by its type: ``text`` completes the sentence "must be ..."."""

    text: str
    holds: Callable[[Any], bool]


Positive = Annotated[int, Rule("at least 1", lambda v: v >= 1)]
NotNegative = Annotated[int, Rule("0 or more", lambda v: v >= 0)]
PositiveOrAuto = Annotated[int, Rule("at least 1, or -1 to infer it", lambda v: v >= 1 or v == -1)]
Percentage = Annotated[float, Rule("more than 0 and below 100", lambda v: 0 < v < 100)]
Fraction = Annotated[float, Rule("between 0 and 1", lambda v: 0 <= v <= 1)]
Beta = Annotated[float, Rule("at least 0 and below 1", lambda v: 0 <= v < 1)]
NotNegativeFloat = Annotated[float, Rule("0 or more", lambda v: v >= 0)]
PositiveFloat = Annotated[float, Rule("more than 0, and finite", lambda v: 0 < v < math.inf)]


def _is_inner(value: str) -> bool:
    path = PurePath(value)
    return path.parts != () and not path.is_absolute() and ".." not in path.parts


InnerFolder = Annotated[str, Rule("the relative path of a folder inside the run folder", _is_inner)]


def _is_ac_option(value: str) -> bool:
    return value == "op" or (value.isdecimal() and int(value) >= 1)


@dataclass
class Job:
    config_file: str | None = None
    """The TOML file to start from. A file may name another one to build on: base = "other.toml"."""
    dump_folder: str = "./outputs"
    """The run folder: config.toml, metrics.jsonl, tb/, profiles. One job, one folder."""
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
    """Where the traces go, under the run folder."""
    profile_freq: Positive = 10
    """The period of traces and memory snapshots, in steps: they are of its last step. Traces are recorded after three
    steps of warm-up."""
    enable_memory_snapshot: bool = False
    """Write what is allocated, with the stacks that asked for it, for pytorch.org/memory_viz, one file per rank and
    period, and when memory runs out. On GPUs alone."""
    save_memory_snapshot_folder: InnerFolder = "memory_snapshot"
    """Where the snapshots go, under the run folder."""


@dataclass
class Metrics:
    log_freq: Positive = 10
    """Log every this many steps."""
    enable_tensorboard: bool = True
    """Write TensorBoard events. (torchtitan's default is false.)"""
    disable_color_printing: bool = False
    """No colors on the console, even where it is a terminal."""
    save_tb_folder: InnerFolder = "tb"
    """Where TensorBoard events go, under the run folder."""
    save_for_all_ranks: bool = False
    """TensorBoard events from every rank (tb/rank_N), not from rank 0 alone."""
    enable_wandb: bool = False
    """Log to Weights & Biases."""


@dataclass
class Model:
    name: str = "llama3"
    """The model family: a package under models/, or one registered by experimental.custom_import."""
    flavor: str = "debugmodel"
    """The size of the model, one of the family's flavors."""
    tokenizer_path: str = ""
    """A Hugging Face tokenizer.json (or its folder), or a Llama 3 tokenizer.model. Empty: the small BPE
    that titanlite ships."""
    converters: list[str] = field(default_factory=list)
    """Converters to apply to the model, in this order, after it is built and before it is sharded."""
    print_after_conversion: bool = False
    """Log the model's modules after the converters have run."""


@dataclass
class Optimizer:
    name: str = "AdamW"
    """AdamW or Adam, or one registered by experimental.custom_import."""
    lr: PositiveFloat = 8e-4
    """The peak learning rate."""
    beta1: Beta = 0.9
    """The decay of the average of gradients."""
    beta2: Beta = 0.95
    """The decay of the average of squared gradients."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator of the update."""
    weight_decay: NotNegativeFloat = 0.1
    """Weight decay, of every parameter as in torchtitan."""
    implementation: Literal["fused", "foreach", "for-loop"] = "fused"
    """fused: one kernel for all parameters; foreach: one per operation; for-loop: one per parameter."""
    early_step_in_backward: bool = False
    """Step each parameter as soon as its gradient is there."""


@dataclass
class LRScheduler:
    warmup_steps: NotNegative = 200
    """The learning rate rises linearly over this many steps."""
    decay_ratio: Fraction | None = None
    """The last part of the run, as a fraction of its steps, over which the learning rate decays. Unset: all
    that follows the warm-up; 0: no decay."""
    decay_type: str = "linear"
    """The shape of the decay: linear, sqrt (1 - sqrt(progress)), cosine, or one that custom_import registers."""
    lr_min: Fraction = 0.0
    """The learning rate at the end, as a fraction of optimizer.lr."""


@dataclass
class Training:
    dataset: str = "pystdlib"
    """The data source: pystdlib (the Python standard library's own source text), text, json, parquet, or a
    hub set (c4, fineweb_edu). (torchtitan's default is c4_test.)"""
    dataset_path: str | None = None
    """The file, folder or glob that text, json and parquet read; for a hub set, a local copy of it."""
    local_batch_size: Positive = 8
    """Sequences per device and microbatch."""
    global_batch_size: PositiveOrAuto = -1
    """Sequences per optimizer step over all devices; more than local_batch_size times the data-parallel
    degree accumulates gradients. -1: exactly that product."""
    seq_len: Positive = 2048
    """Tokens per sequence."""
    max_norm: PositiveFloat = 1.0
    """The gradient norm above which gradients are scaled down to it."""
    steps: Positive = 10000
    """Optimizer steps."""
    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory."""
    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """The dtype of parameters and activations in forward and backward; master weights are float32. The same
    on one device as on many."""
    mixed_precision_reduce: Literal["float32"] = "float32"
    """The dtype in which gradients are reduced."""
    compile: bool = False
    """torch.compile the model block by block, and the loss; see [compile]."""
    gc_freq: Positive = 50
    """Collect Python's garbage every this many steps, on all ranks at once, and never in between."""
    gc_debug: bool = False
    """Log what each garbage collection found."""
    seed: NotNegative | None = None
    """The seed of weights, data order and everything random. Unset: drawn, logged, and written to
    config.toml."""
    deterministic: bool = False
    """Use deterministic algorithms alone: two runs give byte-identical losses."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """A loss or gradients that are not finite, or a spike of the loss: stop with an error, or skip the update, which
    leaves parameters and optimizer state as they are, and go on. Where optimizer.implementation is not fused, skip
    makes every step wait for the device."""
    spike_sigmas: NotNegativeFloat = 6.0
    """A spike is a loss more than this many standard deviations above the mean of the last 128 good steps (and there
    is none before there are as many); 0: nothing is a spike."""
    max_skipped_in_a_row: Positive = 10
    """Under on_bad_step = skip: stop at this many skipped steps in a row."""


@dataclass
class Parallelism:
    data_parallel_replicate_degree: Positive = 1
    """Groups of devices that hold the same shards (HSDP); 1 is off."""
    data_parallel_shard_degree: PositiveOrAuto = -1
    """Devices over which FSDP2 shards the model; -1: all that the other degrees leave."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Free a block's gathered parameters after its forward: default is always, except under pipeline
    parallelism and with one shard, unless that is in host memory: gathering it is but copies."""
    enable_compiled_autograd: bool = False
    """Compile the backward with compiled autograd."""
    tensor_parallel_degree: Positive = 1
    """Devices over which each layer is split; 1 is off."""
    disable_loss_parallel: bool = False
    """Gather the logits before the loss under tensor parallelism."""
    enable_async_tensor_parallel: bool = False
    """Overlap tensor parallelism's communication with its matmuls (needs compile and NVLink)."""
    pipeline_parallel_degree: Positive = 1
    """Devices over which the layers are split; 1 is off."""
    pipeline_parallel_split_points: list[str] = field(default_factory=list)
    """The modules that begin a stage, for example layers.2,layers.4."""
    pipeline_parallel_layers_per_stage: Positive | None = None
    """Layers per pipeline stage, where no split points are given. Neither: stages of about the same work."""
    pipeline_parallel_schedule: str = "1F1B"
    """The pipeline schedule: 1F1B, GPipe, Interleaved1F1B, LoopedBFS, InterleavedZeroBubble, ZBVZeroBubble; or
    PipelineScheduleMulti, which pipeline_parallel_schedule_csv describes."""
    pipeline_parallel_schedule_csv: str = ""
    """A CSV file with a schedule: a row per process, a cell per time slot, such as 0F1 (stage 0, forward,
    microbatch 1), 0B1 (backward), or 0I1 and 0W1 (its two halves)."""
    pipeline_parallel_microbatch_size: Positive = 1
    """Sequences per pipeline microbatch."""
    context_parallel_degree: Positive = 1
    """Devices over which each sequence is split; 1 is off."""
    context_parallel_rotate_method: Literal["allgather", "alltoall"] = "allgather"
    """How context parallelism exchanges keys and values: all at once, or one process's at a time (less memory)."""


@dataclass
class Checkpoint:
    enable_checkpoint: bool = False
    """Save checkpoints, and continue from the latest one in the run folder."""
    folder: InnerFolder = "checkpoint"
    """Where checkpoints go, under the run folder."""
    initial_load_path: str | None = None
    """Where to start from when the run folder has no checkpoint: a checkpoint of any run (or the folder of several, for
    the latest), or a Hugging Face folder (config.json and *.safetensors)."""
    initial_load_model_weights_only: bool = True
    """Take only the weights from initial_load_path; false: everything, and go on from its step."""
    interval: Positive = 500
    """Save every this many steps; the last step is saved too."""
    last_save_model_weights_only: bool = False
    """Save only the weights at the last step. (torchtitan's default is true; false lets a finished run be
    continued.)"""
    export_dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    """The dtype of a weights-only last save."""
    create_seed_checkpoint: bool = False
    """Save the initial weights as step 0 and end."""
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """Save beside training, from a copy of the state in host memory; pinned is faster on GPUs."""
    keep_latest_k: NotNegative = 10
    """Keep this many checkpoints; 0 keeps all."""
    load_step: Annotated[int, Rule("0 or more, or -1 for the latest", lambda v: v >= -1)] = -1
    """The step to continue from, later ones are set aside; -1: the latest."""
    exclude_from_loading: list[Literal["optimizer", "lr_scheduler", "dataloader", "train_state"]] = field(  # type: ignore[assignment]
        default_factory=list
    )
    """Parts not to load, of optimizer, lr_scheduler, dataloader, train_state (the step). The schedule of the learning
    rate follows from the step, so lr_scheduler goes with train_state."""
    enable_first_step_checkpoint: bool = False
    """Save after the first step too."""
    verify: bool = True
    """Compare every file's checksum before loading; the log says how long it took."""
    fallback: bool = False
    """Continue from the checkpoint before a damaged one; otherwise damage ends the run."""
    on_save_failure: Literal["continue", "stop"] = "continue"
    """What to do when a checkpoint cannot be written (disk full, folder gone). At the end of a run it is an error."""


@dataclass
class ActivationCheckpoint:
    mode: Literal["none", "full", "selective"] = "selective"
    """none: keep all activations; full: recompute every block; selective: see selective_ac_option."""
    selective_ac_option: Annotated[str, Rule('"op", or a whole number from 1 as a string', _is_ac_option)] = "2"
    """"op": recompute all but the results of the expensive operations; "N": recompute every Nth block."""


ScalingTypeName = Literal["dynamic", "delayed", "static"]


@dataclass
class Float8:
    """Of the converter ``float8``; docs/float8.md says what each option costs."""

    enable_fsdp_float8_all_gather: bool = False
    """Gather FSDP's weights in float8: one byte per element, quantized once per optimizer step."""
    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Compute the scales of all gathered weights at once after the optimizer step, with one all-reduce."""
    force_recompute_fp8_weight_in_bwd: bool = False
    """Keep no quantized weight between forward and backward: less memory, one more quantization."""
    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """The float8 recipe; unset is tensorwise."""
    filter_fqns: list[str] = field(default_factory=list)
    """Layers to leave in high precision, by whole parts of their names; auto_filter_small_kn: too small ones."""
    emulate: bool = False
    """Multiply the quantized values in float32; where there are no float8 units this is done anyway."""
    kernels: Literal["auto", "triton", "inductor"] = "auto"
    """What casts on float8 units: titanlite's Triton kernels, the compiler's own, or what is faster (auto)."""
    scaling_type_input: ScalingTypeName = "dynamic"
    """Scale of the inputs: from the tensor itself, from the steps before (delayed), or a constant (static)."""
    scaling_type_weight: ScalingTypeName = "dynamic"
    """Scale of the weights."""
    scaling_type_grad_output: ScalingTypeName = "dynamic"
    """Scale of the gradients."""
    static_scale_input: PositiveFloat | None = None
    """What inputs are multiplied with under static scaling: 448 / (the largest value expected)."""
    static_scale_weight: PositiveFloat | None = None
    """The same for weights."""
    static_scale_grad_output: PositiveFloat | None = None
    """The same for gradients: 57344 / (the largest value expected)."""


@dataclass
class MX:
    recipe_name: str = "mxfp8"
    """The MX recipe."""
    filter_fqns: list[str] = field(default_factory=lambda: ["output"])
    """Layers to leave in high precision, by name."""


@dataclass
class Comm:
    init_timeout_seconds: Positive = 300
    """The timeout of collectives until the first step is done."""
    train_timeout_seconds: Positive = 100
    """The timeout of collectives after the first step."""
    trace_buf_size: NotNegative = 20000
    """Entries of the NCCL flight recorder; 0 is off."""


@dataclass
class MemoryEstimation:
    enabled: bool = False
    """Estimate the memory of a configuration instead of training."""
    disable_fake_mode: bool = False
    """Estimate with real tensors."""


@dataclass
class FaultTolerance:
    enable: bool = False
    """Fault tolerance through torchft."""
    replica_id: NotNegative = 0
    """This replica's number."""
    group_size: NotNegative = 0
    """The number of replicas."""
    min_replica_size: Positive = 1
    """The fewest replicas to go on with."""
    semi_sync_method: str | None = None
    """Semi-synchronous training: local_sgd or diloco."""
    sync_steps: Positive = 5
    """Steps between synchronizations under semi_sync_method."""


@dataclass
class Experimental:
    custom_import: str = ""
    """A Python module to import first; it may register models, converters, optimizers and data sources."""
    custom_args_module: str = ""
    """A Python module whose dataclass JobConfig adds sections and keys to this one."""


@dataclass
class Compile:
    """Not in torchtitan's of June 2025."""

    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """torch.compile's mode."""
    fullgraph: bool = True
    """A graph break in a block is an error."""
    dynamic: bool | None = None
    """Dynamic shapes: true, false, or unset for what torch.compile finds."""
    backend: str = "inductor"
    """torch.compile's backend."""
    components: list[Literal["model", "loss"]] = field(default_factory=lambda: ["model", "loss"])  # type: ignore[assignment]
    """What training.compile compiles."""


@dataclass
class Data:
    """Not in torchtitan's of June 2025."""

    text_field: str = "text"
    """The field of a json or parquet document that holds its text."""
    on_corrupt: Literal["stop", "skip"] = "stop"
    """A document that cannot be read: stop with its file and line, or skip and count it."""


@dataclass
class Validation:
    """Not in torchtitan's of June 2025."""

    enable: bool = False
    """Compute the loss, and bits per byte, of text that training never sees."""
    dataset: str = ""
    """The data source to validate on. Empty, or with dataset_path the same as training's: documents of the training
    data that are held out from training. One that shares files with the training data is refused."""
    dataset_path: str | None = None
    """The files of that source. Unset with an empty dataset: the training data's."""
    interval: Positive = 100
    """Validate after every this many steps, and after the last one."""
    steps: Positive = 10
    """Batches of a validation, each as large as training's: the same in every validation. Fewer where the text, read
    once, has no more."""
    held_out_percent: Percentage = 1.0
    """The share of the training data's documents that is held out; a hash of its text says whether a document is."""
    precision: Literal["as_trained", "bfloat16"] = "as_trained"
    """bfloat16: compute layers that train in float8 in bfloat16 instead."""


@dataclass
class Sample:
    """Not in torchtitan's of June 2025."""

    enable: bool | None = None
    """When the last step is done, log how the model continues a prompt. Each token takes a forward, for which FSDP
    gathers all parameters. Unset: for models of up to a billion. Not under pipeline or context parallelism."""
    prompt: str | None = None
    """The text to continue; empty begins a document. Unset: import for pystdlib, empty for other data."""
    max_new_tokens: Positive = 64
    """The length of the sample, in tokens, of which training.seq_len leaves no more than fit behind the prompt."""


@dataclass
class JobConfig:
    job: Job = field(default_factory=Job)
    profiling: Profiling = field(default_factory=Profiling)
    metrics: Metrics = field(default_factory=Metrics)
    model: Model = field(default_factory=Model)
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
    mx: MX = field(default_factory=MX)
    comm: Comm = field(default_factory=Comm)
    memory_estimation: MemoryEstimation = field(default_factory=MemoryEstimation)
    fault_tolerance: FaultTolerance = field(default_factory=FaultTolerance)
    experimental: Experimental = field(default_factory=Experimental)

    def __post_init__(self) -> None:
        self.origins: dict[str, str] = {}

    def origin(self, name: str) -> str:
        """Where ``section.key`` got its value, for messages: a file and line, an argument, or "the default"."""
        return self.origins.get(name, "the default")
