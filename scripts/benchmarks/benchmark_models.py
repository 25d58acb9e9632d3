"""Models for benchmarks alone: the family ``llama3_benchmark``, whose flavors are Llama 3 8B cut to so many layers
(8B-1 to 8B-32), and small ones; and ``deepseek_v3_benchmark``, a dense model of latent attention. From the root of the
repository they are imported by ``--experimental.custom_import=scripts.benchmarks.benchmark_models``."""

from __future__ import annotations

from dataclasses import replace

from titanlite.models.layers import DecoderArgs
from titanlite.models.spec import get_model_spec, register_model

FAMILY = "llama3_benchmark"
_llama3 = get_model_spec("llama3")

FLAVORS: dict[str, DecoderArgs] = {
    **{f"8B-{layers}": replace(_llama3.flavors["8B"], n_layers=layers) for layers in range(1, 33)},
    # GPT-2 small's width and depth, for curves of the loss: 88 million parameters with titanlite's own vocabulary.
    "100M": DecoderArgs(dim=768, n_layers=12, n_heads=12, n_kv_heads=12, ffn_dim=2048, vocab_size=0),
    "toy": DecoderArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=256, vocab_size=8192),
}


def options(flavor: str, config: str, *, seq_len: int, batch: int, compile: bool) -> list[str]:
    """Return the options of titanlite's command for one of these models in bf16 or with a float8 recipe."""
    given = [
        "--experimental.custom_import=benchmark_models",
        f"--model.name={FAMILY}",
        f"--model.flavor={flavor}",
        f"--training.seq_len={seq_len}",
        f"--training.local_batch_size={batch}",
        f"--training.compile={str(compile).lower()}",
    ]
    if config != "bf16":
        given += ["--model.converters=float8", f"--float8.recipe_name={config}", "--float8.filter_fqns=output"]
        # The choice by count with block rules: each run would compile and time a block with both kinds first.
        given += ["--float8.kernels=inductor"] if compile else []
    return given


_deepseek = get_model_spec("deepseek_v3")
_debug = _deepseek.flavors["debugmodel"]
# The debug model of DeepSeek-V3 without experts: each feed-forward has as many features as a token uses there.
register_model(
    replace(
        _deepseek,
        name="deepseek_v3_benchmark",
        flavors={"dense": replace(_debug, ffn_dim=_debug.mixture.active_dim, mixture=None)},
        hugging_face=None,
    )
)
register_model(replace(_llama3, name=FAMILY, flavors=FLAVORS))
