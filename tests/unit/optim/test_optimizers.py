"""The optimizers by name: they agree with each other and with the published update."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from titanlite.config.schema import Optimizer
from titanlite.errors import ConfigError
from titanlite.optim import build_optimizer, update_parameters

IMPLEMENTATIONS = ("fused", "foreach", "for-loop")


def trained(name: str, implementation: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    options = Optimizer(name=name, lr=1e-2, weight_decay=0.3, implementation=implementation)  # type: ignore[arg-type]
    optimizer = build_optimizer(model.named_parameters(), options)
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
    optimizer = build_optimizer([("p", parameter)], options)
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
    optimizer = build_optimizer(nn.Linear(2, 2).named_parameters(), Optimizer(implementation=implementation))  # type: ignore[arg-type]
    assert optimizer.defaults["fused"] is (implementation == "fused")
    assert optimizer.defaults["foreach"] is (implementation == "foreach")


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model.named_parameters(), Optimizer())
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model[1].parameters()]


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r'optimizer.name = "adamv": .*known: Adam, AdamW'):
        build_optimizer([], Optimizer(name="adamv"))


def updated(name: str, implementation: str, divisor: float, explicit: bool) -> list[Tensor]:
    """The parameters, gradients and state after five updates; ``explicit``: gradients are divided before them."""
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.randn(1003, generator=generator))
    # A large eps makes the update depend on the size of the gradients.
    options = Optimizer(name=name, lr=1e-2, eps=0.1, implementation=implementation)  # type: ignore[arg-type]
    optimizer = build_optimizer([("p", param)], options)
    for _ in range(5):
        param.grad = torch.randn(1003, generator=generator)
        if explicit:
            param.grad *= 1 / divisor
            optimizer.step()
        else:
            update_parameters(optimizer, torch.tensor(divisor))
    assert param.grad is not None
    return [param.detach(), param.grad, *optimizer.state[param].values()]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_an_update_divides_the_gradients(name: str, implementation: str) -> None:
    for divisor in (0.3, 1.0, 17.0):
        pairs = zip(*(updated(name, implementation, divisor, explicit) for explicit in (True, False)), strict=True)
        for expected, actual in pairs:
            # A quotient differs from a product with the rounded inverse by three roundings of 2 ** -24, a square of it
            # by twice as much; averages of gradients of both signs cancel.
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
            assert divisor != 1.0 or torch.equal(actual, expected)
    assert not torch.equal(updated(name, implementation, 17.0, False)[0], updated(name, implementation, 1.0, False)[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_that_are_not_finite_stay_so(implementation: str) -> None:
    for divisor in (math.inf, math.nan):
        param = nn.Parameter(torch.zeros(2))
        param.grad = torch.full((2,), math.inf)
        update_parameters(
            build_optimizer([("p", param)], Optimizer(implementation=implementation)), torch.tensor(divisor)
        )  # type: ignore[arg-type]
        assert param.isnan().all()


class Operators(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_fused_update_makes_no_other_pass_over_the_gradients(implementation: str) -> None:
    param = nn.Parameter(torch.randn(4))
    param.grad = torch.randn(4)
    optimizer = build_optimizer([("p", param)], Optimizer(implementation=implementation))  # type: ignore[arg-type]
    with Operators() as operators:
        update_parameters(optimizer, torch.tensor(2.0))
    assert ("_foreach_div_.Tensor" in operators.names) is (implementation != "fused")
