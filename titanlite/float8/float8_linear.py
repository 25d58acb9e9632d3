"""The float8 linear layer, by torchao's names."""

from __future__ import annotations

from typing import Any

from torch import nn

from titanlite.float8.config import Float8LinearConfig
from titanlite.quant.linear import QuantLinear


class Float8Linear(QuantLinear):
    """``nn.Linear`` computed in float8; the same parameters under the same names.

    The state dict is that of ``nn.Linear``, with the buffers ``fp8_amax_*``, ``fp8_amax_history_*`` and ``fp8_scale_*``
    for operands with delayed scaling; a state dict without them loads, and scaling starts from the live amax.

    Args:
        config: how to cast the operands of its three matmuls.
        The others: as of ``nn.Linear``. Both feature sizes must be multiples of 16.

    Raises:
        ValueError: feature sizes that float8 units cannot take.
    """

    gather_option = "enable_fsdp_float8_all_gather"
    _config: Float8LinearConfig

    def __init__(self, *args: Any, config: Float8LinearConfig | None = None, **kwargs: Any) -> None:
        config = config or Float8LinearConfig()
        super().__init__(*args, **kwargs, **_options(config))
        self._config = config

    @classmethod
    def from_float(cls, module: nn.Linear, config: Float8LinearConfig | None = None) -> Float8Linear:
        """Turn ``module`` itself into a Float8Linear: parameters, their ties, hooks and buffers stay; returns it.

        Raises:
            ValueError: if it cannot be; see :func:`titanlite.float8.why_not_convertible`.
        """
        config = config or Float8LinearConfig()
        layer = cls.from_linear(module, **_options(config))
        layer._config = config
        return layer

    @property
    def config(self) -> Float8LinearConfig:
        """As it was made with. Another one needs another conversion: ``Float8Linear.from_float(layer.to_linear(),
        config)``."""
        return self._config

    def to_linear(self) -> nn.Linear:
        linear = super().to_linear()
        del self._config
        return linear


def _options(config: Float8LinearConfig) -> dict[str, Any]:
    return {
        "format": config.format,
        "gather_quantized": config.enable_fsdp_float8_all_gather,
        "keep_weight": not config.force_recompute_fp8_weight_in_bwd,
    }
