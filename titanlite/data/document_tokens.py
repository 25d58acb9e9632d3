"""The tokens before and after each document, BOS and EOS, as the files of a tokenizer name them.

The files count as in ``transformers`` (``PreTrainedTokenizerBase._from_pretrained``): ``special_tokens_map.json`` over
``tokenizer_config.json``, unless the latter has ``added_tokens_decoder``; then the defaults of its ``tokenizer_class``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from titanlite.data.tokenizer_files import damaged, excerpt, read_object
from titanlite.errors import ConfigError

logger = logging.getLogger(__name__)

CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"
_KEYS = ("bos_token", "eos_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token

# (BOS, EOS) of the classes of transformers that have a default, where their vocabulary has it.
_OF_CLASS: Mapping[str, tuple[str | None, str | None]] = {
    "GPT2Tokenizer": ("<|endoftext|>", "<|endoftext|>"),
    "GPTNeoXTokenizer": ("<|endoftext|>", "<|endoftext|>"),
    "Qwen2Tokenizer": (None, "<|endoftext|>"),
    "GemmaTokenizer": ("<bos>", "<eos>"),
    "LlamaTokenizer": ("<s>", "</s>"),  # but for a byte-level vocabulary, which transformers gives another class
}

# (BOS, EOS) of known model families, used with a warning if no file names them. The order matters: GPT-2's
# <|endoftext|> also appears in vocabularies that have a better pair.
_KNOWN_PAIRS = (
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<s>", "</s>"),
    ("<bos>", "<eos>"),
    ("<|startoftext|>", "<|endoftext|>"),
    ("<|endoftext|>", "<|endoftext|>"),
)

Pair = tuple[str | None, str | None]


def find_document_tokens(backend: tokenizers.Tokenizer, file: Path, *, known: bool = False) -> tuple[int, int]:
    """Return the ids of BOS and EOS. A family that names only one of them uses it as both.

    Args:
        backend: gets the tokens that only the files beside ``file`` add.
        file: the tokenizer; the other files are in its folder.
        known: the format of ``file`` itself says that its tokens are those of a known family.

    Raises:
        ConfigError: the files name no token, or one that the vocabulary has not, or are damaged.
    """
    folder = file.parent
    config, special = read_object(folder, CONFIG), read_object(folder, MAP)
    _add_tokens(backend, folder, config)
    named, place = _named(backend, folder, config, special)
    if named == (None, None):
        named, place = _unnamed(backend, file, known)
    else:
        _compare_with_model(backend, folder, named)
    # Families with a single separator token name only one of the two.
    bos, eos = named[0] or named[1], named[1] or named[0]
    ids = [backend.token_to_id(token) if token else None for token in (bos, eos)]
    if ids[0] is None or ids[1] is None:
        gone = bos if ids[0] is None else eos
        raise damaged(
            file,
            f"its vocabulary has no token {excerpt(gone)}, which {place} names; name the tokens that begin and end a "
            f'document in {folder / CONFIG}: {{"bos_token": "...", "eos_token": "..."}}',
        )
    return ids[0], ids[1]


def _named(
    backend: tokenizers.Tokenizer, folder: Path, config: Mapping[str, Any], special: Mapping[str, Any]
) -> tuple[Pair, Path]:
    """Return the (BOS, EOS) that the tokenizer's files name, and the file that does."""
    listed = {key: _token(folder / CONFIG, key, config[key]) for key in _KEYS if key in config}
    place = folder / CONFIG
    if "added_tokens_decoder" not in config:
        over = {key: _token(folder / MAP, key, special[key]) for key in _KEYS if key in special}
        for key, token in over.items():
            place = folder / MAP
            if listed.get(key, token) != token:
                logger.warning(
                    "%s names %s as %s, and %s %s: the former counts, as in transformers",
                    place, token, key, folder / CONFIG, listed[key],
                )  # fmt: skip
        listed |= over
    name = str(config.get("tokenizer_class")).removesuffix("Fast")
    byte_level = name == "LlamaTokenizer" and "ByteLevel" in str(backend.pre_tokenizer)
    defaults = (None, None) if byte_level else _OF_CLASS.get(name, (None, None))
    for key, token in zip(_KEYS, defaults):
        if token and backend.token_to_id(token) is not None:
            listed.setdefault(key, token)
    return (listed.get("bos_token"), listed.get("eos_token")), place


def _token(file: Path, key: str, entry: object) -> str | None:
    if isinstance(entry, dict):
        entry = entry.get("content")
    if entry is not None and not isinstance(entry, str):
        raise damaged(file, f"{key} must be a token or null, and is {excerpt(entry)}; correct it")
    return entry or None


