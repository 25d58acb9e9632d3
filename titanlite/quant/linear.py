"""The linear layer that computes in a number format, and the conversion of a model's linear layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from titanlite.quant.autograd import QuantMatmul, Ranks
from titanlite.quant.format import Format, Operand
from titanlite.quant.fsdp import plain, wrapped_for_gather
from titanlite.quant.operands import CastsOperands, cast_input, weight_for_output
from titanlite.quant.reuse import WeightCopies
from titanlite.quant.tensor import QuantTensor

Layer = TypeVar("Layer", bound="QuantLinear")


class Sharding(Protocol):
    """The forward of a layer whose parameters are sharded by tensor parallelism."""

    def __call__(self, layer: QuantLinear, input: Tensor) -> Tensor:
        """Return the output of ``layer`` for ``input``."""


class QuantLinear(CastsOperands):
    """An ``nn.Linear`` computed in a number format, with the same parameters under the same names.

    The state dict is that of ``nn.Linear`` and the buffers of ``format.state()``. A state dict without the buffers of
    an operand loads; they are then reset to zero.

    Args:
        format: casts and multiplies the operands of the three matmuls.
        gather_quantized: under FSDP2, gather the weight in the format, one byte per element.
        keep_weight: keep the casts of the weight between forward and backward, and for later microbatches.
        The others: as in ``nn.Linear``.

    Attributes:
        gather_option: the users' name of ``gather_quantized``, for messages.
        sharding: set by the styles of :mod:`titanlite.quant.tensor_parallel`.
        in_high_precision: set by :func:`high_precision`.

    Raises:
        ValueError: the format does not support the feature sizes.
    """

    gather_option = "gather_quantized"
    format: Format
    gather_quantized: bool
    sharding: Sharding | None = None
    in_high_precision: bool = False

    def __init__(
        self, *args: Any, format: Format, gather_quantized: bool = False, keep_weight: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._start(format, gather_quantized, keep_weight)

    @classmethod
    def from_linear(
        cls: type[Layer], module: nn.Linear, format: Format, *, gather_quantized: bool = False, keep_weight: bool = True
    ) -> Layer:
        """Turn ``module`` itself into this class and return it. Parameters, their ties, hooks and buffers stay.

        Raises:
            ValueError: it cannot be converted; see :func:`why_not_convertible`.
        """
        reason = why_not_convertible(module, format)
        if reason:
            raise ValueError(f"{module}: {reason}")
        module.__class__ = cls
        assert isinstance(module, cls)
        module._start(format, gather_quantized, keep_weight)
        return module

    def to_linear(self) -> nn.Linear:
        """Turn this layer itself back into an ``nn.Linear`` and return it.

        Raises:
            ValueError: the weight is sharded by tensor parallelism, or wrapped to be gathered in the format.
        """
        if self.sharding is not None or self.gather_quantized or isinstance(self, FSDPModule):
            raise ValueError("to_linear: the weight is sharded or wrapped for FSDP2; load its state dict elsewhere")
        for name in self._state_names():
            delattr(self, name)
        del self.format, self.gather_quantized, self.keep_weight, self.copies
        self.__class__ = nn.Linear  # type: ignore[assignment]
        return self

    def _start(self, format: Format, gather_quantized: bool, keep_weight: bool) -> None:
        if reason := format.why_not(self.in_features, self.out_features):
            raise ValueError(
                f"{type(self).__name__}(in_features={self.in_features}, out_features={self.out_features}): {reason}; "
                "leave this layer in high precision"
            )
        self.format, self.gather_quantized = format, gather_quantized
        self.keep_weight, self.copies = keep_weight, WeightCopies()
        self.weight = self.weight  # wraps it for FSDP2 if gather_quantized
        for shapes in format.state().values():
            for name, shape in shapes.items():
                self.register_buffer(name, torch.zeros(shape, device=self.weight.device))

    def _state_names(self) -> list[str]:
        return [name for shapes in self.format.state().values() for name in shapes]

    # ---- forward

    def forward(self, input: Tensor) -> Tensor:
        """Map ``input`` [..., in_features] to [..., out_features], in the dtype of ``input``, or of autocast."""
        if self.sharding is not None:
            return self.sharding(self, input)
        if self.in_high_precision:
            return super().forward(input)  # with a bias, the last bit differs from that of multiply
        out = self.multiply(input)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def multiply(self, input: Tensor, ranks: Ranks | None = None) -> Tensor:
        """Compute :meth:`forward` without the bias.

        Args:
            ranks: the ranks that share the input features; the result is then ``ranks.sum`` of their outputs.
        """
        input = autocast(input)
        weight = self.local_weight(input)
        if self.in_high_precision:
            product = F.linear(input, weight)
            return product if ranks is None else ranks.sum(product)
        format = self.format.on(input.device)
        x, saved = cast_input(self, input, format, self.learns(weight))
        w = weight_for_output(self, weight, format)
        if saved is x:
            saved = Operand(None, None)  # type: ignore[arg-type]  # the compiler takes no tensor twice
        out: Tensor = QuantMatmul.apply(input, weight, *x, *w, *saved, self, format, ranks)
        return out

    def local_weight(self, input: Tensor) -> Tensor:
        """Return this rank's weight, to be multiplied with ``input``.

        Raises:
            TypeError: ``input`` is a DTensor.
            ValueError: ``input`` has another number of features.
            RuntimeError: FSDP2 has not gathered the weight.
        """
        name = type(self).__name__
        if isinstance(input, DTensor):
            raise TypeError(
                f"{name} takes plain tensors, not a DTensor: parallelize it with the styles for columns and rows of "
                "quantized layers (for float8: Float8ColwiseParallel, Float8RowwiseParallel)"
            )
        weight = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        if input.shape[-1] != weight.shape[-1]:
            raise ValueError(f"{name}: input of shape {tuple(input.shape)}, must be [..., {weight.shape[-1]}]")
        if self.gather_quantized and not self.in_high_precision and not isinstance(weight, QuantTensor):
            raise RuntimeError(
                f"{self.gather_option}: FSDP2 has not gathered the weight of this {name}; call fully_shard on the "
                "model, or leave the flag out"
            )
        return weight

    @staticmethod
    def learns(weight: Tensor) -> bool:
        """Return whether backward will need the gradient of the weight."""
        return torch.is_grad_enabled() and weight.requires_grad

    # ---- overrides of nn.Module

    def __setattr__(self, name: str, value: Any) -> None:
        copies = self.__dict__.get("copies")  # None while the constructor of nn.Linear runs
        if name == "weight" and copies is not None:
            copies.forget()
            if isinstance(value, nn.Parameter) and self.gather_quantized:
                value = wrapped_for_gather(value, self.format)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "copies": WeightCopies()}  # a copy of the layer has none yet

    def forget_copies(self) -> None:
        """Drop the quantized copies of the weight; call it after a write that no version counter shows."""
        self.copies.forget()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            # Not the result of detach, so that writes to the state dict change the weight's version.
            destination[f"{prefix}weight"] = plain(self.weight)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.forget_copies()
        missing_keys = args[2]
        for names in self.format.state().values():
            if not any(f"{prefix}{name}" in state_dict for name in names):  # saved by a model without them
                for name in names:
                    self.get_buffer(name).zero_()
                    missing_keys.remove(f"{prefix}{name}")

    def _apply(self: Layer, fn: Any, recurse: bool = True) -> Layer:
        before = {name: self.get_buffer(name) for name in self._state_names()}
        super()._apply(fn, recurse)
        self.forget_copies()
        for name, old in before.items():
            new = self.get_buffer(name)
            if old.is_meta and not new.is_meta:
                new.zero_()  # to_empty leaves it uninitialized
            elif new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))  # stays float32 when the model is cast
        return self

    def extra_repr(self) -> str:
        options = (f"{name}={value}" for name, value in self.format.describe().items())
        return ", ".join([super().extra_repr(), *options])


def autocast(input: Tensor) -> Tensor:
    """Return ``input``, cast to autocast's dtype if autocast is enabled."""
    # (is_autocast_enabled does not know the meta device; torch 2.11 cannot compile is_autocast_available.)
    if not input.is_meta and torch.is_autocast_enabled(input.device.type):
        return input.to(torch.get_autocast_dtype(input.device.type))
    return input


