"""FSDP2: parameters, gradients and optimizer state sharded over the mesh's ``dp_shard`` dimension."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from titanlite.config import JobConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def apply_fsdp(model: nn.Module, mesh: DeviceMesh, config: JobConfig, *, groups: Iterable[list[nn.Module]]) -> None:
    """Shard ``model`` in place.

    Args:
        mesh: with a dimension ``dp_shard``; of size 1 it still brings the mixed precision, so that one device computes
            what many do.
        groups: modules gathered together, in the order of the forward; the last one is needed again at the start of
            the backward, so it is kept gathered unless ``fsdp_reshard_after_forward`` is "always".
    """
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[config.training.mixed_precision_param],
        reduce_dtype=DTYPES[config.training.mixed_precision_reduce],
        # Activations have the parameters' dtype already; what else a block is given, such as the rotary table, is in
        # float32 because it has to be.
        cast_forward_inputs=False,
    )
    reshard = config.parallelism.fsdp_reshard_after_forward
    groups = list(groups)
    for i, modules in enumerate(groups):
        keep = reshard == "never" or (reshard == "default" and i == len(groups) - 1)
        fully_shard(modules, mesh=mesh["dp_shard"], mp_policy=policy, reshard_after_forward=not keep)
    fully_shard(model, mesh=mesh["dp_shard"], mp_policy=policy, reshard_after_forward=reshard == "always")
