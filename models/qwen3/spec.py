"""The dense Qwen3, and where its weights are in Hugging Face's files (``Qwen3ForCausalLM``): Llama's network with
normalized heads of queries and keys.

The sizes are those of the ``config.json`` of Qwen/Qwen3-*-Base and Qwen/Qwen3-32B.
"""

from __future__ import annotations

from functools import partial

from titanlite.models.hugging_face import HEAD_NORMS, LAYER, DecoderFiles
from titanlite.models.layers import DecoderArgs
from titanlite.models.spec import ModelSpec, register_model

_sizes = partial(DecoderArgs, rope_theta=1e6, norm_eps=1e-6, qk_norm=True)
# All have heads of 128; where dim / n_heads is another number, head_dim says it.
_published = partial(_sizes, n_kv_heads=8, vocab_size=151936, max_seq_len=32768)

FLAVORS = {
    "debugmodel": _sizes(dim=256, n_layers=6, n_heads=4, n_kv_heads=2, ffn_dim=768, vocab_size=0),
    "0.6B": _published(dim=1024, n_layers=28, n_heads=16, head_dim=128, ffn_dim=3072, tie_embeddings=True),
    "1.7B": _published(dim=2048, n_layers=28, n_heads=16, ffn_dim=6144, tie_embeddings=True),
    "4B": _published(dim=2560, n_layers=36, n_heads=32, head_dim=128, ffn_dim=9728, tie_embeddings=True),
    "8B": _published(dim=4096, n_layers=36, n_heads=32, ffn_dim=12288),
    "14B": _published(dim=5120, n_layers=40, n_heads=40, ffn_dim=17408),
    "32B": _published(dim=5120, n_layers=64, n_heads=64, head_dim=128, ffn_dim=25600),
}

FILES = DecoderFiles(
    family="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fixed={"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "use_sliding_window": False},
    defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
    args={"qk_norm": True},
    layer=LAYER | HEAD_NORMS,
)

register_model(ModelSpec("qwen3", FLAVORS, hugging_face=FILES.format()))
