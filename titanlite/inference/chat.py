"""A conversation with a model, which is given its chat template."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

from titanlite.data.encode_chat import ChatEncoder
from titanlite.errors import ConfigError, counted
from titanlite.inference.answer import Answer
from titanlite.inference.generate import DEFAULT_MAX_NEW_TOKENS, extend
from titanlite.inference.kv_cache import KVCache
from titanlite.inference.sampling import Sampling, TokenSampler

Message = dict[str, str]


class Chat:
    """A conversation. Its caller is within :func:`~titanlite.inference.generate.inference`, and the cache's context.

    A prompt is always what the template makes of all messages. Keys and values in the cache are used as far as the
    tokens of the new prompt are those of the earlier text; the rest is computed.

    Args:
        encoder: has the tokenizer's chat template.
        answer: makes an empty answer of at most so many tokens.
        max_new_tokens: None: as many as the model has positions for, at most 256.
        system: the first message, of the role "system"; None: there is none.
        cache: None: compute all tokens again for each new one.
        say: is told what a user should know, such as messages that are dropped.

    Attributes:
        messages: the conversation, as far as the model is given it.
        ids: the tokens of the last prompt and answer.
        computed: the number of tokens of the last prompt that were not in the cache.
        ending: why the last answer is not complete, for the user; empty if it is.
    """

    def __init__(
        self,
        decoder: TokenSampler,
        encoder: ChatEncoder,
        answer: Callable[[int], Answer],
        sampling: Sampling,
        max_new_tokens: int | None = None,
        *,
        system: str | None = None,
        cache: KVCache | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ConfigError("must be at least 1", key="max_new_tokens", value=max_new_tokens)
        self._decoder, self._encoder, self._answer, self._sampling = decoder, encoder, answer, sampling
        self._most = max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        self._cache, self._say = cache, say
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._fixed = len(self.messages)
        self.ids: list[int] = []
        self.computed = self._asked = 0
        self.ending = ""

    def ask(self, text: str) -> Generator[str, None, None]:
        """Add a message of the user, and yield the answer piece by piece. The pieces may be empty: there is one for
        each token. A caller that stops the answer closes the iterator; what was said by then stays.

        Raises:
            Corrupt: the template refuses the conversation with this message, which is left out then.
            ConfigError: the message is longer than the context, and left out then; or the template does what none may.
            TrainingError: the logits are not finite.
        """
        messages, prompt = self._fitting([*self.messages, {"role": "user", "content": text}])
        self.messages = messages
        # Other random numbers for each answer, so that they do not resemble each other.
        sampling = replace(self._sampling, seed=(self._sampling.seed + self._asked) % (1 << 63))
        self._asked += 1
        room = self._decoder.max_seq_len - len(prompt)
        answer = self._answer(min(self._most, room))
        if self._cache is not None:
            self._cache.truncate(min(_common(self.ids, prompt), len(prompt) - 1))
        self.computed = len(prompt) - (0 if self._cache is None else self._cache.length)
        try:
            for _ in extend(self._decoder, [prompt], [answer], sampling, self._cache):
                yield answer.certain()
        finally:
            answer.ended = answer.ended or "stopped"
            self.ending = self._ending(answer, room)
            self.messages.append({"role": "assistant", "content": answer.text})
            # The last token may not have been computed yet.
            self.ids = [*prompt, *answer.ids][: None if self._cache is None else self._cache.length]

    def _ending(self, answer: Answer, room: int) -> str:
        if answer.ended != "length":
            return "(stopped)" if answer.ended == "stopped" else ""
        if room <= self._most:
            return f"(the answer ends here: the context of {counted(self._decoder.max_seq_len, 'token')} is full)"
        return f"(the answer ends here, after {counted(self._most, 'token')}; --max_new_tokens allows more)"

    def _fitting(self, messages: Sequence[Message]) -> tuple[list[Message], list[int]]:
        """Return the conversation, without its oldest messages if an answer has no room else, and its prompt."""
        kept, positions = list(messages), self._decoder.max_seq_len
        wanted = max(1, min(self._most, positions // 4))
        prompt = self._encoder.prompt({"messages": kept})
        while len(prompt) + wanted > positions and len(kept) > self._fixed + 1:
            del kept[self._fixed : self._fixed + 2]  # a message of the user, and its answer
            prompt = self._encoder.prompt({"messages": kept})
        if len(prompt) >= positions:
            raise ConfigError(
                f"the message makes a prompt of {counted(len(prompt), 'token')}, and the model has "
                f"{counted(positions, 'position')}, which leaves no room for an answer; shorten it"
            )
        if dropped := len(messages) - len(kept):
            full = f"the context of {counted(positions, 'token')} is full"
            self._say(f"({full}: the oldest {dropped} messages are dropped)")
        return kept, prompt


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens that both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
