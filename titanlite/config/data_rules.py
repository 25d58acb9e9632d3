"""Rules of the section [data]."""

from __future__ import annotations

from titanlite.config.data_sections import Data
from titanlite.config.refuse import refuse
from titanlite.config.schema import JobConfig

INSTRUCT, CHAT, HELLASWAG = "instruct", "chat", "hellaswag"
EXAMPLES = (INSTRUCT, CHAT, HELLASWAG)  # the data sets of examples, of which a part is scored

# The data set that reads a field of [data].
_READ_BY = {"prompt_field": INSTRUCT, "answer_field": INSTRUCT, "label_field": INSTRUCT, "messages_field": CHAT}


def packing_of(config: JobConfig) -> str:
    """Return ``data.packing``; for "auto" what it stands for: whole examples where the data are examples."""
    if config.data.packing != "auto":
        return config.data.packing
    return "examples" if config.training.dataset in EXAMPLES else "stream"


def masks_documents(config: JobConfig) -> bool:
    """Return True if documents that share a sequence do not attend to each other."""
    return config.data.document_mask or packing_of(config) != "stream"


def check_data(config: JobConfig) -> None:
    """Refuse fields of examples that no data set of the run reads, or that are one another."""
    datasets = {config.training.dataset}
    if config.validation.enable:
        datasets.add(config.validation.dataset or config.training.dataset)
    default = Data()
    for field, reader in _READ_BY.items():
        if getattr(config.data, field) != getattr(default, field) and reader not in datasets:
            refuse(
                config,
                f"data.{field}",
                f'has no effect, as only the data set "{reader}" reads it; set training.dataset = "{reader}", or leave '
                "this out",
            )
    if config.data.text_field != default.text_field and datasets <= {*EXAMPLES}:
        fields = sorted(field for field, reader in _READ_BY.items() if reader in datasets)
        instead = f"name its fields with {', '.join(f'data.{field}' for field in fields)}, or " if fields else ""
        refuse(config, "data.text_field", f'has no effect on the data set "{min(datasets)}"; {instead}leave this out')
    if config.data.too_long != default.too_long and packing_of(config) == "stream":
        refuse(
            config,
            "data.too_long",
            "has no effect on a stream, which is cut where a sequence ends; set data.packing to examples or none, or "
            "leave this out",
        )
    if INSTRUCT in datasets:
        named = {field: getattr(config.data, field) for field, reader in _READ_BY.items() if reader == INSTRUCT}
        for field, name in named.items():
            same = [f"data.{other}" for other in named if other != field and named[other] == name]
            if same:
                refuse(config, f"data.{field}", f"{same[0]} names the same field; name another")
