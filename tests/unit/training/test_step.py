"""The loop over microbatches, on one process; under parallelism it is tested in tests/distributed/test_parallel.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from titanlite.config.parallelism import Degrees
from titanlite.config.schema import Comm, Training
from titanlite.data import Batch
from titanlite.distributed import runtime
from titanlite.distributed.gradients import GradientScale, gradient_scale
from titanlite.distributed.init import WeightInit
from titanlite.distributed.mesh import Mesh, build_mesh
from titanlite.models.layers import BalanceLoss, Decoder, DecoderArgs, Mixture, MixtureArgs
from titanlite.optim import IGNORED, cross_entropy_loss, update_parameters
from titanlite.training.step import StepLoss, StepRunner
from titanlite.training.step_guard import StepGuard, StepRecord

VOCAB = 11


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.output = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.embedding(tokens))


@pytest.fixture
def mesh() -> Mesh:
    here = runtime.start_runtime(Comm())
    yield build_mesh(Degrees(1, 1, 1, 1, 1), here.device.type)
    dist.destroy_process_group()


def batch(scored: list[float]) -> Batch:
    """Microbatches of which these shares of the labels are scored."""
    generator = torch.Generator().manual_seed(0)
    shape = len(scored), 2, 32
    tokens, labels = (torch.randint(VOCAB, shape, generator=generator) for _ in range(2))
    kept = torch.rand(shape, generator=generator) < torch.tensor(scored)[:, None, None]
    return Batch(tokens, labels.where(kept, IGNORED))


def clip(model: Model, max_norm: float, mesh: Mesh, loss: StepLoss) -> GradientScale:
    scale = gradient_scale(model.parameters(), max_norm, mesh, *loss)
    update_parameters(torch.optim.Adam(model.parameters(), lr=0.0, fused=True), scale.divisor)
    return scale


@pytest.mark.parametrize("scored", [[1.0], [1.0, 1.0, 1.0], [0.1, 0.9, 0.0]], ids=["one", "three", "uneven"])
@pytest.mark.parametrize("max_norm", [1e9, math.inf])
def test_gradients_and_losses_are_of_the_mean_over_scored_labels(
    mesh: Mesh, scored: list[float], max_norm: float
) -> None:
    torch.manual_seed(0)
    model, given = Model(), batch(scored)
    expected = F.cross_entropy(
        model(given.inputs.flatten(0, 1)).flatten(0, 1).double(), given.labels.flatten(), ignore_index=IGNORED
    )
    wanted = torch.autograd.grad(expected, [*model.parameters()])
    fully_shard(model, mesh=mesh.data_parallel)
    runner = StepRunner([model], cross_entropy_loss, None, None, torch.device("cpu"))
    evaluated = runner.evaluate(given)
    step = runner.forward_backward(given)
    norm, mean, *_ = clip(model, max_norm, mesh, step)
    for loss in (step.mean(), evaluated.mean(), mean):
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert step.scored == evaluated.scored == (given.labels != IGNORED).sum()
    assert norm.item() == pytest.approx(torch.cat([g.flatten() for g in wanted]).norm().item(), rel=1e-5)
    for param, grad in zip(model.parameters(), wanted):
        atol = 1e-6 * grad.abs().max().item()  # elements that are sums of terms which cancel
        torch.testing.assert_close(param.grad.to_local(), grad, rtol=1e-5, atol=atol)  # type: ignore[union-attr]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_the_balance_of_experts_counts_each_sequence_once(mesh: Mesh, padded: bool) -> None:
    """However many of its labels are scored, in whatever microbatch; padding does not count."""
    args = DecoderArgs(
        dim=16, n_layers=2, n_heads=2, n_kv_heads=2, ffn_dim=8, vocab_size=VOCAB, max_seq_len=32,
        mixture=MixtureArgs(6, 2, 8),
    )  # fmt: skip
    model = Decoder(args)
    model.init_weights(WeightInit(model, 0))
    mixtures = [module for module in model.modules() if isinstance(module, Mixture)]
    given = batch([0.1, 0.9, 0.4])
    lengths = torch.tensor([[32, 5], [20, 32], [1, 32]])
    if padded:
        real = torch.arange(32) < lengths[..., None]
        given = Batch(given.inputs, given.labels.where(real, IGNORED), None, lengths)
    for mixture in mixtures:
        mixture.balance_loss = BalanceLoss(0.5, "sequence")
    ce = F.cross_entropy(model(given.inputs.flatten(0, 1)).flatten(0, 1), given.labels.flatten(), ignore_index=IGNORED)
    rows = [row[: n if padded else 32] for row, n in zip(given.inputs.flatten(0, 1), lengths.flatten())]
    losses: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda m, x, out: losses.append(out[1])) for m in mixtures]
    for row in rows:
        model(row[None])
    for hook in hooks:
        hook.remove()
    balance = torch.stack(losses).sum()
    wanted = torch.autograd.grad(ce + balance / len(rows), [*model.parameters()])
    fully_shard(model, mesh=mesh.data_parallel)
    runner = StepRunner([model], cross_entropy_loss, None, None, torch.device("cpu"), mesh)
    for mixture in mixtures:
        mixture.tally.zero_()
    step = runner.forward_backward(given)
    gradient = gradient_scale(model.parameters(), math.inf, mesh, *step)
    for param, grad in zip(model.parameters(), wanted):
        torch.testing.assert_close(param.grad.to_local() / gradient.divisor, grad, rtol=1e-4, atol=1e-7)  # type: ignore[union-attr]
    assert [mixture.tally[:-3].sum() for mixture in mixtures] == [2 * sum(map(len, rows))] * 2


def test_clipping_is_of_the_corrected_gradients(mesh: Mesh) -> None:
    model, given = Model(), batch([0.2, 0.0])
    fully_shard(model, mesh=mesh.data_parallel)
    runner = StepRunner([model], cross_entropy_loss, None, None, torch.device("cpu"))
    assert clip(model, 0.01, mesh, runner.forward_backward(given)).norm > 0.1
    clipped = torch.cat([p.grad.to_local().flatten() for p in model.parameters()])  # type: ignore[union-attr]
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("on_bad_step", ["stop", "skip"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_without_scored_labels_changes_nothing(mesh: Mesh, on_bad_step: Any, fused: bool) -> None:
    """Neither by the optimizer's momentum nor by its weight decay. It is counted, and no loss for the next ones."""
    model = Model()
    fully_shard(model, mesh=mesh.data_parallel)
    runner = StepRunner([model], cross_entropy_loss, None, None, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5, fused=fused)
    guard = StepGuard(Training(on_bad_step=on_bad_step), torch.device("cpu"))

    def step(given: Batch) -> StepRecord:
        loss = runner.forward_backward(given)
        scale = gradient_scale(model.parameters(), 1.0, mesh, *loss)
        judged = scale.loss, scale.norm, scale.divisor, scale.stops, scale.scored
        record = guard.step(optimizer, loss.mean(), *judged)
        optimizer.zero_grad()
        return StepRecord.of(record)

    def state() -> list[Tensor]:
        moments = [value for values in optimizer.state.values() for value in values.values()]
        values = [*(p.detach() for p in model.parameters()), *moments]
        return [value.to_local() if isinstance(value, DTensor) else value for value in values]

    assert step(batch([0.5, 0.5])).skipped == 0
    before, losses = [value.clone() for value in state()], guard.state_dict()["losses"]
    record = step(batch([0.0, 0.0]))
    assert (record.loss, record.grad_norm, record.scored, record.is_bad) == (0, 0, 0, True)
    assert (record.skipped, record.in_a_row) == (1, 1)
    assert guard.state_dict()["losses"] == losses
    for value, earlier in zip(state(), before, strict=True):
        assert torch.equal(value, earlier)
    record = step(batch([0.5, 0.5]))
    assert (record.skipped, record.in_a_row, record.is_bad) == (1, 0, False)
