"""The optimizers by name: they agree with each other and with the published update."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from titanlite.config.schema import Optimizer
from titanlite.errors import ConfigError
from titanlite.optim import build_optimizer

IMPLEMENTATIONS = ("fused", "foreach", "for-loop")


def trained(name: str, implementation: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    options = Optimizer(name=name, lr=1e-2, weight_decay=0.3, implementation=implementation)  # type: ignore[arg-type]
    optimizer = build_optimizer(model.parameters(), options)
    inputs = torch.randn(5, 4, 6, generator=generator)
    for batch in inputs:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_implementations_agree(name: str) -> None:
    fused, foreach, loop = (trained(name, implementation) for implementation in IMPLEMENTATIONS)
    torch.testing.assert_close(fused, loop, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(foreach, loop, rtol=1e-5, atol=1e-6)


def test_adam_is_not_adamw() -> None:
    assert not torch.allclose(trained("Adam", "for-loop")[0], trained("AdamW", "for-loop")[0], atol=1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_the_first_steps_by_hand(name: str, implementation: str) -> None:
    lr, beta1, beta2, eps, decay = 0.1, 0.8, 0.9, 1e-3, 0.5
    parameter = nn.Parameter(torch.tensor([2.0]))
    options = Optimizer(name, lr, beta1, beta2, eps, decay, implementation)  # type: ignore[arg-type]
    optimizer = build_optimizer([parameter], options)
    expected, m, v = 2.0, 0.0, 0.0
    for step, gradient in enumerate([3.0, -1.0, 0.5], 1):
        parameter.grad = torch.tensor([gradient])
        optimizer.step()
        if name == "AdamW":
            expected -= lr * decay * expected
        else:
            gradient += decay * expected
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        expected -= lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)) ** 0.5 + eps)
        assert parameter.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_implementation_asked_for_is_the_one_used(implementation: str) -> None:
    optimizer = build_optimizer(nn.Linear(2, 2).parameters(), Optimizer(implementation=implementation))  # type: ignore[arg-type]
    assert optimizer.defaults["fused"] is (implementation == "fused")
    assert optimizer.defaults["foreach"] is (implementation == "foreach")


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model.parameters(), Optimizer())
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model[1].parameters()]


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r'optimizer.name = "adamv": .*known: Adam, AdamW'):
        build_optimizer([], Optimizer(name="adamv"))
