"""The device that computes: the device of this run, or in an estimate one that need not be present."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Target:
    """The device to compute for.

    Attributes:
        kind: "cpu" or "cuda". In an estimate for GPUs the tensors, which have no data, are still on the CPU.
        architecture: the GPU's architecture as compilers spell it, such as "sm_90"; None: that of the present device.
    """

    kind: Literal["cpu", "cuda"]
    architecture: str | None = None

    @property
    def is_cpu(self) -> bool:
        return self.kind == "cpu"


H100 = Target("cuda", "sm_90")
