"""Llama 2, 3, 3.1 and 3.2, and where their weights are in Hugging Face's files (``LlamaForCausalLM``).

The sizes are those of the ``config.json`` of meta-llama/Llama-2-*-hf, Meta-Llama-3-*, Llama-3.1-* and Llama-3.2-*.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from titanlite.models.hugging_face import DecoderFiles
from titanlite.models.layers import DecoderArgs, RopeScaling
from titanlite.models.spec import ModelSpec, register_model

_llama2 = partial(DecoderArgs, vocab_size=32000, rope_theta=10000.0, max_seq_len=4096)
_llama3_2 = partial(DecoderArgs, rope_scaling=RopeScaling(32), max_seq_len=131072, tie_embeddings=True)
_8B = DecoderArgs(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, ffn_dim=14336)
_70B = DecoderArgs(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_dim=28672)
_405B = DecoderArgs(dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, ffn_dim=53248)
_3_1: dict[str, Any] = {"rope_scaling": RopeScaling(8), "max_seq_len": 131072}

FLAVORS = {
    "debugmodel": DecoderArgs(dim=256, n_layers=6, n_heads=16, n_kv_heads=16, ffn_dim=768, vocab_size=0),
    # For a laptop: 20M and 102M parameters with the tokenizer that titanlite ships. Smaller heads would cost
    # attention on CPUs more than they compute (docs/internals/cpu-step.md).
    "20M": DecoderArgs(dim=512, n_layers=6, n_heads=8, n_kv_heads=4, ffn_dim=1408, vocab_size=0),
    "100M": DecoderArgs(dim=768, n_layers=14, n_heads=12, n_kv_heads=12, ffn_dim=2048, vocab_size=0),
    "2-7B": _llama2(dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, ffn_dim=11008),
    "2-13B": _llama2(dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, ffn_dim=13824),
    "2-70B": _llama2(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_dim=28672),
    "3-8B": _8B,
    "3-70B": _70B,
    "3.1-8B": replace(_8B, **_3_1),
    "3.1-70B": replace(_70B, **_3_1),
    "3.1-405B": replace(_405B, **_3_1),
    "3.2-1B": _llama3_2(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, ffn_dim=8192),
    "3.2-3B": _llama3_2(dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, ffn_dim=8192),
}

FILES = DecoderFiles(
    family="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    fixed={"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False},
    ignored=r".*\.rotary_emb\.inv_freq",  # Llama 2's files hold this buffer, which follows from the configuration
)

register_model(ModelSpec("llama", FLAVORS, hugging_face=FILES.format()))
