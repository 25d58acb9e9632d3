"""Train a byte-level BPE tokenizer. The same corpus always gives the same file.

``titanlite tokenizer train`` without options reproduces the tokenizer that is shipped with titanlite.
"""

from __future__ import annotations

from collections.abc import Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from titanlite.data.sources import START, Source
from titanlite.data.tiktoken import split_like_llama3
from titanlite.errors import ConfigError

SPECIAL_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>"]


def train(source: Source, vocab_size: int) -> tokenizers.Tokenizer:
    """Train a byte-level BPE with ``vocab_size`` ids; the last two are BOS and EOS.

    Raises:
        ConfigError: ``vocab_size`` is not a multiple of 128, or the corpus is too small to fill it.
    """
    if vocab_size % 128 or vocab_size < 384:
        raise ConfigError(
            f"--vocab-size {vocab_size}: must be a multiple of 128 and at least 384 (256 bytes, merges and 2 special "
            "tokens), so that the output layer divides evenly"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = split_like_llama3()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(source), trainer)
    backend.add_special_tokens(SPECIAL_TOKENS)
    if backend.get_vocab_size() != vocab_size:
        raise ConfigError(
            f"--vocab-size {vocab_size}: the corpus gives only {backend.get_vocab_size()} different tokens; "
            "use more text or a smaller vocabulary"
        )
    return backend


def _texts(source: Source) -> Iterator[str]:
    for _, text in source.documents(shard=0, num_shards=1, epoch=0, start=START):
        yield text
