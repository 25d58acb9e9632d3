"""The models that the recipes of fine-tuning are for: their ``config.json`` on the hub, without what only generation
reads, and small folders of the same form with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

from titanlite.checkpoint.hugging_face import stored_shapes
from titanlite.models.spec import model_spec_of

_COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "tie_word_embeddings": False}
_MISTRAL = {**_COMMON, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "intermediate_size": 14336}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama3_1_8b": {
        **_COMMON,
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "pretraining_tp": 1,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "vocab_size": 128256,
    },
    "mistral_7b": {
        **_MISTRAL,
        "hidden_size": 4096,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 32000,
    },
    "mistral_nemo": {
        **_MISTRAL,
        "head_dim": 128,
        "hidden_size": 5120,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 131072,
    },
    "qwen2_5_7b": {
        **_COMMON,
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "phi_4": {
        **_COMMON,
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "max_position_embeddings": 16384,
        "model_type": "phi3",
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "num_key_value_heads": 10,
        "original_max_position_embeddings": 16384,
        "resid_pdrop": 0.0,
        "rope_scaling": None,
        "rope_theta": 250000.0,
        "sliding_window": None,
        "vocab_size": 100352,
    },
}

VOCABULARY = 320  # more than the tokenizer has, as in Qwen
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}


def small_config(name: str) -> dict[str, Any]:
    """The ``config.json`` of a model, of 2 layers; a head that is not dim / heads, and a window, stay so."""
    config = {**CONFIGS[name], **_SMALL}
    if "head_dim" in config:
        config["head_dim"] = 32
    if name == "mistral_7b":
        config["sliding_window"] = 16
    return config


def save_small(name: str, folder: Path) -> Path:
    """Write a small model of the form of ``name``: ``config.json``, random weights in bfloat16, a tokenizer of bytes.
    Return ``folder``."""
    folder.mkdir()
    config = small_config(name)
    (folder / "config.json").write_text(json.dumps(config))
    spec, args = model_spec_of(config)
    assert spec.hugging_face is not None
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in spec.build(args).named_parameters()}
    random = torch.Generator().manual_seed(0)
    tensors = {
        key: (1.0 if len(shape) == 1 else 0.0) + 0.05 * torch.randn(shape, generator=random)
        for key, shape in stored_shapes(shapes, spec.hugging_face.weights(args)).items()
    }
    save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, folder / "model.safetensors")
    save_bytes_tokenizer(folder, bos=None if name == "qwen2_5_7b" else "<s>")  # Qwen has none
    return folder


def save_bytes_tokenizer(folder: Path, extra: int = 0, bos: str | None = "<s>") -> None:
    """Write a tokenizer with a token for each byte, two special tokens, and ``extra`` more."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", *(f"<extra {i}>" for i in range(extra))])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": "</s>"}))
