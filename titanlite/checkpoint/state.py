"""The state of a training process in a checkpoint: a dictionary of tensors named ``model.<name>``,
``optimizer.<name>.<key>`` and ``random.<rank>.<generator>``. The tensors of the model and the optimizer are references,
not copies: a write to them changes the model or the optimizer."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titanlite.checkpoint.collectives import union_on_all
from titanlite.errors import ConfigError
from titanlite.quant.fsdp import plain
from titanlite.quant.stored import SCALES, stored_weight

State = dict[str, Tensor]
_MAX_LISTED = 10


def model_state(parts: Iterable[nn.Module]) -> State:
    """Return parameters and persistent buffers. ``parts`` is the model, or the pipeline stages of this process. A
    weight that is stored quantized is one tensor, the parameter itself."""
    state: State = {}
    for part in parts:
        tensors = part.state_dict()
        for name, param in part.named_parameters(remove_duplicate=False):
            if stored_weight(param) is not None:
                tensors[name] = param.detach()
                del tensors[f"{name}{SCALES}"]
        state |= {f"model.{name}": tensor for name, tensor in tensors.items()}
    return state


def buffer_names(parts: Iterable[nn.Module]) -> set[str]:
    """Return the names in :func:`model_state` that belong to buffers."""
    names = set()
    for part in parts:
        parameters = {name for name, _ in part.named_parameters(remove_duplicate=False)}
        names |= {name for name in model_state([part]) if name.removeprefix("model.") not in parameters}
    return names


@dataclass(frozen=True)
class Process:
    """The objects of a process whose state is saved.

    Attributes:
        parts: the model, or the pipeline stages of this process.
        model: name, flavor and args of the model; those of a checkpoint must be the same.
    """

    rank: int
    device: torch.device
    parts: list[nn.Module]
    optimizer: torch.optim.Optimizer
    model: dict[str, Any]

    def parameters(self) -> State:
        """Return the parameters by name, as in a state dict. The tensors are references, not copies."""
        buffers, state = buffer_names(self.parts), model_state(self.parts)
        return {name.removeprefix("model."): tensor for name, tensor in state.items() if name not in buffers}

    def buffers_on_all(self, group: dist.ProcessGroup | None) -> list[str]:
        """Return the names of the buffers that all processes have together, sorted; all must call this."""
        return sorted(union_on_all(group, dict.fromkeys(buffer_names(self.parts))))


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


def disagreements(saved: Mapping[str, Sequence[int]], model: Mapping[str, Sequence[int] | None]) -> list[str]:
    """Return why tensors of these names and shapes are not those of a model: one line for each kind of reason, nothing
    if they are. A shape of the model that is None is not compared."""
    reasons = {
        "are not in its files": [name for name in model if name not in saved],
        "are in its files and not in the model": [name for name in saved if name not in model],
        "have another shape": [
            f"{name} {list(saved[name])}, in the model {list(shape)}"
            for name, shape in model.items()
            if shape is not None and name in saved and tuple(saved[name]) != tuple(shape)
        ],
    }
    return [listed(reason, names) for reason, names in reasons.items() if names]


def listed(predicate: str, names: Sequence[str]) -> str:
    """Return how many ``names`` there are, the predicate, and the first of them."""
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    if len(names) == 1:
        predicate = re.sub(r"\bare\b", "is", re.sub(r"\bhave\b", "has", predicate))
    return f"{len(names)} {predicate}: {', '.join(names[:_MAX_LISTED])}{more}"


def refuse_another_model(
    folder: Path, saved: Mapping[str, Sequence[int]], model: Mapping[str, Sequence[int] | None]
) -> None:
    """Raise ConfigError if the weights in ``folder`` are not those of the model; see :func:`disagreements`."""
    if lines := disagreements(saved, model):
        raise ConfigError(
            f"{folder}: these are the weights of another model, flavor or vocabulary: {'; '.join(lines)}; choose the "
            "flavor that they belong to"
        )


def local_bytes(state: Mapping[str, Tensor]) -> int:
    """Return the bytes of ``state`` that this process holds."""
    return sum(local_part(tensor).nbytes for tensor in state.values())


def local_part(tensor: Tensor) -> Tensor:
    """Return the elements of ``tensor`` that this process holds, in the same memory, without gradients."""
    data = tensor.detach()
    return data.to_local() if isinstance(data, DTensor) else data


def size_text(count: int) -> str:
    """Return a number of bytes for the log."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
