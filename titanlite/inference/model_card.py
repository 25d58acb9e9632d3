"""The model card of an exported folder, ``README.md``: what is known of how its weights were made, and nothing else.

A name in a configuration, or of a folder, may be somebody else's. In the front matter (YAML) stands only what has the
letters of a name on the Hub; in the text such a name is a code span, in which nothing is a link, HTML or the end of a
line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from titanlite import __version__
from titanlite.config.run_config import METRICS, VALIDATION, inner_folder, located, read_run_config, section_in
from titanlite.errors import printable
from titanlite.inference.load import ModelDescription
from titanlite.untrusted.files import Untrusted, contained, is_of, open_file

_LONGEST_ROW = 1 << 20  # bytes; a longer line is no row
_LONGEST_NAME = 200  # characters
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HUB = re.compile(r"models--([A-Za-z0-9][A-Za-z0-9._-]*?)--([A-Za-z0-9][A-Za-z0-9._-]*)/snapshots/[^/]+/?\Z")
_HUB_DATA = re.compile(r"hub:([A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)")

Facts = list[tuple[str, str]]


def model_card(
    name: str, description: ModelDescription, parameters: int, dtype: torch.dtype, scheme: str | None
) -> str:
    """Return the model card of a folder that is called ``name``.

    Args:
        description: of the folder that the weights come from. The run that made a checkpoint is that of the folder
            around it.
        parameters: their number.
        scheme: how the linear layers are quantized; None: they are not.
    """
    family = description.spec.hugging_face
    tags = ["titanlite", *([family.model_type] if family is not None and _TAG.fullmatch(family.model_type) else [])]
    tree, run = _run_of(description)
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if base := _base_model(description, tree, run):
        front["base_model"] = base
    named = (_text(tree, "training", key) for key in ("dataset_path", "dataset"))
    if data := next(filter(None, map(_HUB_DATA.fullmatch, named)), None):
        front["datasets"] = [data[1]]
    facts = [*_of_weights(description, parameters, dtype, scheme), *_of_run(description, tree, run)]
    lines = [f"- {label}: {value}" for label, value in facts]
    losses = [f"- {label}: {value}" for label, value in _losses(description, run)]
    return "\n".join(
        [
            *("---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""),
            *(f"# {code(name)}", "", f"Written by titanlite {__version__}.", ""),
            *("## How it was made", "", *lines, ""),
            *(["## Last losses", "", *losses, ""] if losses else []),
            *("## Use", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""),
            f'model = AutoModelForCausalLM.from_pretrained({name!r}, dtype="auto")',
            *(f"tokenizer = AutoTokenizer.from_pretrained({name!r})", "```", ""),
        ]
    )


def code(text: str) -> str:
    """Return ``text`` as a code span of Markdown, which shows it as it is."""
    cut = text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}..."
    shown = printable(cut)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence}{shown}{fence}" if len(fence) == 1 else f"{fence} {shown} {fence}"


def _of_weights(description: ModelDescription, parameters: int, dtype: torch.dtype, scheme: str | None) -> Facts:
    flavor = [description.flavor] if description.flavor in description.spec.flavors else []
    shape = " ".join([description.spec.name, *flavor])
    facts = [("model", f"{code(shape)}, {parameters:,} parameters"), ("dtype", str(dtype).removeprefix("torch."))]
    if scheme is not None:
        facts.append(("linear layers but for the output projection", code(scheme)))
    if description.files is not None:
        facts.append(("converted from", code(_name(description.weights.folder))))
    return facts


def _of_run(description: ModelDescription, tree: Mapping[str, Any], run: Path | None) -> Facts:
    """Return what the checkpoint says, and ``config.toml`` of its run."""
    info = description.weights.info
    facts: Facts = []
    if info is not None and info.step:
        facts.append(("optimizer steps", f"{info.step:,}"))
    if info is not None and info.tokens_seen:
        facts.append(("tokens seen", f"{info.tokens_seen:,}"))
    if run is None:
        return facts
    begun = _text(tree, "checkpoint", "initial_load_path")
    converters = section_in(tree, "model").get("converters")
    named = [name for name in converters if isinstance(name, str) and name] if isinstance(converters, list) else []
    recipes = [f"{name}, recipe {recipe}" if (recipe := _text(tree, name, "recipe_name")) else name for name in named]
    values = {
        "recipe": [_text(tree, "job", "description")],
        "began with": [_name(Path(begun)) if begun else ""],
        "data": [_text(tree, "training", "dataset"), _name(Path(_text(tree, "training", "dataset_path")))],
        "converters": recipes,
        "optimizer": [_text(tree, "optimizer", "name")],
    }
    facts += [(label, ", ".join(map(code, filter(None, texts)))) for label, texts in values.items() if any(texts)]
    for label, key in (("tokens of a sequence", "seq_len"), ("sequences of a step", "global_batch_size")):
        value = section_in(tree, "training").get(key)
        if is_of(value, int) and value:
            facts.append((label, f"{value:,}"))
    return facts


def _losses(description: ModelDescription, run: Path | None) -> Facts:
    """Return the losses that the run noted last, up to the step of the checkpoint."""
    info = description.weights.info
    facts: Facts = []
    if run is None or info is None:
        return facts
    training, validation = (_last_row(run, name, info.step) for name in (METRICS, VALIDATION))
    for kind, row, keys in (
        ("training", training, ("loss",)),
        ("validation", validation, ("loss", "bits_per_byte", "accuracy", "accuracy_norm")),
    ):
        values = [f"{key.replace('_', ' ')} {row[key]:.4f}" for key in keys if is_of(row.get(key), float)]
        if values:
            facts.append((f"{kind}, step {row['step']:,}", ", ".join(values)))
    return facts


def _run_of(description: ModelDescription) -> tuple[Mapping[str, Any], Path | None]:
    """Return the configuration and the folder of the run that made a checkpoint; None if it is not known."""
    checkpoints = description.weights.folder.absolute().parent
    if description.weights.info is not None:
        for run in checkpoints.parents[:3]:
            tree = read_run_config(run)
            inner = inner_folder(tree, "checkpoint", "folder")
            if inner and run / inner == checkpoints:
                return tree, run
    return {}, None


def _base_model(description: ModelDescription, tree: Mapping[str, Any], run: Path | None) -> str:
    """Return the name on the Hub of the model that the weights come from; empty if it is not known. In the Hub's cache,
    the path of a folder says it."""
    path = "" if description.files is None else str(description.weights.folder.absolute())
    if run is not None and (begun := _text(tree, "checkpoint", "initial_load_path")):
        path = located(begun, run)
    match = _HUB.search(path)
    return f"{match[1]}/{match[2]}" if match else ""


def _text(tree: Mapping[str, Any], section: str, key: str) -> str:
    value = section_in(tree, section).get(key)
    return value if isinstance(value, str) else ""


def _name(path: Path) -> str:
    """Return the name of a folder or file, without the folders of whoever has made it, but for those of a run."""
    match = _HUB.search(str(path))
    if match:
        return f"{match[1]}/{match[2]}"
    parts = path.parts[-3:] if re.fullmatch(r"step-\d+", path.name) else path.parts[-1:]
    return "/".join(parts).lstrip("/")


def _last_row(run: Path, name: str, step: int) -> dict[str, Any]:
    """Return the row of the latest step up to ``step``; empty if there is none, or the file cannot be read."""
    last: dict[str, Any] = {}
    for row in _rows(run, name):
        if is_of(row.get("step"), int) and last.get("step", 0) <= row["step"] <= step:
            last = row
    return last


def _rows(run: Path, name: str) -> Iterator[dict[str, Any]]:
    try:
        with open_file(contained(run, name)) as stream:
            while line := stream.readline(_LONGEST_ROW):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(row, dict):
                    yield row
    except (OSError, Untrusted):
        return
