"""torch.compile, block by block: all blocks share one compiled graph, so it takes seconds, not minutes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from titanlite.config.schema import Compile


def compiled(function: Callable[..., Any], options: Compile) -> Callable[..., Any]:
    """``torch.compile`` with the options of ``[compile]``."""
    return torch.compile(
        function,
        mode=None if options.mode == "default" else options.mode,
        fullgraph=options.fullgraph,
        dynamic=options.dynamic,
        backend=options.backend,
    )


def compile_blocks(blocks: nn.ModuleDict, options: Compile) -> None:
    """Compile each block's forward, in place: names in state dicts stay, and FSDP's hooks stay outside the graph."""
    for block in blocks.values():
        block.forward = compiled(block.forward, options)  # type: ignore[method-assign]
