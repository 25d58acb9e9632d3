"""The state of a training process in a checkpoint: a dictionary of tensors named ``model.<name>``,
``optimizer.<name>.<key>`` and ``random.<rank>.<generator>``. The tensors of the model and the optimizer are references,
not copies: a write to them changes the model or the optimizer."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from titanlite.quant.fsdp import plain

State = dict[str, Tensor]


def model_state(parts: Iterable[nn.Module]) -> State:
    """Return parameters and persistent buffers. ``parts`` is the model, or the pipeline stages of this process."""
    return {f"model.{name}": tensor for part in parts for name, tensor in part.state_dict().items()}


def buffer_names(parts: Iterable[nn.Module]) -> set[str]:
    """Return the names in :func:`model_state` that belong to buffers."""
    names = set()
    for part in parts:
        parameters = {name for name, _ in part.named_parameters(remove_duplicate=False)}
        names |= {f"model.{name}" for name in part.state_dict() if name not in parameters}
    return names


def optimizer_state(optimizer: torch.optim.Optimizer, parts: Iterable[nn.Module]) -> State:
    """Return the optimizer state of each parameter. Hyperparameters are not saved; they come from the configuration."""
    state = {}
    for part in parts:
        for name, param in part.named_parameters():
            for key, value in optimizer.state.get(param, {}).items():
                assert isinstance(value, Tensor), f"optimizer state {key} of {name} is no tensor: {value}"
                state[f"optimizer.{name}.{key}"] = plain(value)
    return state


def prepare_optimizer(optimizer: torch.optim.Optimizer, parts: Iterable[nn.Module], saved: Iterable[str]) -> None:
    """Make the optimizer create its state, to load into, by a step with zero gradients at learning rate 0.

    Only parameters with state in ``saved`` get a gradient, because a parameter without gradients has no state. If
    ``saved`` has none at all, every parameter gets one, so that an optimizer with state shows up as another optimizer.
    """
    with_state = {name.removeprefix("optimizer.").rpartition(".")[0] for name in saved if name.startswith("optimizer.")}
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for part in parts:
        for name, param in part.named_parameters():
            param.grad = torch.zeros_like(param) if name in with_state or not with_state else None
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate


def random_state(rank: int, device: torch.device) -> State:
    """Return copies of the states of the random generators of this process."""
    version, numbers, gauss = random.getstate()
    assert version == 3
    numpy_state: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = numpy_state
    assert name == "MT19937"
    state = {
        "torch": torch.get_rng_state(),
        # The cached Gaussian is a float64; NaN means that there is none.
        "python": torch.tensor(numbers, dtype=torch.int64),
        "python_gauss": torch.tensor(float("nan") if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return {f"random.{rank}.{name}": tensor for name, tensor in state.items()}


def set_random_state(state: Mapping[str, Tensor], rank: int, device: torch.device) -> None:
    """Restore the generators from :func:`random_state`; generators that are not in ``state`` stay unchanged."""
    local = {name.rpartition(".")[2]: tensor for name, tensor in state.items() if name.startswith(f"random.{rank}.")}
    if not local:
        return
    torch.set_rng_state(local["torch"])
    gauss = local["python_gauss"].item()
    random.setstate((3, tuple(local["python"].tolist()), None if gauss != gauss else gauss))
    *keys, position, has_gauss = local["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, local["numpy_gauss"].item()))
    if "cuda" in local:
        torch.cuda.set_rng_state(local["cuda"], device)


def differences(saved: Mapping[str, torch.Size], state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Return the names in ``state`` that were not saved, and one line for each tensor whose saved shape differs."""
    missing = [name for name in state if name not in saved]
    mismatches = [
        f"{name} is {tuple(tensor.shape)}, was {tuple(saved[name])}"
        for name, tensor in state.items()
        if name in saved and saved[name] != tensor.shape
    ]
    return missing, mismatches


def local_part(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the part of ``tensor`` that this process holds, without gradients, and its offset in the whole tensor."""
    data = tensor.detach()
    if not isinstance(data, DTensor):
        return data, (0,) * data.dim()
    shape, offset = compute_local_shape_and_global_offset(data.shape, data.device_mesh, data.placements)
    local = data.to_local()
    assert local.shape == tuple(shape), (local.shape, shape)
    return local, tuple(offset)


def local_bytes(state: Mapping[str, Tensor]) -> int:
    """Return the bytes of ``state`` that this process holds."""
    tensors = (t.to_local() if isinstance(t, DTensor) else t for t in state.values())
    return sum(t.numel() * t.element_size() for t in tensors)
