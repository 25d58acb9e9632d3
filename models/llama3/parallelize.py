"""How a Llama 3 is spread over devices: activation checkpointing, compile per block, FSDP2, in this order."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from models.llama3.model import Llama3
from titanlite.config import JobConfig
from titanlite.distributed.activation_checkpoint import apply_activation_checkpoint
from titanlite.distributed.compile import compile_blocks
from titanlite.distributed.data_parallel import apply_fsdp


def parallelize(model: nn.Module, mesh: DeviceMesh, config: JobConfig) -> dict[str, str]:
    """Apply what ``config`` asks for to ``model`` in place; returns what was done, for the log."""
    assert isinstance(model, Llama3)
    done = {"activation checkpointing": apply_activation_checkpoint(model.layers, config.activation_checkpoint)}
    if config.training.compile and "model" in config.compile.components:
        compile_blocks(model.layers, config.compile)
        done["compile"] = f"{len(model.layers)} blocks, {config.compile.backend}"
    groups: list[list[nn.Module]] = [[layer] for layer in model.layers.values()]
    # A tied embedding belongs to both ends of the model: the root gathers it, once for forward and backward.
    if not model.args.tie_embeddings:
        groups = [[model.tok_embeddings], *groups, [model.norm, model.output]]
    apply_fsdp(model, mesh, config, groups=groups)
    done["FSDP2"] = f"{mesh['dp_shard'].size()} processes, {config.training.mixed_precision_param} parameters"
    return done
