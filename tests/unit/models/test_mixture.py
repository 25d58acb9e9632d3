"""Mixtures of experts against a loop over tokens, in float64; their balance; and the losses against transformers'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titanlite.config.schema import Experts
from titanlite.distributed.experts import ExpertBalance
from titanlite.distributed.init import WeightInit
from titanlite.models.layers import BalanceLoss, Decoder, DecoderArgs, Mixture, MixtureArgs, grouped_mm
from titanlite.models.layers.mixture import Router

ARGS = MixtureArgs(n_experts=8, experts_per_token=3, expert_dim=12)
KINDS = {
    "softmax": ARGS,
    "shared, not normalized, scaled": replace(ARGS, n_shared_experts=2, normalized=False, scale=1.7),
    "sigmoid, bias, groups": replace(ARGS, scores="sigmoid", bias=True, n_groups=4, group_limit=2, scale=2.5),
    "one expert": MixtureArgs(1, 1, 6),
}


def mixture(args: MixtureArgs, dim: int = 10) -> Mixture:
    module = Mixture(dim, args).double()
    with torch.no_grad():
        module.init_weights(WeightInit(module, 1), 0.02)
        for param in module.parameters():
            param.copy_(torch.randn_like(param) / 2)
        if module.router.bias is not None:
            module.router.bias.copy_(torch.randn(args.n_experts) / 4)
    return module


def by_token(module: Mixture, x: Tensor) -> Tensor:
    """The same, one token after the other, from the definition."""
    args, experts = module.args, module.experts
    out = []
    for token in x.flatten(0, 1):
        logits = module.router.weight @ token
        scores = logits.softmax(0) if args.scores == "softmax" else logits.sigmoid()
        for_choice = scores + (0 if module.router.bias is None else module.router.bias)
        size = args.n_experts // args.n_groups
        groups = sorted(
            range(args.n_groups), key=lambda g: -for_choice[g * size : (g + 1) * size].topk(min(2, size))[0].sum()
        )
        allowed = [e for e in range(args.n_experts) if e // size in groups[: args.group_limit]]
        chosen = sorted(allowed, key=lambda e: -for_choice[e].item())[: args.experts_per_token]
        total = sum(scores[e] for e in chosen) if args.normalized else 1
        value = sum(
            scores[e] / total * args.scale * (experts.w2[e] @ (F.silu(experts.w1[e] @ token) * (experts.w3[e] @ token)))
            for e in chosen
        )
        out.append(value if module.shared is None else value + module.shared(token))
    return torch.stack(out).view_as(x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_is_the_sum_of_the_experts_of_each_token(kind: str) -> None:
    torch.manual_seed(0)
    module = mixture(KINDS[kind])
    x = torch.randn(2, 7, 10, dtype=torch.float64, requires_grad=True)
    out, _, tally, rows = module(x)
    expected = by_token(module, x)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    leaves = [x, *module.parameters()]
    for mine, theirs in zip(*(torch.autograd.grad((y * grad).sum(), leaves) for y in (out, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert tally[:-3].sum() == 14 * KINDS[kind].experts_per_token
    assert tally[-3] == 14
    assert rows == 14 * KINDS[kind].experts_per_token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sizes", [[3, 0, 5, 1], [0, 0, 9, 0], [0, 0, 0, 0]], ids=str)
def test_groups_of_any_size_are_multiplied(sizes: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(s, dtype=dtype, requires_grad=True) for s in ((sum(sizes), 5), (4, 5, 3)))
    offsets = torch.tensor(sizes).cumsum(0).int()
    expected = torch.cat([rows @ matrix for rows, matrix in zip(a.split(sizes), b)])
    out = grouped_mm(a, b, offsets)
    torch.testing.assert_close(out, expected)
    # A gradient without strides of its own, as a sum has.
    for mine, theirs in zip(*(torch.autograd.grad(y.sum(), (a, b)) for y in (out, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("sizes", [[33, 0, 1, 300], [1, 31, 64, 5], [7, 0, 0, 2], [0, 0, 0, 500]])
def test_grouped_matmul_in_bfloat16_on_the_cpu(sizes: list[int]) -> None:
    """There the numbers of rows are rounded up. Rows after the last group hold anything."""
    torch.manual_seed(0)
    rows = sum(sizes)
    a, b, grad = (torch.randn(s).bfloat16() for s in ((rows + 40, 6), (4, 6, 3), (rows + 40, 3)))
    a[rows:] = grad[rows:] = torch.nan
    exact = [x.double().requires_grad_() for x in (a[:rows], b)]
    expected = torch.cat([part @ matrix for part, matrix in zip(exact[0].split(sizes), exact[1])])
    wanted = expected, *torch.autograd.grad(expected, exact, grad[:rows].double())
    out = grouped_mm(a.requires_grad_(), b.requires_grad_(), torch.tensor(sizes).cumsum(0).int())
    grads = torch.autograd.grad(out, (a, b), grad)
    for mine, theirs in zip((out[:rows], grads[0][:rows], grads[1]), wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-2, atol=1e-2 * theirs.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [0, 1])
def test_nan_stays_in_its_group(dtype: torch.dtype, group: int) -> None:
    a, b = torch.ones(4, 3, dtype=dtype), torch.ones(2, 3, 3, dtype=dtype)
    a[2 * group] = torch.nan
    out = grouped_mm(a, b.requires_grad_(), torch.tensor([2, 4], dtype=torch.int32))
    out.sum().backward()
    assert out.isnan().any(1).tolist() == [row == 2 * group for row in range(4)]
    assert b.grad is not None
    assert b.grad.isnan().flatten(1).any(1).tolist() == [g == group for g in range(2)]


def test_a_router_of_low_precision_chooses_in_float32() -> None:
    torch.manual_seed(0)
    router = Router(64, MixtureArgs(16, 4, 8)).bfloat16()
    torch.nn.init.normal_(router.weight)
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    routing = router(x)
    exact = (x.double() @ router.weight.double().T).softmax(-1)
    assert routing.scores.dtype == torch.float32
    torch.testing.assert_close(routing.scores.double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(routing.experts, exact.topk(4).indices)


# ---- balance


def their_losses(kind: str, logits: list[Tensor], args: MixtureArgs, sequences: int) -> Tensor:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    parts = logits if kind == "batch" else [part for layer in logits for part in layer.chunk(sequences)]
    losses = [load_balancing_loss_func((part,), args.n_experts, args.experts_per_token) for part in parts]
    return torch.stack(losses).sum() / (len(parts) // len(logits))


@pytest.mark.parametrize("over", ["batch", "sequence"])
def test_the_balance_loss_is_that_of_transformers(over: Any) -> None:
    """Of each layer. Theirs takes several layers for one of as many tokens."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    module = mixture(ARGS).float()
    module.balance_loss = BalanceLoss(0.5, over, z_coefficient=0.25)
    x = torch.randn(3, 9, 10, requires_grad=True)
    _, loss, tally, _ = module(x)
    logits = F.linear(x.flatten(0, 1), module.router.weight)
    expected = 0.5 * their_losses(over, [logits], ARGS, 3) + 0.25 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(loss, expected)
    assert tally[-1] / tally[-3] == pytest.approx(loss.item())
    for mine, theirs in zip(
        *(torch.autograd.grad(y, [x, module.router.weight]) for y in (loss, expected)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_padding_has_no_part_in_the_balance() -> None:
    """Nor in the loss of transformers, which knows it by the attention mask."""
    pytest.importorskip("transformers")
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    torch.manual_seed(0)
    module = mixture(ARGS).float()
    x, lengths = torch.randn(3, 9, 10), torch.tensor([9, 4, 0])
    rows = [row[:n][None] for row, n in zip(x, lengths) if n]
    module.real = torch.arange(9) < lengths[:, None]
    logits = F.linear(x, module.router.weight)
    mask = module.real.long()
    module.balance_loss = BalanceLoss(0.5, "batch", 0.25)
    _, loss, *_ = module(x)
    theirs = load_balancing_loss_func((logits.flatten(0, 1),), 8, 3, attention_mask=mask)
    squares = logits.logsumexp(-1).square()
    torch.testing.assert_close(loss, 0.5 * theirs + 0.25 * squares[module.real].mean())
    module.balance_loss = BalanceLoss(0.5, "sequence")
    _, loss, tally, _ = module(x)
    module.real = None
    alone = [module(row) for row in rows]
    torch.testing.assert_close(loss, sum(part[1] for part in alone) / 3)  # each sequence counts as much
    torch.testing.assert_close(tally[:-1], sum(part[2][:-1] for part in alone))
    assert tally[:8].sum() == 13 * 3


def check_gradients(theirs: Any, spec: Any, ours: Any) -> None:
    """Compare the gradients of two models, which have the same weights."""
    from tests.support.families import in_files, part_of

    gradients = in_files(theirs, {name: param.grad for name, param in theirs.named_parameters()})
    places = spec.hugging_face.weights(ours.args)
    for name, param in ours.named_parameters():
        assert param.grad is not None
        assert (param.grad - part_of(gradients, places[name])).abs().max() < 1e-5, name


@pytest.mark.parametrize("case", ["qwen3_moe", "mixtral"])
def test_a_step_with_balance_losses_of_several_layers_has_the_gradients_of_transformers(
    tmp_path: Path, case: str
) -> None:
    """Their function of each layer by itself; they would take all layers for one."""
    pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    from tests.support.families import their_model
    from tests.unit.models.test_families import ours_of, tokens
    from titanlite.optim import cross_entropy_loss

    theirs = their_model(case, output_router_logits=True)
    theirs.save_pretrained(tmp_path)
    spec, ours = ours_of(tmp_path)
    mixtures = [module for module in ours.modules() if isinstance(module, Mixture)]
    for module in mixtures:
        module.balance_loss, module.loss_weight = BalanceLoss(0.3, "batch"), 1.0
    args, batch = mixtures[0].args, tokens()
    out = theirs(batch[:, :-1])
    losses = [load_balancing_loss_func((one,), args.n_experts, args.experts_per_token) for one in out.router_logits]
    assert len(losses) == 3
    (F.cross_entropy(out.logits.flatten(0, 1), batch[:, 1:].flatten()) + 0.3 * torch.stack(losses).sum()).backward()
    (cross_entropy_loss(ours(batch[:, :-1]), batch[:, 1:]) / batch[:, 1:].numel()).backward()
    check_gradients(theirs, spec, ours)


@pytest.mark.parametrize("case", ["qwen3_moe", "mixtral"])
def test_a_step_with_balance_loss_has_the_gradients_of_transformers(tmp_path: Path, case: str) -> None:
    """Of a model with one mixture, whose loss transformers adds itself."""
    pytest.importorskip("transformers")
    from tests.support.families import their_model
    from tests.unit.models.test_families import ours_of, tokens
    from titanlite.optim import cross_entropy_loss

    theirs = their_model(case, num_hidden_layers=1, output_router_logits=True, router_aux_loss_coef=0.3)
    theirs.save_pretrained(tmp_path)
    spec, ours = ours_of(tmp_path)
    for module in ours.modules():
        if isinstance(module, Mixture):
            module.balance_loss, module.loss_weight = BalanceLoss(0.3, "batch"), 1.0
    batch = tokens()
    out = theirs(batch[:, :-1])
    (F.cross_entropy(out.logits.flatten(0, 1), batch[:, 1:].flatten()) + 0.3 * out.aux_loss).backward()
    (cross_entropy_loss(ours(batch[:, :-1]), batch[:, 1:]) / batch[:, 1:].numel()).backward()
    check_gradients(theirs, spec, ours)
    (report,) = [module.tally for module in ours.modules() if isinstance(module, Mixture)]
    assert report[-1] / report[-3] == pytest.approx(0.3 * out.aux_loss.item(), rel=1e-5)


SMALL = DecoderArgs(
    dim=16, n_layers=3, n_heads=2, n_kv_heads=2, ffn_dim=24, vocab_size=32, max_seq_len=16,
    mixture=MixtureArgs(6, 2, 8, n_dense_layers=1, n_shared_experts=1, scores="sigmoid", bias=True),
)  # fmt: skip


def decoder() -> Decoder:
    model = Decoder(SMALL)
    model.init_weights(WeightInit(model, 0))
    return model


def test_the_bias_moves_by_the_sign_of_the_load_error() -> None:
    model = decoder()
    balance = ExpertBalance([model], Experts(bias_update_rate=0.25))
    batch = torch.randint(32, (2, 16))
    model(batch).sum().backward()
    with torch.no_grad():
        model(batch)  # counts for nothing
    loads = {name: m.tally[:6].clone() for name, m in model.named_modules() if isinstance(m, Mixture)}
    assert [*loads] == ["layers.1.feed_forward", "layers.2.feed_forward"]
    balance.step_done(bad=torch.zeros(()))
    for name, load in loads.items():
        router = model.get_submodule(name).router
        assert torch.equal(router.bias, 0.25 * (load.mean() - load).sign())  # type: ignore[union-attr]
    model(batch).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    balance.step_done(bad=torch.ones(()))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    report = balance.report()
    assert {sum(tokens) for tokens in report["expert_tokens"].values()} == {2 * 32}  # of the good step
    assert 0 < report["router_entropy"] <= torch.tensor(6.0).log()
    assert balance.report() == {}


def test_sizes_count_what_a_token_uses() -> None:
    model = decoder()
    size = model.size()
    assert size.params == sum(p.numel() for p in model.parameters())
    assert size.unused_params == 2 * (6 - 2) * 3 * 16 * 8
    assert SMALL.active_ffn_dim == (24 + 2 * 3 * 8) // 3


def test_loads_change_and_nothing_is_compiled_again() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = decoder()
    for block in model.layers.values():
        block.run = torch.compile(block.compute, backend="aot_eager", fullgraph=True)  # type: ignore[assignment, union-attr]
    plain = decoder()
    for seed in range(3):
        batch = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(model(batch), plain(batch))
        model(batch).sum().backward()
    assert counters["stats"]["unique_graphs"] == 2  # a dense block, and a mixture
    for lengths in ([16, 3], [7, 16], [1, 2]):
        for each in (model, plain):
            for module in each.modules():
                if isinstance(module, Mixture):
                    module.tally.zero_()
                    module.real = torch.arange(16) < torch.tensor(lengths)[:, None]
            each(batch).sum().backward()
        for one, other in zip(model.layers.values(), plain.layers.values()):
            if isinstance(one.feed_forward, Mixture):
                assert isinstance(other.feed_forward, Mixture)
                torch.testing.assert_close(one.feed_forward.tally, other.feed_forward.tally)
                assert one.feed_forward.tally[:6].sum() == 2 * sum(lengths)
    assert counters["stats"]["unique_graphs"] == 3  # a mixture with padding
    torch._dynamo.reset()
