"""titanlite.float8 against torchao.float8, which computes the same layers, emulated, on the CPU."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanlite.distributed.init import WeightInit
from titanlite.float8 import (
    CastConfig,
    Float8Linear,
    Float8LinearConfig,
    ScalingGranularity,
    convert_to_float8_training,
)
from titanlite.models.layers import Decoder
from titanlite.models.llama3.spec import FLAVORS
from titanlite.quant.float8.matmul import cast
from titanlite.quant.float8.numerics import round_down_to_power_of_2

torchao = pytest.importorskip("torchao.float8")

from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic  # noqa: E402
from torchao.float8.float8_training_tensor import GemmInputRole, LinearMMConfig  # noqa: E402

RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]
SHAPES = [(48,), (3, 16), (2, 3, 8)]  # the leading dimensions: 48 tokens each
IN, OUT = 64, 96


def values(kind: str, *shape: int) -> Tensor:
    """float32 data of one sort."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(len(kind) + math.prod(shape)))
    if kind == "outliers":
        x.view(-1)[:: x.numel() // 7] *= 1000
    elif kind == "tiny":
        x *= 1e-6
    elif kind == "huge":
        x *= 1e30
    elif kind == "a zero row and column":
        x[..., 0, :] = 0
        x[..., 0] = 0
    elif kind == "constant":
        x.fill_(0.37)
    return x


KINDS = ["random", "outliers", "tiny", "huge", "a zero row and column", "constant"]


def sqnr(reference: Tensor, other: Tensor) -> float:
    """In dB; infinite where they are the same."""
    reference, other = reference.detach().double(), other.detach().double()
    noise = (reference - other).norm()
    return math.inf if noise == 0 else (20 * torch.log10(reference.norm() / noise)).item()


def theirs(linear: nn.Linear, recipe: str) -> nn.Module:
    config = torchao.Float8LinearConfig.from_recipe_name(recipe)
    object.__setattr__(config, "emulate", True)
    converted: nn.Module = torchao.convert_to_float8_training(nn.Sequential(copy.deepcopy(linear)), config=config)
    return converted


def ours(linear: nn.Linear, recipe: str) -> nn.Module:
    config = Float8LinearConfig.from_recipe_name(recipe)
    return convert_to_float8_training(nn.Sequential(copy.deepcopy(linear)), config=config)


def step(model: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = model(x)
    out.backward(grad)
    assert x.grad is not None
    return {"output": out, "grad_input": x.grad, **{f"grad_{n}": p.grad for n, p in model.named_parameters()}}  # type: ignore[dict-item]


# ---- single tensors: bytes and scales


def exact_power_below(scale: Tensor) -> Tensor:
    _, exponent = torch.frexp(scale.double())
    return torch.ldexp(torch.ones_like(scale, dtype=torch.float64), exponent - 1).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("contracted", [None, 0, 1])
@pytest.mark.parametrize("power_of_2", [False, True])
def test_bytes_and_scales(
    dtype: torch.dtype, kind: str, target: torch.dtype, contracted: int | None, power_of_2: bool
) -> None:
    x = values(kind, 48, IN).to(dtype)
    granularity = torchao.ScalingGranularity.TENSORWISE if contracted is None else torchao.ScalingGranularity.AXISWISE
    expected = hp_tensor_to_float8_dynamic(
        x,
        target,
        LinearMMConfig(),
        gemm_input_role=GemmInputRole.INPUT,
        scaling_granularity=granularity,
        axiswise_dim=None if contracted is None else -contracted,
        round_scales_to_power_of_2=power_of_2,
    )
    config = CastConfig(scaling_granularity=ScalingGranularity(granularity.value), target_dtype=target)
    data, scale = cast(x, config, contracted=contracted or 0, power_of_2=power_of_2, emulate=True)
    assert scale is not None
    # torchao rounds by exp2(floor(log2(scale))), which is wrong where log2 rounds up to a whole number. There its
    # scale is above ours, and ours is the exact one.
    wrong = expected._scale != scale
    assert power_of_2 or not wrong.any()
    full = torch.finfo(target).max / x.abs().double().amax(contracted, keepdim=True).clamp(min=1e-12).float()
    if contracted is None:
        full = full.squeeze()
    assert torch.equal(scale[wrong], exact_power_below(full.float())[wrong])
    same = (~wrong).expand(x.shape)
    assert torch.equal(data.view(torch.uint8)[same], expected._data.view(torch.uint8)[same])
    assert same.any()


def test_where_torchao_rounds_up() -> None:
    """The cases in which bytes and scales may differ: a scale of which log2 rounds to the whole number above it."""
    below = torch.nextafter(2.0 ** torch.arange(-120, 121).float(), torch.tensor(0.0))
    rounded = torch.exp2(torch.floor(torch.log2(below)))  # what torchao computes
    assert (rounded > below).any()
    expected = 2.0 ** torch.arange(-121, 120).float()
    assert torch.equal(exact_power_below(below), expected)
    assert torch.equal(round_down_to_power_of_2(below), expected)


# ---- layers: outputs and gradients


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("leading", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_layers(recipe: str, leading: tuple[int, ...], bias: bool, dtype: torch.dtype, kind: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, bias=bias).to(dtype)
    x, grad = values(kind, *leading, IN).to(dtype), values("random", *leading, OUT).to(dtype)
    expected, results = step(theirs(linear, recipe), x, grad), step(ours(linear, recipe), x, grad)
    assert results.keys() == expected.keys()
    for name in expected:
        assert results[name].shape == expected[name].shape
        assert results[name].dtype == expected[name].dtype
        assert torch.isfinite(results[name]).all()
        assert sqnr(expected[name], results[name]) >= 40, name
    if kind == "random":
        high = step(nn.Sequential(linear), x, grad)
        assert sqnr(high["output"], results["output"]) >= 18
        assert sqnr(high["grad_input"], results["grad_input"]) >= 17
        assert sqnr(high["grad_0.weight"], results["grad_0.weight"]) >= 17


# ---- models: all gradients


class FeedForward(nn.Module):
    """Two layers of Llama's feed-forward block."""

    def __init__(self, dim: int = 128, hidden: int = 384) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.RMSNorm(dim),
                    "w1": nn.Linear(dim, hidden, bias=False),
                    "w3": nn.Linear(dim, hidden, bias=False),
                    "w2": nn.Linear(hidden, dim, bias=False),
                }
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for b in self.blocks:
            assert isinstance(b, nn.ModuleDict)
            h = b["norm"](x)
            x = x + b["w2"](F.silu(b["w1"](h)) * b["w3"](h))
        return x


def feed_forward() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = FeedForward().bfloat16()
    x, target = torch.randn(4, 64, 128).bfloat16(), torch.randn(4, 64, 128)
    return model, lambda m: F.mse_loss(m(x).float(), target)


def debug_model() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    args = FLAVORS["debugmodel"]
    model = Decoder(type(args)(**{**args.__dict__, "vocab_size": 512}))
    model.init_weights(WeightInit(model, seed=1))
    tokens = torch.randint(0, 512, (2, 129))
    model = model.bfloat16()
    model.rope = model.rope.float()
    return model, lambda m: F.cross_entropy(m(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())


def gradients(model: nn.Module, loss: Any) -> dict[str, Tensor]:
    loss(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("build", [feed_forward, debug_model], ids=["feed-forward", "debugmodel"])
def test_gradients_of_models(recipe: str, build: Any) -> None:
    model, loss = build()
    high = gradients(copy.deepcopy(model), loss)
    config = torchao.Float8LinearConfig.from_recipe_name(recipe)
    object.__setattr__(config, "emulate", True)
    expected = gradients(torchao.convert_to_float8_training(copy.deepcopy(model), config=config), loss)
    converted = convert_to_float8_training(copy.deepcopy(model), config=Float8LinearConfig.from_recipe_name(recipe))
    assert sum(isinstance(m, Float8Linear) for m in converted.modules()) == sum(
        isinstance(m, nn.Linear) for m in model.modules()
    )
    converted_gradients = gradients(converted, loss)
    assert converted_gradients.keys() == high.keys()

    def together(grads: dict[str, Tensor]) -> Tensor:
        return torch.cat([grads[name].double().flatten() for name in sorted(high)])

    assert sqnr(together(high), together(converted_gradients)) >= 20
    for name, reference in high.items():
        mine, their = sqnr(reference, converted_gradients[name]), sqnr(reference, expected[name])
        assert mine >= 14, f"{name}: {mine:.1f} dB"
        assert mine >= their - 1, f"{name}: {mine:.1f} dB, torchao {their:.1f} dB"
