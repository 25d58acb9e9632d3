"""Train a byte-level BPE tokenizer. The same corpus always gives the same file.

``titanlite tokenizer train --output=FILE.json`` without other options reproduces the tokenizer that titanlite ships.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from titanlite.data.cut import cut
from titanlite.data.sources import START, Source
from titanlite.data.tiktoken import split_like_llama3
from titanlite.data.tokenizer import Tokenizer
from titanlite.errors import ConfigError

SPECIAL_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>"]


class Corpus:
    """The texts of a source, once, up to a number of bytes.

    Attributes:
        nbytes: the bytes of UTF-8 text read so far.
        is_cut: True if there was more text than ``limit`` bytes.
    """

    def __init__(self, source: Source, limit: int) -> None:
        self.source, self.limit = source, limit
        self.nbytes, self.is_cut = 0, False

    def __iter__(self) -> Iterator[str]:
        for _, text in self.source.documents(shard=0, num_shards=1, epoch=0, start=START):
            self.nbytes += len(text.encode("utf-8", "surrogatepass"))
            if self.nbytes > self.limit:
                self.is_cut = True
                return
            yield from cut(text)


def train(corpus: Corpus, vocab_size: int) -> Tokenizer:
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
    backend.train_from_iterator(iter(corpus), trainer)
    backend.add_special_tokens(SPECIAL_TOKENS)
    if backend.get_vocab_size() != vocab_size:
        raise ConfigError(
            f"--vocab-size {vocab_size}: the corpus gives only {backend.get_vocab_size()} different tokens; "
            "use more text or a smaller vocabulary"
        )
    return Tokenizer(backend, bos_id=vocab_size - 2, eos_id=vocab_size - 1, path="")


def files_to_write(output: Path, force: bool) -> list[Path]:
    """Return the files of a tokenizer at ``output``: itself if its name ends in .json, else two in that folder.

    Raises:
        ConfigError: one of them is there, without ``force``; or they cannot be written.
    """
    is_file = output.suffix == ".json" and not output.is_dir()
    files = [output] if is_file else [output / "tokenizer.json", output / "tokenizer_config.json"]
    if not is_file and output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output}: is a file; name a folder, or a file whose name ends in .json")
    refuse_existing(files, force)
    above = next(folder for folder in files[0].absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(f"--output {output}: {above} is no folder that can be written; choose another place")
    return files


def refuse_existing(files: list[Path], force: bool) -> None:
    """Raise ConfigError if one of ``files`` is there already, unless ``force`` says to replace it."""
    there = [file for file in files if file.exists() or file.is_symlink()]
    if any(file.is_dir() for file in there):
        raise ConfigError(f"{there[0]} is a folder; choose another place")
    if there and not force:
        raise ConfigError(f"{', '.join(map(str, there))}: there already; choose another place, or replace with --force")


def write(tokenizer: Tokenizer, files: list[Path]) -> None:
    """Write a tokenizer to the ``files`` of :func:`files_to_write`, each complete or not at all.

    Raises:
        ConfigError: they cannot be written.
    """
    compact = tokenizer.files(pretty=False)
    texts = compact if len(files) > 1 else {files[0].name: compact["tokenizer.json"]}
    for file in files:
        partial = file.with_name(f".{file.name}.partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(texts[file.name], encoding="utf-8")
            partial.replace(file)
        except OSError as e:
            raise ConfigError(f"--output {file}: cannot be written ({e.strerror or e}); choose another place") from None
