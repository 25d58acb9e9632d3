"""Mixtral, and where its weights are in Hugging Face's files (``MixtralForCausalLM``): Mistral's network with
experts in every block.

The sizes are those of the ``config.json`` of mistralai/Mixtral-8x7B-v0.1.
"""

from __future__ import annotations

from titanlite.models.hugging_face import DecoderFiles
from titanlite.models.hugging_face_mixture import MixtureFiles
from titanlite.models.layers import DecoderArgs, MixtureArgs
from titanlite.models.spec import ModelSpec, register_model

FLAVORS = {
    "debugmodel": DecoderArgs(
        dim=256,
        n_layers=6,
        n_heads=4,
        n_kv_heads=2,
        ffn_dim=384,
        vocab_size=0,
        rope_theta=1e6,
        mixture=MixtureArgs(8, 2, 384),
    ),
    "8x7B": DecoderArgs(
        dim=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        ffn_dim=14336,
        vocab_size=32000,
        rope_theta=1e6,
        max_seq_len=32768,
        mixture=MixtureArgs(8, 2, 14336),
    ),
}

_MIXTURE = MixtureFiles(
    keys={
        "n_experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_dim": "intermediate_size",
    },
    tensors={
        "router.weight": "block_sparse_moe.gate.weight",
        "experts.w1": "block_sparse_moe.experts.{}.w1.weight",
        "experts.w2": "block_sparse_moe.experts.{}.w2.weight",
        "experts.w3": "block_sparse_moe.experts.{}.w3.weight",
    },
)

FILES = DecoderFiles(
    family="mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    fixed={"hidden_act": "silu", "attention_dropout": 0.0, "router_jitter_noise": 0.0},
    defaults={
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 131072,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 14336,
    },
    window=True,
    mixture=_MIXTURE,
)

register_model(ModelSpec("mixtral", FLAVORS, hugging_face=FILES.format()))
