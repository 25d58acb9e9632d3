"""Linear layers in int8 against torchao's int8_mixed_precision_training, and their casts against its casts."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.float8.test_float8_oracle import KINDS, SHAPES, sqnr, step, values
from titanlite.config.schema import ActivationCheckpoint
from titanlite.converters.int8 import RECIPES
from titanlite.distributed.activation_checkpoint import apply_activation_checkpoint
from titanlite.quant.format import Use
from titanlite.quant.int8 import cpu
from titanlite.quant.int8.cpu import MULTIPLY
from titanlite.quant.int8.format import Int8Format
from titanlite.quant.int8.numerics import LONGEST, dequantize
from titanlite.quant.linear import QuantLinear

mixed = pytest.importorskip("torchao.prototype.quantized_training.int8_mixed_precision")
from torchao.prototype.quantized_training.int8 import quantize_int8_rowwise  # noqa: E402

IN, OUT = 64, 96


def theirs(linear: nn.Linear, recipe: str) -> nn.Module:
    config = mixed.Int8MixedPrecisionTrainingConfig(
        **{matmul: matmul in RECIPES[recipe] for matmul in ("output", "grad_input", "grad_weight")}
    )
    layer = mixed.Int8MixedPrecisionTrainingLinear(IN, OUT, bias=linear.bias is not None, config=config)
    layer.load_state_dict(linear.state_dict())
    # Without GPUs too, torchao would take its Triton kernel.
    return nn.Sequential(layer.to(linear.weight.dtype))


def ours(linear: nn.Linear, recipe: str, **options: Any) -> nn.Module:
    return nn.Sequential(QuantLinear.from_linear(copy.deepcopy(linear), Int8Format(RECIPES[recipe], **options)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("contracted", [0, 1])
def test_bytes_and_scales(kind: str, contracted: int) -> None:
    x = values(kind, 48, IN)
    data, scale = Int8Format().cast(x, Use("input", contracted))
    assert scale is not None
    expected, their_scale = quantize_int8_rowwise(x if contracted else x.t())
    if not contracted:
        expected, scale = expected.t(), scale.t()
    large = x.abs().amax(contracted) > 1e-9  # torchao limits the scale, not the amax
    assert torch.equal(scale.flatten()[large], their_scale[large])
    assert torch.equal(data, expected)
    assert large.any()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "bias"), [(SHAPES[0], False), (SHAPES[1], True), (SHAPES[2], False), ((7,), True)])
def test_layers(recipe: str, kind: str, shape: tuple[int, ...], bias: bool) -> None:
    linear = nn.Linear(IN, OUT, bias=bias)
    x, grad = values(kind, *shape, IN), values("random", *shape, OUT)
    expected, result = step(theirs(linear, recipe), x, grad), step(ours(linear, recipe), x, grad)
    assert expected.keys() == result.keys()
    for name in expected:
        assert sqnr(expected[name], result[name]) > 110, name  # float32 rounds the products in another order


@pytest.mark.parametrize("recipe", RECIPES)
def test_bfloat16_is_no_worse_than_torchaos(recipe: str) -> None:
    """torchao rounds the scales to bfloat16."""
    linear = nn.Linear(IN, OUT, bias=False).bfloat16()
    x, grad = values("random", 48, IN).bfloat16(), values("random", 48, OUT).bfloat16()
    exact = step(nn.Sequential(copy.deepcopy(linear).double()), x.double(), grad.double())
    for name, value in step(ours(linear, recipe), x, grad).items():
        assert sqnr(exact[name], value) > 40, name
        assert sqnr(exact[name], value) > sqnr(exact[name], step(theirs(linear, recipe), x, grad)[name]) - 0.1, name


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tokens", [0, 1, 7, 48])
def test_emulated_is_the_same(recipe: str, tokens: int) -> None:
    linear = nn.Linear(IN, OUT)
    x, grad = values("random", tokens, IN), values("random", tokens, OUT)
    results = [step(ours(linear, recipe, emulate=emulate), x, grad) for emulate in (False, True)]
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("emulate", [False, True])
def test_what_is_not_finite_stays_so(value: float, emulate: bool) -> None:
    """A row with it gives NaN in its output, and a column with it NaN in the gradient of its weights."""
    x, grad = values("random", 5, IN), values("random", 5, OUT)
    x[2, 3] = value
    result = step(ours(nn.Linear(IN, OUT, bias=False), "rowwise", emulate=emulate), x, grad)
    rows = torch.arange(5) == 2
    assert torch.equal(result["output"].isnan(), rows[:, None].expand(5, OUT))
    columns = torch.arange(IN) == 3
    assert torch.equal(result["grad_0.weight"].isnan(), columns.expand(OUT, IN))
    grad[4, 0] = value
    assert step(ours(nn.Linear(IN, OUT, bias=False), "rowwise"), x, grad)["grad_input"][4].isnan().all()


def test_extremes_of_float32() -> None:
    x = torch.tensor([[0.0] * 8, [1e-30] * 8, [-1e38] * 8, [3.4e38, *[-0.0] * 7]])
    data, scale = Int8Format().cast(x, Use("input", 1))
    assert scale is not None
    assert scale.isfinite().all()
    assert torch.equal(dequantize(data, scale)[:2], torch.zeros(2, 8))  # far below the smallest amax
    torch.testing.assert_close(dequantize(data, scale)[2:], x[2:], rtol=1e-6, atol=0)


def test_long_sums_do_not_overflow() -> None:
    """All products are as large as can be; two more than int32 holds."""
    tokens = LONGEST + 100
    x, grad = torch.full((tokens, 8), 3.0), torch.full((tokens, 8), 5.0)
    result = step(ours(nn.Linear(8, 8, bias=False), "rowwise"), x, grad)
    torch.testing.assert_close(result["grad_0.weight"], torch.full((8, 8), 15.0 * tokens), rtol=1e-5, atol=0)


def test_compiled_is_the_same() -> None:
    linear = nn.Linear(IN, OUT)
    x, grad = values("outliers", 48, IN), values("random", 48, OUT)
    expected = step(ours(linear, "rowwise"), x, grad)
    compiled = ours(linear, "rowwise")
    compiled.compile()
    for name, value in step(compiled, x, grad).items():
        assert sqnr(expected[name], value) > 110, name


def test_what_is_saved_for_backward() -> None:
    """The input is saved as one byte per element, in the recipes that cast it for the gradient of the weight."""
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    for recipe, dtype in (("rowwise", torch.int8), ("rowwise_with_gw_hp", torch.float32)):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            ours(nn.Linear(IN, OUT, bias=False), recipe)(values("random", 48, IN).requires_grad_())
        assert [x.dtype for x in saved if x.shape == (48, IN)] == [dtype], recipe


def test_checkpointing_keeps_every_second_matmul() -> None:
    """The policy knows the matmuls: of four outputs, backward computes two again."""
    layers = nn.Sequential(*(ours(nn.Linear(IN, IN), "rowwise")[0] for _ in range(4)))  # type: ignore[index]
    block = SimpleNamespace(run=None, compute=layers)
    apply_activation_checkpoint({"0": block}, ActivationCheckpoint(mode="selective", selective_ac_option="op"))  # type: ignore[arg-type]
    counted: list[int] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counted.append(func is MULTIPLY)
            return func(*args, **(kwargs or {}))

    out = block.run(values("random", 48, IN).requires_grad_())  # type: ignore[misc]
    with Count():
        out.sum().backward()
    assert sum(counted) == 8 + 2  # two gradients of each layer, and the outputs of the second and fourth


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN is not in this build of torch")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 8, 8), (33, 64, 48), (130, 200, 24)])
def test_the_matmul_of_processors_with_matrix_units(m: int, k: int, n: int, transposed: bool) -> None:
    """It runs on others too, in other instructions; a NaN scale stays in its column."""
    a = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    b = torch.randint(-127, 128, (n, k), dtype=torch.int8).t()
    b = b if transposed else b.contiguous()
    scale = torch.rand(1, n) + 0.5
    scale[0, 3] = torch.nan
    expected = (a.double() @ b.double() * scale.double()).float()
    torch.testing.assert_close(cpu._onednn_matmul(a, b, scale), expected, rtol=1e-6, atol=0, equal_nan=True)