def quant_layers(model: nn.Module) -> list[QuantLinear]:
    """Return the layers in ``model`` that compute in a number format."""
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


@contextmanager
def high_precision(model: nn.Module) -> Iterator[None]:
    """Evaluate ``model`` without quantization error: in this context its quantized layers compute like ``nn.Linear``.

    They compute, and under tensor parallelism gather their input, in the dtype of their weight (under FSDP2's mixed
    precision, ``param_dtype``). Gradients are disabled, and delayed scaling records nothing. A compiled model is
    compiled once more.

    Raises:
        ValueError: a weight is gathered in the format, so that no high-precision weight exists.
    """
    layers = quant_layers(model)
    for layer in layers:
        if layer.gather_quantized:
            raise ValueError(
                f"high_precision: {layer.gather_option} gathers weights in {layer.format.name}, so that no "
                "high-precision weight exists; leave the flag out"
            )
    try:
        for layer in layers:
            layer.in_high_precision = True
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer.in_high_precision = False


# ---- conversion


def why_not_convertible(module: nn.Module, format: Format) -> str | None:
    """Return why ``module`` cannot become a QuantLinear of the format; None if it can."""
    if isinstance(module, QuantLinear):
        return "is converted already"
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}, whose own forward would be lost"
    return format.why_not(module.in_features, module.out_features)


