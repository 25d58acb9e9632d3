"""Phi-4 and Phi-3, and where their weights are in Hugging Face's files (``Phi3ForCausalLM``): Llama's network, whose
projections of one input are one tensor there.

The sizes are those of the ``config.json`` of microsoft/phi-4, Phi-3-mini-4k-instruct and Phi-3-medium-4k-instruct.
"""

from __future__ import annotations

from functools import partial

from titanlite.models.hugging_face import LAYER, DecoderFiles
from titanlite.models.layers import DecoderArgs
from titanlite.models.spec import ModelSpec, register_model

_phi3_4k = partial(DecoderArgs, vocab_size=32064, rope_theta=10000.0, sliding_window=2047, max_seq_len=4096)

FLAVORS = {
    "debugmodel": DecoderArgs(
        dim=256, n_layers=6, n_heads=4, n_kv_heads=2, ffn_dim=768, vocab_size=0, rope_theta=10000.0
    ),
    "phi-3-mini-4k": _phi3_4k(dim=3072, n_layers=32, n_heads=32, n_kv_heads=32, ffn_dim=8192),
    "phi-3-medium-4k": _phi3_4k(dim=5120, n_layers=40, n_heads=40, n_kv_heads=10, ffn_dim=17920),
    "phi-4": DecoderArgs(
        dim=5120,
        n_layers=40,
        n_heads=40,
        n_kv_heads=10,
        ffn_dim=17920,
        vocab_size=100352,
        rope_theta=250000.0,
        max_seq_len=16384,
    ),
}

_FUSED: dict[str, tuple[str, ...]] = {
    "self_attn.qkv_proj": ("attention.wq", "attention.wk", "attention.wv"),
    "mlp.gate_up_proj": ("feed_forward.w1", "feed_forward.w3"),
}

FILES = DecoderFiles(
    family="phi3",
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    fixed={"hidden_act": "silu", "attention_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    window=True,
    rope_kinds=("default",),
    partial_rotary=True,
    layer={name: tensor for name, tensor in LAYER.items() if name not in sum(_FUSED.values(), ())},
    fused=_FUSED,
)

register_model(ModelSpec("phi3", FLAVORS, hugging_face=FILES.format()))
