"""The costs of a number format in a step, and what it saves, for predictions; the rules of its section give them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FormatCost:
    """The work of a converter's layers, in 8-bit floating point.

    Attributes:
        recipe: its name.
        row_scales: its matmuls have a scale for each row and column, which takes other kernels.
        grad_weight: the gradient of the weight is computed in the format too.
        input_bytes, grad_bytes, weight_bytes: the bytes that the casts of an input, of a gradient of an output, and of
            a weight in a whole step move, for each element: passes for the largest magnitudes, and copies in both
            layouts. Of a gathered weight, without ``recast_bytes``.
        recast_bytes: the bytes that are moved for each element of what was gathered in the format, to cast it again
            along its other dimension; 0: one cast has both layouts.
        agrees: ranks that share a tensor agree on its scale.
        casts_shards: tensor parallelism casts before it gathers, and gathers one byte for each element.
        gathers_weights: FSDP2 gathers one byte for each element of a weight.
        filter_fqns: layers that stay in high precision.
        moe_fqns: experts that compute in the format, by parts of their names. Their weights are gathered in
            high precision.
        expert_weight_bytes: as ``weight_bytes``, of the experts' weights.
        native_on: the architectures whose units compute in the format; empty: all with units for 8-bit floating point.
        emulated: as configured, whatever the device has.
        grouped_on: the architectures that have a grouped matmul in the format; elsewhere it is emulated.
    """

    recipe: str
    row_scales: bool
    grad_weight: bool
    input_bytes: float
    grad_bytes: float
    weight_bytes: float
    recast_bytes: float
    agrees: bool
    casts_shards: bool
    gathers_weights: bool
    filter_fqns: tuple[str, ...]
    moe_fqns: tuple[str, ...]
    expert_weight_bytes: float
    native_on: tuple[str, ...]
    emulated: bool
    grouped_on: tuple[str, ...]

    def is_native(self, architecture: str) -> bool:
        """Return whether an architecture with units for 8-bit floating point computes in the format."""
        return not self.native_on or architecture in self.native_on
