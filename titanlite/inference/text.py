"""Continue a text with a trained model, on one process or with tensor parallelism over all processes."""

from __future__ import annotations

import sys

from titanlite.errors import counted
from titanlite.inference.generate import Sampling, TokenSampler, generate
from titanlite.inference.load import opened


def continue_text(
    checkpoint: str,
    prompt: str,
    max_new_tokens: int | None,
    sampling: Sampling,
    dtype: str = "float32",
    tokenizer_path: str | None = None,
    *,
    quantize: str | None = None,
    calibration: str | None = None,
    cached: bool = True,
) -> str:
    """Return the prompt with its continuation. The speed is printed to stderr.

    Args:
        checkpoint: the folder of one step, or of Hugging Face weights; or that of a run, or of its checkpoints, of
            which the latest is taken.
        prompt: the text to continue; an empty prompt begins a document.
        max_new_tokens: None: as many as the model has positions for, at most 256.
        dtype: the torch dtype of the weights, by name.
        tokenizer_path: the tokenizer, where the folder has none; None: the one of the folder.
        quantize, calibration: see :func:`titanlite.inference.load.load_model`.
        cached: cache keys and values; False: compute all tokens again for each new token.

    Raises:
        ConfigError: the model cannot be loaded, or the prompt does not fit.
    """
    with opened(
        checkpoint, dtype, tokenizer_path, quantize=quantize, calibration=calibration, tensor_parallel=True
    ) as (loaded, mesh, process):
        tokenizer = loaded.tokenizer
        decoder = TokenSampler(
            loaded.model,
            process.device,
            loaded.max_seq_len,
            tokenizer.vocab_size,
            tp=mesh.tp,
            group=process.control if process.world_size > 1 else None,
        )
        ids = tokenizer.encode(prompt)
        out = generate(decoder, [tokenizer.bos_id, *ids], max_new_tokens, sampling, {tokenizer.eos_id}, cached=cached)
        if process.rank == 0:
            numbers = dtype if quantize is None else f"{quantize}, {dtype}"
            print(
                f"{numbers} on {process.device}, {counted(process.world_size, 'process')}: {out.speed()}",
                file=sys.stderr,
            )
        return tokenizer.decode([*ids, *out.ids])