def _unnamed(backend: tokenizers.Tokenizer, file: Path, known: bool) -> tuple[Pair, Path]:
    """Return the pair of the model's ``config.json``, or one that is known, and say so."""
    model = file.parent / "config.json"
    listed = _ids_of_model(model)
    first = [ids[0] if ids else None for ids in listed]
    tokens = [None if i is None else backend.id_to_token(i) for i in first]
    place = model
    if tokens == [None, None]:
        pairs = (pair for pair in _KNOWN_PAIRS if all(backend.token_to_id(token) is not None for token in pair))
        tokens, place = list(next(pairs, (None, None))), file
    if tokens == [None, None]:
        raise damaged(
            file,
            "no file names the tokens that begin and end a document, and its vocabulary has no pair that is known; "
            f'name them in {file.parent / CONFIG}: {{"bos_token": "...", "eos_token": "..."}}',
        )
    if not known:
        logger.warning(
            "%s: no %s or %s beside it names the tokens that begin and end a document; taken are %s and %s, %s",
            file, CONFIG, MAP, tokens[0] or tokens[1], tokens[1] or tokens[0],
            f"from {model}" if place == model else "which are known from other models",
        )  # fmt: skip
    return (tokens[0], tokens[1]), place


def _ids_of_model(file: Path) -> tuple[list[int], list[int]]:
    """Return the ids of BOS and of EOS in a model's ``config.json``, which may have several."""
    try:
        config = read_object(file.parent, file.name)
    except ConfigError:  # who reads the model reports it
        config = {}
    entries = [config.get(f"{key}_id") for key in _KEYS]
    lists = [entry if isinstance(entry, list) else [entry] for entry in entries]
    bos, eos = ([i for i in ids if type(i) is int and 0 <= i < 1 << 32] for ids in lists)
    return bos, eos


def _compare_with_model(backend: tokenizers.Tokenizer, folder: Path, named: Pair) -> None:
    for key, token, ids in zip(_KEYS, named, _ids_of_model(folder / "config.json")):
        if token and ids and backend.token_to_id(token) not in ids:
            logger.warning(
                "%s: its %s_id is %s, and the tokenizer's files name %s (%s), which counts, as in transformers",
                folder / "config.json", key, ids, token, backend.token_to_id(token),
            )  # fmt: skip


def _add_tokens(backend: tokenizers.Tokenizer, folder: Path, config: Mapping[str, Any]) -> None:
    """Add the tokens that the files beside the vocabulary list, as transformers does.

    Raises:
        ConfigError: a token gets another id than the file says.
    """
    place = folder / CONFIG
    has = backend.get_added_tokens_decoder()
    try:
        if "added_tokens_decoder" in config:
            listed = {int(i): _added_token(entry) for i, entry in config["added_tokens_decoder"].items()}
        else:
            place = folder / "added_tokens.json"
            listed = {
                int(i): tokenizers.AddedToken(token, special=_is_named(folder, config, token))
                for token, i in read_object(folder, place.name).items()
                if i not in has
            }
    except (TypeError, ValueError, AttributeError) as e:
        raise damaged(place, f"its list of added tokens is damaged ({excerpt(e)}); download it again") from None
    ids = {i: backend.token_to_id(token.content) for i, token in listed.items()}
    for i, there in ids.items():
        if there not in (None, i):
            logger.warning("%s gives %s the id %d, and the vocabulary %d, which counts", place, listed[i], i, there)
    backend.add_tokens([listed[i] for i in sorted(listed)])
    for i in sorted(i for i, there in ids.items() if there is None):
        received = backend.token_to_id(listed[i].content)
        if received != i:
            raise damaged(
                place,
                f"gives {excerpt(listed[i].content)} the id {i}, and the vocabulary beside it has room at {received}: "
                "the files belong to different tokenizers; download all of them again",
            )


def _added_token(entry: Mapping[str, Any]) -> tokenizers.AddedToken:
    unknown = [key for key in entry if key not in ("content", "__type", *_FLAGS)]
    if unknown or not isinstance(entry.get("content"), str):
        raise ValueError(f"{entry}")
    return tokenizers.AddedToken(entry["content"], **{key: entry[key] for key in _FLAGS if key in entry})


def _is_named(folder: Path, config: Mapping[str, Any], token: str) -> bool:
    entries = {**config, **read_object(folder, MAP)}
    names = [entry.get("content") if isinstance(entry, dict) else entry for entry in entries.values()]
    return token in [name for name in names if isinstance(name, str)]
