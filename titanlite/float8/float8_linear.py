"""The float8 linear layer, with torchao's names."""

from __future__ import annotations

from typing import Any

from torch import nn

from titanlite.float8.config import Float8LinearConfig
from titanlite.quant.linear import QuantLinear


class Float8Linear(QuantLinear):
    """An ``nn.Linear`` computed in float8, with the same parameters under the same names.

    The state dict is that of ``nn.Linear`` and, for operands with delayed scaling, the buffers ``fp8_amax_*``,
    ``fp8_amax_history_*`` and ``fp8_scale_*``. A state dict without them loads; delayed scaling then starts anew.

    Args:
        config: the casts of the operands, and the options of the three matmuls; None: the recipe tensorwise.
        The others: as in ``nn.Linear``.

    Raises:
        ValueError: the feature sizes are not multiples of 16.
    """

    gather_option = "enable_fsdp_float8_all_gather"
    _config: Float8LinearConfig

    def __init__(self, *args: Any, config: Float8LinearConfig | None = None, **kwargs: Any) -> None:
        config = config or Float8LinearConfig()
        super().__init__(*args, **kwargs, **_options(config))
        self._config = config

    @classmethod
    def from_float(cls, module: nn.Linear, config: Float8LinearConfig | None = None) -> Float8Linear:
        """Turn ``module`` itself into a Float8Linear and return it. Parameters, their ties, hooks and buffers stay.

        Raises:
            ValueError: it cannot be converted; see :func:`titanlite.float8.why_not_convertible`.
        """
        config = config or Float8LinearConfig()
        layer = cls.from_linear(module, **_options(config))
        layer._config = config
        return layer

    @property
    def config(self) -> Float8LinearConfig:
        """The configuration of the conversion; to change it, call ``Float8Linear.from_float(layer.to_linear(),
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
