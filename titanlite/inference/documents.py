"""The documents to compute a loss of, and its computation: each document between BOS and EOS, by itself."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from titanlite.config.data_rules import EXAMPLES
from titanlite.config.run_config import HUB
from titanlite.data import SOURCES, SourceOptions, Tokenizer, build_source
from titanlite.data.cut import cut
from titanlite.data.files import JSON_SUFFIXES, find_files, with_compressed
from titanlite.data.local import whole_texts
from titanlite.data.readers import LinesReader, ParquetReader
from titanlite.data.streamed import FileStream
from titanlite.errors import ConfigError, TrainingError, counted, renaming
from titanlite.inference.score import Group, Scored, Scorer

_JSON = with_compressed(*JSON_SUFFIXES)
_OF_FILES = {"text", "json", "parquet", "c4_test"}  # sources that need a path, which is given instead
_LONG = 1 << 22  # characters; a longer text is tokenized in pieces, which bounds the memory of the tokenizer
_AT_ONCE = 1 << 20  # characters to tokenize together, on all cores


@dataclass(frozen=True)
class TextLoss:
    """The loss of documents.

    Attributes:
        loss: the mean negative log-likelihood of the scored tokens, in nats.
        tokens: the number of scored tokens: those of the documents, and an EOS for each.
        nbytes: the bytes of the documents' text in UTF-8.
        documents: the number of documents.
        left_out: the number of documents without a token, which are not scored.
    """

    loss: float
    tokens: int
    nbytes: int
    documents: int
    left_out: int

    @property
    def perplexity(self) -> float | None:
        """None if it is too large for a number."""
        return math.exp(self.loss) if self.loss < 700 else None

    @property
    def bits_per_byte(self) -> float:
        return self.loss * self.tokens / math.log(2) / self.nbytes


def read_documents(data: str, text_field: str = "text", max_documents: int | None = None) -> Iterator[str]:
    """Return the documents of ``data``, in the order of its files, with the files of a folder by name.

    Args:
        data: a file, folder or glob: of text, where each file is a document, of JSON lines or JSON arrays, or of
            parquet; else the name of a data source.
        text_field: the field of a record that holds the text.
        max_documents: the most documents; None: all.

    Raises:
        ConfigError: there is no such file or source. The iterator raises it too, where a document cannot be read.
    """
    if max_documents is not None and max_documents < 1:
        raise ConfigError("must be at least 1", key="--max_documents", value=max_documents)
    with renaming(_of_command):
        documents = _documents(data, text_field)
    return _renaming(islice(documents, max_documents))


def _renaming(documents: Iterator[str]) -> Iterator[str]:
    with renaming(_of_command):
        yield from documents


def _documents(data: str, text_field: str) -> Iterator[str]:
    sources = [name for name in SOURCES.names() if name not in (*_OF_FILES, *EXAMPLES)]
    is_there = os.path.lexists(os.path.expanduser(data))
    if not is_there and (data in sources or data.startswith(HUB)):
        return build_source(data, text_field=text_field, seed=0).in_order()
    try:
        files = find_files(data, (".parquet", *_JSON, *with_compressed(".txt")))
    except ConfigError as e:
        e.why += "" if is_there else f", or name a data source: {', '.join(sources)}"
        raise
    formats = sorted({_format(file) for file in files})
    if len(formats) > 1:
        raise ConfigError(
            f"has files of {' and '.join(formats)}; narrow it with a glob", key="training.dataset_path", value=data
        )
    if formats == ["text"]:
        return whole_texts(files)
    reader = ParquetReader(text_field) if formats == ["parquet"] else LinesReader(text_field)
    return FileStream(SourceOptions(formats[0], data, text_field, "stop", 0), files, reader).in_order()


def _format(file: Path) -> str:
    name = file.name.lower()
    return "parquet" if name.endswith(".parquet") else "JSON" if name.endswith(_JSON) else "text"


def _of_command(text: str) -> str:
    """Rename options in a message: sources use the names of [training]."""
    text = text.replace("training.dataset_path", "--data").replace("training.dataset", "--data")
    text = text.replace(', or leave out such documents with data.on_corrupt = "skip"', "")
    return text.replace("data.text_field", "--text_field")


def text_loss(
    scorer: Scorer,
    tokenizer: Tokenizer,
    texts: Iterator[str],
    seq_len: int,
    progress: Callable[[str], None],
) -> TextLoss:
    """Return the loss of ``texts``: of every token and EOS, given BOS and the tokens before it in the same document. A
    document of more than ``seq_len`` tokens is cut into pieces of that many; the first token of a piece is given the
    last one of the piece before, and nothing else of that.

    Raises:
        ConfigError: there is no document with a token.
        TrainingError: the loss of a document is not finite.
    """
    counts = _Counts()
    total, pieces = 0.0, 0
    for scores in scorer.scores(counts.pieces(tokenizer, texts, seq_len)):
        for (score,) in scores:
            if not math.isfinite(score):
                raise TrainingError(
                    f"the loss of document {counts.document_of[pieces]} is {-score}: no number describes this model on "
                    "this text; its weights are damaged, or its training diverged"
                )
            total -= score
            pieces += 1
        progress(f"{counted(counts.documents, 'document')}, {counts.tokens:,} tokens")
    if not counts.documents:
        raise ConfigError(
            f"--data: no document with a token in it ({counted(counts.left_out, 'document')} without one); name one "
            "with text"
        )
    return TextLoss(total / counts.tokens, counts.tokens, counts.nbytes, counts.documents, counts.left_out)


class _Counts:
    """Counts what it makes of documents. ``document_of`` has the number of each piece's document, from 1."""

    def __init__(self) -> None:
        self.documents = self.left_out = self.tokens = self.nbytes = 0
        self.document_of: list[int] = []

    def pieces(self, tokenizer: Tokenizer, texts: Iterator[str], seq_len: int) -> Iterator[Group]:
        for text, ids in _encoded(tokenizer, texts):
            if not len(ids):
                self.left_out += 1
                continue
            tokens = np.empty(len(ids) + 2, np.int32)
            tokens[0], tokens[1:-1], tokens[-1] = tokenizer.bos_id, ids, tokenizer.eos_id
            self.documents += 1
            self.tokens += len(tokens) - 1
            self.nbytes += len(text.encode())
            for begin in range(0, len(tokens) - 1, seq_len):
                self.document_of.append(self.documents + self.left_out)
                yield (Scored(tokens[begin : begin + seq_len + 1]),)


def _encoded(tokenizer: Tokenizer, texts: Iterator[str]) -> Iterator[tuple[str, NDArray[np.int32]]]:
    """Yield each text with its token ids."""
    some: list[str] = []
    characters = 0
    for text in texts:
        some.append(text)
        characters += len(text) + 1
        if characters > _AT_ONCE:
            yield from zip(some, _encode(tokenizer, some))
            some, characters = [], 0
    yield from zip(some, _encode(tokenizer, some))


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[NDArray[np.int32]]:
    parts = [list(cut(text)) if len(text) > _LONG else [text] for text in texts]
    ids = iter(tokenizer.encode_batch([part for of_text in parts for part in of_text]))
    return [np.concatenate([next(ids) for _ in of_text]) for of_text in parts]
