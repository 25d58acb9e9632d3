"""The float8 linear layer: what it casts for its three matmuls, and how, as its configuration says."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titanlite.float8 import kernels, scaling
from titanlite.float8.config import CastConfig, Float8LinearConfig
from titanlite.float8.devices import must_emulate
from titanlite.float8.fsdp import gathered_in_float8, plain
from titanlite.float8.matmul import Operand, cast, cast_by_kernels
from titanlite.float8.numerics import dequantize
from titanlite.float8.products import Float8Matmul, Ranks
from titanlite.float8.reuse import WeightCopies, remember, remembered
from titanlite.float8.tensor import Float8Tensor


def why_not_convertible(module: nn.Module) -> str | None:
    """Why ``module`` cannot become a Float8Linear; None if it can."""
    if type(module) is Float8Linear:
        return "is converted already"
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}, whose own forward would be lost"
    if module.in_features % 16 or module.out_features % 16:
        return "features are not multiples of 16"
    return None


class Float8Linear(nn.Linear):
    """``nn.Linear`` computed in float8; the same parameters under the same names.

    Args:
        config: how to cast the operands of its three matmuls.
        The others: as of ``nn.Linear``. Both feature sizes must be multiples of 16.

    The state dict is that of ``nn.Linear``, with the buffers ``fp8_amax_*``, ``fp8_amax_history_*`` and ``fp8_scale_*``
    for operands with delayed scaling; a state dict without them loads, and scaling starts from the live amax.

    Raises:
        ValueError: feature sizes that float8 units cannot take.
    """

    config: Float8LinearConfig
    _copies: WeightCopies
    in_high_precision: bool = False  # see titanlite.float8.high_precision

    def __init__(self, *args: Any, config: Float8LinearConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._start_float8(config or Float8LinearConfig())

    @classmethod
    def from_float(cls, module: nn.Linear, config: Float8LinearConfig | None = None) -> Float8Linear:
        """Turn ``module`` itself into a Float8Linear: parameters, their ties, hooks and buffers stay; returns it.

        Raises:
            ValueError: if it cannot be; see :func:`why_not_convertible`.
        """
        reason = why_not_convertible(module)
        if reason:
            raise ValueError(f"{module}: {reason}")
        module.__class__ = cls
        assert isinstance(module, Float8Linear)
        module._start_float8(config or Float8LinearConfig())
        return module

    def to_linear(self) -> nn.Linear:
        """Turn this layer itself back into an ``nn.Linear``; returns it.

        Raises:
            ValueError: it is sharded by FSDP2, or prepared to be gathered in float8.
        """
        if type(self) is not Float8Linear or self.config.enable_fsdp_float8_all_gather:
            raise ValueError("to_linear: the layer belongs to FSDP2; load the state dict into a new model")
        for name in scaling.buffer_names(self):
            delattr(self, name)
        del self.config, self._copies
        self.__class__ = nn.Linear  # type: ignore[assignment]
        return self

    def _start_float8(self, config: Float8LinearConfig) -> None:
        if self.in_features % 16 or self.out_features % 16:
            raise ValueError(
                f"Float8Linear(in_features={self.in_features}, out_features={self.out_features}): float8 matmuls need "
                "multiples of 16; leave this layer in high precision"
            )
        self.config = config
        self.weight = self.weight  # prepared for FSDP2, if that is asked for
        scaling.add_buffers(self)

    # ---- forward

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [..., in_features] -> [..., out_features], in the dtype of ``input``, or of autocast."""
        if self.in_high_precision:
            return super().forward(input)  # with a bias, not the same as multiply to the last bit
        out = self.multiply(input)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def multiply(self, input: Tensor, ranks: Ranks | None = None) -> Tensor:
        """:meth:`forward` without the bias.

        Args:
            ranks: that share the input features; the result is what their sum leaves this one with.
        """
        input = self._autocast(input)
        weight, emulate, for_weight = self._ready(input)
        if self.in_high_precision:
            product = F.linear(input, weight)
            return product if ranks is None else ranks.sum(product)
        x, saved = self._cast_input(input, emulate, for_weight)
        w = self._weight_for_output(weight, self.weight, emulate)
        if saved is x:
            saved = Operand(None, None)  # type: ignore[arg-type]  # the compiler takes no tensor twice
        out: Tensor = Float8Matmul.apply(input, weight, *x, *w, *saved, self, emulate, ranks)
        return out

    def _autocast(self, input: Tensor) -> Tensor:
        """``input`` in the dtype of autocast, where that is on."""
        # (Of the meta device autocast cannot be asked; is_autocast_available cannot be compiled with torch 2.11.)
        if not input.is_meta and torch.is_autocast_enabled(input.device.type):
            return input.to(torch.get_autocast_dtype(input.device.type))
        return input

    def _ready(self, input: Tensor) -> tuple[Tensor, bool, bool]:
        """The local weight for ``input``, whether to emulate, and whether the weight is to have a gradient.

        Raises:
            TypeError, ValueError, RuntimeError: it cannot be multiplied.
        """
        if isinstance(input, DTensor):
            raise TypeError(
                "Float8Linear takes plain tensors, not a DTensor: parallelize it with titanlite.float8's "
                "Float8ColwiseParallel or Float8RowwiseParallel"
            )
        weight = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        if input.shape[-1] != weight.shape[-1]:
            raise ValueError(f"Float8Linear: input of shape {tuple(input.shape)}, must be [..., {weight.shape[-1]}]")
        for_weight = torch.is_grad_enabled() and weight.requires_grad
        if self.in_high_precision:
            return weight, False, for_weight
        if self.config.enable_fsdp_float8_all_gather and not isinstance(weight, Float8Tensor):
            raise RuntimeError(
                "enable_fsdp_float8_all_gather: FSDP2 has not gathered this weight; call fully_shard on the model, or "
                "leave the flag out"
            )
        emulate = must_emulate(input.device, self.config.dtypes, self.config.emulate, torch.compiler.is_compiling())
        return weight, emulate, for_weight

    # ---- the operands

    def _by_kernels(self, x: Tensor, emulate: bool) -> bool:
        """Whether kernels cast ``x``, if its scale is dynamic, rather than plain operations."""
        chosen = kernels.AVAILABLE and self.config.kernels != "inductor" and not emulate
        return chosen and x.dtype in kernels.DTYPES and x.numel() > 0

    def _cast(self, x: Tensor, how: CastConfig, contracted: int, emulate: bool, scale: Tensor | None) -> Operand:
        rounded = self.config.round_scales_to_power_of_2
        if how.is_cast and scale is None and self._by_kernels(x, emulate):
            by_features, by_rows = (how, None) if contracted == 1 else (None, how)
            return cast_by_kernels(x, by_features, by_rows, power_of_2=rounded)[1 - contracted]
        return cast(x, how, contracted=contracted, power_of_2=rounded, scale=scale, emulate=emulate)

    def _cast_twice(self, name: str, x: Tensor, emulate: bool, for_weight: bool) -> tuple[Operand, Operand]:
        """``x`` (rows, features) for the matmul that contracts its features, and if ``for_weight`` for grad_weight,
        which contracts its rows; one and the same object where one cast serves both."""
        first: CastConfig = getattr(self.config, f"cast_config_{name}")
        second: CastConfig = getattr(self.config, f"cast_config_{name}_for_grad_weight")
        scale = scaling.scale_of(self, name, first, x)
        if for_weight and first.is_cast and second.is_cast and scale is None and self._by_kernels(x, emulate):
            return cast_by_kernels(x, first, second, power_of_2=self.config.round_scales_to_power_of_2)
        features = self._cast(x, first, 1, emulate, scale)
        if not for_weight or (first == second and not first.is_axiswise):
            return features, features
        return features, self._cast(x, second, 0, emulate, scale)

    def _cast_input(self, input: Tensor, emulate: bool, for_weight: bool) -> tuple[Operand, Operand]:
        key = (
            self.config.cast_config_input,
            self.config.cast_config_input_for_grad_weight,
            self.config.round_scales_to_power_of_2,
            emulate,
            for_weight,
        )
        found: tuple[Operand, Operand] | None = remembered(input, key)
        if found is not None:
            return found
        if isinstance(input, Float8Tensor):
            casts = self._recast(input.operand(), self.config.cast_config_input_for_grad_weight, emulate)
        else:
            casts = self._cast_twice("input", input.detach().reshape(-1, input.shape[-1]), emulate, for_weight)
        if not scaling.is_stateful(self.config.cast_config_input):  # else the scale is this layer's own
            remember(input, key, casts)
        return casts

    def _cast_grad_output(
        self, grad_output: Tensor | Operand, emulate: bool, for_weight: bool
    ) -> tuple[Operand, Operand]:
        if isinstance(grad_output, Operand):
            return self._recast(grad_output, self.config.cast_config_grad_output_for_grad_weight, emulate)
        return self._cast_twice("grad_output", grad_output.reshape(-1, grad_output.shape[-1]), emulate, for_weight)

    def _recast(self, arrived: Operand, second: CastConfig, emulate: bool) -> tuple[Operand, Operand]:
        """The operands of what arrived in float8: as it is, and for scales along the other dimension cast once more."""
        if arrived.scale is not None and not arrived.scale.ndim and not second.is_axiswise:
            return arrived, arrived
        return arrived, self._cast(dequantize(*arrived), second, 0, emulate, None)  # type: ignore[arg-type]

    def _weight_for_output(self, weight: Tensor, source: Tensor, emulate: bool) -> Operand:
        if isinstance(weight, Float8Tensor):
            return weight.operand()
        return self._weight_copy("output", weight, source, self.config.cast_config_weight, emulate)

    def _weight_for_grad_input(self, weight: Tensor, source: Tensor | None, emulate: bool) -> Operand:
        second = self.config.cast_config_weight_for_grad_input
        if not isinstance(weight, Float8Tensor):
            return self._weight_copy("grad_input", weight, source, second, emulate)
        return self._recast(weight.operand(), second, emulate)[1]

    def _weight_copy(self, use: str, weight: Tensor, source: Tensor | None, how: CastConfig, emulate: bool) -> Operand:
        """The weight, cast; in eager mode once for several microbatches.

        Args:
            source: the parameter that ``weight`` is, or is the local part of.
        """

        def make() -> Operand:
            scale = scaling.scale_of(self, "weight", how, weight)
            return self._cast(weight, how, 1 if use == "output" else 0, emulate, scale)

        kept = self.training and not self.config.force_recompute_fp8_weight_in_bwd
        if not kept or source is None or torch.compiler.is_compiling() or source.is_inference():
            return make()
        # One copy serves both matmuls where they want the same and memory layouts do not matter.
        same = not how.is_axiswise and how == self.config.cast_config_weight and not self._by_kernels(weight, emulate)
        key = "output" if same else use
        found: Operand = self._copies.get(source, (key, emulate), make, in_forward=use == "output")
        return found

    # ---- what nn.Module does with it

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self.forget_copies()
            config = self.__dict__.get("config")  # nn.Linear's own constructor comes before it
            if isinstance(value, nn.Parameter) and config is not None and config.enable_fsdp_float8_all_gather:
                value = gathered_in_float8(value, config)
        super().__setattr__(name, value)

    def forget_copies(self) -> None:
        """Drop the quantized copies of the weight, after a write to it that nothing else shows."""
        if "_copies" not in self.__dict__:
            object.__setattr__(self, "_copies", WeightCopies())
        self._copies.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copies": WeightCopies()}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            # Of the weight itself, not of what detach made of it: writes to the state dict are then seen.
            destination[f"{prefix}weight"] = plain(self.weight)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.forget_copies()
        for operand in scaling.delayed_operands(self):
            names = scaling.buffer_names(self, operand)
            if not any(f"{prefix}{name}" in state_dict for name in names):
                missing_keys = args[2]  # a checkpoint of a model that had none: scaling begins anew
                for name in names:
                    self.get_buffer(name).zero_()
                    missing_keys.remove(f"{prefix}{name}")

    def _apply(self, fn: Any, recurse: bool = True) -> Float8Linear:
        before = {name: self.get_buffer(name) for name in scaling.buffer_names(self)}
        super()._apply(fn, recurse)
        self.forget_copies()
        for name, old in before.items():
            new = self.get_buffer(name)
            if old.is_meta and not new.is_meta:
                new.zero_()  # to_empty leaves anything
            elif new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))  # scales stay float32 when a model is cast
        return self

    def extra_repr(self) -> str:
        casts = {name.removeprefix("cast_config_"): c.short_str() for name, c in self.config.casts.items()}
        others = {
            name: short
            for name, short in casts.items()
            if short != casts[name.split("_for_")[0]] or "_for_" not in name
        }
        return f"{super().extra_repr()}, " + ", ".join(f"{name}={short}" for name, short in others.items())
