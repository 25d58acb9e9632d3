"""Rotary frequencies as ``config.json`` states them: by the keys of transformers 4 (``rope_theta`` and
``rope_scaling``) or 5 (both in ``rope_parameters``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from titanlite.models.config_json import ConfigJson, shown
from titanlite.models.layers import RopeScaling, YarnScaling

Scaling = RopeScaling | YarnScaling

# The attributes of a scaling -> the keys in config.json.
_ORIGINAL = {"original_max_seq_len": "original_max_position_embeddings"}
_LLAMA3 = {name: name for name in ("factor", "low_freq_factor", "high_freq_factor")} | _ORIGINAL
_YARN = {name: name for name in ("factor", "beta_fast", "beta_slow", "attention_factor")} | _ORIGINAL
_MSCALE = {name: name for name in ("mscale", "mscale_all_dim")}
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "truncate"}


def rope_to_config(scaling: Scaling | None) -> dict[str, Any] | None:
    """Return ``rope_scaling``, with the keys that ``transformers`` reads since 4.43, as do other programs."""
    if scaling is None:
        return None
    kind, keys = ("yarn", _YARN | _MSCALE) if isinstance(scaling, YarnScaling) else ("llama3", _LLAMA3)
    stated = {key: value for name, key in keys.items() if (value := getattr(scaling, name)) is not None}
    # transformers warns if a factor is not a float.
    return {key: value if key in _ORIGINAL.values() else float(value) for key, value in stated.items()} | {
        "rope_type": kind
    }


def rope_from_config(
    config: ConfigJson, kinds: Sequence[str], partial: bool, mscale: bool = False
) -> tuple[float, Scaling | None, float | None]:
    """Return the base of the frequencies, their scaling, and the share of a head that is rotated (None: all).

    Args:
        kinds: the values of ``rope_type`` that the family computes.
        partial: the family computes heads that are rotated in part.
        mscale: the family computes DeepSeek's factors of YaRN.

    Raises:
        ConfigError: the file states another kind, or values that are not used.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    stated = config.get(key) or {}
    if not isinstance(stated, Mapping):
        raise config.unsupported(key, "must be an object")
    rope = ConfigJson(stated, config.family, f"{key}.")
    theta = rope.number("rope_theta", config.number("rope_theta", 10000.0))
    share = None
    for holder in (config, rope):
        if not partial:
            holder.only("partial_rotary_factor", 1.0)
        elif holder.get("partial_rotary_factor") is not None:
            share = holder.number("partial_rotary_factor", most=1.0)
    share = None if share == 1.0 else share
    kind = stated.get("rope_type", stated.get("type", "default"))
    if kind not in kinds:
        names = " or ".join(shown(name) for name in sorted(kinds, key="default".__eq__))
        raise rope.unsupported("rope_type", f"must be {names}", kind)
    if kind == "default":
        return theta, None, share
    factors = _MSCALE if mscale else {}
    keys = _YARN | factors if kind == "yarn" else _LLAMA3
    if kind == "yarn":
        rope.only("truncate", True)
    for name in stated:
        if name not in _COMMON and name not in keys.values() and stated[name] is not None:
            raise rope.unsupported(name, f"is not computed; of a {kind} scaling are {', '.join(keys.values())}")
    original = rope.number("original_max_position_embeddings", config.size("max_position_embeddings"))
    if kind == "llama3":
        numbers = {name: rope.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor")}
        if numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
            raise rope.unsupported("low_freq_factor", "must be below high_freq_factor")
        return theta, RopeScaling(original_max_seq_len=original, **numbers), share
    if theta <= 1:
        raise rope.unsupported("rope_theta", "must be above 1 for YaRN", theta)
    options = ("beta_fast", "beta_slow", "attention_factor", *factors)
    optional = {name: rope.number(name) for name in options if rope.get(name) is not None}
    return theta, YarnScaling(rope.number("factor"), original, **optional), share