def convert_linears(
    model: nn.Module,
    format: Format,
    convert: Callable[[nn.Linear], object],
    keep: Callable[[nn.Linear, str], str | None],
    *,
    gather_quantized: bool = False,
) -> None:
    """Call ``convert`` with each linear layer in ``model`` that can be converted.

    Args:
        keep: ``(layer, fully qualified name)`` -> why the layer stays in high precision, or None.
        gather_quantized: first wrap the weights for FSDP2 to gather them in the format; tied weights stay tied.

    Raises:
        ValueError: there is nothing to convert (the message has the reasons), or a layer is converted already.
    """
    chosen: list[nn.Linear] = []
    reasons: dict[str, str] = {}
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        if reason := keep(linear, name):
            reasons[name] = reason
        elif isinstance(linear, QuantLinear):
            raise ValueError(f'"{name}" is a {type(linear).__name__} already; convert a layer once')
        elif reason := why_not_convertible(linear, format):
            reasons[name] = reason
        else:
            chosen.append(linear)
    if not chosen:
        summary = "; ".join(f'"{name}": {reason}' for name, reason in reasons.items()) or "there are no linear layers"
        raise ValueError(f"nothing to convert: {summary}")
    if gather_quantized:
        _wrap_weights(model, chosen, format)
    for linear in chosen:
        convert(linear)


def _wrap_weights(model: nn.Module, linears: list[nn.Linear], format: Format) -> None:
    """Wrap the weights so that FSDP2 gathers them in the format; tied weights stay tied."""
    owners: defaultdict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for name, owner in model.named_modules():
        for key, param in owner.named_parameters(recurse=False):
            owners[id(param)].append((owner, f"{name}.{key}"))
    chosen = set(map(id, linears))
    for linear in linears:
        for owner, name in owners[id(linear.weight)]:
            if id(owner) not in chosen:
                raise ValueError(
                    f'a weight to be gathered in {format.name} is also "{name}", which cannot use it in this format; '
                    "leave the layer out, or gather in high precision"
                )
    for linear in linears:
        weight = linear.weight
        wrapped = wrapped_for_gather(weight, format)  # type: ignore[arg-type]  # torch types it as a Tensor
        for owner, _ in owners[id(weight)]:
            owner.weight = wrapped
