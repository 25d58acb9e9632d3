"""The loader of a run's documents, for training and validation."""

from __future__ import annotations

from titanlite.config import JobConfig, global_batch_size
from titanlite.config.data_rules import CHAT, HELLASWAG, INSTRUCT, masks_documents, packing_of
from titanlite.data import DataLoader, Packing, Source, Tokenizer, build_source
from titanlite.data.encode_chat import ChatEncoder
from titanlite.data.encode_hellaswag import HellaSwagEncoder
from titanlite.data.encode_instruct import InstructEncoder
from titanlite.data.examples import Encoder
from titanlite.distributed.mesh import Mesh
from titanlite.distributed.runtime import Runtime


def build_encoder(dataset: str, tokenizer: Tokenizer, config: JobConfig) -> Encoder | None:
    """Return the encoder of a data set of examples; None for one of texts.

    Raises:
        ConfigError: the chat template of the tokenizer cannot be used.
    """
    if dataset == INSTRUCT:
        return InstructEncoder(tokenizer, config.data)
    if dataset == CHAT:
        return ChatEncoder(tokenizer, config.data)
    return HellaSwagEncoder(tokenizer) if dataset == HELLASWAG else None


def open_source(dataset: str, path: str | None, config: JobConfig, encoder: Encoder | None, seed: int) -> Source:
    """Return the source ``dataset`` of ``path``, as [data] says.

    Raises:
        ConfigError: see :func:`titanlite.data.build_source`.
    """
    return build_source(
        dataset,
        path=path,
        text_field=config.data.text_field,
        on_corrupt=config.data.on_corrupt,
        seed=seed,
        fields=None if encoder is None else encoder.fields,
    )


def build_loader(
    source: Source, tokenizer: Tokenizer, encoder: Encoder | None, config: JobConfig, mesh: Mesh, runtime: Runtime
) -> DataLoader:
    """Return the loader of this rank's sequences of each step."""
    degree = mesh.degrees.data_parallel
    return DataLoader(
        source,
        tokenizer,
        seq_len=config.training.seq_len,
        global_batch_size=global_batch_size(config, degree),
        local_batch_size=config.training.local_batch_size,
        dp_rank=mesh.data_parallel_rank,
        dp_degree=degree,
        encoder=encoder,
        packing=Packing(packing_of(config), masks_documents(config), config.data.too_long),
        pin_memory=runtime.device.type == "cuda",
    )


def describe_packing(config: JobConfig) -> str:
    """Return how documents share a sequence, for the log."""
    kind = packing_of(config)
    if kind == "stream":
        masked = masks_documents(config)
        return f"documents that share a sequence {'do not attend' if masked else 'attend'} to each other"
    long = {"truncate": "truncated", "drop": "left out", "error": "an error"}[config.data.too_long]
    whole = "one example per sequence" if kind == "none" else "whole examples, which do not attend to each other"
    return f"{whole}; longer ones are {long}"
