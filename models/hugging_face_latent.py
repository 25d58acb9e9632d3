"""Latent attention as ``transformers`` keeps it: keys of ``config.json``, and the names of its tensors."""

from __future__ import annotations

from typing import Any

from titanlite.models.config_json import ConfigJson
from titanlite.models.layers import LatentArgs

_KEYS = {
    "kv_rank": "kv_lora_rank",
    "q_rank": "q_lora_rank",
    "nope_dim": "qk_nope_head_dim",
    "rope_dim": "qk_rope_head_dim",
    "value_dim": "v_head_dim",
}
_LAYER = {
    "attention.wkv_a": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention.wkv": "self_attn.kv_b_proj",
    "attention.wo": "self_attn.o_proj",
}
_DIRECT = {"attention.wq": "self_attn.q_proj"}
_LOW_RANK = {
    "attention.wq_a": "self_attn.q_a_proj",
    "attention.q_a_norm": "self_attn.q_a_layernorm",
    "attention.wq": "self_attn.q_b_proj",
}


def latent_from_config(stated: ConfigJson) -> LatentArgs:
    """Return the sizes in a ``config.json``.

    Raises:
        ConfigError: a key is missing, or its value is none of these sizes.
    """
    sizes = {name: stated.size(key, required=name != "q_rank") for name, key in _KEYS.items()}
    latent = LatentArgs(**sizes)
    if latent.rope_dim % 2:
        raise stated.unsupported("qk_rope_head_dim", "must be even, for rotary embeddings")
    # What transformers derives from these.
    stated.only("head_dim", latent.rope_dim)
    stated.only("qk_head_dim", latent.head_dim)
    return latent


def latent_to_config(latent: LatentArgs) -> dict[str, Any]:
    """Return the keys of ``config.json`` that state ``latent``."""
    return {key: getattr(latent, name) for name, key in _KEYS.items()}


def latent_layer(latent: LatentArgs) -> dict[str, str]:
    """Return the name of each parameter of a block's attention, without ".weight" -> its name in a layer of the
    files."""
    return _LAYER | (_DIRECT if latent.q_rank is None else _LOW_RANK)
