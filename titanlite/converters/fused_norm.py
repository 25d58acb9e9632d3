"""The converter ``fused_rmsnorm``: RMSNorm as one compiled kernel in forward and in backward, for any model."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanlite.config import JobConfig
from titanlite.converters.registry import register_converter
from titanlite.distributed.mesh import Mesh
from titanlite.errors import ConfigError


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float | None) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


class FusedRMSNorm(nn.RMSNorm):
    """An ``nn.RMSNorm`` over the last dimension, compiled, with the same parameter under the same name."""

    kernel: Callable[[Tensor, Tensor | None, float | None], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        # A compiled block inlines this, and fuses it with its neighbours.
        return self.kernel(x, self.weight, self.eps)


@register_converter("fused_rmsnorm")
class FusedNormConverter:
    def __init__(self, config: JobConfig, mesh: Mesh) -> None:
        self.backend = config.compile.backend

    def convert(self, model: nn.Module) -> str:
        # Not at import, which would load the compiler for every run.
        kernel = torch.compile(_rms_norm, fullgraph=True, dynamic=False, backend=self.backend)
        count = 0
        for parent in list(model.modules()):
            for name, norm in list(parent.named_children()):
                if type(norm) is nn.RMSNorm and len(norm.normalized_shape) == 1:
                    with torch.device("meta"):
                        fused = FusedRMSNorm(norm.normalized_shape, norm.eps, norm.elementwise_affine)
                    fused.kernel = kernel
                    fused.weight = norm.weight
                    fused.train(norm.training)
                    setattr(parent, name, fused)
                    count += 1
        if not count:
            raise ConfigError(
                "the model has no nn.RMSNorm to convert; leave it out", key="model.converters", value="fused_rmsnorm"
            )
        return f"{count} RMSNorm layers fused"

    def post_optimizer_hook(self, model: nn.Module) -> None:
        pass
