"""The cast kernel of mxfp8: against the plain formulas and torchao, in Triton's interpreter or on a GPU; in layers; by
the bytes it moves; and compiled ahead of time."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from tests.support.compiler import compiles
from tests.unit.float8.interpreted import exact_conversions
from tests.unit.float8.test_float8_kernels import DEVICE, Traffic, matrix
from tests.unit.float8.test_float8_oracle import step, values
from titanlite.quant.format import WEIGHT, Operand, Use
from titanlite.quant.linear import QuantLinear
from titanlite.quant.mx import kernels
from titanlite.quant.mx.format import MXFormat
from titanlite.quant.mx.numerics import BLOCK, ScaleMode, dequantize

MODES: tuple[ScaleMode, ...] = ("floor", "rceil")
each_mode = pytest.mark.parametrize("mode", MODES)
LAYOUTS = [(True, True), (True, False), (False, True)]


@pytest.fixture(scope="module", autouse=True)
def as_on_a_gpu() -> Iterator[None]:
    with exact_conversions():
        yield


def check(x: Tensor, mode: ScaleMode, by_rows: bool, by_columns: bool) -> None:
    result = kernels.cast_by_kernel(x.to(DEVICE), mode, by_rows, by_columns)
    compare(result, kernels.cast(x, mode, by_rows, by_columns))


def compare(result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip((t.cpu() for t in result), expected, strict=True):
        assert (a.shape, a.dtype, a.is_contiguous()) == (b.shape, b.dtype, True)
        same = (a.view(torch.uint8) == b.view(torch.uint8)) | (a.float().isnan() & b.float().isnan())
        assert same.all(), f"{(~same).sum()} of {same.numel()} differ"


@each_mode
@pytest.mark.parametrize(("by_rows", "by_columns"), LAYOUTS)
def test_casts_are_the_formulas(mode: ScaleMode, by_rows: bool, by_columns: bool) -> None:
    torch.manual_seed(0)
    for shape, dtype in [((130, 288), torch.bfloat16), ((1, 32), torch.float32), ((67, 33), torch.float16)]:
        check(matrix(*shape).clamp(-60000, 60000).to(dtype), mode, by_rows, by_columns)
    x = matrix(96, 160)
    check(x[::2, 32:96], mode, by_rows, by_columns)
    check(x.t(), mode, by_rows, by_columns)


@each_mode
def test_casts_of_extremes(mode: ScaleMode) -> None:
    """NaN and infinities, zeros of both signs, subnormals, and the largest numbers."""
    x = matrix(70, 96, torch.float32)
    x[3], x[:, 5], x[11], x[12] = 0, -0.0, 3.4e38, 1e-40
    x[33, 40], x[65, 1], x[2, 95] = math.nan, math.inf, -math.inf
    check(x, mode, True, True)
    rounded = kernels.cast_rows_by_kernel(x.to(DEVICE), mode, torch.bfloat16)
    compare(rounded, kernels.cast_rows(x.bfloat16(), mode))


@each_mode
def test_what_was_gathered_is_cast_again_as_a_copy_would_be(mode: ScaleMode) -> None:
    """From any bytes, with exponents of all values: the bits of the cast of a float32 copy."""
    torch.manual_seed(0)
    for m, n in ((256, 96), (70, 160), (1, 32)):
        data = torch.randint(0, 256, (m, n), dtype=torch.uint8).view(torch.float8_e4m3fn)
        data = torch.where(torch.rand(m, n) < 0.01, data.float(), data.float().nan_to_num()).to(data.dtype)
        exponents = torch.arange(m * n // BLOCK).view(m, n // BLOCK).remainder(256).to(torch.uint8)
        for operand in ((data, exponents), kernels.cast_rows(matrix(m, n), mode)):
            on_device = (t.to(DEVICE) for t in operand)
            expected = kernels.cast(dequantize(*operand), mode, False, True)[2:]
            compare(kernels.recast_by_kernel(*on_device, mode), expected)
            compare(kernels.recast(*operand, mode), expected)


@each_mode
def test_scales_of_all_exponents(mode: ScaleMode) -> None:
    """Just below, at, and just above each power of two, subnormals included, and each 1.75 times that."""
    powers = torch.ldexp(torch.ones(276, dtype=torch.float64), torch.arange(-149, 127)).float()
    turns = torch.cat([powers, powers * 1.75]).clamp(max=torch.finfo(torch.float32).max)
    amaxes = torch.cat([turns, *(turns.nextafter(torch.tensor(to)) for to in (0.0, math.inf))])
    check(amaxes[:, None].expand(-1, BLOCK).contiguous(), mode, True, False)


@each_mode
@pytest.mark.parametrize("shape", [(128, 128), (96, 64), (256, 160)])
def test_bytes_are_torchaos(mode: ScaleMode, shape: tuple[int, int]) -> None:
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.utils import to_blocked

    torch.manual_seed(0)
    x = torch.randn(shape) * torch.exp(torch.randn(shape[0], 1))
    result = [t.cpu() for t in kernels.cast_by_kernel(x.to(DEVICE), mode, True, True)]
    for data, exponents, source in ((*result[:2], x), (*result[2:], x.t().contiguous())):
        their_scale, their_data = mx.to_mx(source, torch.float8_e4m3fn, BLOCK, ScaleCalculationMode(mode))
        assert torch.equal(data.view(torch.uint8), their_data.view(torch.uint8))
        assert torch.equal(exponents, to_blocked(their_scale.view(torch.uint8)).flatten())


# ---- layers


def unswizzled(exponents: Tensor, rows: int, blocks: int) -> Tensor:
    """Read each scale from where cuBLAS says that it lies."""
    row, block = torch.arange(rows)[:, None], torch.arange(blocks)[None, :]
    tile = row // 128 * -(-blocks // 4) + block // 4
    return exponents[tile * 512 + row % 32 * 16 + row // 32 % 4 * 4 + block % 4]


def units(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The matmul of sm_100, with its demands on memory."""
    assert a.is_contiguous()
    assert b.t().is_contiguous()
    scaled = []
    for data, scale in ((a, scale_a), (b.t(), scale_b)):
        blocks = data.shape[1] // BLOCK
        assert scale.dtype is torch.float8_e8m0fnu
        assert scale.numel() == 512 * -(-len(data) // 128) * -(-blocks // 4)
        scaled.append(dequantize(data, unswizzled(scale.view(torch.uint8), len(data), blocks)))
    return (scaled[0] @ scaled[1].t()).to(out_dtype)


@pytest.mark.skipif(DEVICE == "cuda", reason="tests/gpu has them on the GPU")
@pytest.mark.parametrize("grad_weight", [True, False])
@pytest.mark.parametrize("interpreted", [False, True])
@pytest.mark.parametrize(("tokens", "dtype"), [(64, torch.float32), (19, torch.bfloat16)])
def test_layers(
    grad_weight: bool, interpreted: bool, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On sm_100 a layer gives what emulation gives, and casts each activation once."""
    casts: list[tuple[bool, bool]] = []

    def cast(x: Tensor, mode: ScaleMode, *layouts: bool) -> Any:
        casts.append(layouts)  # type: ignore[arg-type]
        return kernels.cast_by_kernel(x, mode, *layouts)

    monkeypatch.setattr(torch, "_scaled_mm", units)
    if interpreted:
        monkeypatch.setattr(kernels, "cast", cast)
    linear = nn.Linear(64, 96, dtype=dtype)
    x, grad = values("outliers", tokens, 64).to(dtype), values("random", tokens, 96).to(dtype)
    x[3, 5] = math.nan
    results = [
        step(nn.Sequential(QuantLinear.from_linear(copy.deepcopy(linear), format)), x, grad)
        for format in (
            MXFormat(grad_weight=grad_weight, target="sm_100"),
            MXFormat(grad_weight=grad_weight, emulate=True),
        )
    ]
    for name, expected in results[1].items():
        assert torch.equal(results[0][name].nan_to_num(-7), expected.nan_to_num(-7)), name
    if interpreted:
        both = (True, grad_weight)
        assert casts == [both, (True, False), both, (False, True)]


@each_mode
def test_gathered_operands(mode: ScaleMode, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ranks gather is joined by rows, and then computes on sm_100 what the whole tensor computes."""
    monkeypatch.setattr(torch, "_scaled_mm", units)
    x, w = values("outliers", 40, 64), values("outliers", 96, 64)
    x[3, 5] = math.nan
    format = MXFormat(mode, target="sm_100")
    parts = [format.cast_to_gather(part, torch.float32, None) for part in w.split([32, 64])]
    weight = Operand(*map(torch.cat, zip(*parts, strict=True)))  # type: ignore[arg-type]
    tokens = format.quantize(x.view(2, 20, 64), format.amax(x.view(2, 20, 64), "input"), "input")
    left = Operand(*(part.flatten(0, 1) for part in tokens))  # type: ignore[union-attr]
    whole = format.multiply(format.cast(x, Use("input", 1)), format.cast(w, WEIGHT).t(), "output", torch.float32)
    product = format.multiply(format.arrived(left), format.arrived(weight).t(), "output", torch.float32)
    assert torch.equal(product.nan_to_num(-7), whole.nan_to_num(-7))
    values_of_w = dequantize(weight.data, weight.scale)  # type: ignore[arg-type]
    for mine, expected in zip(format.recast(weight, "weight"), format.cast(values_of_w, Use("weight", 0)), strict=True):
        assert torch.equal(mine.view(torch.uint8), expected.view(torch.uint8))  # type: ignore[union-attr]


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", units)
    native = nn.Sequential(QuantLinear.from_linear(nn.Linear(32, 64), MXFormat(target="sm_100")))
    result = step(native, torch.randn(tokens, 32), torch.randn(tokens, 64))
    assert result["output"].shape == (tokens, 64)
    assert result["grad_0.weight"].shape == (64, 32)


@each_mode
def test_shapes_are_known_without_data(mode: ScaleMode) -> None:
    for by_rows, by_columns in LAYOUTS:
        torch.library.opcheck(torch.ops.titanlite_mx.cast.default, (torch.randn(33, 64), mode, by_rows, by_columns))
    gathered = kernels.cast_rows(torch.randn(33, 64), mode)
    without_schema = (
        "test_faketensor",
        "test_autograd_registration",
        "test_aot_dispatch_dynamic",
    )  # needs sums of float8
    torch.library.opcheck(torch.ops.titanlite_mx.recast.default, (*gathered, mode), test_utils=without_schema)


def test_compiled_without_breaks() -> None:
    """As far as the graph: the CPU has no such matmul."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = nn.Sequential(QuantLinear.from_linear(nn.Linear(64, 32), MXFormat(target="sm_100")))
    graphs: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph

    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.compile(model, backend=record, fullgraph=True)(torch.randn(8, 64))
    assert len(graphs) == 1
    assert "titanlite_mx" in graphs[0]


# ---- bytes moved, and compilation


@pytest.mark.skipif(DEVICE == "cuda", reason="counted in the interpreter")
@pytest.mark.parametrize(("by_rows", "by_columns"), LAYOUTS)
def test_bytes_moved(by_rows: bool, by_columns: bool) -> None:
    """Each element is read once, and written once for each layout, with a byte for each 32 of them."""
    x = matrix(256, 384)
    with Traffic() as traffic:
        kernels.cast_by_kernel(x, "rceil", by_rows, by_columns)
    assert traffic.read == 2 * x.numel()
    assert traffic.written == (by_rows + by_columns) * x.numel() * 33 / 32
    with Traffic() as of_shard:  # as FSDP2 gathers it
        kernels.cast_rows_by_kernel(x.float(), "rceil", torch.bfloat16)
    assert (of_shard.read, of_shard.written) == (4 * x.numel(), x.numel() * 33 / 32)
    gathered = kernels.cast_rows(x, "rceil")
    with Traffic() as again:  # along the other dimension
        kernels.recast_by_kernel(*gathered, "rceil")
    assert again.read == again.written == x.numel() * 33 / 32


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_100", "sm_90", "gfx942"])
def test_kernel_compiles(target: str) -> None:
    """Without spills, with accesses of 16 bytes, and with offsets of 64 bits."""
    compiles(Path(__file__).with_name("compile_mx_kernels.py"), target)
