"""torch.compile, block by block: all blocks share one compiled graph, so it takes seconds, not minutes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from titanlite.config.schema import Compile
from titanlite.errors import ConfigError
from titanlite.registry import nearest


def compiled(function: Callable[..., Any], options: Compile) -> Callable[..., Any]:
    """``torch.compile`` with the options of ``[compile]``."""
    backends = torch.compiler.list_backends(exclude_tags=())
    if options.backend not in backends:
        raise ConfigError(
            f'compile.backend = "{options.backend}": there is no such backend{nearest(options.backend, backends)}; '
            f"known: {', '.join(backends)}"
        )
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
