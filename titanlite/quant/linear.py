"""The linear layer that computes in a number format, and the conversion of a model's linear layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from titanlite.quant.agreement import NO_AGREEMENT, Agreement, Shards
from titanlite.quant.autograd import QuantMatmul, Ranks
from titanlite.quant.convertible import (
    call_all_layers,
    change_class,
    read_directly,
    restore_class,
    why_not_changeable,
)
from titanlite.quant.experts import QuantExperts
from titanlite.quant.format import WEIGHT, Format, Operand
from titanlite.quant.fsdp import plain, wrapped_for_gather
from titanlite.quant.grouped_mm import QuantGroupedMatmul
from titanlite.quant.operands import (
    CastsOperands,
    autocast,
    cast_input,
    uses_of,
    weight_for_output,
    weight_is_cast,
)
from titanlite.quant.reuse import WeightCopies
from titanlite.quant.sharding import Sharding, local_part, sharding_of
from titanlite.quant.stored import SCALES, joined, stored_parts, stored_weight
from titanlite.quant.tensor import QuantTensor

Layer = TypeVar("Layer", bound="QuantLinear")


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
        sharding: set by the styles of :mod:`titanlite.quant.tensor_parallel`. None: as the placements of the weight
            imply, if it is a DTensor, as the styles of torch make it.
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
        layer = change_class(module, cls)
        layer._start(format, gather_quantized, keep_weight)
        return layer

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
        restore_class(self)
        return self

    def _start(self, format: Format, gather_quantized: bool, keep_weight: bool) -> None:
        if reason := format.why_not(self.in_features, self.out_features):
            raise ValueError(
                f"{type(self).__name__}(in_features={self.in_features}, out_features={self.out_features}): {reason}; "
                "leave this layer in high precision"
            )
        self.format, self.gather_quantized = format, gather_quantized
        self.keep_weight, self.copies = keep_weight, WeightCopies()
        if gather_quantized:
            self.weight = self.weight  # wraps it for FSDP2
        for shapes in format.state().values():
            for name, shape in shapes.items():
                self.register_buffer(name, torch.zeros(shape, device=self.weight.device))

    def _state_names(self) -> list[str]:
        return [name for shapes in self.format.state().values() for name in shapes]

    # ---- forward

    def forward(self, input: Tensor) -> Tensor:
        """Map ``input`` [..., in_features] to [..., out_features], in the dtype of ``input``, or of autocast. A DTensor
        gives a DTensor."""
        sharding = self.sharding or sharding_of(self, input)
        if sharding is not None:
            return sharding(self, input)
        if self.in_high_precision:
            return super().forward(input)  # with a bias, the last bit differs from that of multiply
        out, bias = self.multiply(input), self.bias
        return out if bias is None else out + bias.to(out.dtype)

    def multiply(self, input: Tensor, ranks: Ranks | None = None, shards: Shards | None = None) -> Tensor:
        """Compute :meth:`forward` without the bias.

        Args:
            ranks: the ranks that share the input features; the result is then ``ranks.sum`` of their outputs.
            shards: the operands of which this rank has a part.
        """
        input = autocast(input)
        weight = self.local_weight(input, shards)
        if self.in_high_precision:
            product = F.linear(input, weight)
            return product if ranks is None else ranks.sum(product)
        format, learns = self.format.on(input.device), self.learns(weight)
        agreement = NO_AGREEMENT if shards is None else self._agree(input, weight, format, shards)
        x, saved = cast_input(self, input, format, learns, agreement)
        w = weight_for_output(self, weight, format, agreement)
        if saved is x:
            saved = Operand(None, None)  # type: ignore[arg-type]  # the compiler takes no tensor twice
        amax = agreement.get(WEIGHT)
        out: Tensor = QuantMatmul.apply(input, weight, *x, *w, *saved, amax, self, format, ranks, shards)
        return out

    def _agree(self, input: Tensor, weight: Tensor, format: Format, shards: Shards) -> Agreement:
        """Begin to agree with the other ranks on the amaxes of the operands of forward."""
        casts = []
        if not isinstance(input, QuantTensor):
            casts.append((input, uses_of("input", self.learns(weight))))
        if not weight_is_cast(self, weight, self.kept_source(), format, for_output=True):
            casts.append((weight, (WEIGHT,)))
        return Agreement(shards, format, casts)

    def local_weight(self, input: Tensor, shards: Shards | None = None) -> Tensor:
        """Return this rank's weight, to be multiplied with ``input``.

        Raises:
            ValueError: ``input`` has another number of features.
            RuntimeError: FSDP2 has not gathered the weight.
        """
        name = type(self).__name__
        weight = local_part(self.weight, shards)  # read once, because it may be computed from other tensors
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
            if isinstance(value, nn.Parameter) and name in self._parameters:
                # As FSDP2 does it for a layer without __setattr__. It assigns the parameter before every use.
                self._parameters[name] = wrapped_for_gather(value, self.format) if self.gather_quantized else value
                return
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Take a parameter from a style of tensor parallelism."""
        if name == "weight" and param is not None and self.__dict__.get("gather_quantized"):
            param = wrapped_for_gather(param, self.format, tensor_parallel=True)
        super().register_parameter(name, param)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "copies": WeightCopies()}  # a copy of the layer has none yet

    def forget_copies(self) -> None:
        """Drop the quantized copies of the weight; call it after a write that no version counter shows."""
        self.copies.forget()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars and "weight" in self._parameters:
            if stored_weight(self.weight) is not None:
                names = f"{prefix}weight", f"{prefix}weight{SCALES}"
                destination.update(zip(names, stored_parts(self.weight), strict=True))
                return
            # Not the result of detach, so that writes to the state dict change the weight's version.
            destination[f"{prefix}weight"] = plain(self.weight)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        scales = f"{prefix}weight{SCALES}"
        if scales in state_dict and stored_weight(self.weight) is not None:
            data = state_dict[f"{prefix}weight"]
            state_dict[f"{prefix}weight"] = joined(self.weight, data, state_dict.pop(scales))
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


