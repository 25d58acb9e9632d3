"""Training data: sources of documents, tokenizers, and the loader that packs tokenized documents into batches."""

from titanlite.data import example_sources, local, streamed  # noqa: F401  (registers the sources)
from titanlite.data.document_stream import TooLittleText
from titanlite.data.held_out import PartOfSource, is_held_out
from titanlite.data.loader import Batch, DataLoader, Packing, merge_states
from titanlite.data.sources import SOURCES, START, Position, Source, SourceOptions, build_source
from titanlite.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "SOURCES",
    "START",
    "Batch",
    "DataLoader",
    "Packing",
    "PartOfSource",
    "Position",
    "Source",
    "SourceOptions",
    "Tokenizer",
    "TooLittleText",
    "build_source",
    "is_held_out",
    "load_tokenizer",
    "merge_states",
]
