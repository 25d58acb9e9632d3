"""Float8 inference: its numbers against float64 and torchao, what it refuses, what users do with a quantized model."""

from __future__ import annotations

import copy
import io
import logging
import re
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from titanlite.float8.config import CastConfig, Float8LinearConfig, ScalingType
from titanlite.float8.float8_linear import Float8Linear
from titanlite.float8.inference import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8InferenceLinear,
    Float8StaticActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    PerRow,
    PerTensor,
    QuantizationConfig,
    calibrate,
    quantize_,
)

DYNAMIC = Float8DynamicActivationFloat8WeightConfig
STATIC = Float8StaticActivationFloat8WeightConfig
CONFIGS: dict[str, QuantizationConfig] = {
    "dynamic per tensor": DYNAMIC(granularity=PerTensor()),
    "dynamic per row": DYNAMIC(granularity=PerRow()),
    "static per tensor": STATIC(activation_amax=3.0),
    "static per row": STATIC(activation_amax=3.0, granularity=PerRow()),
    "weight per tensor": Float8WeightOnlyConfig(granularity=PerTensor()),
    "weight per row": Float8WeightOnlyConfig(granularity=PerRow()),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}  # relative, of one rounding

# The e4m3fn numbers from 0 to 448 in the order of their codes, from the format's definition: 4 bits of exponent with
# bias 7, 3 of mantissa; the code 127 is NaN.
E4M3 = torch.tensor(
    [(m / 8) * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127]
).double()


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def model(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Sequential:
    layers = (
        nn.Linear(32, 64, bias=bias),
        nn.ReLU(),
        nn.Linear(64, 48, bias=bias),
        nn.ReLU(),
        nn.Linear(48, 16, bias=bias),
    )
    return nn.Sequential(*layers).to(dtype)


def nearest_e4m3(x: Tensor) -> Tensor:
    """Round float64 to the nearest e4m3 number, ties to the even code, saturating."""
    magnitude = x.abs().clamp(max=448)
    upper = torch.searchsorted(E4M3, magnitude).clamp(max=126)
    lower = (upper - 1).clamp(min=0)
    up, down = E4M3[upper] - magnitude, magnitude - E4M3[lower]
    code = torch.where((up < down) | ((up == down) & (upper % 2 == 0)), upper, lower)
    return torch.sign(x) * E4M3[code]


def cast(x: Tensor, per_row: bool, amax: float | None = None) -> tuple[Tensor, Tensor]:
    """The e4m3 numbers that stand for ``x``, in float64, and the scale they were multiplied by."""
    largest = x.double().abs().amax(-1, keepdim=True) if per_row else x.double().abs().amax()
    if amax is not None:
        largest = torch.tensor(amax, dtype=torch.float64)
    scale = (448 / largest.clamp(min=1e-12)).float()
    return nearest_e4m3((x.float() * scale).double()), scale.double()


def expected(linear: nn.Linear, config: QuantizationConfig, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output by the definition, in float64, and what it is a sum of in magnitude: the measure of its rounding."""
    per_row = config.granularity == PerRow()
    w, w_scale = cast(linear.weight, per_row)
    w = w / w_scale
    a = x.double()
    if isinstance(config, Float8WeightOnlyConfig):
        w = w.to(x.dtype).double()
    else:
        a, scale = cast(x, per_row and isinstance(config, DYNAMIC), getattr(config, "activation_amax", None))
        a = a / scale
    bias = torch.zeros(()) if linear.bias is None else linear.bias.detach()
    return a @ w.T + bias.double(), a.abs() @ w.abs().T + bias.double().abs()


def sqnr_db(actual: Tensor, wanted: Tensor) -> float:
    noise = (actual.double() - wanted.double()).square().mean()
    return float(10 * torch.log10(wanted.double().square().mean() / noise).detach())


class Operators(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


# ---- the numbers


@every_config
@pytest.mark.parametrize("shape", [(32,), (5, 32), (1, 32), (2, 3, 32)], ids=str)
@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@torch.inference_mode()
def test_outputs_are_those_of_the_definition(
    config: QuantizationConfig, shape: tuple[int, ...], dtype: torch.dtype, bias: bool
) -> None:
    linear = nn.Linear(32, 48, bias=bias, dtype=dtype)
    x = (2 * torch.randn(shape)).to(dtype)
    wanted, magnitude = expected(linear, config, x)
    quantize_(linear, config)
    out = linear(x)
    assert out.dtype is dtype
    assert out.shape == (*shape[:-1], 48)
    bound = 2 * EPSILON[dtype] * wanted.abs() + (40 * 2.0**-24 + 2 * EPSILON[dtype] * bias) * magnitude
    assert ((out.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("granularity", [PerTensor(), PerRow()], ids=str)
@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_weights_are_the_nearest_float8_numbers(granularity: Any, dtype: torch.dtype) -> None:
    linear = nn.Linear(96, 64, dtype=dtype)
    with torch.no_grad():
        linear.weight[3] *= 1e-3
        linear.weight[5] = 0
    numbers, scale = cast(linear.weight, granularity == PerRow())
    quantize_(linear, Float8WeightOnlyConfig(granularity=granularity))
    assert linear.weight_float8.dtype is torch.float8_e4m3fn
    assert linear.weight_scale.dtype is torch.float32
    assert linear.weight_scale.shape == ((64, 1) if granularity == PerRow() else ())
    assert torch.equal(linear.weight_scale.double(), scale)
    assert torch.equal(linear.weight_float8.double(), numbers)


@pytest.mark.parametrize("granularity", ["PerTensor", "PerRow"])
def test_weight_only_agrees_with_torchao(granularity: str) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    theirs = model()  # of bfloat16 weights it takes scales in bfloat16
    ours = copy.deepcopy(theirs)
    torchao.quantize_(theirs, torchao.Float8WeightOnlyConfig(granularity=getattr(torchao, granularity)()))
    quantize_(ours, Float8WeightOnlyConfig(granularity={"PerTensor": PerTensor(), "PerRow": PerRow()}[granularity]))
    for i in (0, 2, 4):
        torch.testing.assert_close(  # theirs is the divisor
            ours[i].weight_scale.reciprocal().flatten(), theirs[i].weight.scale.flatten(), rtol=1e-6, atol=0
        )
        # Dividing instead of multiplying rounds differently once in a while, to the next float8 number.
        a, b = ours[i].weight_float8.view(torch.uint8).int(), theirs[i].weight.qdata.view(torch.uint8).int()
        assert (a - b).abs().max() <= 1
        assert (a != b).float().mean() < 1e-3
    x = torch.randn(9, 32)
    with torch.inference_mode():
        assert sqnr_db(ours(x), theirs(x)) > 50


# Measured, over 4 seeds: 31.5 to 31.7 with one side cast to e4m3, 28.5 to 28.7 with both.
BOUNDS = {
    "weight per row": 31.0,
    "weight per tensor": 31.0,
    "dynamic per row": 28.0,
    "dynamic per tensor": 28.0,
    "static per row": 28.0,
    "static per tensor": 28.0,
}


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@torch.inference_mode()
def test_signal_to_quantization_noise(name: str, dtype: torch.dtype) -> None:
    linear = nn.Linear(512, 256, bias=False, dtype=dtype)
    nn.init.normal_(linear.weight)
    x = torch.randn(256, 512, dtype=dtype)
    wanted = linear(x)
    config = CONFIGS[name]
    if isinstance(config, STATIC):
        config = STATIC(activation_amax=x.abs().amax(), granularity=config.granularity)
    quantize_(linear, config)
    assert sqnr_db(linear(x), wanted) > BOUNDS[name]


@pytest.mark.parametrize("name", [name for name in CONFIGS if "weight" not in name])
@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@torch.inference_mode()
def test_the_matmul_of_float8_units_agrees_with_its_emulation(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = nn.Linear(64, 48, dtype=dtype)
    quantize_(linear, CONFIGS[name])
    x = torch.randn(5, 64, dtype=dtype)
    emulated = linear(x)
    # torch._scaled_mm takes the same operands on the CPU.
    monkeypatch.setattr("titanlite.float8.inference_linear.has_native_float8", lambda device: True)
    with Operators() as operators:
        assert sqnr_db(linear(x), emulated) > 45
    assert operators.seen.count(torch.ops.aten._scaled_mm.default) == 1


@torch.inference_mode()
def test_an_outlier_costs_only_its_own_row_precision() -> None:
    linear = nn.Linear(64, 64, bias=False)
    x = torch.randn(16, 64)
    x[0, 0] = 1e6
    per_tensor, per_row = copy.deepcopy(linear), copy.deepcopy(linear)
    quantize_(per_tensor, DYNAMIC(granularity=PerTensor()))
    quantize_(per_row, DYNAMIC(granularity=PerRow()))
    wanted = linear(x)[1:]
    assert sqnr_db(per_row(x)[1:], wanted) > 25
    assert sqnr_db(per_tensor(x)[1:], wanted) < 5


@every_config
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@torch.inference_mode()
def test_what_is_not_finite_gives_nan(config: QuantizationConfig, value: float) -> None:
    linear = nn.Linear(32, 16)
    quantize_(linear, config)
    x = torch.randn(4, 32)
    clean = linear(x)
    x[1, 7] = value
    out = linear(x)
    if config == DYNAMIC(granularity=PerTensor()):
        assert out.isnan().all()
    else:
        assert not out[1].isfinite().any()
        assert torch.equal(out[[0, 2, 3]], clean[[0, 2, 3]])
    if not isinstance(config, Float8WeightOnlyConfig):  # an ordinary matmul: infinities stay infinities
        assert out[1].isnan().all()


@every_config
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@torch.inference_mode()
def test_a_weight_that_is_not_finite_gives_nan(config: QuantizationConfig, value: float) -> None:
    linear = nn.Linear(32, 16)
    linear.weight[5, 3] = value
    quantize_(linear, config)
    out = linear(torch.randn(4, 32))
    assert out[:, 5].isnan().all()
    assert out[:, 4].isnan().all() == (config.granularity == PerTensor())


@every_config
@torch.inference_mode()
def test_zeros_and_extremes_are_finite(config: QuantizationConfig) -> None:
    linear = nn.Linear(32, 16, dtype=torch.bfloat16)
    linear.weight[0] = 0
    quantize_(linear, config)
    assert torch.equal(linear(torch.zeros(3, 32, dtype=torch.bfloat16)), linear.bias.expand(3, 16))
    for magnitude in (1e-30, 1e-6, 1e30):
        assert linear(torch.full((3, 32), magnitude, dtype=torch.bfloat16)).isfinite().all()


@every_config
@torch.inference_mode()
def test_empty_batches(config: QuantizationConfig) -> None:
    m = model(torch.bfloat16)
    quantize_(m, config)
    assert m(torch.empty(0, 32, dtype=torch.bfloat16)).shape == (0, 16)
    assert m(torch.empty(2, 0, 32, dtype=torch.bfloat16)).shape == (2, 0, 16)


@every_config
def test_autocast_decides_the_dtype_as_for_any_linear(config: QuantizationConfig) -> None:
    m = nn.Linear(32, 16)
    quantize_(m, config)
    x = torch.randn(4, 32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        out = m(x)
    with torch.inference_mode():
        assert torch.equal(out, m(x.bfloat16()))


@every_config
def test_gradients_pass_through_the_dequantized_weight(config: QuantizationConfig) -> None:
    linear = nn.Linear(32, 16)
    w, scale = cast(linear.weight, config.granularity == PerRow())
    quantize_(linear, config)
    x, g = torch.randn(2, 3, 32, requires_grad=True), torch.randn(2, 3, 16)
    linear(x).backward(g)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (g.double() @ (w / scale)).float(), rtol=1e-5, atol=1e-6)
    assert linear.bias.grad is not None
    torch.testing.assert_close(linear.bias.grad, g.sum((0, 1)))
    assert [name for name, _ in linear.named_parameters()] == ["bias"]


# ---- models


@every_config
@torch.inference_mode()
def test_compiled_equals_eager(config: QuantizationConfig) -> None:
    m = model()
    quantize_(m, config)
    x = torch.randn(7, 32)
    assert torch.equal(torch.compile(m, fullgraph=True)(x), m(x))


@torch.inference_mode()
def test_a_compiled_model_that_ran_already_is_quantized() -> None:
    m = model()
    compiled: Any = torch.compile(m, fullgraph=True)
    x = torch.randn(7, 32)
    high_precision = compiled(x)
    assert quantize_(compiled, DYNAMIC()).quantized == ("0", "2", "4")
    out = compiled(x)
    assert torch.equal(out, m(x))
    assert not torch.equal(out, high_precision)


def test_compiled_backward_equals_eager() -> None:
    m = model()
    quantize_(m, DYNAMIC(granularity=PerRow()))
    grads = []
    for f in (m, torch.compile(m, fullgraph=True)):
        x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        f(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("wrap", [lambda m: m, torch.compile], ids=["plain", "compiled"])
def test_the_model_may_be_one_linear_layer(wrap: Any) -> None:
    linear = nn.Linear(32, 16)
    seen: list[str] = []
    report = quantize_(wrap(linear), DYNAMIC(), lambda module, fqn: not seen.append(fqn))
    assert report.quantized == ("",)
    assert seen == [""]
    assert isinstance(linear, Float8InferenceLinear)
    assert wrap(linear)(torch.randn(2, 32)).shape == (2, 16)


def test_names_are_free_of_wrappers() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    m = nn.ModuleDict(
        {"a": torch.compile(nn.Sequential(nn.Linear(16, 16))), "b": checkpoint_wrapper(nn.Linear(16, 16))}
    )
    assert quantize_(m, STATIC(activation_amax={"a.0": 1.0, "b": 2.0}), strict=True).quantized == ("a.0", "b")


@pytest.mark.parametrize("delayed", [False, True], ids=["dynamic", "delayed"])
@every_config
def test_a_trained_float8_model_is_quantized_as_its_weights_are(config: QuantizationConfig, delayed: bool) -> None:
    plain = model()
    trained = copy.deepcopy(plain)
    operand = CastConfig(scaling_type=ScalingType.DELAYED if delayed else ScalingType.DYNAMIC)
    for i in (0, 2, 4):
        Float8Linear.from_float(trained[i], Float8LinearConfig(cast_config_input=operand, cast_config_weight=operand))
    trained(torch.randn(8, 32)).sum().backward()
    for m in (plain, trained):
        quantize_(m, config)
    assert trained.state_dict().keys() == plain.state_dict().keys()
    assert vars(trained[0]).keys() == vars(plain[0]).keys()
    x = torch.randn(5, 32)
    with torch.inference_mode():
        assert torch.equal(trained(x), plain(x))


def test_hooks_and_attributes_stay() -> None:
    m = model()
    called = []
    m[2].register_forward_pre_hook(lambda module, args: called.append("pre"))
    m[2].register_forward_hook(lambda module, args, out: out * 2)
    m[2].note = "mine"
    doubled = m[2]
    quantize_(m, DYNAMIC())
    x = torch.randn(3, 64)
    with torch.inference_mode():
        assert torch.equal(m[2](x), 2 * m[2].forward(x))
    assert called == ["pre"]
    assert m[2] is doubled
    assert m[2].note == "mine"


def test_layers_tied_to_each_other_stay_tied() -> None:
    m = nn.ModuleDict({"embedding": nn.Embedding(64, 32), "a": nn.Linear(32, 64), "b": nn.Linear(32, 64)})
    m["a"].weight = m["b"].weight = m["embedding"].weight
    embedded = m["embedding"](torch.arange(64)).clone()
    assert quantize_(m, DYNAMIC(granularity=PerRow())).quantized == ("a", "b")
    assert m["a"].weight_float8.data_ptr() == m["b"].weight_float8.data_ptr()
    assert torch.equal(m["embedding"](torch.arange(64)), embedded)
    with torch.inference_mode():
        m["b"].bias.copy_(m["a"].bias)
        x = torch.randn(3, 32)
        assert torch.equal(m["a"](x), m["b"](x))


def test_a_layer_used_twice_is_quantized_once() -> None:
    linear = nn.Linear(32, 32)
    assert quantize_(nn.Sequential(linear, linear), DYNAMIC()).quantized == ("0",)


def test_weights_take_one_byte_per_element() -> None:
    m = model(bias=False)
    elements = sum(p.numel() for p in m.parameters())
    weights = [weakref.ref(p) for p in m.parameters()]
    quantize_(m, DYNAMIC(granularity=PerTensor()))
    assert sum(t.nbytes for t in m.state_dict().values()) == elements + 3 * 4
    assert [w() for w in weights] == [None] * 3
    assert list(m.parameters()) == []


@every_config
def test_a_saved_state_loads_into_a_model_quantized_alike(config: QuantizationConfig) -> None:
    m, other = model(torch.bfloat16), model(torch.bfloat16)
    quantize_(m, config)
    quantize_(other, DYNAMIC(granularity=config.granularity) if isinstance(config, DYNAMIC) else config)
    state = m.state_dict()
    assert {type(t) for t in state.values()} == {Tensor}
    x = torch.randn(5, 32, dtype=torch.bfloat16)
    with torch.inference_mode():
        wanted = m(x)
        assert not torch.equal(other(x), wanted)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(x), wanted)
        assert torch.equal(copy.deepcopy(m)(x), wanted)


def test_states_of_other_models_do_not_load() -> None:
    high_precision, per_tensor, per_row = model(), model(), model()
    quantize_(per_tensor, DYNAMIC(granularity=PerTensor()))
    quantize_(per_row, DYNAMIC(granularity=PerRow()))
    for a, b in ((high_precision, per_row), (per_row, high_precision), (per_tensor, per_row), (per_row, per_tensor)):
        with pytest.raises(RuntimeError, match="loading state_dict"):
            a.load_state_dict(b.state_dict())


def test_a_change_of_dtype_is_for_the_bias() -> None:
    m = model()
    quantize_(m, STATIC(activation_amax=3.0))
    before = {k: t.clone() for k, t in m.state_dict().items()}
    m.to(torch.bfloat16).float().half()
    for name, t in m.state_dict().items():
        assert t.dtype is (torch.float16 if "bias" in name else before[name].dtype)
        assert "bias" in name or torch.equal(t.float(), before[name].float())
    assert {t.device.type for t in m.to(torch.float32).to("meta").state_dict().values()} == {"meta"}


@pytest.mark.parametrize("layer", ["attention", "encoder"])
def test_modules_that_read_weights_directly_work(layer: str) -> None:
    modules = {
        "attention": nn.MultiheadAttention(32, 4, batch_first=True),
        "encoder": nn.TransformerEncoderLayer(32, 4, 64, batch_first=True),
    }
    m = nn.ModuleDict({"layer": modules[layer].eval(), "head": nn.Linear(32, 16)})
    left_out = {"attention": {"layer.out_proj": "MultiheadAttention reads its weight directly"}}.get(
        layer,
        {
            "layer.self_attn.out_proj": "MultiheadAttention reads its weight directly",
            "layer.linear1": "TransformerEncoderLayer reads its weight directly",
            "layer.linear2": "TransformerEncoderLayer reads its weight directly",
        },
    )
    x = torch.randn(2, 5, 32)
    arguments = (x, x, x) if layer == "attention" else (x,)
    with torch.inference_mode():
        wanted = m["layer"](*arguments)
        report = quantize_(m, DYNAMIC())
        torch.testing.assert_close(m["layer"](*arguments), wanted, rtol=0, atol=0)
    assert report.quantized == ("head",)
    assert report.left_out == left_out


# ---- static scales


def test_calibration_records_the_largest_input_of_all_batches() -> None:
    m = model()
    batches = [torch.randn(4, 32), 5 * torch.randn(4, 32), torch.empty(0, 32), torch.randn(4, 32)]
    with torch.inference_mode(), calibrate(m) as amax:
        for batch in batches:
            m(batch)
        hidden = [m[:2](batch) for batch in batches if len(batch)]
    assert {fqn: float(a) for fqn, a in amax.items() if fqn != "4"} == {
        "0": max(float(b.abs().max()) for b in batches if len(b)),
        "2": max(float(h.abs().max()) for h in hidden),
    }
    assert not any(module._forward_pre_hooks for module in m.modules())
    recorded = dict(amax)
    m(100 * torch.randn(4, 32))
    assert amax == recorded
    quantize_(m, STATIC(activation_amax=amax), strict=True)
    for i in (0, 2, 4):
        assert float(m[i].input_scale) == float((448 / amax[str(i)].double()).float())


@pytest.mark.parametrize("ran_before", [True, False])
def test_calibration_of_a_compiled_model(ran_before: bool) -> None:
    m: Any = torch.compile(model(), fullgraph=True)
    with torch.inference_mode():
        if ran_before:
            m(torch.randn(4, 32))
        with calibrate(m) as amax:
            x = torch.randn(4, 32)
            m(x)
    assert amax.keys() == {"0", "2", "4"}
    assert float(amax["0"]) == float(x.abs().max())


def test_calibration_takes_keywords_and_ends_on_an_error() -> None:
    linear = nn.Linear(32, 16)
    with pytest.raises(ValueError, match="a bad batch"), calibrate(linear) as amax:  # noqa: PT012
        linear(input=torch.ones(2, 32))
        raise ValueError("a bad batch")
    assert float(amax[""]) == 1
    assert not linear._forward_pre_hooks


@torch.inference_mode()
def test_static_scales_are_dynamic_ones_of_the_data_calibrated_with() -> None:
    static, x = model(), torch.randn(6, 32)
    dynamic = copy.deepcopy(static)
    with calibrate(static) as amax:
        static(x)
    quantize_(static, STATIC(activation_amax={"0": amax["0"]}), lambda _, fqn: fqn == "0")
    quantize_(dynamic, DYNAMIC(), lambda _, fqn: fqn == "0")
    assert torch.equal(static(x), dynamic(x))


@torch.inference_mode()
def test_beyond_the_calibrated_range_static_scales_saturate() -> None:
    linear = nn.Linear(32, 16, bias=False)
    quantize_(linear, STATIC(activation_amax=2.0))
    x = torch.randn(4, 32).sign() * 2
    assert torch.equal(linear(10 * x), linear(x))


def test_a_layer_that_calibration_did_not_see_is_left_out() -> None:
    report = quantize_(model(), STATIC(activation_amax={"0": 1.0, "4": torch.tensor(2.0)}))
    assert report.quantized == ("0", "4")
    assert report.left_out == {"2": "has no activation_amax (did not run in calibration)"}


# ---- what cannot be, and what is refused


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


KINDS = (
    *("narrow", "odd", "empty", "subclass", "patched", "meta", "double", "complex", "normed", "pruned"),
    *("tensor subclass", "lazy", "float8"),
)


def left_out_layers() -> dict[str, tuple[nn.Module, str]]:
    patched = nn.Linear(32, 32)
    patched.forward = lambda input: input  # type: ignore[method-assign]
    subclass = nn.Linear(32, 32)
    subclass.weight = nn.Parameter(subclass.weight.detach().as_subclass(type("Fancy", (Tensor,), {})))
    float8 = nn.Linear(32, 32)
    float8.weight = nn.Parameter(float8.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return {
        "narrow": (nn.Linear(128, 1), "128 -> 1 features: float8 matmuls need multiples of 16"),
        "odd": (nn.Linear(100, 32), "100 -> 32 features: float8 matmuls need multiples of 16"),
        "empty": (nn.Linear(16, 0), "16 -> 0 features: its weight is empty"),
        "subclass": (OwnForward(32, 32), "is a OwnForward with a forward of its own"),
        "patched": (patched, "its forward was replaced on the instance"),
        "meta": (nn.Linear(32, 32, device="meta"), "its weight is on the meta device"),
        "double": (nn.Linear(32, 32).double(), "its weight is torch.float64, not bfloat16, float16 or float32"),
        "complex": (
            nn.Linear(32, 32, dtype=torch.complex64),
            "its weight is torch.complex64, not a high-precision dtype",
        ),
        "normed": (
            nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)),
            "its weight is computed from other tensors",
        ),
        "pruned": (prune.identity(nn.Linear(32, 32), "weight"), "its weight is computed from other tensors"),
        "float8": (float8, "its weight is torch.float8_e4m3fn, not a high-precision dtype"),
        "tensor subclass": (subclass, "its weight is a Fancy, not a plain tensor"),
        "lazy": (nn.LazyLinear(32), "its weight is not initialized yet; run a batch"),
    }


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_quantized_is_left_out_with_its_reason(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    layer, reason = left_out_layers()[kind]
    m = nn.ModuleDict({"a": nn.Linear(16, 16), "b": layer})
    kept = type(layer), dict(layer._parameters)

    with pytest.raises(ValueError, match=rf"^cannot be quantized: b: {re.escape(reason)}.*exclude them by filter_fn"):
        quantize_(m, DYNAMIC(), strict=True)
    assert type(m["a"]) is nn.Linear  # nothing happened
    with pytest.raises(ValueError, match=rf"nothing to quantize in {type(layer).__name__}.*{re.escape(reason)}"):
        quantize_(layer, DYNAMIC())

    with caplog.at_level(logging.INFO, logger="titanlite.float8"):
        report = quantize_(m, DYNAMIC())
    assert report.quantized == ("a",)
    assert report.left_out.keys() == {"b"}
    assert report.left_out["b"].startswith(reason)
    assert (type(layer), dict(layer._parameters)) == kept
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "quantized 1 of 2 linear layers to float8 (PerTensor() weights); not b: " + report.left_out["b"]
    )


def test_a_sharded_weight_is_left_out() -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        m = model()
        m[0].weight = nn.Parameter(distribute_tensor(m[0].weight.detach(), init_device_mesh("cpu", (1,))))
        assert quantize_(m, DYNAMIC()).left_out == {"0": "its weight is a DTensor, not a plain tensor"}
    finally:
        dist.destroy_process_group()


def test_weight_only_takes_any_shape() -> None:
    m = nn.Sequential(nn.Linear(20, 7), nn.Linear(7, 1))
    x = torch.randn(3, 20)
    wanted = m(x)
    quantize_(m, Float8WeightOnlyConfig(), strict=True)
    assert sqnr_db(m(x), wanted) > 20


def test_the_filter_is_asked_for_each_linear_layer_and_strict_does_not_mind_its_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    m = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    asked = []

    def filter_fn(module: nn.Module, fqn: str) -> bool:
        asked.append((module, fqn))
        return fqn == "0"

    with caplog.at_level(logging.INFO, logger="titanlite.float8"):
        report = quantize_(m, DYNAMIC(granularity=PerRow()), filter_fn, strict=True)
    assert asked == [(m[0], "0"), (m[2], "2")]
    assert report.quantized == ("0",)
    assert report.left_out == {}
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [
        (logging.INFO, "quantized 1 of 2 linear layers to float8 (PerRow() weights)")
    ]


def test_layers_can_be_quantized_in_turn_but_none_twice() -> None:
    m = model()
    quantize_(m, DYNAMIC(granularity=PerRow()), lambda _, fqn: fqn == "0")
    state = {k: t.clone() for k, t in m.state_dict().items()}
    with pytest.raises(ValueError, match=r"\['0'\] are quantized already.*exclude them by filter_fn"):
        quantize_(m, Float8WeightOnlyConfig())
    assert all(torch.equal(t, state[k]) for k, t in m.state_dict().items())
    quantize_(m, Float8WeightOnlyConfig(), lambda _, fqn: fqn != "0")
    assert [m[i].casts_input for i in (0, 2, 4)] == [True, False, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DYNAMIC(granularity=PerRow), r"must be titanlite.float8's PerTensor\(\) or PerRow\(\), or a pair"),
        (lambda: DYNAMIC(granularity=(PerRow(), PerTensor())), r"granularity=\(PerRow\(\), PerTensor\(\)\)\): must be"),
        (lambda: DYNAMIC(granularity="row"), "granularity='row'"),
        (lambda: DYNAMIC(granularity=PerRow(0)), r"PerRow\(dim=0\): must be -1"),
        (lambda: DYNAMIC(version=1), "version=1.*must be 2: titanlite has no other"),
        (lambda: DYNAMIC(packing_format="sparse"), "packing_format='sparse'"),
        (lambda: DYNAMIC(kernel_preference="mslk"), "kernel_preference='mslk'"),
        (lambda: DYNAMIC(weight_dtype=torch.int8), "weight_dtype=torch.int8.*must be one of torch.float8_e4m3fn"),
        (lambda: DYNAMIC(torch.float8_e5m2, torch.float8_e5m2), "weight_dtype=torch.float8_e5m2.*must be an e4m3"),
        (lambda: STATIC(), "needs activation_amax or act_quant_scale"),
        (lambda: Float8WeightOnlyConfig(granularity="row"), "granularity='row'"),
        (
            lambda: Float8WeightOnlyConfig(granularity=(PerRow(), PerRow())),
            r"must be titanlite.float8's PerTensor\(\) or PerRow\(\)$",
        ),
        (lambda: STATIC(activation_amax=0), "activation_amax=0: must be one positive finite number"),
        (lambda: STATIC(activation_amax=-1.0), "activation_amax=-1.0"),
        (lambda: STATIC(activation_amax="2,5"), "activation_amax='2,5'"),
        (lambda: STATIC(activation_amax=torch.ones(2)), r"activation_amax=tensor\(\[1., 1.\]\)"),
        (lambda: STATIC(activation_amax={"a.b": float("nan")}), "activation_amax of 'a.b': nan: must be"),
        (lambda: STATIC(activation_amax={"a": 1.0, "b": torch.tensor(float("inf"))}), "activation_amax of 'b'"),
        (lambda: STATIC(activation_amax={}), "names no layer; run batches"),
        (lambda: STATIC(activation_amax=1.0, granularity=(PerRow(), PerRow())), "granularity"),
    ],
)
def test_configurations_without_meaning(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_configurations_compare_and_do_not_change() -> None:
    assert (
        DYNAMIC(granularity=(PerRow(), PerRow()))
        == DYNAMIC(granularity=[PerRow(), PerRow()])
        == DYNAMIC(granularity=PerRow())
    )  # type: ignore[arg-type]
    assert Float8WeightOnlyConfig() == Float8WeightOnlyConfig(granularity=PerRow())
    measured = {"0": torch.tensor(2.0)}
    config = STATIC(activation_amax=measured)
    measured["0"].fill_(7)
    measured["1"] = torch.tensor(1.0)
    assert config.activation_amax == {"0": 2.0}
    with pytest.raises(AttributeError):
        config.granularity = PerRow()  # type: ignore[misc]


def test_models_and_arguments_without_meaning() -> None:
    with pytest.raises(ValueError, match="nothing to quantize in ReLU: of its 0 linear layers"):
        quantize_(nn.ReLU(), DYNAMIC())
    with pytest.raises(
        ValueError, match="nothing to quantize in Sequential: of its 3 linear layers, filter_fn excluded 3"
    ):
        quantize_(model(), DYNAMIC(), lambda module, fqn: False)
    with pytest.raises(TypeError, match=r"config=.*PerRow.*: must be one of titanlite.float8's"):
        quantize_(model(), PerRow())  # type: ignore[arg-type]
    m = model()
    with pytest.raises(
        ValueError, match=r"activation_amax of \['1', 'typo'\]: no such linear layers; the model has \['0'"
    ):
        quantize_(m, STATIC(activation_amax={"0": 1.0, "1": 1.0, "typo": 1.0}))
    assert type(m[0]) is nn.Linear


@every_config
def test_inputs_without_meaning(config: QuantizationConfig) -> None:
    linear = nn.Linear(32, 16)
    quantize_(linear, config)
    for dtype in (torch.int64, torch.float64):
        with pytest.raises(TypeError, match=f"input of {dtype}: must be bfloat16, float16 or float32"):
            linear(torch.ones(2, 32, dtype=dtype))
    for shape in ((2, 20), (2, 64), ()):
        with pytest.raises(ValueError, match=rf"input of shape {re.escape(str(shape))}: the last dimension must be 32"):
            linear(torch.ones(shape))


def test_the_weight_of_a_quantized_layer() -> None:
    """It has the shape and dtype that programs ask for, and nothing computes with its numbers without their scale."""
    linear = nn.Linear(32, 16).bfloat16()
    original = linear.weight.detach()
    quantize_(linear, STATIC(activation_amax=1.0))
    weight = linear.weight
    assert (weight.shape, weight.dtype, weight.device) == ((16, 32), torch.bfloat16, original.device)
    assert weight.qdata.dtype == torch.float8_e4m3fn
    assert sqnr_db(weight.dequantize(), original) > 25
    assert not list(linear.parameters())[1:]
    with pytest.raises(NotImplementedError, match="only quantized layers compute with it"):
        F.linear(torch.ones(2, 32, dtype=torch.bfloat16), weight)
    assert linear.float().weight.dtype == torch.float32
    assert repr(linear) == (
        "Float8InferenceLinear(in_features=32, out_features=16, bias=True, weight=torch.float8_e4m3fn PerTensor(), "
        "input=static)"
    )
