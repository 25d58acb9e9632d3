"""Qwen3 with mixtures of experts, and where its weights are in Hugging Face's files (``Qwen3MoeForCausalLM``): the
dense Qwen3 with experts in every block.

The sizes are those of the ``config.json`` of Qwen/Qwen3-30B-A3B and Qwen3-235B-A22B. The debug model has as many
features inside the experts of a token as the dense one has inside its feed-forward.
"""

from __future__ import annotations

from functools import partial

from titanlite.models.hugging_face import HEAD_NORMS, LAYER, DecoderFiles
from titanlite.models.hugging_face_mixture import MixtureFiles
from titanlite.models.layers import DecoderArgs, MixtureArgs
from titanlite.models.spec import ModelSpec, register_model

_sizes = partial(DecoderArgs, rope_theta=1e6, norm_eps=1e-6, qk_norm=True)
_published = partial(_sizes, n_kv_heads=4, head_dim=128, vocab_size=151936, max_seq_len=40960)

FLAVORS = {
    "debugmodel": _sizes(
        dim=256, n_layers=6, n_heads=4, n_kv_heads=2, ffn_dim=768, vocab_size=0, mixture=MixtureArgs(16, 4, 192)
    ),
    "30B-A3B": _published(dim=2048, n_layers=48, n_heads=32, ffn_dim=6144, mixture=MixtureArgs(128, 8, 768)),
    "235B-A22B": _published(dim=4096, n_layers=94, n_heads=64, ffn_dim=12288, mixture=MixtureArgs(128, 8, 1536)),
}

_MIXTURE = MixtureFiles(
    keys={
        "n_experts": "num_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_dim": "moe_intermediate_size",
        "normalized": "norm_topk_prob",
    },
    tensors={
        "router.weight": "mlp.gate.weight",
        "experts.w1": "mlp.experts.{}.gate_proj.weight",
        "experts.w2": "mlp.experts.{}.down_proj.weight",
        "experts.w3": "mlp.experts.{}.up_proj.weight",
    },
    aliases={"num_experts": "num_local_experts"},
)

FILES = DecoderFiles(
    family="qwen3_moe",
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    fixed={
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    args={"qk_norm": True},
    layer=LAYER | HEAD_NORMS,
    mixture=_MIXTURE,
)

register_model(ModelSpec("qwen3_moe", FLAVORS, hugging_face=FILES.format()))
