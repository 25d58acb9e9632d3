"""The interface of a number format: it casts the operands of a linear layer's matmuls, and multiplies two of them.

A linear layer has three matmuls::

    output = x @ w.T        grad_input = g @ w        grad_weight = g.T @ x

``x`` (rows, in_features) is the input, ``w`` (out_features, in_features) the weight, ``g`` (rows, out_features) the
gradient of the output. Each of the three is an operand of two matmuls, which sum over different dimensions of it. The
dimension that a matmul sums over is called contracted; a cast for the matmul has its blocks or scales along it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

OperandName = Literal["input", "weight", "grad_output"]
OPERANDS: tuple[OperandName, ...] = ("input", "weight", "grad_output")
Matmul = Literal["output", "grad_input", "grad_weight"]


class Use(NamedTuple):
    """The use of an operand in the matmul that sums over dimension ``contracted`` of the 2-D operand."""

    operand: OperandName
    contracted: int


WEIGHT, WEIGHT_FOR_GRAD_INPUT = Use("weight", 1), Use("weight", 0)
Amaxes: TypeAlias = tuple[Tensor | None, Tensor | None]


class Operand(NamedTuple):
    """One side of a matmul.

    Attributes:
        data: 2-D; in the format, or in high precision where ``scale`` is None.
        scale: of the dtype and meaning that the format gives it; () for the whole tensor, 2-D with one entry per row,
            column, or block of ``data``, or 1-D in the order of the units.
    """

    data: Tensor
    scale: Tensor | None

    def t(self) -> Operand:
        return Operand(self.data.t(), None if self.scale is None else self.scale.t() if self.scale.ndim else self.scale)


class Format(ABC):
    """A number format with all its options. Immutable and hashable; equal formats compute the same.

    The layers, their autograd functions, FSDP2's all-gather and tensor parallelism are written once over this
    interface. They cast and multiply with the format that :meth:`on` returned for their device.

    Attributes:
        name: the name in messages, such as "float8".
        multiple: the hardware needs in_features and out_features that are multiples of this number.
        stores_weights: weights exist in the format only, with scales of rows; there is no copy in high precision.
    """

    name: str
    multiple: int
    stores_weights: bool = False

    def why_not(self, in_features: int, out_features: int) -> str | None:
        """Return why a layer of this size cannot be computed in the format; None if it can."""
        if in_features % self.multiple or out_features % self.multiple:
            return f"features are not multiples of {self.multiple}"
        return None

    @abstractmethod
    def on(self, device: torch.device) -> Format:
        """Return the format as ``device`` computes it: with its own units, or emulated in float32.

        Raises:
            ValueError: the device can do neither.
        """

    def eager(self) -> Format:
        """Return the format as code that is not compiled computes it, FSDP2's hooks for example: with kernels of its
        own, where plain operations would not be fused. The results are the same."""
        return self

    # ---- casts

    @abstractmethod
    def cast(self, x: Tensor, use: Use, scale: Tensor | None = None, amax: Tensor | None = None) -> Operand:
        """Cast ``x`` for one matmul.

        Args:
            x: 2-D, in high precision.
            scale: from :meth:`scale_from_state`; None computes it from the amaxes.
            amax: the amaxes, as of :meth:`amaxes`, that ranks agreed on; None: those of ``x``.
        """

    @abstractmethod
    def one_cast_serves_both(self, x: Tensor, operand: OperandName, scale: Tensor | None = None) -> bool:
        """Return whether one cast serves both matmuls of the operand."""

    def cast_both(
        self, x: Tensor, operand: OperandName, scale: Tensor | None = None, amaxes: Amaxes = (None, None)
    ) -> tuple[Operand, Operand]:
        """Cast ``x`` for the matmul that contracts its features, and for the one that contracts its rows. The two are
        the same object where one cast serves both. ``amaxes`` are those of the two casts."""
        by_features = self.cast(x, Use(operand, 1), scale, amaxes[0])
        if self.one_cast_serves_both(x, operand, scale):
            return by_features, by_features
        return by_features, self.cast(x, Use(operand, 0), scale, amaxes[1])

    @abstractmethod
    def input_key(self) -> Hashable:
        """Return a key of the options that the casts of an input depend on. Layers with equal keys share the casts of
        an input. None: the casts depend on the layer's state, so they cannot be shared."""

    # ---- matmuls

    @abstractmethod
    def multiply(self, a: Operand, b: Operand, matmul: Matmul, dtype: torch.dtype) -> Tensor:
        """Return ``a @ b``, (m, k) @ (k, n), with the scales applied, in ``dtype``; it is summed in float32 or int32.
        Both operands are in the format, or neither is; of a format that stores weights, ``b`` alone may be."""

    # ---- communication

    def travels(self, operand: OperandName) -> bool:
        """Return whether ranks can gather the operand in the format, as they can if both of its matmuls use it. The
        methods below, up to :meth:`recast`, are called only for an operand that travels."""
        return False

    def has_scales_of_rows(self, operand: OperandName) -> bool:
        """Return whether each row has its own scales when the operand is gathered; ranks then need no common scale."""
        raise NotImplementedError

    def amax(self, x: Tensor, operand: OperandName) -> Tensor:
        """Return the amaxes for the scales of ``x``, float32: (), which the ranks that share the tensor have to
        all-reduce, or (..., n) for n scales of each row, all of which are whole on their rank."""
        raise NotImplementedError

    def quantize(self, x: Tensor, amax: Tensor, operand: OperandName) -> Operand:
        """Cast ``x``, of any shape, with the scales of ``amax``; the data is contiguous, one byte per element."""
        raise NotImplementedError

    def cast_to_gather(self, shard: Tensor, dtype: torch.dtype, amax: Tensor | None) -> Operand:
        """Round this rank's rows of a weight, (rows, in_features), to ``dtype``, and cast them for a gather. ``amax``
        are the amaxes before rounding that ranks agreed on; None: those of the shard."""
        # Rounding is monotonic, so the rounded amax is the amax of the rounded shard.
        return self.cast(shard.to(dtype), WEIGHT, amax=None if amax is None else amax.to(dtype).float())

    def arrived(self, gathered: Operand) -> Operand:
        """Return an operand that was gathered as :meth:`multiply` takes it, for the matmul that contracts its
        features. They differ where the units want the scales in an order that rows cannot be gathered in."""
        return gathered

    def recast(self, arrived: Operand, operand: OperandName) -> Operand:
        """Return the operand for the matmul that contracts its rows, computed from the cast for the other matmul, which
        was gathered."""
        raise NotImplementedError

    def dequantize(self, operand: Operand) -> Tensor:
        """Return what :meth:`quantize` has rounded, in float32. Called only where weights are stored."""
        raise NotImplementedError

    def requantize(self, stored: Operand, x: Tensor, amax: Tensor, bits: Tensor) -> Operand:
        """Round an updated weight stochastically. Called only where weights are stored.

        Args:
            stored: the weight before.
            x: the weight now, float32.
            amax: as of :meth:`amax`, of the whole rows.
            bits: int32, of the shape of ``x``: 32 uniform bits.
        """
        raise NotImplementedError

    def agrees(self, use: Use, sharded: int) -> bool:
        """Return whether ranks have to agree on the amaxes of a cast if each has a part of the operand, split along
        dimension ``sharded``. Otherwise the scales of the parts give the same numbers."""
        return False

    def shares_amax(self, operand: OperandName) -> bool:
        """Return whether both casts of the operand take the same amax, (). Ranks then agree on it once."""
        return False

    def amaxes(self, x: Tensor, uses: Iterable[Use]) -> dict[Use, Tensor]:
        """Return the amaxes of casts of ``x``, 2-D: float32, (), or with size 1 along the contracted dimension."""
        raise NotImplementedError

    # ---- state of a layer

    def state(self) -> dict[OperandName, dict[str, tuple[int, ...]]]:
        """Return the names and shapes, by operand, of the float32 buffers of a layer. They are initialized to zero."""
        return {}

    def scale_from_state(self, layer: nn.Module, x: Tensor, operand: OperandName) -> Tensor | None:
        """Return the scale, (), to cast ``x`` with; None if it is computed from ``x`` alone. In training this may
        update the buffers of ``layer``."""
        return None

    # ---- SwiGLU

    def fuses_swiglu(self, x: Tensor) -> bool:
        """Return whether :meth:`swiglu_cast` and :meth:`swiglu_backward` support factors like ``x``."""
        return False

    def swiglu_cast(self, gate: Tensor, up: Tensor, for_weight: bool) -> tuple[Operand, Tensor]:
        """Cast the input ``silu(gate) * up``, (rows, features), for the output, without writing the product. The second
        result is for :meth:`swiglu_backward`, which with ``for_weight`` casts the product for grad_weight."""
        raise NotImplementedError

    def swiglu_backward(
        self, grad: Tensor, gate: Tensor, up: Tensor, saved: Tensor, for_weight: bool
    ) -> tuple[Tensor, Tensor, Operand | None]:
        """Return the gradients of ``gate`` and ``up`` and, if ``for_weight``, the product as the operand of
        grad_weight. ``grad`` is the gradient of the product; it is overwritten."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return the options to show in the ``repr`` of a layer."""
        return {}
