"""Qwen2.5, and where its weights are in Hugging Face's files (``Qwen2ForCausalLM``): Llama's network with a bias on
queries, keys and values.

The sizes are those of the ``config.json`` of Qwen/Qwen2.5-* (the base models). Qwen2's have the same form.
"""

from __future__ import annotations

from functools import partial

from titanlite.models.hugging_face import DecoderFiles
from titanlite.models.layers import DecoderArgs
from titanlite.models.spec import ModelSpec, register_model

_sizes = partial(DecoderArgs, rope_theta=1e6, qkv_bias=True)
_small = partial(_sizes, vocab_size=151936, norm_eps=1e-6, tie_embeddings=True, max_seq_len=32768)
_large = partial(_sizes, vocab_size=152064, norm_eps=1e-5, max_seq_len=131072)

FLAVORS = {
    "debugmodel": _sizes(dim=256, n_layers=6, n_heads=4, n_kv_heads=2, ffn_dim=768, vocab_size=0),
    "0.5B": _small(dim=896, n_layers=24, n_heads=14, n_kv_heads=2, ffn_dim=4864),
    "1.5B": _small(dim=1536, n_layers=28, n_heads=12, n_kv_heads=2, ffn_dim=8960),
    "3B": _small(dim=2048, n_layers=36, n_heads=16, n_kv_heads=2, ffn_dim=11008),
    "7B": _large(dim=3584, n_layers=28, n_heads=28, n_kv_heads=4, ffn_dim=18944, norm_eps=1e-6),
    "14B": _large(dim=5120, n_layers=48, n_heads=40, n_kv_heads=8, ffn_dim=13824),
    "32B": _large(dim=5120, n_layers=64, n_heads=40, n_kv_heads=8, ffn_dim=27648),
    "72B": _large(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_dim=29568),
}

FILES = DecoderFiles(
    family="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    # sliding_window has no meaning then.
    fixed={"hidden_act": "silu", "attention_dropout": 0.0, "use_sliding_window": False},
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768},
    args={"qkv_bias": True},
)

register_model(ModelSpec("qwen2", FLAVORS, hugging_face=FILES.format()))
