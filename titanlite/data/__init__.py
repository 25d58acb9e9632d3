"""Training data: sources of documents, tokenizers, and the loader that packs one into batches of the other."""

from titanlite.data import local, streamed  # noqa: F401  (registers the sources)
from titanlite.data.loader import Batch, DataLoader, merge_states
from titanlite.data.sources import SOURCES, START, Position, Source, SourceOptions, build_source
from titanlite.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "SOURCES",
    "START",
    "Batch",
    "DataLoader",
    "Position",
    "Source",
    "SourceOptions",
    "Tokenizer",
    "build_source",
    "load_tokenizer",
    "merge_states",
]