def quant_layers_by_name(model: nn.Module) -> dict[str, QuantLinear]:
    """Return the layers in ``model`` that compute in a number format, by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def quant_layers(model: nn.Module) -> list[QuantLinear]:
    """Return the layers in ``model`` that compute in a number format."""
    return [*quant_layers_by_name(model).values()]


@contextmanager
def high_precision(model: nn.Module) -> Iterator[None]:
    """Evaluate ``model`` without quantization error: in this context its quantized layers and grouped
    matmuls compute as before their conversion.

    They compute, and under tensor parallelism gather their input, in the dtype of their weight (under FSDP2's mixed
    precision, ``param_dtype``). Gradients are disabled, and delayed scaling records nothing. A compiled model is
    compiled once more.

    Raises:
        ValueError: a weight is gathered in the format, so that no high-precision weight exists.
    """
    layers = quant_layers(model)
    computing: list[QuantLinear | QuantGroupedMatmul | QuantExperts] = [*layers]
    computing += [module for module in model.modules() if isinstance(module, (QuantGroupedMatmul, QuantExperts))]
    for layer in layers:
        if layer.gather_quantized:
            raise ValueError(
                f"high_precision: {layer.gather_option} gathers weights in {layer.format.name}, so that no "
                "high-precision weight exists; leave the flag out"
            )
    try:
        for module in computing:
            module.in_high_precision = True
        with torch.no_grad():
            yield
    finally:
        for module in computing:
            module.in_high_precision = False


# ---- conversion


def why_not_convertible(module: nn.Module, format: Format) -> str | None:
    """Return why ``module`` cannot become a QuantLinear of the format; None if it can."""
    if isinstance(module, QuantLinear):
        return "is converted already"
    if not isinstance(module, nn.Linear):
        return f"is a {type(module).__name__}, not a linear layer"
    return why_not_changeable(module) or format.why_not(module.in_features, module.out_features)


def reasons_in(model: nn.Module, format: Format) -> dict[str, str]:
    """Return, by name, why linear layers in ``model`` cannot become QuantLinears of the format."""
    reader = read_directly(model)
    linears = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    reasons = ((name, reader.get(id(linear)) or why_not_convertible(linear, format)) for name, linear in linears)
    return {name: reason for name, reason in reasons if reason}


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
    not_convertible = reasons_in(model, format)
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        if reason := keep(linear, name):
            reasons[name] = reason
        elif isinstance(linear, QuantLinear):
            raise ValueError(f'"{name}" is a {type(linear).__name__} already; convert a layer once')
        elif name in not_convertible:
            reasons[name] = not_convertible[name]
        else:
            chosen.append(linear)
    if not chosen:
        summary = "; ".join(f'"{name}": {reason}' for name, reason in reasons.items()) or "there are no linear layers"
        raise ValueError(f"nothing to convert: {summary}")
    if gather_quantized:
        _wrap_weights(model, chosen, format)
    for linear in chosen:
        convert(linear)
    call_all_layers(model, set(map(id, chosen)))


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
