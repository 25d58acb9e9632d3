"""Activation checkpointing: save fewer results in forward, and recompute the others in backward."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titanlite.config.schema import ActivationCheckpoint
from titanlite.distributed.attend_apart import ATTEND_APART
from titanlite.distributed.expert_parallel import EXCHANGES
from titanlite.models.layers import GROUPED_MATMULS
from titanlite.quant.kept import MATMULS, SMALL_RESULTS

# Compiled, "op" makes it warn of in-place operations, which blocks do not have (models/spec.py).
logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)

# The "op" policy saves results that are expensive to compute, and every second matmul, which halves their memory for a
# quarter more compute (torchtitan's policy of June 2025).
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    ATTEND_APART,
}
# The choice of experts: recomputed with another rounding, it could differ from the one whose results are saved.
_CHOICES = {torch.ops.aten.topk.default, torch.ops.aten.sort.stable}
_COMMUNICATION = {
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_reduce.default,
    *EXCHANGES,
}


def apply_activation_checkpoint(blocks: nn.ModuleDict, options: ActivationCheckpoint) -> None:
    """Fill the slot ``run`` of each block that ``options`` selects. The names of the blocks are their numbers in the
    whole model, from 0."""
    per_op = {"context_fn": _op_contexts} if options.mode == "selective" and _is_per_op(options) else {}
    for name in checkpointed_blocks(blocks, options):
        _wrap(blocks[name], **per_op)


def checkpointed_blocks(names: Iterable[str], options: ActivationCheckpoint) -> list[str]:
    """Return those of the block ``names``, which are numbers, that ``options`` selects."""
    if options.mode == "none":
        return []
    if options.mode == "auto":
        raise ValueError('activation_checkpoint.mode = "auto" has not been resolved (titanlite.plan.auto_checkpoint)')
    every = 1 if options.mode == "full" or _is_per_op(options) else int(options.selective_ac_option)
    return [name for name in names if (int(name) + 1) % every == 0]


def _is_per_op(options: ActivationCheckpoint) -> bool:
    return options.selective_ac_option == "op"


def _wrap(block: Any, **kwargs: Any) -> None:
    run = block.run or block.compute
    block.run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _op_contexts() -> Any:
    """Return the contexts of one forward and its recomputation; both count their matmuls from 0."""
    matmuls: dict[str, int] = defaultdict(int)

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in MATMULS or op in GROUPED_MATMULS:
            phase = "recompute" if context.is_recompute else "forward"
            matmuls[phase] += 1
            keep = matmuls[phase] % 2 == 1
        else:
            keep = op in _ATTENTION or op in _COMMUNICATION or op in _CHOICES or op in SMALL_RESULTS
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
