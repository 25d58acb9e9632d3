"""Generate text with a model, token by token. Each token attends to the cached keys and values of the tokens before it.

A model family works without changes if its ``forward(tokens, positions)`` takes the positions of the tokens, and its
attention modules are :class:`~titanlite.models.layers.AttentionSlot`. What their slot is given: q [batch, heads,
seq_len, head_dim], k and v [batch, kv_heads, seq_len, head_dim]; positions are already applied to q and k, and
attention is causal over the whole sequence, or over a sliding window of it.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from titanlite.errors import ConfigError, TrainingError, counted
from titanlite.models.layers import AttentionSlot, Core, visible

DEFAULT_MAX_NEW_TOKENS = 256


def forward(model: nn.Module, tokens: Tensor, start: int = 0, multiple: int = 1) -> Tensor:
    """Return the logits [batch, n, vocab] of ``tokens`` [batch, n], at the positions from ``start`` on.

    Args:
        multiple: pad the sequence to a multiple of this, because sequence parallelism divides it. The padding is copies
            of the last token at the same position. They add no new activation values, so the scales of quantized
            layers do not change.
    """
    n = tokens.shape[1]
    positions = torch.arange(start, start + n, device=tokens.device)
    if missing := -n % multiple:
        tokens = torch.cat((tokens, tokens[:, -1:].expand(-1, missing)), 1)
        positions = torch.cat((positions, positions[-1:].expand(missing)))
    logits: Tensor = model(tokens, positions)
    return logits[:, :n]


class KVCache:
    """A cache of the keys and values of all tokens so far, for every attention of ``model``. Inside the context, it
    fills the slot ``core`` of these modules::

        with KVCache(model, capacity=100) as cache:
            logits = cache(prompt)  # [batch, n, vocab]
            logits = cache(next_token)  # [batch, 1, vocab]

    Args:
        capacity: the largest number of tokens.
        multiple: as in :func:`forward`; the cache does not keep the padding.

    Attributes:
        length: the number of tokens so far.

    Raises:
        ConfigError: the model has no attention with a slot, or, in a call, the capacity is exceeded.
    """

    def __init__(self, model: nn.Module, capacity: int, multiple: int = 1) -> None:
        self.model, self.capacity, self.multiple = model, capacity, multiple
        self.length = self._new = 0
        self._modules = [module for module in model.modules() if isinstance(module, AttentionSlot)]
        self._cores = [module.core for module in self._modules]
        self._kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        if not self._modules:
            raise ConfigError(
                f"{type(model).__name__} has no AttentionSlot for a cache of keys and values; give its attention one, "
                "or generate without the cache"
            )

    def __enter__(self) -> KVCache:
        for module, core in zip(self._modules, self._cores, strict=True):
            module.core = partial(self._attend, module, core)
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        for module, core in zip(self._modules, self._cores, strict=True):
            module.core = core
        self._kept.clear()

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the logits [batch, n, vocab] of the next tokens [batch, n], and cache their keys and values."""
        new = tokens.shape[1]
        if self.length + new > self.capacity:
            raise ConfigError(
                f"the cache of keys and values has room for {counted(self.capacity, 'token')}, and {self.length} + "
                f"{new} are to go into it; make it larger"
            )
        self._new = new
        logits = forward(self.model, tokens, self.length, self.multiple)
        self.length += new
        return logits

    def _attend(
        self,
        module: nn.Module,
        causal: Core,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int | None = None,
        documents: None = None,
    ) -> Tensor:
        start, new = self.length, self._new
        padding = q.shape[2] - new
        q, k, v = q[:, :, :new], k[:, :, :new], v[:, :, :new]
        keys, values = self._append(module, k, v)
        if start == 0:
            out = causal(q, k, v, window)  # as in training; kernels without a mask need less memory
        else:
            if window is not None:  # the first of the new tokens sees as many positions
                keys, values = (kept[:, :, -(window + new - 1) :] for kept in (keys, values))
            # A single token sees all that is left.
            mask = visible(new, keys.shape[2], window, q.device) if new > 1 else None
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
        return torch.cat((out, out[:, :, -1:].expand(-1, -1, padding, -1)), 2) if padding else out

    def _append(self, module: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``k`` and ``v`` to the cache of ``module``; return all keys and values so far."""
        if module not in self._kept:
            batch, heads, _, head_dim = k.shape
            shape = batch, heads, self.capacity, head_dim
            self._kept[module] = k.new_empty(shape), v.new_empty(shape)
        keys, values = (kept[:, :, : self.length + self._new] for kept in self._kept[module])
        keys[:, :, self.length :] = k
        values[:, :, self.length :] = v
        return keys, values


@dataclass(frozen=True)
class Sampling:
    """The sampling of a token from the logits.

    Attributes:
        temperature: the divisor of the logits; 0 takes the most likely token.
        top_k: draw only from the k most likely tokens; 0 is off.
        top_p: of these, draw only from the fewest whose probabilities sum to p or more (nucleus sampling, Holtzman et
            al., "The Curious Case of Neural Text Degeneration", 2019); 1 is off.
        seed: the seed of a separate generator; the same seed draws the same tokens from the same logits.

    Raises:
        ConfigError: a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = {
            "temperature": (0 <= self.temperature < float("inf"), "0 (the most likely token) or more, and finite"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0, and at most 1 (off)"),
            "seed": (0 <= self.seed < 1 << 63, "0 or more, and below 2**63"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ConfigError(f"must be {rule}", key=name, value=getattr(self, name))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities of the tokens: float32, in the shape of ``logits`` [..., vocab]."""
        logits = logits.float()
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        # Subtract the largest logit first; divided by a small temperature, it could become infinite.
        logits, ids = (logits - logits.amax(-1, keepdim=True)).sort(dim=-1, descending=True, stable=True)
        if self.top_k:
            logits[..., self.top_k :] = -torch.inf
        probs = (logits / self.temperature).softmax(-1)
        if self.top_p < 1:
            probs[probs.cumsum(-1) - probs >= self.top_p] = 0.0
            probs /= probs.sum(-1, keepdim=True)
        return torch.zeros_like(probs).scatter_(-1, ids, probs)


@dataclass(frozen=True)
class TokenSampler:
    """A model to sample text from. All processes that hold a share of the model call its methods together.

    Attributes:
        model: a plain model, or sharded by FSDP2, tensor parallel, compiled, or quantized; not a part of a pipeline.
        device: the device of the tokens.
        max_seq_len: the number of positions of the model.
        vocab_size: the number of ids of the tokenizer. A model may have more ids, as padding; they are never drawn.
        tp: the mesh of tensor parallelism.
        sharded_logits: True if the model's logits are sharded over ``tp``, as for the vocabulary-parallel loss.
        group: the process group of all these processes, for messages on the CPU; None for a single process.
    """

    model: nn.Module
    device: torch.device
    max_seq_len: int
    vocab_size: int
    tp: DeviceMesh | None = None
    sharded_logits: bool = False
    group: dist.ProcessGroup | None = None

    def last_logits(self, logits: Tensor) -> Tensor:
        """Return the logits of the last token of ``logits`` [1, n, vocab]: float32 [vocab_size], on the CPU."""
        last = logits[0, -1].contiguous()
        if self.tp is not None and self.sharded_logits:
            parts = [torch.empty_like(last) for _ in range(self.tp.size())]
            dist.all_gather(parts, last, group=self.tp.get_group())
            last = torch.cat(parts)
        return last[: self.vocab_size].float().cpu()

    def draw(self, logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
        """Draw the next token after ``logits`` [1, n, vocab]; raise :class:`TrainingError` if they are not finite."""
        last = self.last_logits(logits)
        token = torch.tensor([-1])
        if last.isfinite().all():
            token = torch.multinomial(sampling.probabilities(last), 1, generator=generator)
        if self.group is not None:
            # Different processors may round differently, and ranks with different tokens would wait for each other.
            dist.broadcast(token, group=self.group, group_src=0)
        if token < 0:
            raise TrainingError("the model's logits are not finite: its weights are damaged, or its training diverged")
        return int(token)


@dataclass
class Generated:
    """New tokens, and the time they took.

    Attributes:
        ids: the new tokens, without the token that ended the text.
        prompt_tokens: the number of prompt tokens, computed in ``prefill_s`` seconds together with the first new token.
        decoded_tokens: the number of tokens computed one by one, in ``decode_s`` seconds.
    """

    ids: list[int]
    prompt_tokens: int
    prefill_s: float
    decoded_tokens: int
    decode_s: float

    def speed(self) -> str:
        prefill = f"prefill {counted(self.prompt_tokens, 'token')}, {self.prompt_tokens / self.prefill_s:,.1f} tokens/s"
        decode = f"decode {counted(self.decoded_tokens, 'token')}"
        if self.decoded_tokens:
            decode += f", {self.decoded_tokens / self.decode_s:,.1f} tokens/s"
        return f"{prefill}; {decode}"


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
    max_new_tokens = _checked_number(max_new_tokens, len(prompt), decoder.max_seq_len)
    total = len(prompt) + max_new_tokens
    _check_positions(decoder.model)
    generator = torch.Generator().manual_seed(sampling.seed)
    multiple = 1 if decoder.tp is None else decoder.tp.size()
    ids: list[int] = []
    computed = 0
    with inference(decoder.model), KVCache(decoder.model, total, multiple) if cached else nullcontext() as cache:
        began = prefilled = time.perf_counter()
        while len(ids) < max_new_tokens:
            new = ids[-1:] if cache is not None and ids else [*prompt, *ids]
            tokens = torch.tensor([new], device=decoder.device)
            logits = forward(decoder.model, tokens, 0, multiple) if cache is None else cache(tokens)
            token = decoder.draw(logits, sampling, generator)
            computed += 1
            if computed == 1:
                prefilled = time.perf_counter()
            if token in stop_ids:
                break
            ids.append(token)
    return Generated(ids, len(prompt), prefilled - began, computed - 1, time.perf_counter() - prefilled)


def _checked_number(max_new_tokens: int | None, prompt: int, positions: int) -> int:
    """Check ``max_new_tokens`` for a prompt of ``prompt`` tokens and a model with so many ``positions``."""
    if not prompt:
        raise ConfigError("the prompt has no tokens: begin with the tokenizer's BOS")
    if max_new_tokens is None:
        if prompt >= positions:
            raise ConfigError(
                f"the prompt has {counted(prompt, 'token')}, and the model has {counted(positions, 'position')}, "
                "which leaves no room for more; shorten it"
            )
        return min(DEFAULT_MAX_NEW_TOKENS, positions - prompt)
    if max_new_tokens < 1:
        raise ConfigError("must be at least 1", key="max_new_tokens", value=max_new_tokens)
    if prompt + max_new_tokens > positions:
        raise ConfigError(
            f"with the prompt's {prompt} these are {counted(prompt + max_new_tokens, 'token')}, and the model has "
            f"{counted(positions, 'position')}; ask for fewer, or shorten the prompt",
            key="max_new_tokens",
            value=max_new_tokens,
        )
    return max_new_tokens


def _check_positions(model: nn.Module) -> None:
    try:
        inspect.signature(model.forward).bind("tokens", "positions")
    except TypeError as e:
        raise ConfigError(
            f"{type(model).__name__}.forward must take tokens and their positions for text to be generated ({e})"
        ) from e
