"""Small models of every family, as ``transformers`` makes them: random weights, and shapes in which a mistake shows.

Heads of a size that is not dim / heads, one head of keys, tied and untied heads, windows shorter than the sequence,
and each kind of rotary frequencies at positions beyond the original length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titanlite.models.weight_map import Place, Rows, Stack

VOCABULARY, SEQ_LEN = 160, 48
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 12}
_PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 28}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 28,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 20,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "num_nextn_predict_layers": 0,
}
_YARN_MSCALE = {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.7}
ONE_KV_HEAD, WIDE, TIED = {"num_key_value_heads": 1}, {"head_dim": 20}, {"tie_word_embeddings": True}

# The class of transformers' configuration, and its arguments in place of those above.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama, one kv head, wide heads": ("LlamaConfig", {**ONE_KV_HEAD, **WIDE}),
    "llama, tied, llama3 scaling": ("LlamaConfig", {**TIED, "rope_parameters": _LLAMA3}),
    "llama, yarn": ("LlamaConfig", {"rope_parameters": _YARN}),
    "mistral, window": ("MistralConfig", {"sliding_window": 5, **WIDE}),
    "mistral, one kv head": ("MistralConfig", {"sliding_window": None, **ONE_KV_HEAD}),
    "qwen2, tied": ("Qwen2Config", {**TIED, **ONE_KV_HEAD}),
    "qwen2, yarn": ("Qwen2Config", {"rope_parameters": {**_YARN, "beta_fast": 8.0, "attention_factor": 1.3}}),
    "qwen3, tied, wide heads": ("Qwen3Config", {**TIED, **WIDE, **ONE_KV_HEAD}),
    "qwen3": ("Qwen3Config", {"head_dim": 12}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_EXPERTS, "norm_topk_prob": True, **WIDE}),
    "qwen3_moe, weights not normalized": ("Qwen3MoeConfig", {**_EXPERTS, "num_experts_per_tok": 1, **ONE_KV_HEAD}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral, window": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": 7, **WIDE}),
    "deepseek_v3": ("DeepseekV3Config", _DEEPSEEK),
    "deepseek_v3, yarn, two shared experts": (
        "DeepseekV3Config",
        {**_DEEPSEEK, "rope_parameters": _YARN_MSCALE, "n_shared_experts": 2, "routed_scaling_factor": 1.3},
    ),
    "deepseek_v3, whole queries, one group": (
        "DeepseekV3Config",
        {**_DEEPSEEK, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "v_head_dim": 18},
    ),
    "phi3": ("Phi3Config", {}),
    "phi3, window, partial rotary": ("Phi3Config", {"sliding_window": 7, "rope_parameters": _PARTIAL, **ONE_KV_HEAD}),
}


def their_model(case: str, **changed: Any) -> Any:
    """transformers' model of a case, in float32, with random weights in every tensor, biases and norms too."""
    import transformers

    kind, values = CASES[case]
    config = getattr(transformers, kind)(**{**_SIZES, **values, **changed})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.1 * torch.randn_like(param)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer += 0.1 * torch.randn_like(buffer)
    return model.eval()


# The projections of experts in the files of each class of transformers: the folder, then gate, up and down.
_PROJECTIONS = {
    "MixtralForCausalLM": ("block_sparse_moe", "w1", "w3", "w2"),
    "Qwen3MoeForCausalLM": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "DeepseekV3ForCausalLM": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def in_files(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by parameter of a model of theirs -> by the names in its files, which hold every expert by itself."""
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.partition(".mlp.")
        folder, gate, up, down = _PROJECTIONS.get(type(model).__name__, ("mlp", "", "", ""))
        if not rest.startswith("experts."):
            named[f"{layer}.{folder}.{rest}" if rest else name] = tensor
            continue
        for i, expert in enumerate(tensor):
            parts = {gate: expert.chunk(2)[0], up: expert.chunk(2)[1]} if "gate_up" in rest else {down: expert}
            named |= {f"{layer}.{folder}.experts.{i}.{part}.weight": value for part, value in parts.items()}
    return named


def part_of(tensors: dict[str, Tensor], place: Place) -> Tensor:
    """The parameter at a place, in the tensors of a model of theirs."""
    if isinstance(place, Stack):
        return torch.stack([tensors[name] for name in place.tensors])
    if isinstance(place, Rows):
        return tensors[place.tensor][place.start : place.stop]
    assert isinstance(place, str)
    return tensors[place]
