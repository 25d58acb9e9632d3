"""The least memory that a run needs, from its options alone, to refuse what cannot fit before anything is allocated.

Every part is a lower bound: what a step holds at one moment, without temporaries, padding and fragmentation.
:mod:`titanlite.plan.estimate` counts temporaries and padding too, but must run a step for it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from titanlite.config import Degrees, JobConfig, global_batch_size, resolve_degrees
from titanlite.config.number_formats import least_weight_bytes
from titanlite.config.refuse import refuse
from titanlite.distributed.activation_checkpoint import checkpointed_blocks
from titanlite.errors import ConfigError, counted
from titanlite.metrics.device import GIB, host_memory, total_memory
from titanlite.models.layers import DecoderArgs, ModelSize
from titanlite.models.spec import ModelSpec
from titanlite.optim.moments import bytes_per_element
from titanlite.training.model_shape import choose_shape

_INT64 = 8
_PER_SEQUENCE = 64  # bytes of Python's objects for each sequence of a global batch


@dataclass
class Least:
    """The bytes that one process needs at least, by what for.

    Attributes:
        weights, gradients, optimizer: its shard of them, in float32 where no option says otherwise.
        step: what a step holds beside weights and optimizer state, at the end of its forward.
        batch: the tokens of a global batch, on the host.
    """

    weights: int
    gradients: int
    optimizer: int
    step: dict[str, int] = field(default_factory=dict)
    batch: int = 0

    @property
    def state(self) -> int:
        """Weights, gradients and optimizer state, before the optimizer's step."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """The larger of two moments: before the optimizer's step, and at the end of the forward."""
        return max(self.state, self.weights + self.optimizer + sum(self.step.values()))

    def offloaded(self) -> Least:
        """Return what is left on a GPU with training.enable_cpu_offload."""
        return replace(self, weights=0, gradients=0, optimizer=0)


def least_memory(config: JobConfig, size: ModelSize, args: Any, degrees: Degrees) -> Least:
    """Return the least memory of a process of the run. ``args`` are the model's configured arguments."""
    training, shards = config.training, degrees.model_shards
    moments = 2 if config.optimizer.name in ("Adam", "AdamW") else 0
    optimizer = round(moments * bytes_per_element(config.optimizer.moments) * size.params) // shards
    tp, pp = degrees.tensor_parallel, degrees.pipeline_parallel
    dtype_bytes = 2 if training.mixed_precision_param == "bfloat16" else 4
    microbatch = training.local_batch_size if pp == 1 else config.parallelism.pipeline_parallel_microbatch_size
    tokens = microbatch * training.seq_len // degrees.context_parallel
    kept = _kept_elements(config, size, args) // pp
    activations = tokens * kept * dtype_bytes // tp
    sharded = tp > 1 and not config.parallelism.disable_loss_parallel
    logits = tokens * size.vocab_size // (tp if sharded or training.loss_chunks > 1 else 1) // training.loss_chunks
    logits *= _bytes_per_logit(config, dtype_bytes, sharded=tp > 1)
    rotary = 2 * 4 * training.seq_len * (args.rotary_size if isinstance(args, DecoderArgs) else size.head_dim)
    step = {f"activations of {counted(size.layers, 'block')}": activations, "logits": logits, "rotary table": rotary}
    if pp > 1:  # the last stage has the logits, and other stages may have all the blocks
        step = dict([max(step.items(), key=lambda part: part[1])])
    sequences = global_batch_size(config, degrees.data_parallel) // degrees.data_parallel
    return Least(
        # Which layers are converted is not known here: all of them may be.
        weights=least_weight_bytes(config) * size.params // shards,
        gradients=4 * size.params // shards,
        optimizer=optimizer if training.steps > 1 else 0,  # a first step has none before its end
        step=step,
        batch=sequences * (2 * _INT64 * training.seq_len + _PER_SEQUENCE),
    )


