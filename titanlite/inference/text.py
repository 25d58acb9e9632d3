"""A text, continued by a trained model: on one process, or with tensor parallelism over all that there are."""

from __future__ import annotations

import sys

import torch

from titanlite.config.parallelism import Degrees
from titanlite.config.schema import Comm
from titanlite.distributed import runtime
from titanlite.distributed.mesh import build_mesh
from titanlite.inference.generate import Decoder, Sampling, generate
from titanlite.inference.load import load_model


def continue_text(
    checkpoint: str,
    prompt: str,
    max_new_tokens: int | None,
    sampling: Sampling,
    dtype: str = "float32",
    tokenizer_path: str | None = None,
    *,
    cached: bool = True,
) -> str:
    """The prompt and its continuation; how fast it was goes to stderr.

    Args:
        checkpoint: the folder of one step, or of Hugging Face weights.
        prompt: what to continue; empty begins a document.
        max_new_tokens: None: as many as the model has positions for, at most 256.
        dtype: of the weights, the name of one of torch's.
        tokenizer_path: None: what the checkpoint was trained with.
        cached: or compute all tokens again for each one.

    Raises:
        ConfigError: the model cannot be loaded, or the prompt does not fit.
    """
    here = runtime.start_runtime(Comm())
    try:
        mesh = build_mesh(Degrees(1, 1, 1, tensor_parallel=here.world_size, pipeline_parallel=1), here.device.type)
        loaded = load_model(checkpoint, getattr(torch, dtype), mesh, here.device, tokenizer_path=tokenizer_path)
        tokenizer = loaded.tokenizer
        decoder = Decoder(
            loaded.model,
            here.device,
            loaded.max_seq_len,
            tokenizer.vocab_size,
            tp=mesh.tp,
            group=here.control if here.world_size > 1 else None,
        )
        ids = tokenizer.encode(prompt)
        done = generate(decoder, [tokenizer.bos_id, *ids], max_new_tokens, sampling, {tokenizer.eos_id}, cached=cached)
        if here.rank == 0:
            print(f"{dtype} on {here.device}, {here.world_size} processes: {done.speed()}", file=sys.stderr)
        return tokenizer.decode([*ids, *done.ids])
    finally:
        runtime.stop_runtime()
