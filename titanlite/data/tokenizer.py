"""Tokenizers: the small shipped one, any Hugging Face ``tokenizer.json``, and Llama 3's ``tokenizer.model``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import pre_tokenizers, processors

from titanlite.data.tiktoken import load_tiktoken
from titanlite.errors import ConfigError

SHIPPED = Path(__file__).parent / "assets" / "tokenizer.json"

# (BOS, EOS) of known model families, used if no tokenizer_config.json names them. The order matters: GPT-2's
# <|endoftext|> also appears in vocabularies that have a better pair.
_KNOWN_PAIRS = (
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<s>", "</s>"),
    ("<bos>", "<eos>"),
    ("<|startoftext|>", "<|endoftext|>"),
    ("<|endoftext|>", "<|endoftext|>"),
)


class Tokenizer:
    """Converts text to token ids and back. It never adds special tokens, and never parses them in the text.

    Attributes:
        vocab_size: the size of the id space, including special tokens; every id is below it.
        bos_id, eos_id: the ids of the tokens before and after each document; equal if the family has only one.
        path: the file of the tokenizer.
    """

    def __init__(self, backend: tokenizers.Tokenizer, bos_id: int, eos_id: int, path: str) -> None:
        self._backend = backend
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.path = path
        # Published files may enable truncation or padding; both would silently change the corpus.
        backend.no_truncation()
        backend.no_padding()
        # The text "<|end_of_text|>" inside a document must not become an EOS token.
        backend.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Return one int32 array of ids per text. Runs on all cores and releases the interpreter lock."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    @cached_property
    def token_bytes(self) -> NDArray[np.int32] | None:
        """The number of bytes of UTF-8 text of each token, int32 [vocab_size]; 0 for special tokens and unused ids.

        None if the tokenizer is not byte-level. For example, spaces in SentencePiece depend on the position of a token,
        so a single token has no fixed number of bytes.
        """
        if not _is_byte_level(self._backend):
            return None
        characters = set(pre_tokenizers.ByteLevel.alphabet())
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        for token, i in self._backend.get_vocab(with_added_tokens=False).items():
            # A token with a character that represents no byte is decoded literally.
            sizes[i] = len(token) if characters.issuperset(token) else len(token.encode())
        for i, added in self._backend.get_added_tokens_decoder().items():
            sizes[i] = 0 if added.special else len(added.content.encode())
        sizes[[self.bos_id, self.eos_id]] = 0
        return sizes

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``, including special tokens."""
        text: str = self._backend.decode([int(i) for i in ids], skip_special_tokens=False)
        return text

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``, for :func:`load_tokenizer` and for
        ``transformers``. A tokenizer without a post-processor gets one that puts BOS before a text, as in training."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        bos, eos = (backend.id_to_token(i) for i in (self.bos_id, self.eos_id))
        if backend.post_processor is None:
            backend.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, self.bos_id)]
            )
        backend.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "clean_up_tokenization_spaces": False,  # it would change decoded text
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Return True if each character of a token represents one byte of the text, and no space is added before it."""
    parts = json.loads(backend.to_str())
    kinds = []
    for name, inner in (("decoder", "decoders"), ("pre_tokenizer", "pretokenizers")):
        part = parts[name] or {}
        kinds.append([p for p in part.get(inner, [part]) if p.get("type") == "ByteLevel"])
    decoders, splitters = kinds
    return bool(decoders and splitters) and not any(p["add_prefix_space"] for p in splitters)


def load_tokenizer(path: str = "") -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: a ``tokenizer.json``, a Llama 3 ``tokenizer.model``, or a folder with one of them (``tokenizer.json``
            is preferred); empty for the tokenizer shipped with titanlite (2,048 tokens).

    Raises:
        ConfigError: the file is missing, its format is unknown, or no BOS and EOS tokens are known.
    """
    file = _find(path)
    if file.suffix == ".model":
        backend = load_tiktoken(file)
    else:
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(
                f"{file} is not a Hugging Face tokenizer.json ({error}); "
                "download it again, or leave model.tokenizer_path empty for the shipped tokenizer",
                key="model.tokenizer_path",
                value=path,
            ) from error
    bos, eos = _document_tokens(backend, file)
    return Tokenizer(backend, bos, eos, str(file))


def _find(path: str) -> Path:
    if not path:
        return SHIPPED
    file = Path(path).expanduser()
    if file.is_file():
        return file
    names = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")
    for name in names:
        if (file / name).is_file():
            return file / name
    problem = f"the folder has no {', '.join(names[:-1])} or {names[-1]}" if file.is_dir() else "there is no such file"
    raise ConfigError(
        f"{problem} (a path is relative to the current folder, {Path.cwd()}); "
        "get it with: titanlite tokenizer download --repo_id meta-llama/Llama-3.1-8B --hf_token=..., "
        "or leave model.tokenizer_path empty for the shipped tokenizer",
        key="model.tokenizer_path",
        value=path,
    )


def _document_tokens(backend: tokenizers.Tokenizer, file: Path) -> tuple[int, int]:
    """Return the ids of BOS and EOS, from ``tokenizer_config.json`` in the same folder or from well-known names."""
    config = _read_config(file.parent / "tokenizer_config.json")
    configured = [_token_name(config.get(key)) for key in ("bos_token", "eos_token")]
    defaults = next((p for p in _KNOWN_PAIRS if all(backend.token_to_id(t) is not None for t in p)), (None, None))
    bos, eos = (name or default for name, default in zip(configured, defaults))
    # Families with a single separator token configure only one of the two.
    bos, eos = bos or eos, eos or bos
    ids = [backend.token_to_id(token) if token else None for token in (bos, eos)]
    if ids[0] is None or ids[1] is None:
        raise ConfigError(
            f"model.tokenizer_path: {file} has no token known to begin or end a document "
            f"(looked for {bos or 'BOS'} and {eos or 'EOS'}); name them in a tokenizer_config.json beside it: "
            '{"bos_token": "...", "eos_token": "..."}'
        )
    return ids[0], ids[1]


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"model.tokenizer_path: {file} is not JSON ({error}); repair, re-download or delete it"
        ) from error
    return config if isinstance(config, dict) else {}


def _token_name(entry: object) -> str | None:
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None
