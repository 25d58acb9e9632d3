"""Chats: messages of several roles, written as the tokenizer's chat template says."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from titanlite.config.data_sections import Data
from titanlite.data.chat_template import MOST_TEXT, SECONDS, ChatTemplate
from titanlite.data.examples import Encoder, Example
from titanlite.data.records import Corrupt, has_surrogate, no_field
from titanlite.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_OPTION = "data.messages_field"
_DEFAULT, _SHAREGPT = "messages", "conversations"
_ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT; others have the names of messages
_KNOWN = {*_ROLES, "user", "assistant", "system", "tool"}


class ChatEncoder(Encoder):
    """The text of a conversation by the chat template, in which special tokens have their ids. Nothing is added: BOS
    and EOS are where the template writes them. What the assistant says is scored, with the token that ends its turn.

    A token is scored if one of its characters is in a turn of the assistant. Where the template marks the turns with
    ``{% generation %}``, ids and mask are those of ``apply_chat_template`` of transformers.

    Args:
        seconds: the processor time that the template may take for a conversation.
    """

    def __init__(self, tokenizer: Tokenizer, data: Data, *, seconds: float = SECONDS) -> None:
        self._tokenizer = tokenizer
        self._field = data.messages_field
        self._template = ChatTemplate(tokenizer, seconds=seconds)
        self._notices = {"tools"}  # that have not been given
        self.fields = (self._field, _SHAREGPT) if self._field == _DEFAULT else (self._field,)
        named = tokenizer.named_tokens()
        self.identity = {
            "encoder": "chat",
            "messages_field": self._field,
            "chat_template": self._template.digest,
            "template_tokens": json.dumps(named, sort_keys=True),
        }

    def encode(self, record: Mapping[str, Any]) -> Example:
        messages = self._messages(record)
        text, turns, marked = self._template.render(messages)
        _refuse_surrogates(text)
        if not marked:
            said = [message["content"] for message in messages if message["role"] == "assistant"]
            turns = [_without_blanks(text, turn, content) for turn, content in zip(turns, said)]
        tokens, places = self._tokenizer.encode_with_special(text)
        scored = np.zeros(len(tokens), dtype=bool)
        for begin, end in turns:
            scored |= (places[:, 0] < end) & (places[:, 1] > begin)
        scored[:1] = False
        if not scored.any():
            roles = ", ".join(dict.fromkeys(str(message["role"])[:40] for message in messages))
            raise Corrupt(f"nothing to learn: the assistant says nothing (the roles are: {roles})", "nothing scored")
        return Example(tokens, scored)

    def prompt(self, record: Mapping[str, Any]) -> list[int]:
        """Return the ids of a conversation and of the beginning of an answer to it, as ``apply_chat_template`` of
        transformers makes them with ``add_generation_prompt``.

        Raises:
            Corrupt, ConfigError: see :meth:`ChatTemplate.render`.
        """
        text = self._template.prompt(self._messages(record))
        _refuse_surrogates(text)
        ids: list[int] = self._tokenizer.encode_with_special(text)[0].tolist()
        return ids

    def _messages(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        field = next((field for field in self.fields if record.get(field) is not None), self._field)
        if field not in record:
            raise Corrupt(no_field(field, record, _OPTION), "no field")
        messages = record[field]
        if not isinstance(messages, (list, tuple)):
            kind = "null" if messages is None else type(messages).__name__
            raise Corrupt(f'the field "{field}" is no list of messages ({kind}); {_OPTION} names it', "no list")
        if not messages:
            raise Corrupt(f'the field "{field}" has no message', "no message")
        converted = [self._message(number, message) for number, message in enumerate(messages, start=1)]
        try:
            size = len(json.dumps(converted))
        except (TypeError, ValueError, RecursionError) as error:
            raise Corrupt(f"a message has something that is no text or number ({error})", "message") from None
        if size > 8 * MOST_TEXT:
            raise Corrupt(f"a conversation of more than {MOST_TEXT:,} characters; cut it into several", "size")
        return converted

    def _message(self, number: int, message: object) -> dict[str, Any]:
        """Return a message with ``role`` and ``content``, as strings, and what else a template may read."""
        if not isinstance(message, Mapping):
            raise Corrupt(f"message {number} is no object with role and content ({type(message).__name__})", "message")
        entries = {str(key): value for key, value in message.items() if value is not None}
        if "role" not in entries and "from" in entries:
            speaker = entries.pop("from")
            if speaker not in _KNOWN:
                raise Corrupt(
                    f"message {number} is from {str(speaker)[:40]!r}, which is none of {', '.join(sorted(_KNOWN))}",
                    "role",
                )
            entries |= {"role": _ROLES.get(speaker, speaker), "content": entries.pop("value", None)}
        role = entries.get("role")
        if not isinstance(role, str):
            raise Corrupt(
                f'message {number} has no role, or one that is no string; it needs "role" and "content"', "role"
            )
        calls = entries.pop("tool_calls", None)
        if calls or role == "tool":
            self._notice("tools", "calls of tools are left out of the messages, and tools are not described")
        content = entries.get("content")
        if not content and calls:
            raise Corrupt(f"message {number} only calls a tool, and such calls are not supported", "tool call")
        return {**entries, "content": _text(number, content)}

    def _notice(self, key: str, text: str) -> None:
        if key in self._notices:
            self._notices.remove(key)
            logger.warning("%s: %s", _OPTION, text)


def _refuse_surrogates(text: str) -> None:
    if has_surrogate(text):
        raise Corrupt("a message has half of a surrogate pair, which is no character", "surrogate")


def _text(number: int, content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)) and content:
        kinds = {part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in content}
        if kinds == {"text"} and all(isinstance(part.get("text"), str) for part in content):
            return "".join(part["text"] for part in content)
        kind = ", ".join(sorted(map(str, kinds)))
        raise Corrupt(f"message {number} has parts that are no text ({kind}); only text is learned", "content")
    kind = "none" if content is None else type(content).__name__
    raise Corrupt(f"message {number} has no content that is a string or a list of texts ({kind})", "content")


def _without_blanks(text: str, turn: tuple[int, int], content: str) -> tuple[int, int]:
    """Leave out the blanks after the mark that ends a turn, if there is one: a model that writes stops at the mark."""
    begin, end = turn
    spoken = text[begin:end].rstrip()
    has_mark = not content.strip() or not spoken.endswith(content.strip())
    return (begin, begin + len(spoken)) if has_mark else turn
