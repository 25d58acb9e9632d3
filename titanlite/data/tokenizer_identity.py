"""The identity of a tokenizer: checksums of what decides which ids a text gets, so that two files can be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import tokenizers

from titanlite.data.tokenizer_files import damaged, excerpt

FILE = "tokenizer_identity.json"
_PARTS = ("model", "vocabulary", "merges", "normalizer", "pre-tokenizer", "added tokens", "BOS", "EOS")

# Part of an identity -> its value; "sha256" covers all parts, "tokenizers" is the version of the library.
Identity = dict[str, str]


def identity_of(content: Mapping[str, Any], bos: str, eos: str) -> Identity:
    """Return the identity of a tokenizer.

    Left out is what changes no id of a text: the decoder, the post-processor, truncation and padding, which training
    does not use. The names of special tokens are part of it: what they mean to a model depends on their ids.

    Args:
        content: the object of its ``tokenizer.json``.
        bos, eos: the tokens before and after each document, with their ids.
    """
    model = dict(content["model"])
    vocabulary, merges = model.pop("vocab", None), model.pop("merges", None)
    parts: dict[str, Any] = {
        "vocabulary": vocabulary if isinstance(vocabulary, Mapping) else _plain(vocabulary),  # with scores
        "merges": merges,
        "model": _plain(model),
        "normalizer": _plain(content.get("normalizer")),
        "pre-tokenizer": _plain(content.get("pre_tokenizer")),
        "added tokens": _plain(content.get("added_tokens")),
    }
    digests = {name: _digest(value) for name, value in parts.items()} | {"BOS": bos, "EOS": eos}
    return {"sha256": _digest(digests), "tokenizers": tokenizers.__version__} | digests


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Return ``value`` without what differs between files and versions of the library that give the same ids."""
    if isinstance(value, Mapping):
        # A later version may write a key that an earlier one has not, with the value that it is without it.
        kept = {key: _plain(v) for key, v in value.items() if key != "trim_offsets"}
        return {key: v for key, v in kept.items() if v is not None and v is not False}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return f"{value:.9g}" if isinstance(value, float) else value  # the library rounds when it reads a number


def is_same(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    return one["sha256"] == other["sha256"]


def comparable(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Return True if both were computed by one version of the library: another may write the same in another form."""
    return one["tokenizers"] == other["tokenizers"]


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    """Return a description of what differs, such as "vocabulary, merges, EOS (<s> (1) and </s> (2))"."""
    names = [part for part in _PARTS if one.get(part) != other.get(part)]
    pairs = {n: f"{n} ({excerpt(one.get(n))} and {excerpt(other.get(n))})" for n in ("BOS", "EOS")}
    return ", ".join(pairs.get(name, name) for name in names)


def short(identity: Mapping[str, str]) -> str:
    return identity["sha256"][:12]


def checked(entry: Any, place: str) -> Identity:
    """Return an identity that was read from a file; raise ConfigError, naming ``place``, if it is none."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("sha256", "tokenizers")):
        raise damaged(place, "holds no identity of a tokenizer; restore it, or delete it")
    return entry
