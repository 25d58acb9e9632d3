"""Llama 3: the published sizes, and where its weights are in Hugging Face's files (``LlamaForCausalLM``)."""

from __future__ import annotations

from titanlite.errors import ConfigError
from titanlite.models.hugging_face import DecoderFiles
from titanlite.models.layers import DecoderArgs, RopeScaling
from titanlite.models.spec import ModelSpec, register_model

# 8B and 70B are Llama 3 (8192 positions); 405B exists as Llama 3.1 only, and 1B and 3B as Llama 3.2 only, with their
# scaled rotary frequencies.
FLAVORS = {
    "debugmodel": DecoderArgs(dim=256, n_layers=6, n_heads=16, n_kv_heads=16, ffn_dim=768, vocab_size=0),
    "1B": DecoderArgs(
        dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, ffn_dim=8192, tie_embeddings=True, rope_scaling=RopeScaling(32)
    ),
    "3B": DecoderArgs(
        dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, ffn_dim=8192, tie_embeddings=True, rope_scaling=RopeScaling(32)
    ),
    "8B": DecoderArgs(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, ffn_dim=14336),
    "70B": DecoderArgs(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_dim=28672),
    "405B": DecoderArgs(dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, ffn_dim=53248, rope_scaling=RopeScaling(8)),
}

HUGGING_FACE = DecoderFiles(
    family="llama3",
    model_type="llama",
    architecture="LlamaForCausalLM",
    fixed={
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
    },
    layer={
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    },
    ignored=r".*\.rotary_emb\.inv_freq",  # Llama 2's files hold this buffer, which follows from the configuration
).format()


def torchtitan(args: DecoderArgs) -> dict[str, int]:
    """Return the parameters whose rows torchtitan orders otherwise; see :class:`~titanlite.models.spec.ModelSpec`."""
    if args.tie_embeddings:
        raise ConfigError("the model ties its output to the embedding, and torchtitan's Llama 3 does not")
    return {
        f"layers.{i}.attention.{name}.weight": args.head_size for i in range(args.n_layers) for name in ("wq", "wk")
    }


register_model(ModelSpec("llama3", FLAVORS, hugging_face=HUGGING_FACE, torchtitan=torchtitan))
