"""Llama 3 as ``transformers`` knows it (``LlamaForCausalLM``): its ``config.json`` and the names of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from titanlite.errors import ConfigError
from titanlite.models.llama3.model import Llama3Args, RopeScaling
from titanlite.models.spec import HuggingFaceFormat

_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")

# What the network computes with; a key that is not there, or null, means the same.
_FIXED = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}

_ROPE_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}

_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def names(args: Llama3Args) -> dict[str, str]:
    """Our name of each parameter -> theirs. The weights need no permutation: both pair the rotary embedding's elements
    i and i + head_dim/2."""
    found = {"tok_embeddings.weight": "model.embed_tokens.weight"}
    for i in range(args.n_layers):
        found |= {f"layers.{i}.{a}.weight": f"model.layers.{i}.{b}.weight" for a, b in _LAYER.items()}
    found["norm.weight"] = "model.norm.weight"
    found["output.weight"] = "model.embed_tokens.weight" if args.tie_embeddings else "lm_head.weight"
    return found


def to_config(args: Llama3Args) -> dict[str, Any]:
    """What ``config.json`` says of the model. The scaled rotary frequencies are in the spelling that every version of
    ``transformers`` since 4.43 reads, and other programs do."""
    scaling = None
    if args.rope_scaling is not None:
        scaling = {theirs: getattr(args.rope_scaling, ours) for ours, theirs in _ROPE_LLAMA3.items()}
        # transformers warns where a factor is not a float.
        scaling = {key: value if key.startswith("original") else float(value) for key, value in scaling.items()}
        scaling["rope_type"] = "llama3"
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.dim,
        "intermediate_size": args.ffn_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": args.max_seq_len,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": args.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def from_config(config: Mapping[str, Any]) -> Llama3Args:
    """The model that a ``config.json`` describes; ``max_seq_len`` is its ``max_position_embeddings``.

    Raises:
        ConfigError: a size is missing, or a key has a value that this network does not compute.
    """
    if config.get("model_type") != "llama":
        raise _unsupported("model_type", config.get("model_type"), 'must be "llama"')
    for key, only in _FIXED.items():
        if config.get(key) not in (None, only):
            raise _unsupported(key, config[key], f"must be {_shown(only)}")
    for key in _REQUIRED:
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise _unsupported(key, config.get(key), "must be a whole number of at least 1")
    heads, dim = config["num_attention_heads"], config["hidden_size"]
    if dim % heads:
        raise _unsupported("hidden_size", dim, f"must be a multiple of num_attention_heads = {heads}")
    # Absent and null both mean these, as in transformers.
    kv_heads, head_dim = config.get("num_key_value_heads") or heads, config.get("head_dim") or dim // heads
    if heads % kv_heads:
        raise _unsupported("num_key_value_heads", kv_heads, f"must divide num_attention_heads = {heads}")
    if head_dim != dim // heads:
        raise _unsupported("head_dim", head_dim, f"must be hidden_size / num_attention_heads = {dim // heads}")
    theta, scaling = _rope(config)
    return Llama3Args(
        dim=dim,
        n_layers=config["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=kv_heads,
        ffn_dim=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_number(config, "rms_norm_eps", 1e-6),
        tie_embeddings=bool(config.get("tie_word_embeddings")),
        max_seq_len=_number(config, "max_position_embeddings", 2048),
    )


def check(args: Llama3Args, config: Mapping[str, Any]) -> None:
    """Refuse a ``config.json`` of another model than ``args``; the length of sequences may differ.

    Raises:
        ConfigError: naming every size and number that differs.
    """
    theirs = replace(from_config(config), max_seq_len=args.max_seq_len)
    differing = [
        f"{f.name} is {_shown(getattr(theirs, f.name))} there and {_shown(getattr(args, f.name))} here"
        for f in fields(Llama3Args)
        if getattr(theirs, f.name) != getattr(args, f.name)
    ]
    if differing:
        raise ConfigError(
            f"config.json: describes another model than model.flavor: {'; '.join(differing)}; choose the flavor that "
            "these weights belong to"
        )


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """The base of the rotary frequencies and their scaling, spelled as until transformers 4 (``rope_theta`` and
    ``rope_scaling``) or as since 5 (both in ``rope_parameters``)."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or {}
    theta = _number(rope, "rope_theta", _number(config, "rope_theta", 10000.0))
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise _unsupported(f"{key}.partial_rotary_factor", rope["partial_rotary_factor"], "must be 1.0")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise _unsupported(f"{key}.rope_type", kind, 'must be "llama3" or "default"')
    return theta, RopeScaling(**{ours: _number(rope, theirs) for ours, theirs in _ROPE_LLAMA3.items()})


def _number(holder: Mapping[str, Any], key: str, default: Any = None) -> Any:
    value = holder.get(key, default)
    if not isinstance(value, (int, float)):
        raise _unsupported(key, value, "must be a number")
    return value


def _unsupported(key: str, value: Any, rule: str) -> ConfigError:
    return ConfigError(
        f"config.json: {key} = {_shown(value)}: {rule}; the folder holds a model that llama3 does not compute, or the "
        "file is damaged"
    )


def _shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


# Llama 2's files hold a buffer that follows from the configuration.
HUGGING_FACE = HuggingFaceFormat(to_config, from_config, check, names, ignored=r".*\.rotary_emb\.inv_freq")
