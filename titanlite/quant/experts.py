"""Modules of any model whose grouped matmuls compute in a number format: the experts of a mixture."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.overrides import TorchFunctionMode

from titanlite.quant.convertible import HIGH_PRECISION
from titanlite.quant.grouped_mm import QuantGroupedMatmul, quantized_grouped_mm
from titanlite.quant.groups import GroupedFormat
from titanlite.quant.reuse import share_first_input

# torch.nn.functional.grouped_mm calls the second.
_GROUPED_MATMULS = (torch.nn.functional.grouped_mm, torch._grouped_mm)


class _GroupedMatmulsIn(TorchFunctionMode):
    """In this context, torch's grouped matmuls compute in ``format``.

    Attributes:
        count: the number of calls.
    """

    def __init__(self, format: GroupedFormat) -> None:
        super().__init__()
        self.format, self.count = format, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _GROUPED_MATMULS:
            return func(*args, **(kwargs or {}))
        self.count += 1
        return _as_torch_calls_it(self.format, *args, **(kwargs or {}))


def _as_torch_calls_it(
    format: GroupedFormat,
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    if offs is None or mat_b.ndim != 3 or bias is not None or out_dtype not in (None, mat_a.dtype):
        raise ValueError(
            f"grouped_mm in {format.name}: mat_a {tuple(mat_a.shape)}, mat_b {tuple(mat_b.shape)}; it must be called "
            "as grouped_mm(rows [rows, k], matrices [groups, k, m], offs=offs), without bias and out_dtype"
        )
    return quantized_grouped_mm(mat_a, mat_b, offs, format)


class QuantExperts(nn.Module):
    """A module in whose forward ``torch.nn.functional.grouped_mm`` computes in a number format. The class of a
    converted module inherits from this one and from the class it had.

    Attributes:
        format: of the grouped matmuls.
        in_high_precision: set by :func:`titanlite.quant.linear.high_precision`.
    """

    format: GroupedFormat
    in_high_precision = False

    # The compiler lets a mode see the functions of torch.overrides.get_overridable_functions alone (torch 2.13), and
    # torch._grouped_mm is none of them: it would be compiled in high precision.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.in_high_precision:
            return super().forward(*args, **kwargs)
        with _GroupedMatmulsIn(self.format) as matmuls:
            out = super().forward(*args, **kwargs)
        given = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        if not matmuls.count and all(x.numel() for x in given):
            raise RuntimeError(
                f"{type(self).__name__} was converted to {self.format.name}, and its forward did not call "
                "torch.nn.functional.grouped_mm; call it there, or leave the module out of the conversion"
            )
        return out

    def extra_repr(self) -> str:
        described = ", ".join(f"{name}={value}" for name, value in self.format.describe().items())
        return ", ".join(filter(None, (super().extra_repr(), described)))


def why_not_experts(module: nn.Module, format: GroupedFormat) -> str | None:
    """Return why the grouped matmuls of ``module`` cannot compute in ``format``; None if they can. It must have
    parameters [groups, rows, columns] of its own."""
    if isinstance(module, FSDPModule):
        return "is sharded by FSDP2 already; convert it before fully_shard"
    stacks = [p for p in module._parameters.values() if p is not None and p.ndim == 3]
    if not stacks:
        return "has no parameters of three dimensions"
    if type(module).__module__.startswith("torch.nn."):
        return f"is a {type(module).__name__}, which has no grouped matmuls"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if other := next((p.dtype for p in stacks if p.dtype not in HIGH_PRECISION), None):
        return f"a parameter is {other}, not a high-precision dtype"
    reasons = (format.why_not(p.shape[1], p.shape[2]) for p in stacks)
    return next(filter(None, reasons), None)


def convert_grouped_matmuls(module: nn.Module, format: GroupedFormat) -> None:
    """Let ``module`` multiply in ``format``, in place: in its slot ``multiply``, a function ``(a, b, offsets)``, if it
    has one, where matmuls share the casts of its first input; else wherever its forward calls
    ``torch.nn.functional.grouped_mm``."""
    multiply = vars(module).get("multiply")  # a slot of the instance, and no method of the class
    if callable(multiply):
        module.multiply = QuantGroupedMatmul(format, multiply)
        share_first_input(module)
        return
    module.__class__ = _quantized(type(module))  # type: ignore[arg-type]
    module.format = format  # type: ignore[assignment]


def is_converted(module: nn.Module) -> bool:
    """Return whether :func:`convert_grouped_matmuls` was called with ``module``."""
    return isinstance(module, QuantExperts) or isinstance(getattr(module, "multiply", None), QuantGroupedMatmul)


def convert_experts(
    model: nn.Module, format: GroupedFormat, keep: Callable[[nn.Module, str], str | None]
) -> dict[str, nn.Module]:
    """Convert the modules in ``model`` that have parameters [groups, rows, columns] of their own.

    Args:
        keep: ``(module, fully qualified name)`` -> why the module stays in high precision, or None.

    Returns:
        Those that are converted, by name.

    Raises:
        ValueError: there is nothing to convert (the message has the reasons), a module is converted already, or the
            format has no grouped matmuls.
    """
    if reason := format.why_not_grouped():
        raise ValueError(reason)
    chosen: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if all(p is None or p.ndim != 3 for p in module._parameters.values()):
            continue
        if reason := keep(module, name):
            reasons[name] = reason
        elif is_converted(module):
            raise ValueError(f'"{name}" is converted already; convert a module once')
        elif reason := why_not_experts(module, format):
            reasons[name] = reason
        else:
            chosen[name] = module
    if not chosen:
        summary = "; ".join(f'"{name}": {reason}' for name, reason in reasons.items())
        raise ValueError(f"nothing to convert: {summary or 'no module has parameters of three dimensions'}")
    for module in chosen.values():
        convert_grouped_matmuls(module, format)
    return chosen


@cache
def _quantized(base: type[nn.Module]) -> type[nn.Module]:
    """Return a class that is ``base`` with its grouped matmuls in a number format."""

    def reduce(self: nn.Module, protocol: Any) -> Any:  # by its base, since pickle cannot import this class
        return _restored, (base,), self.__getstate__()

    members = {"__reduce_ex__": reduce, "__module__": base.__module__, "__doc__": base.__doc__}
    return type(f"{base.__name__}QuantExperts", (QuantExperts, base), members)


def _restored(base: type[nn.Module]) -> nn.Module:
    both = _quantized(base)  # type: ignore[arg-type]
    return both.__new__(both)
