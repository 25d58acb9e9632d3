"""How much longer the parts of a tokenizer can make a text. A file from anybody could make it as long as it likes."""

from __future__ import annotations

import base64
import json
from typing import Any

import tokenizers

# Of published tokenizers the largest is some hundred: a ligature of 18 letters, and a few replacements of spaces.
MAX_GROWTH = 10_000


def growth_of(backend: tokenizers.Tokenizer) -> int:
    """Return the largest factor by which the normalizer or the decoder can make a text longer."""
    parts = (part for part in (backend.normalizer, backend.decoder) if part is not None)
    return max((_growth(json.loads(part.__getstate__())) for part in parts), default=1)


def _growth(part: dict[str, Any]) -> int:
    inner = part.get("normalizers") or part.get("decoders")
    if inner:
        total = 1
        for one in inner:  # a product of a million of them would be a number too large to print
            total = min(total * _growth(one), 10**12)
        return total
    if part["type"] == "Replace":
        length, replaced = len(part["content"]), part["pattern"].get("String")
        return max(1, -(-length // len(replaced))) if replaced else 1 + length  # an expression can match nothing
    if part["type"] == "Prepend":
        return 1 + len(part["prepend"])
    if part["type"] == "Precompiled":
        data = base64.b64decode(part["precompiled_charsmap"])
        # After a trie, whose size comes first, follow the replacements, each with a zero at its end.
        return max(map(len, data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")))
    return 1
