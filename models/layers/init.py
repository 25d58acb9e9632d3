"""The interface by which layers get their initial values."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Init(Protocol):
    """An initializer of parameters (see ``titanlite.distributed.init``)."""

    def trunc_normal(self, param: Tensor, std: float, bound: float = 3.0) -> None: ...
    def normal(self, param: Tensor, std: float) -> None: ...
    def ones(self, param: Tensor) -> None: ...
    def zeros(self, param: Tensor) -> None: ...
