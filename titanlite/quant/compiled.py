"""Functions of plain tensors that are compiled into one pass over their inputs, in code that is not compiled itself."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("titanlite.compile")


class CompiledFunction:
    """A function that is compiled at its first call, for all shapes; as it is where there is no compiler.

    Args:
        function: takes tensors and numbers. It sees the tensors without autograd.
        subject: its name in the warning that there is no compiler, in the plural.
    """

    def __init__(self, function: Callable[..., Any], subject: str) -> None:
        self.plain, self.subject = function, subject
        self.function: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        # In one state of autograd and with plain tensors: each other one would be compiled again, eight times at most.
        with torch.no_grad(), torch._C._AutoDispatchBelowADInplaceOrView():
            return self._call(*(arg.detach() if isinstance(arg, Tensor) else arg for arg in args))

    def _call(self, *args: Any) -> Any:
        if self.function is None:
            from torch._dynamo.exc import BackendCompilerFailed  # loads the compiler
            from torch._inductor.exc import InductorError

            self.function = torch.compile(self.plain, dynamic=True)
            try:
                return self.function(*args)
            except (BackendCompilerFailed, InductorError) as e:
                reason = str(e).strip().splitlines()[0]
                logger.warning("%s are not compiled, so they take several passes each (%s)", self.subject, reason)
                self.function = self.plain
        return self.function(*args)
