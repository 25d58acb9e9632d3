"""What a checkpoint holds of a training process, as tensors by name: ``model.<name>``, ``optimizer.<name>.<key>`` and
``random.<rank>.<generator>``. Writing to the tensors of the model and the optimizer changes those."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titanlite.float8.fsdp import plain

State = dict[str, Tensor]


def model_state(parts: Iterable[nn.Module]) -> State:
    """Parameters and persistent buffers; ``parts`` are the module, or those of this process's pipeline stages."""
    return {f"model.{name}": tensor for part in parts for name, tensor in part.state_dict().items()}


def buffer_names(parts: Iterable[nn.Module]) -> set[str]:
    """The names of :func:`model_state` that are no parameters."""
    names = set()
    for part in parts:
        parameters = {name for name, _ in part.named_parameters(remove_duplicate=False)}
        names |= {f"model.{name}" for name in part.state_dict() if name not in parameters}
    return names


def optimizer_state(optimizer: torch.optim.Optimizer, parts: Iterable[nn.Module]) -> State:
    """The state of each parameter, by the parameter's name. (Hyperparameters are the configuration's.)"""
    state = {}
    for part in parts:
        for name, param in part.named_parameters():
            for key, value in optimizer.state.get(param, {}).items():
                assert isinstance(value, Tensor), f"optimizer state {key} of {name} is no tensor: {value}"
                state[f"optimizer.{name}.{key}"] = plain(value)
    return state


def prepare_optimizer(optimizer: torch.optim.Optimizer, parts: Iterable[nn.Module], saved: Iterable[str]) -> None:
    """Let the optimizer create its state for the parameters that have some in ``saved``, to be loaded into: a step with
    gradients of zero, at a rate of zero. A parameter that never had a gradient has none; where none has any, what was
    saved is of an optimizer without, and this one shows whether it is one: it makes all that it has."""
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
    """Copies of the state of this process's random generators."""
    version, numbers, gauss = random.getstate()
    assert version == 3
    numpys: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = numpys
    assert name == "MT19937"
    state = {
        "torch": torch.get_rng_state(),
        # A cached Gaussian is a float64; NaN where there is none.
        "python": torch.tensor(numbers, dtype=torch.int64),
        "python_gauss": torch.tensor(float("nan") if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return {f"random.{rank}.{name}": tensor for name, tensor in state.items()}


def set_random_state(state: Mapping[str, Tensor], rank: int, device: torch.device) -> None:
    """Put the generators where :func:`random_state` found them; those that ``state`` has not stay where they are."""
    own = {name.rpartition(".")[2]: tensor for name, tensor in state.items() if name.startswith(f"random.{rank}.")}
    if not own:
        return
    torch.set_rng_state(own["torch"])
    gauss = own["python_gauss"].item()
    random.setstate((3, tuple(own["python"].tolist()), None if gauss != gauss else gauss))
    *keys, position, has_gauss = own["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, own["numpy_gauss"].item()))
    if "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"], device)


def differences(saved: Mapping[str, torch.Size], own: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """The names of ``own`` that were not saved, and those whose shapes were others, in words."""
    missing = [name for name in own if name not in saved]
    others = [
        f"{name} is {tuple(tensor.shape)}, was {tuple(saved[name])}"
        for name, tensor in own.items()
        if name in saved and saved[name] != tensor.shape
    ]
    return missing, others


def local_bytes(state: Mapping[str, Tensor]) -> int:
    """What this process has of ``state``."""
    locals_ = (t.to_local() if isinstance(t, DTensor) else t for t in state.values())
    return sum(t.numel() * t.element_size() for t in locals_)
