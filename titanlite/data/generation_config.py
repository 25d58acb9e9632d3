"""``generation_config.json`` of a model's folder: which tokens end an answer, and how its makers sample from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titanlite.data.tokenizer_files import excerpt
from titanlite.errors import ConfigError

GENERATION = "generation_config.json"


def end_ids(generation: Mapping[str, Any], folder: Path) -> frozenset[int]:
    """Return the tokens that end an answer, of the ``generation_config.json`` in ``folder``. Llama 3's has several.

    Raises:
        ConfigError: they are no ids.
    """
    entry = generation.get("eos_token_id")
    ids = entry if isinstance(entry, list) else [] if entry is None else [entry]
    if not all(type(i) is int for i in ids):
        raise ConfigError(
            f"{folder / GENERATION}: eos_token_id must be an id or a list of ids, and is {excerpt(entry)}; correct it"
        )
    return frozenset(ids)