def _kept_elements(config: JobConfig, size: ModelSize, args: Any) -> int:
    """Return the numbers that all blocks keep for backward, for each token: the inputs of the blocks; of a decoder's
    block that is not recomputed also the second norm's, attention's and the feed-forward's."""
    checkpointing = config.activation_checkpoint
    whole = size.layers
    if checkpointing.mode != "none":
        whole -= len(checkpointed_blocks(map(str, range(size.layers)), checkpointing))
    inside = 0
    if isinstance(args, DecoderArgs):
        inside = args.dim + 2 * args.active_ffn_dim + args.attention_features
    return size.layers * size.dim + whole * inside


def _bytes_per_logit(config: JobConfig, dtype_bytes: int, *, sharded: bool) -> int:
    """Return the bytes of each logit at the end of the forward. The plain loss holds the logits, a copy in float32 and
    its softmax. One that is compiled, sharded or in chunks holds at least the logits; and its backward, their gradient
    beside them."""
    if sharded or config.training.loss_chunks > 1 or config.compile_options("loss") is not None:
        return 2 * dtype_bytes
    return 2 * 4 + (dtype_bytes if dtype_bytes != 4 else 0)


def _least_of(config: JobConfig, spec: ModelSpec, args: Any, degrees: Degrees) -> tuple[Least, ModelSize]:
    with torch.device("meta"):
        size: ModelSize = spec.build(args).size()  # type: ignore[operator]
    return least_memory(config, size, args, degrees), size


def least_peak(config: JobConfig, world_size: int, vocab_size: int) -> int:
    """Return the least memory of a device of the run, in bytes: a lower bound of its estimate, known at once."""
    shape, degrees = choose_shape(config), resolve_degrees(config.parallelism, world_size)
    args = shape.spec.configure(shape.flavor, vocab_size, config.training.seq_len)
    least, _ = _least_of(config, shape.spec, args, degrees)
    return (least.offloaded() if config.training.enable_cpu_offload else least).peak


def check_memory(config: JobConfig, spec: ModelSpec, args: Any, degrees: Degrees, device: torch.device) -> None:
    """Refuse a run that cannot fit, before its data are read and anything is allocated. ``args`` are the model's
    configured arguments.

    Raises:
        ConfigError: the device, or this machine, has less memory than :func:`least_memory`.
    """
    least, size = _least_of(config, spec, args, degrees)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type != "cuda":
        _check(config, least, least.peak + least.batch, processes, host_memory(), "machine", size)
        return
    offload = config.training.enable_cpu_offload
    of_gpu = least.offloaded() if offload else least
    _check(config, of_gpu, of_gpu.peak, 1, total_memory(device), "GPU", size)
    on_host = least.state if offload else 0
    _check(config, least, least.batch + on_host, processes, host_memory(), "machine", size)


def _check(
    config: JobConfig, least: Least, nbytes: int, processes: int, total: int, place: str, size: ModelSize
) -> None:
    if processes * nbytes <= total:
        return
    state = processes * least.state
    needs = f"at least {processes * nbytes / GIB:,.1f} GiB here"
    has = f"and this {place} has {total / GIB:,.1f} GiB"
    if state > total:
        raise ConfigError(
            f"its {size.params:,} parameters need {needs} ({least.state * processes / GIB:,.1f} for weights, gradients "
            f"and optimizer state, {4 * least.state // max(1, least.gradients)} bytes each), {has}: use more devices "
            "(NGPU), or a smaller flavor",
            key="model.flavor",
            value=config.model.flavor,
        )
    parts = {"weights and optimizer state": state, "the tokens of a global batch": processes * least.batch}
    parts |= {name: processes * n for name, n in least.step.items()}
    largest = sorted(parts, key=lambda name: -parts[name])[:3]
    shown = ", ".join(f"{parts[name] / GIB:,.1f} for {name}" for name in largest)
    batch = config.training.local_batch_size
    key = "training.local_batch_size" if batch > 1 and processes * nbytes <= total * batch else "training.seq_len"
    if least.batch > sum(least.step.values()):
        key = "training.global_batch_size"
    refuse(
        config,
        key,
        f"a step needs {needs} ({shown}), {has}: use fewer or shorter sequences, activation_checkpoint.mode = "
        '"full", or more devices (NGPU)',
    )
