"""The rules of weights that are stored in a number format, whichever it is."""

from __future__ import annotations

from titanlite.config.refuse import refuse
from titanlite.config.schema import JobConfig

OPTIMIZERS = ("AdamW", "Adam", "SGD")
"""Those that update such weights."""


def check_optimizer(config: JobConfig, recipe: str) -> None:
    """Refuse an optimizer that cannot update the weights that ``recipe``, an option with its value, stores."""
    if config.optimizer.name not in OPTIMIZERS:
        refuse(
            config,
            "optimizer.name",
            f"does not update weights that are stored in a number format ({recipe}); use {', '.join(OPTIMIZERS)}, or "
            "another recipe",
        )
    if config.optimizer.implementation == "foreach":
        refuse(
            config,
            "optimizer.implementation",
            f'would hold all weights in float32 at once, which {recipe} avoids; use "fused" or "for-loop"',
        )
