"""Draw tokens from the logits of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from titanlite.errors import ConfigError, TrainingError


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

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

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

    def last_logits(self, logits: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return the logits of the last token of each row of ``logits`` [batch, n, vocab], of which the first
        ``lengths`` are no padding: float32 [batch, vocab_size], on the CPU."""
        last = torch.stack([row[max(1, length) - 1] for row, length in zip(logits, lengths, strict=True)])
        if self.tp is not None and self.sharded_logits:
            parts = [torch.empty_like(last) for _ in range(self.tp.size())]
            dist.all_gather(parts, last, group=self.tp.get_group())
            last = torch.cat(parts, -1)
        return last[:, : self.vocab_size].float().cpu()

    def draw(self, last: Tensor, sampling: Sampling, generators: Sequence[torch.Generator | None]) -> list[int]:
        """Draw a token after each row of :meth:`last_logits`.

        Args:
            generators: that of each row; None: the row gets no token, but -1.

        Raises:
            TrainingError: the logits are not finite.
        """
        tokens = torch.full((len(last),), -1)
        finite = last.isfinite().all(-1).tolist()
        for row, generator in enumerate(generators):
            if generator is not None and finite[row]:
                tokens[row] = torch.multinomial(sampling.probabilities(last[row]), 1, generator=generator)
        if self.group is not None:
            # Different processors may round differently, and ranks with different tokens would wait for each other.
            dist.broadcast(tokens, group=self.group, group_src=0)
        drawn: list[int] = tokens.tolist()
        if any(token < 0 for token, generator in zip(drawn, generators) if generator is not None):
            raise TrainingError("the model's logits are not finite: its weights are damaged, or its training diverged")
        return drawn
