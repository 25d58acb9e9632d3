"""Generate tokens with a model, one after the other, for one prompt or several together."""

from __future__ import annotations

import inspect
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import repeat

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from titanlite.errors import ConfigError, counted
from titanlite.inference.kv_cache import KVCache, forward
from titanlite.inference.sampling import Sampling, TokenSampler

DEFAULT_MAX_NEW_TOKENS = 256


@dataclass
class Sequel:
    """The new tokens after a prompt.

    Attributes:
        limit: the largest number of them.
        end_ids: the tokens that end the text (EOS).
        ids: the new tokens, without the one that ended the text.
        ended: why there are no more: "end" (a token of ``end_ids``), "length"; "" while there can be more.
    """

    limit: int
    end_ids: Collection[int] = ()
    ids: list[int] = field(default_factory=list)
    ended: str = ""

    def add(self, token: int) -> None:
        if token in self.end_ids:
            self.ended = "end"
            return
        self.ids.append(token)
        if len(self.ids) == self.limit:
            self.ended = "length"


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run ``model`` without gradients, dropout and the compiler; restore its modes and FSDP's shards at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # A block compiled for training would be compiled again for every other sequence length.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
            if isinstance(module, FSDPModule):
                module.reshard()  # free parameters that stay gathered for a backward


def extend(
    decoder: TokenSampler,
    prompts: Sequence[Sequence[int]],
    sequels: Sequence[Sequel],
    sampling: Sampling,
    cache: KVCache | None,
) -> Iterator[None]:
    """Add tokens to ``sequels``, one to each that has not ended, in each iteration, until all have ended. All processes
    iterate, within :func:`inference`.

    Args:
        prompts: their token ids, at least one each. Each prompt has its own random numbers, so that its text does not
            depend on the others.
        cache: may hold the keys and values of a beginning of a prompt, but not of the whole; None: compute all tokens
            again for each new one.

    Raises:
        TrainingError: the logits are not finite.
    """
    generators = [sampling.generator() for _ in prompts]
    multiple = 1 if decoder.tp is None else decoder.tp.size()
    while not all(sequel.ended for sequel in sequels):
        computed = (cache and cache.lengths) or repeat(0)
        rows = [
            [] if sequel.ended else _after(done, prompt, sequel)
            for prompt, sequel, done in zip(prompts, sequels, computed)
        ]
        lengths = list(map(len, rows))
        last = [sequel.ids[-1] if sequel.ids else prompt[-1] for prompt, sequel in zip(prompts, sequels)]
        filled = [row + [token] * (max(lengths) - len(row)) for row, token in zip(rows, last)]
        tokens = torch.tensor(filled, device=decoder.device)
        if cache is not None:
            logits = cache(tokens, lengths)
        else:
            same = len({*lengths}) == 1
            logits = forward(decoder.model, tokens, 0 if same else [0] * len(rows), multiple, lengths)
        live = [None if sequel.ended else generator for sequel, generator in zip(sequels, generators)]
        drawn = decoder.draw(decoder.last_logits(logits, lengths), sampling, live)
        for token, sequel in zip(drawn, sequels):
            if not sequel.ended:
                sequel.add(token)
        yield


def _after(computed: int, prompt: Sequence[int], sequel: Sequel) -> list[int]:
    """Return the tokens after the first ``computed`` ones."""
    if computed < len(prompt):
        return [*prompt[computed:], *sequel.ids]
    return sequel.ids[computed - len(prompt) :]


@dataclass
class Generated:
    """New tokens, and the time they took.

    Attributes:
        ids: the new tokens, without the token that ended the text; of several prompts, those of the first.
        prompt_tokens: the number of prompt tokens, computed in ``prefill_s`` seconds together with the first new token.
        decoded_tokens: the number of tokens computed one by one, in ``decode_s`` seconds.
    """

    ids: list[int]
    prompt_tokens: int
    prefill_s: float
    decoded_tokens: int
    decode_s: float

    def __add__(self, other: Generated) -> Generated:
        """Return the sums; the ids are those of ``other``."""
        return Generated(
            other.ids,
            self.prompt_tokens + other.prompt_tokens,
            self.prefill_s + other.prefill_s,
            self.decoded_tokens + other.decoded_tokens,
            self.decode_s + other.decode_s,
        )

    def speed(self) -> str:
        prefill = f"prefill {counted(self.prompt_tokens, 'token')}, {self.prompt_tokens / self.prefill_s:,.1f} tokens/s"
        decode = f"decode {counted(self.decoded_tokens, 'token')}"
        if self.decoded_tokens:
            decode += f", {self.decoded_tokens / self.decode_s:,.1f} tokens/s"
        return f"{prefill}; {decode}"


