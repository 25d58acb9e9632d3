"""What is called converted computes in float8; what is left out computes as before, for the reason that is given."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from titanlite.float8 import Float8Linear, Float8LinearConfig, convert_to_float8_training, why_not_convertible
from titanlite.float8.inference import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    quantize_,
)
from titanlite.quant.float8.format import Float8Format
from titanlite.quant.linear import quant_layers, reasons_in


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def fmt() -> Float8Format:
    return Float8LinearConfig().format


def in_float8(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The output of a plain float8 layer with these parameters."""
    layer = Float8Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.load_state_dict({"weight": weight.detach(), **({} if bias is None else {"bias": bias.detach()})})
    return layer(x)


class Projection(nn.Linear):
    """A subclass without a forward of its own."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.label = "projection"

    def rank(self) -> int:
        return int(torch.linalg.matrix_rank(self.weight.detach().float()))

    def extra_repr(self) -> str:
        return super().extra_repr() + f", label={self.label}"


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Called(nn.Linear):
    def __call__(self, input: Tensor) -> Tensor:
        return 2 * super().__call__(input)


class Halved(nn.Linear):
    """Its weight is a property."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.stored * 0.5

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.stored = nn.Parameter(value.detach())


def wrapped_by_a_hook_library() -> nn.Linear:
    layer = nn.Linear(32, 32)
    original = layer.forward
    layer.forward = functools.partial(lambda f, x: f(x) + 1, original)  # type: ignore[method-assign]
    return layer


def of_a_subclass() -> nn.Linear:
    layer = nn.Linear(32, 32)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(type("Fancy", (Tensor,), {})))
    return layer


def of_dtype(dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(32, 32)
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    return layer


COMPUTED = "its weight is computed from other tensors"
LEFT_OUT: dict[str, tuple[Callable[[], nn.Linear], str]] = {
    "forward of a subclass": (lambda: Scaled(32, 32), "is a Scaled with a forward of its own"),
    "call of a subclass": (lambda: Called(32, 32), "is a Called with a forward of its own"),
    "forward of an instance": (wrapped_by_a_hook_library, "its forward was replaced on the instance"),
    "property": (lambda: Halved(32, 32), COMPUTED),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(32, 32)), COMPUTED),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(32, 32)), COMPUTED),
    "weight norm by a hook": (lambda: weight_norm(nn.Linear(32, 32)), COMPUTED),
    "spectral norm by a hook": (lambda: spectral_norm(nn.Linear(32, 32)), COMPUTED),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(32, 32), "weight", 0.5), COMPUTED),
    "parametrized bias": (
        lambda: parametrize.register_parametrization(nn.Linear(32, 32), "bias", nn.Identity()),
        COMPUTED,
    ),
    "tensor subclass": (of_a_subclass, "its weight is a Fancy, not a plain tensor"),
    "int8": (lambda: of_dtype(torch.int8), "its weight is torch.int8, not a high-precision dtype"),
    "float8": (lambda: of_dtype(torch.float8_e4m3fn), "its weight is torch.float8_e4m3fn, not a high-precision dtype"),
    "lazy": (lambda: nn.LazyLinear(32), "its weight is not initialized yet"),
    "width": (lambda: nn.Linear(32, 3), "features are not multiples of 16"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("kind", LEFT_OUT)
def test_what_is_left_out_computes_as_before(kind: str) -> None:
    make, reason = LEFT_OUT[kind]
    layer = make().eval()  # a spectral norm changes in training
    x = torch.randn(8, 32)
    computes = kind not in ("lazy", "int8", "float8")
    before = layer(x) if computes else None
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": layer})
    names = type(layer), dict(layer._parameters)
    assert reasons_in(model, fmt())["b"].startswith(reason)
    convert_to_float8_training(model)
    assert [type(m) for m in quant_layers(model)] == [Float8Linear]
    assert (type(model["b"]), dict(layer._parameters)) == names
    if before is not None:
        assert torch.equal(layer(x), before)
    if kind != "width":  # weights alone may have any size
        assert quantize_(nn.ModuleDict({"a": nn.Linear(32, 32), "b": layer}), DYNAMIC).quantized == ("a",)


DYNAMIC = Float8DynamicActivationFloat8WeightConfig()


def hooked() -> nn.Linear:
    layer = nn.Linear(32, 32)
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    return layer


def compiled() -> nn.Linear:
    layer = nn.Linear(32, 32)
    layer.compile(backend="eager")
    layer(torch.randn(8, 32))  # compiled while it was an nn.Linear
    return layer


def tied() -> nn.Linear:
    layer = nn.Linear(32, 32)
    layer.weight = nn.Embedding(32, 32).weight
    return layer


CONVERTED: dict[str, tuple[Callable[[], nn.Linear], Callable[[nn.Linear, Tensor], Tensor]]] = {
    "plain": (lambda: nn.Linear(32, 32), lambda m, x: in_float8(x, m.weight, m.bias)),
    "subclass": (lambda: Projection(32, 32), lambda m, x: in_float8(x, m.weight, m.bias)),
    "hooks": (hooked, lambda m, x: in_float8(2 * x, m.weight, m.bias) + 1),
    "compiled in place": (compiled, lambda m, x: in_float8(x, m.weight, m.bias)),
    "tied": (tied, lambda m, x: in_float8(x, m.weight, m.bias)),
    "pruned bias": (
        lambda: prune.l1_unstructured(nn.Linear(32, 32), "bias", 0.5),
        lambda m, x: in_float8(x, m.weight) + m.bias,
    ),
    "float64": (
        lambda: nn.Linear(32, 32).double(),
        lambda m, x: in_float8(x.float(), m.weight.float(), m.bias.float()),
    ),
}


@pytest.mark.parametrize("kind", CONVERTED)
def test_what_is_converted_computes_in_float8(kind: str) -> None:
    make, expected = CONVERTED[kind]
    layer = make()
    x = torch.randn(8, 32, dtype=layer.weight.dtype)
    before = layer(x)
    model = nn.Sequential(layer)
    assert not reasons_in(model, fmt())
    convert_to_float8_training(model)
    after = model(x)
    assert model[0] is layer
    assert not torch.equal(after, before)
    torch.testing.assert_close(after.float(), expected(layer, x).float(), rtol=1e-6, atol=1e-6)
    after.sum().backward()
    assert layer.weight.grad is not None


def test_a_subclass_stays_one() -> None:
    layer = Projection(32, 32)
    model = convert_to_float8_training(nn.Sequential(layer))
    assert isinstance(layer, Projection)
    assert isinstance(layer, Float8Linear)
    assert layer.rank() == 32
    assert "label=projection" in repr(layer)
    assert "cast_configs=" in repr(layer)
    x = torch.randn(8, 32)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False))
    for other in copies:
        assert torch.equal(other(x), model(x))
        assert type(other[0]) is type(layer)
        assert other[0].config == layer.config
    plain = layer.to_linear()
    assert type(plain) is Projection
    assert torch.equal(plain(x), F.linear(x, layer.weight, layer.bias))
    quantize_(nn.Sequential(layer), DYNAMIC)
    assert layer.rank is not None
    assert layer.weight.qdata.dtype == torch.float8_e4m3fn  # type: ignore[attr-defined]


