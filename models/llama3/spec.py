"""Llama 3 under the name and with the flavors that torchtitan has. The family ``llama`` has all of Llama's sizes."""

from __future__ import annotations

from dataclasses import replace

from titanlite.errors import ConfigError
from titanlite.models.layers import DecoderArgs
from titanlite.models.llama.spec import FILES
from titanlite.models.llama.spec import FLAVORS as LLAMA
from titanlite.models.spec import ModelSpec, register_model

# 8B and 70B are Llama 3 (8192 positions); 405B exists as Llama 3.1 only, and 1B and 3B as Llama 3.2 only, with their
# scaled rotary frequencies.
FLAVORS = {
    "debugmodel": DecoderArgs(dim=256, n_layers=6, n_heads=16, n_kv_heads=16, ffn_dim=768, vocab_size=0),
    "20M": LLAMA["20M"],
    "100M": LLAMA["100M"],
    "1B": LLAMA["3.2-1B"],
    "3B": LLAMA["3.2-3B"],
    "8B": LLAMA["3-8B"],
    "70B": LLAMA["3-70B"],
    "405B": LLAMA["3.1-405B"],
}
HUGGING_FACE = replace(FILES, family="llama3").format()


def torchtitan(args: DecoderArgs) -> dict[str, int]:
    """Return the parameters whose rows torchtitan orders otherwise; see :class:`~titanlite.models.spec.ModelSpec`."""
    if args.tie_embeddings:
        raise ConfigError("the model ties its output to the embedding, and torchtitan's Llama 3 does not")
    return {
        f"layers.{i}.attention.{name}.weight": args.head_size for i in range(args.n_layers) for name in ("wq", "wk")
    }


register_model(ModelSpec("llama3", FLAVORS, hugging_face=HUGGING_FACE, torchtitan=torchtitan))
