"""A configuration whose step takes about a second: with fewer blocks, or sequences, of the same size."""

from __future__ import annotations

import copy
import os

import torch

from titanlite.config import JobConfig
from titanlite.metrics.flops import flops_per_token
from titanlite.models.layers import DecoderArgs, ModelSize
from titanlite.plan.estimate import ASSUMED_VOCAB_SIZE
from titanlite.training.model_shape import choose_shape

_SECONDS = {"cpu": 1.0, "cuda": 0.5}
_LONGEST = 3.0  # seconds, above which a step is not measured
_PER_PARAMETER = 20  # bytes: float32 weights, gradients and moments, and a copy in 16 bits with its gradient
_SHARE = 3  # of the free memory, one part of so many may be taken


def depth_of(config: JobConfig) -> int:
    """Return the number of blocks of the configured model; 0 where a family does not call it so."""
    return getattr(choose_shape(config).flavor, "n_layers", 0)


def shallow(config: JobConfig, rate: float, device: torch.device) -> JobConfig | None:
    """Return ``config`` with as many blocks and sequences as a step of about a second takes; None if that of the fewest
    takes too long, or too much memory. Families other than decoders are left as they are.

    Args:
        rate: FLOP/s of a matmul.
    """
    config = copy.deepcopy(config)
    training, flavor = config.training, choose_shape(config).flavor
    if not isinstance(flavor, DecoderArgs):
        return config

    def seconds(depth: int) -> float:
        tokens = training.local_batch_size * training.seq_len
        return flops_per_token(size_of(config, depth), training.seq_len) * tokens / rate

    depth, least = flavor.n_layers, least_depth(config, flavor)
    while seconds(least) > _SECONDS[device.type] and training.local_batch_size > 1:
        training.local_batch_size //= 2
    while depth > least and seconds(depth) > _SECONDS[device.type]:
        depth = max(least, depth // 2)
    if seconds(depth) > _LONGEST or not has_room(config, depth, device):
        return None
    config.model.args.n_layers = depth
    return config


def least_depth(config: JobConfig, flavor: DecoderArgs) -> int:
    """Return the fewest blocks with which a model has all kinds of blocks: without and with experts, and with a block
    that activation checkpointing computes again."""
    least = 1 + (flavor.mixture.n_dense_layers if flavor.mixture else 0)
    checkpointing = config.activation_checkpoint
    if checkpointing.mode == "selective" and checkpointing.selective_ac_option.isdigit():
        least = max(least, min(flavor.n_layers, int(checkpointing.selective_ac_option)))  # every N-th block is
    return least


def has_room(config: JobConfig, depth: int, device: torch.device) -> bool:
    """Return whether the device has free memory for several models of ``depth`` blocks."""
    return _PER_PARAMETER * size_of(config, depth).params <= free_memory(device) / _SHARE


def size_of(config: JobConfig, depth: int) -> ModelSize:
    """Return the size of the configured decoder with ``depth`` blocks."""
    shape = choose_shape(config)
    flavor = shape.spec.resized(shape.flavor, {"n_layers": depth})
    args = shape.spec.configure(flavor, flavor.vocab_size or ASSUMED_VOCAB_SIZE, config.training.seq_len)
    with torch.device("meta"):
        size: ModelSize = shape.spec.build(args).size()  # type: ignore[operator]
    return size


def free_memory(device: torch.device) -> int:
    """Return the bytes of the device, or of this machine, that nobody has taken."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
