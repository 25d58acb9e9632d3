"""Mistral 7B and Mistral Nemo, and where their weights are in Hugging Face's files (``MistralForCausalLM``).

The sizes are those of the ``config.json`` of mistralai/Mistral-7B-v0.1, Mistral-7B-v0.3 and Mistral-Nemo-Base-2407.
"""

from __future__ import annotations

from functools import partial

from titanlite.models.hugging_face import DecoderFiles
from titanlite.models.layers import DecoderArgs
from titanlite.models.spec import ModelSpec, register_model

_7b = partial(DecoderArgs, dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, ffn_dim=14336, max_seq_len=32768)

FLAVORS = {
    "debugmodel": DecoderArgs(
        dim=256, n_layers=6, n_heads=4, n_kv_heads=2, ffn_dim=768, vocab_size=0, rope_theta=10000.0, sliding_window=128
    ),
    "7B-v0.1": _7b(vocab_size=32000, rope_theta=10000.0, sliding_window=4096),
    "7B-v0.3": _7b(vocab_size=32768, rope_theta=1e6),
    "Nemo-2407": DecoderArgs(
        dim=5120,
        n_layers=40,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,  # not dim / n_heads
        ffn_dim=14336,
        vocab_size=131072,
        rope_theta=1e6,
        max_seq_len=131072,
    ),
}

FILES = DecoderFiles(
    family="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    fixed={"hidden_act": "silu", "attention_dropout": 0.0},
    defaults={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    window=True,
)

register_model(ModelSpec("mistral", FLAVORS, hugging_face=FILES.format()))
