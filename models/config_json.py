"""Checked access to a ``config.json`` that somebody else wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titanlite.errors import ConfigError

# The largest sizes that are believed. A file that states more would fill the memory before a tensor is compared.
MOST = {
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok", "n_routed_experts"), 1 << 16),
    **dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "n_group", "topk_group"), 1 << 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 1 << 16),
    **dict.fromkeys(
        (
            "hidden_size",
            "intermediate_size",
            "moe_intermediate_size",
            "vocab_size",
            "max_position_embeddings",
            "sliding_window",
            "kv_lora_rank",
            "q_lora_rank",
        ),
        1 << 24,
    ),
}


def shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


class ConfigJson:
    """A parsed ``config.json``, or an object in it, read for a family of models.

    Args:
        family: titanlite's name of the family, for messages.
        prefix: the key of the object and a dot, for messages.
    """

    def __init__(self, values: Mapping[str, Any], family: str, prefix: str = "") -> None:
        self.values, self.family, self._prefix = values, family, prefix

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def size(self, key: str, required: bool = False, least: int = 1) -> Any:
        """Return a whole number from ``least``; None if the key is missing or null."""
        value, most = self.values.get(key), MOST[key]
        if (value is not None or required) and (type(value) is not int or not least <= value <= most):
            raise self.unsupported(key, f"must be a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: Any = None, most: float = 1e15) -> Any:
        """Return a number above 0."""
        value = self.values.get(key, default)
        if type(value) not in (int, float) or not 0 < value <= most:
            raise self.unsupported(key, f"must be a number above 0{f', at most {most}' if most < 1e15 else ''}", value)
        return value

    def optional_number(self, key: str, most: float = 1e15) -> Any:
        """Return a number above 0; None if the key is missing or null."""
        return None if self.values.get(key) is None else self.number(key, most=most)

    def only(self, key: str, value: Any) -> None:
        """Check that the key is ``value``, missing or null."""
        if self.values.get(key) not in (None, value):
            raise self.unsupported(key, f"must be {shown(value)}")

    def unsupported(self, key: str, rule: str, value: Any = None) -> ConfigError:
        value = self.values.get(key) if value is None else value
        return ConfigError(
            f"config.json: {self._prefix}{key} = {shown(value)}: {rule}; the folder holds a model that {self.family} "
            "does not compute, or the file is damaged"
        )
