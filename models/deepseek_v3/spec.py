"""DeepSeek-V3, and where its weights are in Hugging Face's files (``DeepseekV3ForCausalLM``): latent attention, a few
dense blocks at the beginning, then mixtures of experts with shared ones, whose router chooses by sigmoid scores and a
bias (DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024).

The sizes are those of the ``config.json`` of deepseek-ai/DeepSeek-V3 and moonshotai/Moonlight-16B-A3B, without the
layer that predicts a second token. The debug model has as many features inside the experts of a token as its dense
block has.
"""

from __future__ import annotations

from functools import partial

from titanlite.models.hugging_face import LAYER, DecoderFiles
from titanlite.models.hugging_face_mixture import MixtureFiles
from titanlite.models.layers import LATENT_LAYOUT, DecoderArgs, LatentArgs, MixtureArgs, YarnScaling
from titanlite.models.spec import ModelSpec, register_model

_mixture = partial(MixtureArgs, scores="sigmoid", bias=True)

FLAVORS = {
    "debugmodel": DecoderArgs(
        dim=256,
        n_layers=6,
        n_heads=4,
        n_kv_heads=4,
        ffn_dim=768,
        vocab_size=0,
        rope_theta=10000.0,
        norm_eps=1e-6,
        latent=LatentArgs(kv_rank=64, q_rank=96, nope_dim=32, rope_dim=32, value_dim=64),
        mixture=_mixture(16, 3, 192, n_shared_experts=1, n_dense_layers=1, scale=1.732, n_groups=4, group_limit=2),
    ),
    "Moonlight-16B-A3B": DecoderArgs(
        dim=2048,
        n_layers=27,
        n_heads=16,
        n_kv_heads=16,
        ffn_dim=11264,
        vocab_size=163840,
        rope_theta=50000.0,
        norm_eps=1e-5,
        max_seq_len=8192,
        latent=LatentArgs(kv_rank=512),
        mixture=_mixture(64, 6, 1408, n_shared_experts=2, n_dense_layers=1, scale=2.446),
    ),
    "671B": DecoderArgs(
        dim=7168,
        n_layers=61,
        n_heads=128,
        n_kv_heads=128,
        ffn_dim=18432,
        vocab_size=129280,
        rope_theta=10000.0,
        rope_scaling=YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0),
        norm_eps=1e-6,
        max_seq_len=163840,
        latent=LatentArgs(kv_rank=512, q_rank=1536),
        mixture=_mixture(256, 8, 2048, n_shared_experts=1, n_dense_layers=3, scale=2.5, n_groups=8, group_limit=4),
    ),
}

_MIXTURE = MixtureFiles(
    keys={
        "n_experts": "n_routed_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_dim": "moe_intermediate_size",
        "n_shared_experts": "n_shared_experts",
        "n_dense_layers": "first_k_dense_replace",
        "normalized": "norm_topk_prob",
        "scale": "routed_scaling_factor",
        "n_groups": "n_group",
        "group_limit": "topk_group",
    },
    tensors={
        "router.weight": "mlp.gate.weight",
        "router.bias": "mlp.gate.e_score_correction_bias",
        "experts.w1": "mlp.experts.{}.gate_proj.weight",
        "experts.w2": "mlp.experts.{}.down_proj.weight",
        "experts.w3": "mlp.experts.{}.up_proj.weight",
        "shared.w1.weight": "mlp.shared_experts.gate_proj.weight",
        "shared.w2.weight": "mlp.shared_experts.down_proj.weight",
        "shared.w3.weight": "mlp.shared_experts.up_proj.weight",
    },
    args={"scores": "sigmoid", "bias": True},
)

FILES = DecoderFiles(
    family="deepseek_v3",
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    fixed={
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    },
    defaults={
        "max_position_embeddings": 4096,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
    rope_kinds=("default", "yarn"),
    layer={name: tensor for name, tensor in LAYER.items() if not name.startswith("attention.")},
    mixture=_MIXTURE,
    latent=True,
    ignored=r"model\.layers\.61\..*",  # the layer that predicts a second token, in the published files of 671B
)

register_model(ModelSpec("deepseek_v3", FLAVORS, layout=LATENT_LAYOUT, hugging_face=FILES.format()))
