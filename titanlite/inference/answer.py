"""The text of new tokens: as far as it is certain while they come, and up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from titanlite.data import Tokenizer
from titanlite.errors import ConfigError
from titanlite.inference.generate import Sequel

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no character, or not yet


def check_stop(stop: Sequence[str]) -> None:
    """Refuse a stop string that is empty, which would stop every text at once."""
    if "" in stop:
        raise ConfigError("must have a character", key="--stop", value="")


@dataclass
class Answer(Sequel):
    """A :class:`Sequel` with its text.

    Attributes:
        tokenizer: the one that made the prompt.
        stop: strings that end the text, wherever the borders of tokens are. The first that is complete counts, and is
            not part of the text.
        before: the tokens of the text that this one continues. A text by itself has none: SentencePiece begins it
            without a space.
        text: the text so far.
    """

    tokenizer: Tokenizer = field(kw_only=True)
    stop: Sequence[str] = ()
    before: Sequence[int] = ()
    text: str = field(default="", init=False)
    _given: int = field(default=0, init=False)

    def add(self, token: int) -> None:
        super().add(token)
        if self.ended == "end":
            return
        self.text = self._decoded(self.ids)
        matches = [(begin + len(stop), begin) for stop in self.stop if (begin := self.text.find(stop)) >= 0]
        if matches:
            self.ended = "stop"
            self.text = self.text[: min(matches)[1]]

    def certain(self) -> str:
        """Return the text that has become certain since the last call. It ends with no part of a character, nor of a
        stop string, unless the answer has ended."""
        end = len(self.text) if self.ended else self._certain_end()
        new = self.text[self._given : end]
        self._given = max(self._given, end)
        return new

    def _certain_end(self) -> int:
        # Bytes in a row are decoded together: one that does not fit makes all of them unknown.
        row = len(self.ids)
        while row and self.ids[row - 1] in self.tokenizer.byte_tokens:
            row -= 1
        text = self.text if row == len(self.ids) else self._decoded(self.ids[:row])
        text = text.rstrip(_UNKNOWN)
        most = max((len(stop) for stop in self.stop), default=1) - 1
        begun = (n for n in range(min(most, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self.stop))
        return len(text) - next(begun, 0)

    def _decoded(self, ids: Sequence[int]) -> str:
        if not self.before:
            return self.tokenizer.decode(ids)
        return self.tokenizer.decode([*self.before, *ids])[len(self.tokenizer.decode(self.before)) :]
