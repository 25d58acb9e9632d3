"""Rows in groups, one group for each matrix of a grouped matmul, and the interface of formats that multiply them.

A grouped matmul has three matmuls, as a linear layer has::

    output_i = x_i @ w_i.T        grad_input_i = g_i @ w_i        grad_weight_i = g_i.T @ x_i

where ``x_i`` and ``g_i`` are the rows of group i, which lie one after the other in ``x`` and ``g``, and ``w_i`` is its
matrix. The last one sums over the rows of a group, and its casts must not look across the border of a group.

Nothing here waits for a device: shapes depend on the number of rows alone, not on the sizes of groups.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from titanlite.quant.devices import lacks_result, lacks_units
from titanlite.quant.emulation import multiply_groups_in_float32
from titanlite.quant.format import Format, Matmul, Operand, Use


class Groups:
    """The places of rows where each group is filled up with zeros to a multiple of ``unit`` rows.

    Args:
        offsets: the end of each group in the rows, int32 [groups]. Rows after the last group are one more group, which
            takes part in no matmul.
        rows: their number.
        least: the units that a group has at least: 1 gives an empty one a unit of zeros.

    Attributes:
        ends: the end of each group in the padded rows, int32 [groups].
        number: the group of each padded row, int64 [padded rows].
        row_of: the row at each place, int32 [padded rows]; -1 for a zero.
        group_of: the group of each unit of rows, int32 [padded rows / unit].
        count: the number of groups, with the one of rows after the last group.
    """

    def __init__(self, offsets: Tensor, rows: int, unit: int, least: int = 0) -> None:
        self.count = offsets.shape[0] + 1
        ends = torch.cat((offsets.long(), offsets.new_full((1,), rows, dtype=torch.int64)))
        sizes = ends.diff(prepend=ends.new_zeros(1))
        padded_ends = (((sizes + unit - 1) // unit).clamp(min=least) * unit).cumsum(0)
        begins = torch.cat((padded_ends.new_zeros(1), padded_ends[:-1]))
        # As much as the sizes can need, and whole units: known without them.
        self._rows = (rows + self.count * (unit - 1 + least) + unit - 1) // unit * unit
        row = torch.arange(rows, device=offsets.device)
        group = torch.searchsorted(ends, row, right=True)
        self._place = row + (begins - (ends - sizes))[group]
        self.ends = padded_ends[:-1].int()
        self.number = torch.searchsorted(self.ends, torch.arange(self._rows, device=offsets.device), right=True)
        self._source, self._unit = row, unit

    @classmethod
    def of_matrices(cls, matrices: Tensor, unit: int) -> Groups:
        """Return the groups that the rows of ``matrices`` [groups, rows, columns] are."""
        count, rows, _ = matrices.shape
        ends = torch.arange(rows, count * rows + 1, rows, dtype=torch.int32, device=matrices.device)
        return cls(ends, count * rows, unit)

    @property
    def row_of(self) -> Tensor:
        nowhere = self._place.new_full((self._rows,), -1, dtype=torch.int32)
        return nowhere.index_copy(0, self._place, self._source.int())

    @property
    def group_of(self) -> Tensor:
        return self.number[:: self._unit].int()

    def padded(self, x: Tensor) -> Tensor:
        """Return rows ``x`` [rows, n] at their places, [padded rows, n]."""
        return x.new_zeros(self._rows, x.shape[1]).index_copy(0, self._place, x)

    def amax(self, padded: Tensor) -> Tensor:
        """Return the largest magnitude of each column in each group, in float32, [groups + 1, n]; NaN where there is
        one, 0 in an empty group."""
        magnitudes = padded.abs().float()
        index = self.number[:, None].expand_as(magnitudes)
        return magnitudes.new_zeros(self.count, padded.shape[1]).scatter_reduce(0, index, magnitudes, "amax")


class GroupedFormat(Format):
    """A number format that has grouped matmuls.

    Their operands have the contracted dimension last: ``data`` is (m, k), or (groups, m, k) for the matrices.

    Attributes:
        emulate: multiply the quantized values in float32.
        emulated: the same format with ``emulate``.
        target: the architecture to compute for, in an estimate without that device; None: the device's own.
        grouped_needs: what the units need, to be said where they are not.
        grouped_results: the dtypes in which the units of the format write products of groups; None: in all.
    """

    grouped_needs: ClassVar[str] = ""
    grouped_results: ClassVar[tuple[torch.dtype, ...] | None] = None
    emulate: bool
    emulated: GroupedFormat
    target: str | None

    @staticmethod
    def has_grouped_units(architecture: str) -> bool:
        """Return whether the format has a grouped matmul of its own on this architecture."""
        return False

    def for_groups(self, device: torch.device, dtype: torch.dtype) -> GroupedFormat:
        """Return the format as ``device`` computes grouped matmuls in it, with results in ``dtype``; as
        :meth:`Format.on`."""
        name, target = f"a grouped matmul in {self.name}", self.target
        if self.emulate or device.type == "meta":
            return self.emulated
        if lacks_units(name, self.has_grouped_units, device, target, self.grouped_needs):
            return self.emulated
        return self.emulated if lacks_result(name, self.grouped_results, dtype, device, target) else self

    def why_not_grouped(self) -> str | None:
        """Return why grouped matmuls cannot use these options of the format; None if they can."""
        return None

    def groups(self, offsets: Tensor, rows: int) -> Groups:
        """Return the groups for :meth:`cast_columns` of ``rows`` rows with these ends."""
        return Groups(offsets, rows, self.multiple)

    @abstractmethod
    def cast_rows(self, x: Tensor, use: Use) -> Operand:
        """Cast each row of ``x``, (m, k), by itself, with the options of ``use``."""

    @abstractmethod
    def cast_columns(self, x: Tensor, groups: Groups, use: Use) -> Operand:
        """Cast each column of each group of the rows ``x``, (rows, n), by itself, with the options of ``use``.

        Returns:
            Data (n, padded rows), contiguous.
        """

    def cast_transposed(self, w: Tensor, use: Use) -> Operand:
        """Cast each column of the matrices ``w``, [groups, m, k], by itself, with the options of ``use``. Return data
        [groups, k, m], contiguous."""
        rows = w.transpose(1, 2).reshape(-1, w.shape[1])
        return Operand(*(None if x is None else x.unflatten(0, (w.shape[0], -1)) for x in self.cast_rows(rows, use)))  # type: ignore[arg-type]

    @abstractmethod
    def values(self, operand: Operand, groups: Groups | None = None) -> Tensor:
        """Return what an operand stands for, in float32, in the shape of its data. ``groups`` are those of
        :meth:`cast_columns`."""

    def multiply_rows(self, x: Operand, w: Operand, offsets: Tensor, matmul: Matmul, dtype: torch.dtype) -> Tensor:
        """Return ``x_i @ w_i.T`` for each group, in ``dtype``, accumulated in float32.

        Args:
            x: from :meth:`cast_rows`, (rows, k).
            w: from :meth:`cast_rows`, (groups, m, k).
            offsets: int32 [groups].

        Returns:
            (rows, m). Rows after the last group are not defined.
        """
        w_values = self.values(Operand(w.data.flatten(0, 1), None if w.scale is None else w.scale.flatten(0, 1)))
        w_values = w_values.view(w.data.shape).transpose(1, 2)
        return multiply_groups_in_float32(self.values(x), w_values, offsets).to(dtype)

    def multiply_columns(self, g: Operand, x: Operand, groups: Groups, dtype: torch.dtype) -> Tensor:
        """Return ``g_i.T @ x_i`` for each group, (groups, m, n), in ``dtype``, accumulated in float32.

        Args:
            g, x: from :meth:`cast_columns`, (m, padded rows) and (n, padded rows).
        """
        values = self.values(g, groups), self.values(x, groups).t()
        return multiply_groups_in_float32(*values, groups.ends).to(dtype)
