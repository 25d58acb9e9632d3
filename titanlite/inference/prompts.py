"""Prompts and conversations from a file, and what a model writes after them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titanlite.config.data_sections import Data
from titanlite.data import Tokenizer
from titanlite.data.encode_chat import ChatEncoder
from titanlite.data.files import JSON_SUFFIXES
from titanlite.data.records import Corrupt, decode_text, has_surrogate, is_blank, record_of_line
from titanlite.errors import ConfigError, shown
from titanlite.inference.answer import Answer
from titanlite.inference.generate import checked_number
from titanlite.inference.sampling import TokenSampler
from titanlite.untrusted.files import read_bytes

_MOST_BYTES = 1 << 30
_LOGITS = 1 << 29  # of a forward pass, which bounds the memory
_FIELDS = ("prompt", "messages")


@dataclass(frozen=True)
class Given:
    """A text to continue, or a conversation to answer.

    Attributes:
        record: has ``prompt`` or ``messages``.
        place: the file and the line, for messages; empty for the command line.
        line: the number of the line, from 1; None for the command line.
    """

    record: dict[str, Any]
    place: str = ""
    line: int | None = None

    @property
    def prompt(self) -> str | None:
        """The text to continue; None if it is a conversation."""
        return self.record.get("prompt")


@dataclass(frozen=True)
class Task:
    """A prompt as tokens, and the answer that they get."""

    given: Given
    ids: list[int]
    answer: Answer

    def text(self) -> str:
        """Return what people read: the prompt with its continuation, or the answer."""
        return (self.given.prompt or "") + self.answer.text

    def json(self) -> str:
        """Return one line of JSON: what was given, and ``text``, what the model wrote."""
        line = {} if self.given.line is None else {"line": self.given.line}
        answer = self.answer
        values = {"text": answer.text, "ended": answer.ended, "prompt_tokens": len(self.ids), "tokens": len(answer.ids)}
        return json.dumps({**line, **self.given.record, **values}, ensure_ascii=False)


def read_prompts(path: str) -> tuple[list[Given], int]:
    """Return the prompts in a file, in order, and the number of blank lines, which are left out.

    The file has a prompt on each line, or is JSON lines, of objects with ``prompt`` (a text) or ``messages`` (a list of
    objects with ``role`` and ``content``). It is JSON lines if its name says so (.jsonl, .ndjson, .json), or its first
    line is such an object.

    Raises:
        ConfigError: the file cannot be read, has no prompts, or a line is none.
    """
    file = Path(path).expanduser()
    try:
        lines = read_bytes(file, _MOST_BYTES).split(b"\n")
    except OSError as e:
        raise ConfigError(f"cannot be read ({e.strerror or e}); name a file", key="--prompts", value=path) from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if not is_blank(line)]
    blank = len(lines) - len(numbered) - (not lines[-1])
    if not numbered:
        raise ConfigError("has no prompts; write one on each line", key="--prompts", value=path)
    as_json = file.name.lower().endswith(JSON_SUFFIXES) or _is_record(numbered[0][1])
    givens = []
    for number, line in numbered:
        place = f"{path}:{number}"
        try:
            record = _checked(record_of_line(line)) if as_json else {"prompt": decode_text(line).removesuffix("\r")}
        except Corrupt as fault:
            raise ConfigError(f"{place}: {fault}") from None
        givens.append(Given(record, place, number))
    return givens, blank


def _is_record(line: bytes) -> bool:
    try:
        return any(name in record_of_line(line) for name in _FIELDS)
    except Corrupt:
        return False


def _checked(record: dict[str, Any]) -> dict[str, Any]:
    """Return ``prompt`` or ``messages`` of a record.

    Raises:
        Corrupt: it has not one of them, or the prompt is no text.
    """
    named = [name for name in _FIELDS if record.get(name) is not None]
    if len(named) != 1:
        raise Corrupt(f'must have either "prompt" or "messages" (it has: {", ".join(record) or "none"})', "field")
    prompt = record.get("prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise Corrupt(f'its "prompt" is no text ({shown(prompt)[:40]})', "no text")
    return {named[0]: record[named[0]]}


def tasks_of(
    givens: Sequence[Given],
    tokenizer: Tokenizer,
    positions: int,
    max_new_tokens: int | None,
    end_ids: Collection[int],
    stop: Sequence[str],
) -> list[Task]:
    """Return the prompts as tokens. BOS comes before a text; a conversation is what the tokenizer's chat template
    makes of it.

    Raises:
        ConfigError: a prompt leaves no room for new tokens, or the template refuses a conversation.
    """
    is_chat = any(given.prompt is None for given in givens)
    chat = ChatEncoder(tokenizer, Data()) if is_chat else None
    tasks = []
    for given in givens:
        try:
            ids, before = _ids(given, tokenizer, chat)
            limit = checked_number(max_new_tokens, len(ids), positions)
        except Corrupt as fault:
            why = str(fault).replace("; data.messages_field names it", "")
            raise ConfigError(f"{given.place}: {why}") from None
        except ConfigError as e:
            if given.place:
                e.why = f"{given.place}: {e.why}"
            raise
        tasks.append(Task(given, ids, Answer(limit, end_ids, tokenizer=tokenizer, stop=stop, before=before)))
    return tasks


def _ids(given: Given, tokenizer: Tokenizer, chat: ChatEncoder | None) -> tuple[list[int], list[int]]:
    """Return the ids of a prompt, and those of its text that the answer continues."""
    if given.prompt is None:
        assert chat is not None
        return chat.prompt(given.record), []
    if has_surrogate(given.prompt):
        raise Corrupt("the prompt has half of a surrogate pair, which is no character", "surrogate")
    ids = tokenizer.encode(given.prompt)
    return [tokenizer.bos_id, *ids], ids


def batches(tasks: Sequence[Task], size: int, decoder: TokenSampler) -> Iterator[list[Task]]:
    """Yield the tasks in order, at most ``size`` together, and no more than memory should hold the logits of."""
    batch: list[Task] = []
    for task in tasks:
        longest = max(len(each.ids) for each in (*batch, task))
        if batch and (len(batch) == size or (len(batch) + 1) * longest * decoder.vocab_size > _LOGITS):
            yield batch
            batch = []
        batch.append(task)
    if batch:
        yield batch
