"""The linear layers that can compute otherwise than ``nn.Linear``, and the change of their class."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from titanlite.quant.fsdp import ShardedWeight
from titanlite.quant.stored import StoredWeight

Layer = TypeVar("Layer", bound=nn.Linear)

HIGH_PRECISION = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def name_matches(entry: str, name: str) -> bool:
    """Return whether the dotted ``name`` contains ``entry`` as whole components."""
    return f".{entry}." in f".{name}."


def why_not_changeable(module: nn.Linear, known: type[nn.Linear] = nn.Linear) -> str | None:
    """Return why another class cannot take over the computation of ``module``; None if it can.

    The layer must compute what ``known.forward`` computes, from a parameter of its own. Subclasses that change
    something else, hooks, and parameters that are tied or sharded do not matter.
    """
    kind = type(module)
    if kind.forward is not known.forward or kind.__call__ is not nn.Module.__call__:
        return f"is a {kind.__name__} with a forward of its own"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if isinstance(module, FSDPModule):
        return "is sharded by FSDP2 already; convert it before fully_shard"
    weight: Any = module._parameters.get("weight")
    if is_lazy(weight):
        return "its weight is not initialized yet; run a batch through the model first"
    if weight is None or hasattr(kind, "weight") or parametrize.is_parametrized(module):
        return "its weight is computed from other tensors (a parametrization, weight norm, pruning)"
    if type(weight) is not nn.Parameter and not isinstance(weight, (DTensor, FakeTensor, ShardedWeight, StoredWeight)):
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    if weight.dtype not in HIGH_PRECISION:
        return f"its weight is {weight.dtype}, not a high-precision dtype"
    return None


def read_directly(model: nn.Module) -> dict[int, str]:
    """Return the linear layers in ``model`` that are never called, by id, with the reason: attention passes the tensors
    of its last layer to a function."""
    return {
        id(attention.out_proj): f"{type(attention).__name__} reads its weight directly"
        for attention in model.modules()
        if isinstance(attention, nn.MultiheadAttention)
    }


def call_all_layers(model: nn.Module, changed: set[int]) -> None:
    """Let torch's encoder layers call those of their linear layers whose ids are in ``changed``. In evaluation, they
    would otherwise pass the weights to a fused kernel. These attributes have no other use (torch 2.13)."""
    for module in model.modules():
        holds_changed = any(id(child) in changed for child in module.modules())
        if isinstance(module, nn.TransformerEncoderLayer) and holds_changed:
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and holds_changed:
            module.use_nested_tensor = False  # it makes tensors that only the fused kernel takes


def change_class(module: nn.Linear, kind: type[Layer]) -> Layer:
    """Make ``module`` itself a ``kind``, and return it. An instance of a subclass of ``nn.Linear`` remains one: all but
    what ``kind`` defines stays as it was."""
    base = type(module)
    module.__class__ = kind if base is nn.Linear else _both(kind, base)  # type: ignore[arg-type]
    assert isinstance(module, kind)
    return module


def restore_class(module: nn.Linear) -> None:
    """Undo :func:`change_class`."""
    module.__class__ = getattr(type(module), "changed_from", nn.Linear)


@cache
def _both(kind: type[nn.Linear], base: type[nn.Linear]) -> type[nn.Linear]:
    """Return a class that computes like ``kind``, and is else like ``base``."""

    def reduce(self: nn.Linear, protocol: Any) -> Any:  # by its parts, since pickle cannot import this class
        return _restored, (kind, base), self.__getstate__()

    members = {"changed_from": base, "__reduce_ex__": reduce, "__module__": base.__module__, "__doc__": kind.__doc__}
    return type(f"{base.__name__}{kind.__name__}", (kind, base), members)


def _restored(kind: type[nn.Linear], base: type[nn.Linear]) -> nn.Linear:
    both = _both(kind, base)  # type: ignore[arg-type]
    return both.__new__(both)
