"""A mixture of experts: a feed-forward of which every token uses a few parts, chosen by a router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanlite.models.layers.feed_forward import FeedForward
from titanlite.models.layers.grouped_mm import grouped_mm
from titanlite.models.layers.init import Init


@dataclass(frozen=True)
class MixtureArgs:
    """The sizes of a mixture, and how its router chooses.

    Attributes:
        n_experts: the number of experts.
        experts_per_token: the number of them that each token uses.
        expert_dim: the features inside an expert.
        n_shared_experts: experts that every token uses, as one feed-forward of so many times ``expert_dim``.
        n_dense_layers: the first blocks of the model, which have a plain feed-forward.
        scores: the function that makes the scores of a token from the router's logits.
        normalized: the weights of a token's experts are divided by their sum.
        scale: the factor of the weights.
        n_groups: the experts are in so many groups of the same size.
        group_limit: a token chooses experts from so many groups, those with the largest sum of their two largest
            scores.
        bias: the router adds a bias to the scores for the choice of experts, not for their weights. No gradient moves
            it; ``experts.bias_update_rate`` does.
    """

    n_experts: int
    experts_per_token: int
    expert_dim: int
    n_shared_experts: int = 0
    n_dense_layers: int = 0
    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalized: bool = True
    scale: float = 1.0
    n_groups: int = 1
    group_limit: int = 1
    bias: bool = False

    @property
    def active_dim(self) -> int:
        """The features inside all experts that a token uses."""
        return (self.experts_per_token + self.n_shared_experts) * self.expert_dim

    def broken_rule(self) -> tuple[tuple[str, ...], str] | None:
        """Return the names of sizes that do not fit together, and the rule; None if all do."""
        if not 1 <= self.group_limit <= self.n_groups or self.experts_per_token < 1 or self.n_experts < 1:
            return ("experts_per_token", "n_experts"), "sizes of a mixture are at least 1, and group_limit <= n_groups"
        if self.n_experts % self.n_groups:
            return ("n_experts",), f"n_experts must be a multiple of the {self.n_groups} groups of the router"
        allowed = self.n_experts // self.n_groups * self.group_limit
        if self.experts_per_token > allowed:
            return ("experts_per_token", "n_experts"), (
                f"experts_per_token = {self.experts_per_token}, and a token chooses among {allowed} experts"
            )
        return None


@dataclass(frozen=True)
class BalanceLoss:
    """A loss for each mixture, added to that of the model, so that its experts have about equal load.

    Attributes:
        coefficient: the factor of ``n_experts * sum(f * p)``, where f is the share of tokens that choose an expert (the
            shares sum to ``experts_per_token``), and p the mean of its normalized scores (Fedus et al., "Switch
            Transformers", 2021, equations 4 to 6).
        over: f and p are those of the tokens of each sequence, or of all tokens of a microbatch, on one data-parallel
            process or on all of them (Qiu et al., "Demons in the Detail", 2025).
        z_coefficient: the factor of the mean square of ``logsumexp(logits)`` (Zoph et al., "ST-MoE", 2022, equation 5).
    """

    coefficient: float = 0.0
    over: Literal["sequence", "batch", "global_batch"] = "sequence"
    z_coefficient: float = 0.0

    @property
    def has_gradient(self) -> bool:
        return bool(self.coefficient or self.z_coefficient)


class Routing(NamedTuple):
    """The choice of a router for ``tokens`` tokens.

    Attributes:
        weights: the factors of each token's experts, float32 [tokens, experts_per_token].
        experts: their numbers, int64 [tokens, experts_per_token].
        logits, scores: of all experts, float32 [tokens, n_experts].
    """

    weights: Tensor
    experts: Tensor
    logits: Tensor
    scores: Tensor


def _all_of(param: Tensor) -> Tensor:
    return param


class Router(nn.Module):
    """A linear layer that scores the experts, and the choice by these scores: in float32, or in float64 if the input is
    it.

    Attributes:
        part_of: a slot for a function that returns what this process computes with of a parameter that is sharded.
    """

    bias: Tensor | None
    part_of: Callable[[Tensor], Tensor]

    def __init__(self, dim: int, args: MixtureArgs) -> None:
        super().__init__()
        self.args, self.part_of = args, _all_of
        # No nn.Linear: a number format of 8 bits has no place here.
        self.weight = nn.Parameter(torch.empty(args.n_experts, dim))
        self.register_buffer("bias", torch.empty(args.n_experts, dtype=torch.float32) if args.bias else None)

    def forward(self, x: Tensor) -> Routing:
        """Choose experts for ``x`` [tokens, dim]."""
        args = self.args
        precise = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(precise), self.part_of(self.weight).to(precise))
        scores = logits.softmax(-1) if args.scores == "softmax" else logits.sigmoid()
        for_choice = scores.detach() if self.bias is None else scores.detach() + self.bias
        if args.group_limit < args.n_groups:
            groups = for_choice.unflatten(-1, (args.n_groups, -1))
            best = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1).topk(args.group_limit, -1).indices
            left_out = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, False)
            for_choice = groups.masked_fill(left_out[..., None], -torch.inf).flatten(-2)
        experts = for_choice.topk(args.experts_per_token, -1).indices
        weights = scores.gather(-1, experts)
        if args.normalized:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # all can be 0 after a sigmoid
        return Routing(weights * args.scale, experts, logits, scores)

    def init_weights(self, init: Init) -> None:
        init.trunc_normal(self.weight, std=0.02)
        if self.bias is not None:
            self.bias.zero_()


class Experts(nn.Module):
    """Experts that are :class:`~titanlite.models.layers.FeedForward` each, in one parameter for each projection.

    Attributes:
        part_of: as of :class:`Router`. Rows and offsets of :meth:`forward` are then those of this process's experts.
        multiply: a slot for the grouped matmul, in the place of :func:`titanlite.models.layers.grouped_mm`.
    """

    part_of: Callable[[Tensor], Tensor]
    multiply: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __init__(self, dim: int, args: MixtureArgs) -> None:
        super().__init__()
        self.part_of, self.multiply = _all_of, grouped_mm
        self.w1 = nn.Parameter(torch.empty(args.n_experts, args.expert_dim, dim))
        self.w2 = nn.Parameter(torch.empty(args.n_experts, dim, args.expert_dim))
        self.w3 = nn.Parameter(torch.empty(args.n_experts, args.expert_dim, dim))

    def forward(self, x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        """Map rows ``x`` [rows, dim], which are sorted by expert, to [rows, dim], each times its weight.

        Args:
            weights: float32 [rows].
            offsets: the end of each expert's rows, int32 [n_experts].
        """
        w1, w2, w3 = (self.part_of(w).transpose(1, 2) for w in (self.w1, self.w2, self.w3))
        gate, up = self.multiply(x, w1, offsets), self.multiply(x, w3, offsets)
        # The weight before the last projection: there are fewer features than after it.
        hidden = F.silu(gate) * up * weights.to(x.dtype)[:, None]
        return self.multiply(hidden, w2, offsets)

    def init_weights(self, init: Init, out_std: float) -> None:
        init.trunc_normal(self.w1, std=0.02)
        init.trunc_normal(self.w2, std=out_std)
        init.trunc_normal(self.w3, std=out_std)


class _Take(torch.autograd.Function):
    """The rows ``x[index // copies]``, where ``index`` is a permutation of the numbers of all copies of the rows, and
    ``inverse`` its inverse. The backward gathers too: a scatter would add in any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x[index // copies]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        grad = grad[inverse]
        return grad if ctx.copies == 1 else grad.unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


class _WithLoss(torch.autograd.Function):
    """``x`` itself. Its backward adds ``weight * loss`` to what the gradients are of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, weight: Tensor | float) -> Tensor:
        ctx.weight = weight
        ctx.like = torch.empty_like(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad, torch.ones_like(ctx.like) * ctx.weight, None


class Mixture(nn.Module):
    """A router, experts of which each token uses a few, and shared experts that all tokens use.

    Its forward returns what it learns of its balance, instead of keeping it: a block that is recomputed in backward
    would keep it twice. The block passes it to :meth:`record`.

    Attributes:
        balance_loss: a slot for what is added to the loss.
        loss_weight: a slot for the factor of the balance loss in a backward; at 0, the default, it has no gradient.
        real: a slot for which tokens of the next forward count, bool [batch, seq_len]: no padding. None: all.
        spread: a slot for a function ``(experts, rows, weights, offsets) -> (out, count)`` that applies experts which
            are on several processes. The arguments and ``out`` are those of :meth:`Experts.forward`, and ``count`` is
            the number of rows that this process has computed. None: all experts are here.
        pool: a slot for a function that returns the mean of a tensor over the processes that have parts of the tokens
            whose load the balance loss is of. None: this process has all of them.
        tally: the sum of what was recorded, float64 [n_experts + 3]: the tokens of each expert, and over all tokens the
            sums of 1, of the entropy of their normalized scores (nats), and of the balance loss.
        most_rows: the largest number of rows that this process has computed at a time, float64 scalar.
    """

    balance_loss: BalanceLoss
    loss_weight: Tensor | float
    real: Tensor | None
    spread: Callable[[Experts, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None
    pool: Callable[[Tensor], Tensor] | None
    tally: Tensor
    most_rows: Tensor

    def __init__(self, dim: int, args: MixtureArgs) -> None:
        super().__init__()
        self.args, self.balance_loss, self.loss_weight = args, BalanceLoss(), 0.0
        self.real = self.spread = self.pool = None
        self.router = Router(dim, args)
        self.experts = Experts(dim, args)
        self.shared = FeedForward(dim, args.n_shared_experts * args.expert_dim) if args.n_shared_experts else None
        self.register_buffer("tally", torch.empty(args.n_experts + 3, dtype=torch.float64), persistent=False)
        self.register_buffer("most_rows", torch.empty((), dtype=torch.float64), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Map ``x`` [batch, seq_len, dim] to [batch, seq_len, dim], the balance loss (float32 scalar), what is added to
        ``tally``, and the number of rows that this process has computed (an integer scalar)."""
        copies = self.args.experts_per_token
        rows = x.flatten(0, 1)
        routing = self.router(rows)
        # Row i of the sorted ones is copy order[i] % copies of token order[i] // copies.
        expert_of, order = routing.experts.flatten().sort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=x.device))
        numbers = torch.arange(self.args.n_experts, device=x.device)
        offsets = torch.searchsorted(expert_of, numbers, right=True, out_int32=True)
        weights = routing.weights.flatten()
        routed = _Take.apply(rows, order, inverse, copies), _Take.apply(weights, order, inverse, 1), offsets
        out, count = (self.experts(*routed), offsets[-1]) if self.spread is None else self.spread(self.experts, *routed)
        del routed  # rows that nothing needs before the backward
        out = _Take.apply(out, inverse, order, 1).unflatten(0, (-1, copies)).sum(1).view_as(x)
        if self.shared is not None:
            out = out + self.shared(x)
        return out, *self._balance(routing, offsets, x.shape[1]), count

    def _balance(self, routing: Routing, offsets: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        shares = routing.scores
        if self.args.scores != "softmax":
            shares = shares / (shares.sum(-1, keepdim=True) + 1e-20)
        loss, options, real = routing.logits.new_zeros(()), self.balance_loss, self.real
        counted = shares.new_ones(shares.shape[0]) if real is None else real.flatten().to(shares.dtype)
        chosen = torch.zeros_like(shares).scatter(-1, routing.experts, 1.0) * counted[:, None]
        if options.coefficient:
            groups = (-1, seq_len if options.over == "sequence" else shares.shape[0])
            counts = counted.unflatten(0, groups).sum(1)[:, None]
            frequency = chosen.unflatten(0, groups).sum(1)
            if self.pool is not None:  # not the shares: the loss is linear in them, so its mean is that of their mean
                frequency = self.pool(frequency)
                counts = counts if real is None else self.pool(counts)
            counts = counts.clamp(min=1e-6)  # a sequence of padding alone has no loss
            mean_shares = (shares * counted[:, None]).unflatten(0, groups).sum(1) / counts
            loss = loss + options.coefficient * self.args.n_experts * (frequency / counts * mean_shares).sum(-1).mean()
        tokens = counted.sum()
        if options.z_coefficient:
            squares = routing.logits.logsumexp(-1).square() * counted
            loss = loss + options.z_coefficient * squares.sum() / tokens.clamp(min=1)
        with torch.no_grad():
            load = offsets.diff(prepend=offsets.new_zeros(1)) if real is None else chosen.sum(0)
            entropy = -(torch.special.xlogy(shares, shares).sum(-1) * counted).sum()
            tally = torch.cat((load.double(), torch.stack((tokens, entropy, loss * tokens))))
        return loss, tally

    def record(self, x: Tensor, loss: Tensor, tally: Tensor, rows: Tensor) -> Tensor:
        """Add to ``tally`` and ``most_rows``, and return ``x`` [batch, seq_len, dim], whose backward is also that of
        the ``loss``. Where gradients are off, only return ``x``: what is evaluated does not count."""
        if not torch.is_grad_enabled():
            return x
        self.tally.add_(tally)
        self.most_rows.copy_(torch.maximum(self.most_rows, rows))
        return _WithLoss.apply(x, loss, self.loss_weight) if loss.requires_grad else x  # type: ignore[no-any-return]

    def used_params(self) -> int:
        """Return the number of parameters that a token uses in the router and the experts that it chooses."""
        experts = sum(p.numel() for p in self.experts.parameters())
        return self.router.weight.numel() + experts - self.unused_params()

    def unused_params(self) -> int:
        """Return the number of parameters that a token does not use."""
        each = sum(p.numel() for p in self.experts.parameters()) // self.args.n_experts
        return each * (self.args.n_experts - self.args.experts_per_token)

    def init_weights(self, init: Init, out_std: float) -> None:
        self.router.init_weights(init)
        self.experts.init_weights(init, out_std)
        if self.shared is not None:
            self.shared.init_weights(init, out_std)
        self.tally.zero_()
        self.most_rows.zero_()
