"""torch.compile block by block: all blocks share one compiled graph, so that it takes seconds, not minutes."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler

from titanlite.config.schema import Compile
from titanlite.errors import ConfigError, counted
from titanlite.models.layers import Mixture
from titanlite.registry import nearest

logger = logging.getLogger()

_COMPILATIONS = (CallbackTrigger.DYNAMO, CallbackTrigger.LAZY_BACKWARD)


class CompileWatch:
    """A watch that logs the time of compilation, and warns about compilation after the first step and validation.

    Attributes:
        graphs: the number of graphs compiled since the last step or validation; forward and backward count separately.
    """

    def __init__(self) -> None:
        self.graphs, self._seconds, self._began = 0, 0.0, 0.0
        self._stepped = self._validated = False
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)

    def _start(self, args: CallbackArgs) -> None:
        self._began = time.perf_counter()

    def _end(self, args: CallbackArgs) -> None:
        if args.callback_trigger in _COMPILATIONS:
            self.graphs += 1
            self._seconds += time.perf_counter() - self._began

    def step_done(self, step: int) -> None:
        self._say(f"step {step}", "compiled", expected=not self._stepped)
        self._stepped = True

    def validation_done(self, step: int) -> None:
        """Log the compilation of a validation. The first one compiles the blocks again, without gradients."""
        self._say(f"the validation after step {step}", "for validation, compiled", expected=not self._validated)
        self._validated = True

    def _say(self, when: str, action: str, expected: bool) -> None:
        if self.graphs and expected:
            logger.info("%s %s in %.1f s", action, counted(self.graphs, "graph"), self._seconds)
        elif self.graphs:
            logger.warning(
                "%s compiled %s again, in %.1f s; TORCH_LOGS=recompiles says why",
                when,
                counted(self.graphs, "graph"),
                self._seconds,
            )
        self.graphs, self._seconds = 0, 0.0

    def close(self) -> None:
        callback_handler.remove_start_callback(self._start)
        callback_handler.remove_end_callback(self._end)


def compiled(function: Callable[..., Any], options: Compile) -> Callable[..., Any]:
    """Return ``function`` compiled with ``options``. Raises ConfigError if there is no such backend."""
    backends = torch.compiler.list_backends(exclude_tags=())
    if options.backend not in backends:
        raise ConfigError(
            f"there is no such backend{nearest(options.backend, backends)}; known: {', '.join(backends)}",
            key="compile.backend",
            value=options.backend,
        )
    return torch.compile(
        function,
        mode=None if options.mode == "default" else options.mode,
        fullgraph=options.fullgraph,
        dynamic=options.dynamic,
        backend=options.backend,
    )


def compile_blocks(blocks: nn.ModuleDict, options: Compile) -> None:
    """Fill the slot ``run`` of each block with its compiled computation; FSDP2's hooks stay outside the graph.

    On GPUs the rules of :mod:`titanlite.distributed.fusion` hold for all that is compiled from then on.
    """
    fuses = options.fuses_blocks and torch.cuda.is_available()
    if fuses or "titanlite.distributed.fusion" in sys.modules:
        from titanlite.distributed.fusion import use_block_fusion  # loads the compiler

        use_block_fusion(fuses)
    if any(isinstance(module, Mixture) and module.spread is not None for module in blocks.modules()):
        # How many rows come to the experts of a process is known only when the graph runs. It must not break for that.
        torch._dynamo.config.capture_dynamic_output_shape_ops = True
    block: Any
    for block in blocks.values():
        block.run = compiled(block.run or block.compute, options)
