"""Weights that are stored quantized, in checkpoints: ``<name>`` is the data, ``<name>_scale`` the scales of the rows.

A model of any precision can be filled from a checkpoint of any precision: what is quantized on one side only is
quantized, or dequantized, as it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from titanlite.checkpoint.metadata import SavedTensor
from titanlite.checkpoint.state import local_part
from titanlite.quant.stored import SCALES, beside, stored_parts, stored_weight

Copy = Callable[[Mapping[str, Tensor], Mapping[str, SavedTensor]], None]


def as_plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state`` with the data and the scales of weights that are stored quantized, as plain tensors."""
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if stored_weight(tensor) is None:
            plain[name] = tensor
        else:
            plain[name], plain[f"{name}{SCALES}"] = stored_parts(tensor)
    return plain


def copy_any(state: Mapping[str, Tensor], saved: Mapping[str, SavedTensor], copy: Copy) -> None:
    """Copy saved tensors into those of ``state`` by ``copy``, which takes plain tensors; see the module.

    Under tensor parallelism that splits the rows of stored weights, all its ranks must call this.
    """
    quantize = {name for name, tensor in state.items() if stored_weight(tensor) is not None and not _scale(saved, name)}
    dequantize = {name for name, tensor in state.items() if stored_weight(tensor) is None and _scale(saved, name)}
    scales = {f"{name}{SCALES}": scale for name in saved if (scale := _scale(saved, name))}
    copy(as_plain({name: tensor for name, tensor in state.items() if name not in quantize}), {**saved, **scales})
    for name in dequantize:
        target = local_part(state[name])
        factors = torch.empty(target.shape[0], 1, device=target.device)
        copy({f"{name}{SCALES}": beside(state[name], factors, 1)}, scales)
        target.copy_(target.float() * factors)
    for name in sorted(quantize):  # one in high precision at a time
        weight = stored_weight(state[name])
        assert weight is not None
        values = torch.empty(weight.shape, device=weight.device)
        copy({name: beside(state[name], values, state[name].shape[1])}, saved)
        weight.write(values)


def _scale(saved: Mapping[str, SavedTensor], name: str) -> SavedTensor | None:
    return saved[name].scale if name in saved else None
