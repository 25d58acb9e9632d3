"""What is done to the blocks of a model one by one: activation checkpointing and compile."""

from __future__ import annotations

from torch import nn

from titanlite.config import JobConfig
from titanlite.distributed.activation_checkpoint import apply_activation_checkpoint
from titanlite.distributed.compile import compile_blocks
from titanlite.distributed.mesh import Mesh


def checkpoint_and_compile(blocks: nn.ModuleDict, mesh: Mesh, config: JobConfig) -> dict[str, str]:
    """Apply what [activation_checkpoint] and [compile] ask for, in place; returns what was done, for the log.

    The compiler sees the checkpointed block, so that what is computed again is fused with the backward. Only where
    whole blocks of DTensors are computed again, it is the compiled block that is checkpointed: the compiler would save
    the DTensors' mesh for backward, and take it for a tensor (torch 2.13: "expected all tensors_saved_with_vc_check to
    be Tensors").
    """
    options, done = config.activation_checkpoint, {}
    compiling = config.training.compile and "model" in config.compile.components
    per_op = options.mode == "selective" and options.selective_ac_option == "op"
    compile_first = compiling and mesh.tp.size() > 1 and not per_op
    if compile_first:
        compile_blocks(blocks, config.compile)
    done["activation checkpointing"] = apply_activation_checkpoint(blocks, options)
    if compiling and not compile_first:
        compile_blocks(blocks, config.compile)
    if compiling:
        done["compile"] = f"{len(blocks)} blocks, {config.compile.backend}"
    return done
