"""Float8 as a number format: the casts of the operands, and the kernels that compute them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from titanlite.quant import kernels
from titanlite.quant.float8 import delayed
from titanlite.quant.float8.casts import CastConfig, ScalingType
from titanlite.quant.float8.devices import has_grouped_matmuls, must_emulate
from titanlite.quant.float8.matmul import cast, scaled_grouped_mm, scaled_mm
from titanlite.quant.float8.numerics import amax_of, amax_to_scale, dequantize, quantize
from titanlite.quant.format import OPERANDS, WEIGHT, Amaxes, Matmul, Operand, OperandName, Use
from titanlite.quant.groups import GroupedFormat, Groups
from titanlite.quant.kernels import DTYPES
from titanlite.quant.kernels.groups import amaxes_of_groups, cast_columns_of_groups

Kernels = Literal["auto", "triton", "inductor"]
Casts: TypeAlias = tuple[CastConfig, CastConfig]


@dataclass(frozen=True)
class Float8Format(GroupedFormat):
    """Float8 with the given casts.

    Args:
        input, weight, grad_output: the two casts of each operand: for the matmul that sums over its features, and for
            the one that sums over its rows. None of the dtypes is None. ``titanlite.float8.Float8LinearConfig`` checks
            the combination and documents the other options.
        target: the architecture to compute for, such as "sm_90", in an estimate without that device; None: the
            device's own.
    """

    input: Casts
    weight: Casts
    grad_output: Casts
    power_of_2: bool = False
    fast_accum: tuple[Matmul, ...] = ("output",)
    kernels: Kernels = "auto"
    emulate: bool = False
    history_len: int = 16
    target: str | None = None

    name = "float8"
    multiple = 16

    def __post_init__(self) -> None:
        # Created here because the compiler traces on(), and cannot create dataclasses.
        emulated = self if self.emulate else replace(self, emulate=True)
        object.__setattr__(self, "emulated", emulated)
        # With one scale a tensor, the compiler's casts move fewer bytes than the kernels, which it cannot fuse. With
        # scales of rows it writes columns byte by byte, and moves more (docs/benchmarks/compiled_block_kernels.json).
        by_compiler = self.kernels == "auto" and not any(config.is_axiswise for config in self.casts)
        object.__setattr__(self, "compiled", replace(self, kernels="inductor") if by_compiler else self)

    @property
    def casts(self) -> tuple[CastConfig, ...]:
        return (*self.input, *self.weight, *self.grad_output)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The float8 dtypes of the operands, without duplicates."""
        return tuple(dict.fromkeys(config.dtype for config in self.casts if config.is_cast))

    def on(self, device: torch.device) -> Float8Format:
        compiling = torch.compiler.is_compiling()
        if must_emulate(device, self.target, self.dtypes, self.emulate, compiling):
            return self.emulated  # type: ignore[return-value]
        return self.compiled if compiling else self  # type: ignore[attr-defined,no-any-return]

    def eager(self) -> Float8Format:
        return replace(self, kernels="triton") if self.kernels == "inductor" and kernels.AVAILABLE else self

    # ---- casts

    def _casts(self, operand: OperandName) -> Casts:
        return getattr(self, operand)  # type: ignore[no-any-return]

    def _cast(self, use: Use) -> CastConfig:
        return self._casts(use.operand)[1 - use.contracted]

    def _by_kernels(self, x: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> bool:
        """Return whether the Triton kernels cast ``x``, if its scale is dynamic; else plain operations do."""
        enabled = kernels.AVAILABLE and self.kernels != "inductor" and not self.emulate
        return enabled and x.dtype in dtypes and x.numel() > 0

    def cast(self, x: Tensor, use: Use, scale: Tensor | None = None, amax: Tensor | None = None) -> Operand:
        config = self._cast(use)
        if config.is_cast and scale is None and self._by_kernels(x):
            layouts: tuple[kernels.Layout, kernels.Layout] = (config.layout, "none")
            layouts = layouts if use.contracted == 1 else ("none", config.layout)
            casts = kernels.cast_operands(x, config.dtype, *layouts, self.power_of_2, amax)
            return casts[1 - use.contracted]
        return cast(
            x,
            config,
            contracted=use.contracted,
            power_of_2=self.power_of_2,
            scale=scale,
            amax=amax,
            emulate=self.emulate,
        )

    def one_cast_serves_both(self, x: Tensor, operand: OperandName, scale: Tensor | None = None) -> bool:
        by_features, by_rows = self._casts(operand)
        # The kernels also write a transposed copy, which float8 units need.
        two_copies = by_features.is_cast and scale is None and self._by_kernels(x)
        return by_features == by_rows and not by_features.is_axiswise and not two_copies

    def cast_both(
        self, x: Tensor, operand: OperandName, scale: Tensor | None = None, amaxes: Amaxes = (None, None)
    ) -> tuple[Operand, Operand]:
        by_features, by_rows = self._casts(operand)
        amax = amaxes[0]
        one_amax = amaxes == (None, None) or (amax is not None and not amax.ndim and amax is amaxes[1])
        if by_features.is_cast and by_rows.is_cast and scale is None and one_amax and self._by_kernels(x):
            layouts = by_features.layout, by_rows.layout
            return kernels.cast_operands(x, by_features.dtype, *layouts, self.power_of_2, amax)
        return super().cast_both(x, operand, scale, amaxes)

    def cast_to_gather(self, shard: Tensor, dtype: torch.dtype, amax: Tensor | None) -> Operand:
        if not self._by_kernels(shard) or dtype not in kernels.DTYPES:
            return super().cast_to_gather(shard, dtype, amax)
        config = self._cast(WEIGHT)
        rounded_to = None if dtype is shard.dtype else dtype
        return kernels.cast_operands(shard, config.dtype, config.layout, "none", self.power_of_2, amax, rounded_to)[0]

    def recast(self, arrived: Operand, operand: OperandName) -> Operand:
        config = self._casts(operand)[1]
        if arrived.scale is not None and not arrived.scale.ndim and not config.is_axiswise:
            return arrived
        if self._by_kernels(arrived.data, kernels.QUANTIZED):
            return kernels.recast(arrived, config.dtype, config.layout, self.power_of_2)
        assert arrived.scale is not None
        values = dequantize(arrived.data, arrived.scale, self.power_of_2)
        return self.cast(values, Use(operand, 0))

    def input_key(self) -> Hashable:
        return None if self.input[0].is_stateful else (self.input, self.power_of_2, self.emulate)

    # ---- matmuls

    def multiply(self, a: Operand, b: Operand, matmul: Matmul, dtype: torch.dtype) -> Tensor:
        return scaled_mm(
            *(a, b),
            out_dtype=dtype,
            fast_accum=matmul in self.fast_accum,
            emulate=self.emulate,
            target=self.target,
        )

    # ---- groups of rows

    has_grouped_units = staticmethod(has_grouped_matmuls)
    grouped_results = (torch.bfloat16,)

    def why_not_grouped(self) -> str | None:
        if all(config.is_axiswise for config in self.casts):
            return None
        return "its grouped matmuls have scales of rows only; use rowwise"

    def groups(self, offsets: Tensor, rows: int) -> Groups:
        # The units end the process at a sum over no rows (PyTorch's aten/src/ATen/native/cuda/GroupMMCommon.cuh).
        return Groups(offsets, rows, self.multiple, least=0 if self.emulate else 1)

    def _groups_by_kernels(self, x: Tensor) -> bool:
        """Return whether the Triton kernels cast ``x`` for grouped matmuls. The number of rows must not decide: under
        expert parallelism the compiler does not know it."""
        return kernels.AVAILABLE and self.kernels != "inductor" and not self.emulate and x.dtype in kernels.DTYPES

    def cast_rows(self, x: Tensor, use: Use) -> Operand:
        dtype = self._cast(use).dtype
        if self._groups_by_kernels(x):
            return kernels.cast_operands(x, dtype, "vector", "none", self.power_of_2)[0]
        scale = amax_to_scale(x.abs().amax(1, keepdim=True), dtype, self.power_of_2)
        return Operand(quantize(x, scale, dtype).contiguous(), scale)

    def cast_columns(self, x: Tensor, groups: Groups, use: Use) -> Operand:
        dtype = self._cast(use).dtype
        if self._groups_by_kernels(x):
            places = groups.row_of, groups.group_of
            scale = amax_to_scale(amaxes_of_groups(x, *places, groups.count), dtype, self.power_of_2)
            return Operand(cast_columns_of_groups(x, *places, scale, dtype), scale)
        padded = groups.padded(x)
        scale = amax_to_scale(groups.amax(padded), dtype, self.power_of_2)
        return Operand(quantize(padded, scale[groups.number], dtype).t().contiguous(), scale)

    def cast_transposed(self, w: Tensor, use: Use) -> Operand:
        if not self._groups_by_kernels(w):
            return super().cast_transposed(w, use)
        data, scale = self.cast_columns(w.flatten(0, 1), Groups.of_matrices(w, self.multiple), use)
        assert scale is not None
        matrices = data[:, : w.shape[0] * w.shape[1]].unflatten(1, w.shape[:2]).transpose(0, 1)
        return Operand(matrices.contiguous(), scale[:-1, :, None])

    def values(self, operand: Operand, groups: Groups | None = None) -> Tensor:
        data, scale = operand
        assert scale is not None
        return dequantize(data, scale if groups is None else scale[groups.number].t())

    def multiply_rows(self, x: Operand, w: Operand, offsets: Tensor, matmul: Matmul, dtype: torch.dtype) -> Tensor:
        if self.emulate:
            return super().multiply_rows(x, w, offsets, matmul, dtype)
        return scaled_grouped_mm(x, w, offsets, matmul in self.fast_accum)

    def multiply_columns(self, g: Operand, x: Operand, groups: Groups, dtype: torch.dtype) -> Tensor:
        if self.emulate:
            return super().multiply_columns(g, x, groups, dtype)
        assert g.scale is not None
        assert x.scale is not None
        left, right = Operand(g.data, g.scale[:-1]), Operand(x.data, x.scale[:-1])
        return scaled_grouped_mm(left, right, groups.ends, "grad_weight" in self.fast_accum)

    # ---- communication

    def travels(self, operand: OperandName) -> bool:
        return all(config.is_dynamic for config in self._casts(operand))

    def has_scales_of_rows(self, operand: OperandName) -> bool:
        return self._casts(operand)[0].is_axiswise

    def amax(self, x: Tensor, operand: OperandName) -> Tensor:
        return amax_of(x, -1 if self.has_scales_of_rows(operand) else None).float()

    def agrees(self, use: Use, sharded: int) -> bool:
        # Powers of two only shift exponents: whichever they are, the numbers are the same, except where they underflow.
        config = self._cast(use)
        shared = not config.is_axiswise or use.contracted == sharded
        return config.is_dynamic and shared and not self.power_of_2

    def shares_amax(self, operand: OperandName) -> bool:
        return all(config.is_dynamic and not config.is_axiswise for config in self._casts(operand))

    def amaxes(self, x: Tensor, uses: Iterable[Use]) -> dict[Use, Tensor]:
        whole = None
        amaxes: dict[Use, Tensor] = {}
        for use in uses:
            if self._cast(use).is_axiswise:
                amaxes[use] = amax_of(x, use.contracted).float()
                continue
            if whole is None:
                whole = kernels.amax(x) if self._by_kernels(x) else amax_of(x).float()
            amaxes[use] = whole
        return amaxes

    def quantize(self, x: Tensor, amax: Tensor, operand: OperandName) -> Operand:
        dtype = self._casts(operand)[0].dtype
        scale = amax_to_scale(amax, dtype, self.power_of_2)
        return Operand(quantize(x, scale, dtype), scale)

    # ---- state

    def state(self) -> dict[OperandName, dict[str, tuple[int, ...]]]:
        return {name: delayed.buffers(name, self.history_len) for name in self.delayed_operands()}

    def delayed_operands(self) -> list[OperandName]:
        return [name for name in OPERANDS if self._casts(name)[0].scaling_type is ScalingType.DELAYED]

    def scale_from_state(self, layer: nn.Module, x: Tensor, operand: OperandName) -> Tensor | None:
        return delayed.scale_of(layer, operand, self._casts(operand)[0], x, self.power_of_2)

    # ---- SwiGLU

    def fuses_swiglu(self, x: Tensor) -> bool:
        return self.input[0].is_cast and self.input[0].is_dynamic and self._by_kernels(x)

    def swiglu_cast(self, gate: Tensor, up: Tensor, for_weight: bool) -> tuple[Operand, Tensor]:
        by_features, by_rows = self.input
        data, scale, amaxes = kernels.swiglu_cast(
            gate,
            up,
            by_features.dtype,
            by_features.layout,
            by_rows.layout if for_weight else "none",
            self.power_of_2,
        )
        return Operand(data, scale), amaxes

    def swiglu_backward(
        self, grad: Tensor, gate: Tensor, up: Tensor, saved: Tensor, for_weight: bool
    ) -> tuple[Tensor, Tensor, Operand | None]:
        by_rows = self.input[1]
        layout = "none" if not for_weight else by_rows.layout if by_rows.is_cast else "high_precision"
        grad_gate, grad_up, data, scale = kernels.swiglu_backward(
            grad, gate, up, saved, by_rows.dtype, layout, self.power_of_2
        )
        product = Operand(data.t(), scale) if by_rows.is_cast else Operand(data, None)
        return grad_gate, grad_up, product if for_weight else None

    def describe(self) -> dict[str, str]:
        names = (("i", "i_gw", self.input), ("w", "w_gi", self.weight), ("go", "go_gw", self.grad_output))
        parts = [f"{name}:{casts[0].short_str()}" for name, _, casts in names]
        parts += [f"{name}:{casts[1].short_str()}" for _, name, casts in names if casts[1] != casts[0]]
        return {"cast_configs": ",".join(parts)}