def generate(
    decoder: TokenSampler,
    prompt: Sequence[int],
    max_new_tokens: int | None,
    sampling: Sampling,
    stop_ids: Collection[int] = (),
    *,
    cached: bool = True,
) -> Generated:
    """Continue ``prompt`` by at most ``max_new_tokens`` tokens. All processes must call this.

    Args:
        prompt: token ids, at least one (BOS).
        max_new_tokens: None: as many as the model has positions for, at most 256.
        stop_ids: tokens that end the text (EOS).
        cached: cache keys and values; False: compute all tokens again for each new token.

    Raises:
        ConfigError: no prompt, ``max_new_tokens`` below 1, too few positions, or a forward that takes no positions.
        TrainingError: the logits are not finite.
    """
    sequel = Sequel(checked_number(max_new_tokens, len(prompt), decoder.max_seq_len), stop_ids)
    return generate_together(decoder, [prompt], [sequel], sampling, cached=cached)


def generate_together(
    decoder: TokenSampler,
    prompts: Sequence[Sequence[int]],
    sequels: Sequence[Sequel],
    sampling: Sampling,
    *,
    cached: bool = True,
) -> Generated:
    """Add tokens to ``sequels`` until all have ended; see :func:`generate` and :func:`extend`."""
    check_positions(decoder.model)
    total = max(map(len, prompts)) + max(sequel.limit for sequel in sequels)
    multiple = 1 if decoder.tp is None else decoder.tp.size()
    steps = computed = 0
    with inference(decoder.model), KVCache(decoder.model, total, multiple) if cached else nullcontext() as cache:
        began = prefilled = time.perf_counter()
        for _ in extend(decoder, prompts, sequels, sampling, cache):
            steps += 1
            if steps == 1:
                prefilled = time.perf_counter()
            else:
                computed += sum(len(sequel.ids) + (sequel.ended == "end") >= steps for sequel in sequels)
    took = time.perf_counter() - prefilled
    return Generated(sequels[0].ids, sum(map(len, prompts)), prefilled - began, computed, took)


def checked_number(max_new_tokens: int | None, prompt: int, positions: int) -> int:
    """Return the number of new tokens for a prompt of ``prompt`` tokens and a model with so many ``positions``.

    Raises:
        ConfigError: there is no room for them, or no prompt.
    """
    if not prompt:
        raise ConfigError("the prompt has no tokens: begin with the tokenizer's BOS")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ConfigError("must be at least 1", key="max_new_tokens", value=max_new_tokens)
    if max_new_tokens is None or prompt >= positions:
        if prompt >= positions:
            raise ConfigError(
                f"the prompt has {counted(prompt, 'token')}, and the model has {counted(positions, 'position')}, "
                "which leaves no room for more; shorten it"
            )
        return min(DEFAULT_MAX_NEW_TOKENS, positions - prompt)
    if prompt + max_new_tokens > positions:
        raise ConfigError(
            f"with the prompt's {prompt} these are {counted(prompt + max_new_tokens, 'token')}, and the model has "
            f"{counted(positions, 'position')}; ask for fewer, or shorten the prompt",
            key="max_new_tokens",
            value=max_new_tokens,
        )
    return max_new_tokens


def check_positions(model: nn.Module) -> None:
    """Refuse a model whose forward takes no positions."""
    try:
        inspect.signature(model.forward).bind("tokens", "positions")
    except TypeError as e:
        raise ConfigError(
            f"{type(model).__name__}.forward must take tokens and their positions for text to be generated ({e})"
        ) from e
