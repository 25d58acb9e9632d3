"""The tokenizer of a run: it belongs to the weights, and another one is refused."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NamedTuple

from titanlite.checkpoint.storage import Info
from titanlite.data.tokenizer import SHIPPED, Tokenizer, has_tokenizer, load_tokenizer
from titanlite.data.tokenizer_files import KEY, damaged, read_object
from titanlite.data.tokenizer_identity import Identity, checked, comparable, differences, is_same, short
from titanlite.errors import ConfigError

logger = logging.getLogger(__name__)


class Weights(NamedTuple):
    """Where weights come from. ``info`` is that of a checkpoint; None: another program wrote ``folder``."""

    folder: Path
    info: Info | None = None


class ChosenTokenizer(NamedTuple):
    """A tokenizer, and why it is this one.

    Attributes:
        source: its path, absolute; empty for the one that titanlite ships. That of a copy in a checkpoint is the path
            of the original.
        reason: in words, for the log.
    """

    tokenizer: Tokenizer
    source: str
    reason: str


def choose_tokenizer(
    path: str, weights: Weights | None, *, replace: bool = False, resume: bool = False
) -> ChosenTokenizer:
    """Load the tokenizer at ``path``, else that of the weights, else the one that titanlite ships.

    Args:
        path: the one that the user names; "" for none.
        weights: None: they are new.
        replace: the user asks for another tokenizer than that of the weights.
        resume: a run is continued. If there is nothing at ``path``, such as on another machine, the checkpoint's copy
            takes its place.

    Raises:
        ConfigError: the tokenizer is missing, damaged, or another one than that of the weights. The key is
            ``model.tokenizer_path``.
    """
    if weights is None:
        tokenizer = load_tokenizer(path)
        return ChosenTokenizer(tokenizer, _source(tokenizer), "model.tokenizer_path" if path else "shipped")
    moved = bool(path) and resume and has_tokenizer(weights.folder) and not os.path.exists(os.path.expanduser(path))
    if moved:
        logger.warning('%s = "%s": there is no such file here; the copy in %s is used', KEY, path, weights.folder)
    if not path or moved:
        try:
            return _tokenizer_of(weights)
        except ConfigError as e:
            e.origin = f"that of the weights in {weights.folder}"
            raise
    tokenizer = load_tokenizer(path)
    if not replace:
        _check(tokenizer, weights)
    return ChosenTokenizer(tokenizer, _source(tokenizer), KEY)


def _source(tokenizer: Tokenizer) -> str:
    return "" if Path(tokenizer.path) == SHIPPED else os.path.abspath(tokenizer.path)


def _tokenizer_of(weights: Weights) -> ChosenTokenizer:
    folder, info = weights
    reason = f"of the weights in {folder}"
    if info is None:
        tokenizer = load_tokenizer(str(folder) if has_tokenizer(folder) else "")
        if Path(tokenizer.path) == SHIPPED:
            if read_object(folder, "config.json").get("vocab_size") not in (None, tokenizer.vocab_size):
                raise damaged(
                    "", f"{folder} has weights and no tokenizer; name the one that belongs to them with {KEY}"
                )
            logger.warning(
                "%s has no tokenizer, so the one that titanlite ships is used; %s names another", folder, KEY
            )
            reason = "shipped"
        return ChosenTokenizer(tokenizer, _source(tokenizer), reason)
    copy, noted = has_tokenizer(folder), _noted(weights)
    if not copy and info.tokenizer_path:  # whoever made the checkpoint does not choose which file is opened here
        why = f"{folder} was trained with it, and has no copy of it; name it yourself with {KEY}"
        raise damaged(info.tokenizer_path, why)
    tokenizer = load_tokenizer(str(folder) if copy else "")
    # After an update of the library, the copy, which has a checksum, is still the same.
    if noted and comparable(noted, tokenizer.identity) and not is_same(noted, tokenizer.identity):
        raise _another(tokenizer, noted, weights)
    if noted is None and not copy:
        _say_unchecked(tokenizer, folder)
    return ChosenTokenizer(tokenizer, info.tokenizer_path, reason)


def _check(tokenizer: Tokenizer, weights: Weights) -> None:
    """Compare a tokenizer with that of the weights.

    Raises:
        ConfigError: it is another one.
    """
    expected = _noted(weights)
    if expected is None or not comparable(expected, tokenizer.identity):
        expected = _identity_of_files(weights)
    if expected is None:
        _say_unchecked(tokenizer, weights.folder)
    elif not is_same(expected, tokenizer.identity):
        raise _another(tokenizer, expected, weights)


def _identity_of_files(weights: Weights) -> Identity | None:
    """Return the identity of the copy, or of the shipped one; None if there is another, or it cannot be read."""
    folder, info = weights
    try:
        if has_tokenizer(folder):
            return load_tokenizer(str(folder)).identity
        return None if info is None or info.tokenizer_path else load_tokenizer().identity
    except ConfigError:
        return None


def _noted(weights: Weights) -> Identity | None:
    """Return the identity in ``checkpoint.json``; None where another program, or an earlier version, wrote it."""
    entry = weights.info.tokenizer if weights.info else None
    return checked(entry, str(weights.folder)) if entry else None


def _another(tokenizer: Tokenizer, noted: Identity, weights: Weights) -> ConfigError:
    source = weights.folder if weights.info is None else weights.info.tokenizer_path or "the one that titanlite ships"
    return damaged(
        tokenizer.path,
        f"is another tokenizer (sha256 {short(tokenizer.identity)}) than that of the weights in {weights.folder} "
        f"({short(noted)}, {source}): they differ in {differences(tokenizer.identity, noted)}. Leave it empty to use "
        "that of the weights. To begin another run that trains them with this one: checkpoint.initial_load_path = "
        f'"{weights.folder}" and checkpoint.exclude_from_loading = ["tokenizer"]',
    )


def _say_unchecked(tokenizer: Tokenizer, folder: Path) -> None:
    logger.warning(
        "%s does not say which tokenizer its weights were trained with, so %s cannot be checked", folder, tokenizer.path
    )
