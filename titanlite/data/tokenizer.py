"""Tokenizers: the small shipped one, any Hugging Face ``tokenizer.json``, and Llama 3's ``tokenizer.model``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import pre_tokenizers, processors

from titanlite.data.document_tokens import CONFIG, find_document_tokens
from titanlite.data.generation_config import GENERATION
from titanlite.data.tiktoken import load_tiktoken
from titanlite.data.tokenizer_files import (
    MAX_BYTES,
    MAX_CONFIG_BYTES,
    MAX_IDS,
    Panic,
    damaged,
    excerpt,
    is_there,
    panics_as_exceptions,
    read_limited,
    read_object,
    without_stderr,
)
from titanlite.data.tokenizer_growth import MAX_GROWTH, growth_of
from titanlite.data.tokenizer_identity import FILE as IDENTITY
from titanlite.data.tokenizer_identity import Identity, checked, comparable, differences, identity_of, is_same, short

SHIPPED = Path(__file__).parent / "assets" / "tokenizer.json"
HUGGING_FACE, LLAMA3 = "tokenizer.json", "tokenizer.model"
_NAMES = (HUGGING_FACE, LLAMA3, f"original/{LLAMA3}")
_TEMPLATE = "chat_template.jinja"
_BEFORE = ("\n", "!", "\0")  # texts that tokens seldom join with what follows

# Entries of tokenizer_config.json that a copy keeps for transformers; training uses none of them.
_KEPT = ("chat_template", "unk_token", "pad_token", "additional_special_tokens", "extra_special_tokens",
         "model_max_length", "padding_side")  # fmt: skip


class Tokenizer:
    """Converts text to token ids and back. It never adds special tokens, and never parses them in the text.

    Args:
        kept: entries of ``tokenizer_config.json`` that a copy keeps.
        generation: the content of ``generation_config.json`` beside it, which a copy keeps too; empty if there is none.

    Attributes:
        vocab_size: the size of the id space, including special tokens; every id is below it.
        bos_id, eos_id: the ids of the tokens before and after each document; equal if the family has only one.
        path: the file of the tokenizer.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        bos_id: int,
        eos_id: int,
        path: str,
        kept: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        self._backend = backend
        self._kept = kept or {}
        self.generation = generation or {}
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.path = path
        # Published files may enable truncation or padding; both would silently change the corpus.
        backend.no_truncation()
        backend.no_padding()
        # The text "<|end_of_text|>" inside a document must not become an EOS token.
        backend.encode_special_tokens = True
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None  # it would give a text other ids each time

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``."""
        with self._naming_file():
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """Return the token ids of ``text`` where it follows another text, which is encoded apart.

        SentencePiece begins every text with a space of its own; here there is none.
        """
        for other in _BEFORE if self._marks_beginning else ():
            before, ids = self.encode(other), self.encode(other + text)
            if ids[: len(before)] == before:  # no token is of both
                return ids[len(before) :]
        return self.encode(text)

    @cached_property
    def _marks_beginning(self) -> bool:
        """True if the beginning of a text has other tokens than the same characters further on."""
        return self.encode("\na") != self.encode("\n") + self.encode("a")

    def encode_with_special(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the token ids of ``text``, in which special tokens have their ids, and their places in it.

        Returns:
            int32 [n], and int64 [n, 2]: the begin and end of each token in characters. The parts of a character that
            is several tokens have the place of the character.
        """
        with self._naming_file():
            encoding = self._parsing.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.int32), np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)

    @cached_property
    def _parsing(self) -> tokenizers.Tokenizer:
        """A copy that finds special tokens in the text; the setting belongs to a tokenizer, not to a call."""
        copy = tokenizers.Tokenizer.from_str(self._backend.to_str())
        copy.encode_special_tokens = False
        return copy

    @cached_property
    def byte_tokens(self) -> frozenset[int]:
        """The tokens that each stand for a byte of a character which has no token (SentencePiece)."""
        ids = (self._backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(i for i in ids if i is not None)

    @property
    def special_tokens(self) -> list[str]:
        """The texts of the special tokens."""
        return [token.content for token in self._backend.get_added_tokens_decoder().values() if token.special]

    @property
    def chat_template(self) -> object:
        """The entry ``chat_template`` of the tokenizer's files, whatever it is; None if there is none."""
        return self._kept.get("chat_template")

    def named_tokens(self) -> dict[str, str]:
        """Return the tokens that chat templates name, such as ``eos_token``, as transformers hands them on."""
        named = {
            "bos_token": self._backend.id_to_token(self.bos_id),
            "eos_token": self._backend.id_to_token(self.eos_id),
        }
        others = {key: self._kept[key] for key in ("bos_token", "unk_token", "pad_token") if key in self._kept}
        entries = {key: e.get("content") if isinstance(e, dict) else e for key, e in (named | others).items()}
        return {key: entry for key, entry in entries.items() if isinstance(entry, str)}

    def _text_of(self, token: int) -> str:
        return str(self._backend.id_to_token(token))

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Return one int32 array of ids per text. Runs on all cores and releases the interpreter lock."""
        with self._naming_file():
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    @cached_property
    def adds_bos(self) -> bool:
        """True if ``transformers`` puts BOS before a text: the post-processor of the tokenizer's file does, or the one
        that :meth:`files` adds for a tokenizer of titanlite or Llama 3."""
        if self._backend.post_processor is None:
            return Path(self.path) == SHIPPED or self.path.endswith(".model")
        return self._backend.encode("", add_special_tokens=True).ids[:1] == [self.bos_id]

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

    @contextmanager
    def _naming_file(self) -> Iterator[None]:
        """Turn the errors of the library about a text, such as a pattern that takes too long, into ConfigError."""
        try:
            with panics_as_exceptions():
                yield
        except Exception as e:
            raise damaged(self.path, f"fails on a text ({excerpt(e)}); use another tokenizer") from None

    @cached_property
    def identity(self) -> Identity:
        """The checksums of what decides the ids; see :func:`identity_of`."""
        names = (f"{self._backend.id_to_token(i)} ({i})" for i in (self.bos_id, self.eos_id))
        return identity_of(json.loads(self._backend.to_str()), *names)

    def description(self) -> str:
        return f"{self.path}, {self.vocab_size:,} tokens, sha256 {short(self.identity)}"

    def files(self, pretty: bool = True) -> dict[str, str]:
        """Return the names and contents of ``tokenizer.json`` and ``tokenizer_config.json``, for
        :func:`load_tokenizer` and for ``transformers``, and of ``generation_config.json`` if it has one. A tokenizer
        without a post-processor gets one that puts BOS before a text, as in training. ``pretty``: one entry of the
        vocabulary per line."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        bos, eos = (backend.id_to_token(i) for i in (self.bos_id, self.eos_id))
        if backend.post_processor is None:
            backend.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, self.bos_id)]
            )
        config = {
            "bos_token": bos,
            **self._kept,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": eos,
            "clean_up_tokenization_spaces": False,  # it would change decoded text
        }
        files = {HUGGING_FACE: backend.to_str(pretty), CONFIG: json.dumps(config, indent=2) + "\n"}
        if self.generation:
            files[GENERATION] = json.dumps(self.generation, indent=2) + "\n"
        return files

    def save(self, folder: Path) -> None:
        """Write :meth:`files` and ``tokenizer_identity.json`` into ``folder``."""
        identity = json.dumps(self.identity, indent=2) + "\n"
        for name, text in (self.files() | {IDENTITY: identity}).items():
            (folder / name).write_text(text, encoding="utf-8")


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
        ConfigError: the file is missing, damaged, too large or of an unknown format, no BOS and EOS tokens are known,
            or it is another tokenizer than ``tokenizer_identity.json`` in its folder says. The key is
            ``model.tokenizer_path``.
    """
    file = _find(path) if path else SHIPPED
    content = read_limited(file, MAX_BYTES)
    is_llama3 = file.suffix == ".model"
    try:
        with panics_as_exceptions():
            with without_stderr():
                backend = load_tiktoken(file, content) if is_llama3 else _load_hugging_face(file, content)
            bos, eos = find_document_tokens(backend, file, known=is_llama3)
            kept, generation = _kept_entries(file.parent, bos == eos), read_object(file.parent, GENERATION)
            tokenizer = Tokenizer(backend, bos, eos, str(file), kept, generation)
    except Panic as e:
        raise damaged(file, f"the tokenizers library fails on it ({excerpt(e)}); download it again") from None
    if tokenizer.vocab_size > MAX_IDS:
        largest = tokenizer.vocab_size - 1
        raise damaged(file, f"has ids up to {largest:,}, and the largest that is read is {MAX_IDS - 1:,}")
    _check_identity(tokenizer, file.parent)
    return tokenizer


def _kept_entries(folder: Path, one_token: bool) -> dict[str, Any]:
    config = read_object(folder, CONFIG)
    kept = {key: config[key] for key in _KEPT if key in config}
    if one_token and config.get("bos_token", "") is None:  # EOS serves as BOS, and a chat template has none
        kept["bos_token"] = None
    if is_there(folder, _TEMPLATE):  # it counts, where both are there
        kept["chat_template"] = read_limited(folder / _TEMPLATE, MAX_CONFIG_BYTES).decode("utf-8", "replace")
    return kept


def has_tokenizer(folder: Path) -> bool:
    """Return True if ``folder`` holds the files of a tokenizer."""
    return any(is_there(folder, name) for name in _NAMES)


def _load_hugging_face(file: Path, content: bytes) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
        added = json.loads(content).get("added_tokens") or []
        stated = {entry["content"]: entry["id"] for entry in added}
    except (Exception, Panic) as error:  # the library raises bare Exception
        reason = excerpt(str(error).removeprefix("Cannot instantiate Tokenizer from buffer: "))
        raise damaged(
            file,
            f"is not a Hugging Face tokenizer.json ({reason}); "
            "download it again, or leave model.tokenizer_path empty for the shipped tokenizer",
        ) from error
    if not backend.get_vocab_size():
        raise damaged(file, "its vocabulary is empty; download it again")
    growth = growth_of(backend)
    if growth > MAX_GROWTH:
        raise damaged(
            file,
            f"its normalizer or decoder can make a text {growth:,} times as long, and at most {MAX_GROWTH:,} is read",
        )
    for token, i in stated.items():
        if backend.token_to_id(token) != i:
            raise damaged(
                file,
                f"gives the added token {excerpt(token)} the id {i}, and its vocabulary has room at "
                f"{backend.token_to_id(token)}; download it again",
            )
    return backend


def _find(path: str) -> Path:
    file = Path(os.path.expanduser(path))
    try:
        if file.is_file():
            return file
        is_folder = file.is_dir()
    except OSError as e:
        raise damaged(path, f"cannot be read ({e.strerror or e}); correct the path or its permissions") from None
    for name in _NAMES:
        if is_folder and is_there(file, name):
            return file / name
    problem = f"the folder has no {', '.join(_NAMES[:-1])} or {_NAMES[-1]}" if is_folder else "there is no such file"
    raise damaged(
        path,
        f"{problem} (a path is relative to the current folder, {Path.cwd()}); "
        "get it with: titanlite tokenizer download --repo_id meta-llama/Llama-3.1-8B --hf_token=..., "
        "or leave model.tokenizer_path empty for the shipped tokenizer",
    )


def _check_identity(tokenizer: Tokenizer, folder: Path) -> None:
    if not is_there(folder, IDENTITY):
        return
    file = folder / IDENTITY
    noted = checked(read_object(folder, IDENTITY), str(file))
    if comparable(noted, tokenizer.identity) and not is_same(noted, tokenizer.identity):
        raise damaged(
            tokenizer.path,
            f"is not the tokenizer that this folder was written with: sha256 {short(noted)} there, "
            f"{short(tokenizer.identity)} here; they differ in {differences(noted, tokenizer.identity)}; restore it, "
            f"or, if you changed it on purpose, delete {file}",
        )