def test_a_layer_registered_twice_is_converted_once() -> None:
    layer = nn.Linear(32, 32)
    model = convert_to_float8_training(nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)}))
    assert quant_layers(model) == [layer]
    assert model["b"][0] is layer


def test_why_not_convertible_takes_any_module() -> None:
    assert why_not_convertible(nn.Conv2d(16, 16, 1)) == "is a Conv2d, not a linear layer"
    assert why_not_convertible(nn.Linear(16, 16)) is None


@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        weight_norm,
        spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight norm", "spectral norm", "weight norm by a hook", "spectral norm by a hook", "pruned"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_is_computed_after_the_conversion(change: Callable[[nn.Module], Any]) -> None:
    model = convert_to_float8_training(nn.Sequential(nn.Linear(32, 32)))
    layer = model[0]
    change(layer)
    x = torch.randn(8, 32)
    model(x)  # a step of the spectral norm
    model.eval()
    out, weight = model(x), layer.weight.detach()
    assert torch.equal(out, in_float8(x, weight, layer.bias))
    assert not torch.equal(out, F.linear(x, weight, layer.bias))
    assert "0.weight" not in model.state_dict()
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_computed_weight_is_computed_once_per_forward() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, weight: Tensor) -> Tensor:
            self.calls += 1
            return weight * 2

    layer = Float8Linear(32, 32)
    counting = Counting()
    parametrize.register_parametrization(layer, "weight", counting)
    before = counting.calls
    layer(torch.randn(8, 32)).sum().backward()
    assert counting.calls == before + 1


@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_reads_the_weight_of_its_last_layer(need_weights: bool) -> None:
    attention = nn.MultiheadAttention(32, 2, batch_first=True)
    model = nn.ModuleDict({"attention": attention, "out": nn.Linear(32, 32)})
    x = torch.randn(2, 4, 32)
    before = attention(x, x, x, need_weights=need_weights)[0]
    assert reasons_in(model, fmt()) == {"attention.out_proj": "MultiheadAttention reads its weight directly"}
    convert_to_float8_training(model)
    assert torch.equal(attention(x, x, x, need_weights=need_weights)[0], before)


@pytest.mark.parametrize("masked", [False, True])
def test_encoder_layers_compute_alike_in_training_and_evaluation(masked: bool) -> None:
    """In evaluation torch has a fused kernel for them, which reads the weights."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 4, 32), torch.tensor([[False] * 4, [False, False, True, True]])
    options = {"src_key_padding_mask": padding} if masked else {}
    shown = ~padding if masked else torch.ones_like(padding)
    with torch.no_grad():
        before = encoder(x, **options)
        convert_to_float8_training(encoder)
        in_evaluation = encoder(x, **options)
        in_training = encoder.train()(x, **options)
    assert not torch.allclose(in_evaluation[shown], before[shown], atol=1e-3)
    torch.testing.assert_close(in_evaluation[shown], in_training[shown], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(4, 64), (2, 3, 64), (0, 64)])
def test_on_the_meta_device(
    shape: tuple[int, ...], dtype: torch.dtype, recipe: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(64, 32, device="meta", dtype=dtype))
    convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name(recipe))
    x = torch.randn(*shape, device="meta", dtype=dtype, requires_grad=True)
    y = model(x)
    assert (y.shape, y.dtype, y.device.type) == ((*shape[:-1], 32), dtype, "meta")
    y.sum().backward()
    weight = model[0].weight
    assert x.grad is not None
    assert weight.grad is not None
    assert (x.grad.shape, x.grad.dtype, weight.grad.shape) == (x.shape, dtype, weight.shape)
    assert not caplog.records  # nothing is emulated there


@pytest.mark.parametrize("config", [DYNAMIC, Float8WeightOnlyConfig()], ids=["dynamic", "weight only"])
def test_inference_on_the_meta_device(config: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    quantize_(model, config)
    assert model.to("meta")(torch.randn(4, 64, device="meta")).shape == (4, 32)
