"""The way from documents to sequences that a configuration asks for."""

from __future__ import annotations

from titanlite.config.schema import JobConfig

EXAMPLES = ("instruct", "chat", "hellaswag")  # the data sets of examples, of which a part is scored


def packing_of(config: JobConfig) -> str:
    """Return ``data.packing``, or what it is by default: whole examples where the data are examples."""
    return config.data.packing or ("examples" if config.training.dataset in EXAMPLES else "stream")


def masks_documents(config: JobConfig) -> bool:
    """Return True if documents that share a sequence do not attend to each other."""
    return config.data.document_mask or packing_of(config) != "stream"
