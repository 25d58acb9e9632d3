"""The facts by which runs compare: the text that a run was trained on, and the text of its validation."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from titanlite.compare.rows import Columns
from titanlite.config.job_name import without_reason
from titanlite.config.options import options_of
from titanlite.config.run_config import DATA_IDENTITY, HUB, TOKENIZER, located
from titanlite.config.schema import JobConfig
from titanlite.errors import ConfigError, printable
from titanlite.untrusted import files

HELD_OUT = "validation.held_out_percent"
DIGEST = "content of the files"
GLOBAL_BATCH, SHARDS = "global_batch_size", "num_shards"
# Entries of a loader's identity that do not say which text it reads: its name (the files count), the order, and the
# tokenizer's.
_NOT_TEXT = {"dataset", "seed", "seq_len", "vocab_size"}
_MOST_BYTES = 1 << 20


@dataclass
class Text:
    """The identity of a text that a run reads.

    Attributes:
        options: by the names of the configuration, with the place of the files.
        content: by the entries of the loader's identity, with :data:`DIGEST` of the files, wherever they lie; empty if
            the run folder does not have it.
    """

    options: dict[str, Any] = field(default_factory=dict)
    content: dict[str, Any] = field(default_factory=dict)

    def of_files(self) -> bool:
        """Return True if the options name files, whose content may change."""
        path = next((value for name, value in self.options.items() if name.endswith(".dataset_path")), None)
        dataset = next((value for name, value in self.options.items() if name.endswith(".dataset")), None)
        return dataset == "pystdlib" or (isinstance(path, str) and not path.startswith(HUB))


def value_of(options: dict[str, Any], name: str) -> Any:
    """Return an option of a run, its default where it is unset; None if the schema does not have it."""
    section, _, key = name.rpartition(".")
    option = options_of(JobConfig).get(section, {}).get(key)
    return without_reason(name, options.get(name, option.default if option else None))


def facts_of(folder: Path, options: dict[str, Any], metrics: Columns) -> dict[str, Any]:
    """Return the other facts that training losses must share to compare, by name: only those that are known."""
    facts = {"training.seq_len": value_of(options, "training.seq_len")} if options else {}
    if (tokens := _tokens_per_step(metrics)) is not None:
        facts["tokens per step"] = tokens
    identity = _json(folder / TOKENIZER / "tokenizer_identity.json")
    if isinstance(identity.get("sha256"), str):
        facts["tokenizer"] = printable(identity["sha256"])[:12]
    elif options:
        facts["model.tokenizer_path"] = value_of(options, "model.tokenizer_path")
    return facts


def texts_of(folder: Path, options: dict[str, Any]) -> tuple[Text, Text]:
    """Return the text of training, and that of validation; both empty without a configuration."""
    identities = _json(folder / DATA_IDENTITY)
    if not options:
        return Text(), Text()
    training = {
        "training.dataset": value_of(options, "training.dataset"),
        "training.dataset_path": _place(folder, value_of(options, "training.dataset_path")),
        **{  # the good documents are the same, whatever is done with bad ones
            f"data.{key}": value_of(options, f"data.{key}")
            for key in options_of(JobConfig)["data"]
            if key != "on_corrupt"
        },
    }
    text = Text(training, _content(identities.get("training"), training))
    # Few documents are held out; cautions() says so. Tokens per step stand for the batch of training, which goes on to
    # all documents. A validation reads only the first ones of each shard: other batches or shards make these others.
    for name in ("held_out_percent", GLOBAL_BATCH, SHARDS):
        text.content.pop(name, None)
    if not value_of(options, "validation.enable"):
        return text, Text({HELD_OUT: 0})
    dataset, path = (value_of(options, f"validation.{key}") for key in ("dataset", "dataset_path"))
    path = _place(folder, path)
    same = (training["training.dataset"], training["training.dataset_path"])
    held_out = (not dataset and path is None) or (dataset or same[0], path) == same  # as in config/validation.py
    validation = training | {HELD_OUT: value_of(options, HELD_OUT) if held_out else 0}
    if not held_out:
        validation["training.dataset"] = dataset or training["training.dataset"]
        validation["training.dataset_path"] = path
    validation = {name.replace("training.", "validation."): value for name, value in validation.items()}
    return text, Text(validation, _content(identities.get("validation"), validation))


def _content(identity: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a loader's identity that say which text it reads."""
    if not isinstance(identity, dict):
        return {}
    plain = {name: value for name, value in identity.items() if isinstance(value, (str, int))}
    content: dict[str, Any] = {printable(name): value for name, value in plain.items() if name not in _NOT_TEXT}
    content.setdefault("packing", "stream")
    if content["packing"] == "stream":  # else documents never attend to each other
        content["data.document_mask"] = options.get("data.document_mask")
    digest = content.pop("content", None)
    if digest is not None:
        return {DIGEST: printable(f"{digest}"), **content}
    # A set of the hub has no files here: its name counts.
    places = {name: value for name, value in options.items() if name.endswith((".dataset", ".dataset_path"))}
    return places | content


def _json(file: Path) -> dict[str, Any]:
    try:
        content = files.read_json(file, most=_MOST_BYTES)
    except (OSError, ConfigError):
        return {}
    return content if isinstance(content, dict) else {}


def _tokens_per_step(metrics: Columns) -> int | None:
    step, tokens = metrics["step"], metrics["tokens_seen"]
    known = np.isfinite(tokens)
    if not known.any():
        return None
    steps, seen = step[known], tokens[known]
    return round(float(np.median(np.diff(seen) / np.diff(steps)) if len(seen) > 1 else seen[0] / steps[0]))


def _place(folder: Path, path: Any) -> Any:
    """Return a path of a run's configuration as it compares with those of other runs."""
    if not isinstance(path, str) or path.startswith(HUB):
        return path
    return os.path.realpath(located(path, folder))
