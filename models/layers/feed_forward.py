"""The feed-forward part of a block."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from titanlite.models.layers.init import Init


def swiglu(w2: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """Return ``w2(silu(gate) * up)`` (Shazeer, "GLU Variants Improve Transformer", 2020)."""
    return w2(F.silu(gate) * up)  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """The feed-forward layer SwiGLU: ``w2(silu(w1 x) * w3 x)``.

    Args:
        dim: the features of the hidden states.
        hidden_dim: the features of gate and up.

    Attributes:
        swiglu: a slot for a function ``(w2, gate, up) -> out``, by default :func:`swiglu`. One that is fused with the
            casts of a quantized ``w2`` can replace it.
    """

    swiglu: Callable[[nn.Module, Tensor, Tensor], Tensor]

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)
        self.swiglu = swiglu

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., dim] to [..., dim]."""
        return self.swiglu(self.w2, self.w1(x), self.w3(x))

    def init_weights(self, init: Init, out_std: float) -> None:
        init.trunc_normal(self.w1.weight, std=0.02)
        init.trunc_normal(self.w2.weight, std=out_std)
        init.trunc_normal(self.w3.weight, std=out_std)
