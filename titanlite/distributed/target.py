"""The device that computes: that of this run, or in an estimate one that is not there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Target:
    """The device whose ways are taken.

    Attributes:
        kind: "cpu" or "cuda". In an estimate for GPUs the tensors, which have no data, lie on the CPU all the same.
        architecture: as compilers spell it, such as "sm_90"; None: that of the device that is there.
    """

    kind: Literal["cpu", "cuda"]
    architecture: str | None = None

    @property
    def is_cpu(self) -> bool:
        return self.kind == "cpu"


H100 = Target("cuda", "sm_90")
