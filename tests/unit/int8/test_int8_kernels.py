"""The kernels of int8 on GPUs: against the plain formulas, in Triton's interpreter or on a GPU; by the bytes they move;
and compiled ahead of time."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from tests.support.compiler import compiles
from tests.unit.float8.interpreted import exact_conversions
from tests.unit.float8.test_float8_kernels import DEVICE, NONE, VECTOR, Traffic, check, matrix
from tests.unit.float8.test_float8_oracle import step, values
from titanlite.converters.int8 import RECIPES
from titanlite.quant.format import Use
from titanlite.quant.int8 import gpu
from titanlite.quant.int8.cpu import MULTIPLY
from titanlite.quant.int8.format import Int8Format
from titanlite.quant.int8.numerics import LONGEST, rescale
from titanlite.quant.kernels import launch, reference
from titanlite.quant.linear import QuantLinear

each_layout = pytest.mark.parametrize(("by_rows", "by_columns"), [(VECTOR, VECTOR), (VECTOR, NONE), (NONE, VECTOR)])
TILES = (gpu.Tile(64, 64, 32, 4, 2), gpu.Tile(32, 32, 32, 4, 2))


@pytest.fixture(scope="module", autouse=True)
def as_on_a_gpu() -> Iterator[None]:
    with exact_conversions():
        yield


# ---- casts


@each_layout
def test_casts_are_the_formulas(by_rows: str, by_columns: str) -> None:
    torch.manual_seed(0)
    for shape, dtype in [((130, 272), torch.bfloat16), ((1, 8), torch.float32), ((67, 33), torch.float16)]:
        check(matrix(*shape).clamp(-60000, 60000).to(dtype), torch.int8, by_rows, by_columns, False)


@each_layout
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_casts_of_extremes(by_rows: str, by_columns: str, bad: float) -> None:
    """NaN and infinities make their scales NaN. Zeros, subnormals, and the largest numbers have finite ones."""
    x = matrix(16, 40, torch.float32)
    x[3], x[:, 5], x[11] = 0, -0.0, 3.4e38
    x[4], x[13] = torch.full((40,), 1e-40), torch.finfo(torch.float32).smallest_normal
    x[6] = 1e-12 * torch.linspace(0.9, 1.1, 40)
    x[7, 12] = bad
    check(x, torch.int8, by_rows, by_columns, False)
    *_, scale = launch.cast(x.to(DEVICE), torch.int8, NONE, VECTOR, False)
    assert scale.flatten().isnan().nonzero().flatten().tolist() == [12]
    check(x[:, ::2], torch.int8, by_rows, by_columns, False)
    check(x.t(), torch.int8, by_rows, by_columns, False)


def test_halves_are_rounded_to_even_and_once() -> None:
    """At every half step of many scales, and at the neighbours of the half. A product that is rounded to a half is then
    rounded to even. Fused with the rounding, it would be rounded to the side that it was on."""
    torch.manual_seed(0)
    amaxes = torch.cat([torch.tensor([127.0, 127 * 2.0**-20, 1.0]), torch.rand(13) * torch.exp(9 * torch.randn(13))])
    steps = (torch.arange(-127, 127) + 0.5) / 127
    halves = amaxes[:, None] * steps
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    x = torch.cat([amaxes[:, None], halves, halves.nextafter(up), halves.nextafter(down)], 1)
    check(x.t(), torch.int8, NONE, VECTOR, False)


def test_scales_are_divided_exactly() -> None:
    """Of all mantissas of a bfloat16, and random ones of a float32."""
    torch.manual_seed(0)
    amaxes = torch.cat(
        [1 + torch.arange(128) / 128, (1 + torch.rand(900)) * torch.exp2(torch.randint(-39, 127, (900,)))]
    )
    check(amaxes[:, None].expand(-1, 8).contiguous(), torch.int8, VECTOR, NONE, False)


def test_a_shard_is_rounded_as_a_copy_would_be() -> None:
    """As FSDP2 gathers it: the kernel reads float32 once."""
    torch.manual_seed(0)
    x = matrix(40, 48, torch.float32)
    x[3], x[4], x[7, 11], x[9, 1], x[11, 2] = 0, 1e-40, math.nan, math.inf, torch.finfo(torch.float32).max
    empty = torch.empty(0, dtype=torch.int32)
    with Traffic() as traffic:
        data, scale, *_ = launch.cast_with(x.to(DEVICE), empty, torch.int8, VECTOR, NONE, False, None, torch.bfloat16)
    plain, plain_scale, *_ = reference.cast(x.bfloat16(), torch.int8, VECTOR, NONE, False)
    assert torch.equal(scale.cpu().nan_to_num(-1), plain_scale.nan_to_num(-1))
    finite = plain_scale.isfinite().expand_as(plain)
    assert torch.equal(data.cpu()[finite], plain[finite])
    assert DEVICE == "cuda" or traffic.read == 4 * x.numel()


def test_what_was_gathered_is_cast_again_as_a_copy_would_be() -> None:
    """Along the other dimension, from a byte per element: by the kernels, the bits of the cast of a float32 copy. A row
    without a meaning, whose scale is NaN, takes that from all columns."""
    torch.manual_seed(0)
    format = Int8Format(target="sm_90", gathered=("weight",))
    for bad in (1.0, math.nan, math.inf):
        x = matrix(67, 131, torch.float32)
        x[3], x[:, 5], x[4], x[9] = 0, -0.0, 1e-40, 3e38
        x[7, 11] *= bad
        arrived = format.cast(x, Use("weight", 1))
        assert arrived.scale is not None
        expected = format.emulated.recast(arrived, "weight")  # type: ignore[attr-defined]
        on_device = arrived.data.to(DEVICE), arrived.scale.to(DEVICE)
        by_kernel = launch.recast(*on_device, torch.int8, VECTOR, False)
        for data, scale in ((by_kernel[0].t().cpu(), by_kernel[1].cpu()), format.recast(arrived, "weight")):
            assert data.t().is_contiguous()
            assert torch.equal(scale.nan_to_num(-1), expected.scale.nan_to_num(-1))
            assert math.isfinite(bad) == scale.isfinite().all()
            assert torch.equal(data, expected.data) or not math.isfinite(bad)


@pytest.mark.parametrize("by_rows", [VECTOR, NONE])
def test_casts_with_agreed_amaxes(by_rows: str) -> None:
    torch.manual_seed(0)
    x, by_columns = matrix(40, 48), NONE if by_rows == VECTOR else VECTOR
    agreed = x.abs().amax(1 if by_rows == VECTOR else 0).float() * 3
    agreed[5] = math.nan
    args = (x, agreed.view(torch.int32), torch.int8, by_rows, by_columns, False)
    for a, b in zip(launch.cast_with(*args), reference.cast_with(*args), strict=True):
        kept = torch.arange(len(agreed)) != 5
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(*(t[kept] if t.dtype is torch.int8 and t.numel() else t.nan_to_num(-1) for t in (a, b)))


# ---- matmuls


def product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, processors: int = 1) -> Tensor:
    operands = (t.to(DEVICE) for t in (a, a_scale, b, b_scale))
    return gpu.multiply_by_kernel(*operands, dtype, TILES, processors).cpu()


def integers(m: int, n: int) -> Tensor:
    return torch.randint(-127, 128, (m, n), dtype=torch.int8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("m", "k", "n"), [(64, 96, 64), (70, 40, 56), (1, 8, 8), (66, 144, 40), (3, 17, 5), (9, 32, 320)]
)
def test_products_are_exact(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b, a_scale, b_scale = integers(m, k), integers(n, k).t(), torch.rand(m, 1), torch.rand(1, n)
    a[0], b[:, 0] = 127, -127
    a_scale[m // 2] = math.nan
    expected = rescale(a.int() @ b.int(), a_scale, b_scale, dtype)
    for processors in (1, 1000):  # the largest tile, and the smallest
        result = product(a, a_scale, b, b_scale, dtype, processors)
        assert (result.shape, result.dtype) == ((m, n), dtype)
        assert torch.equal(result.nan_to_num(-1), expected.nan_to_num(-1))
        assert torch.equal(result.isnan(), expected.isnan())


def test_products_of_any_layout() -> None:
    """Slices along the sum, as of long sums, and operands whose sums are not contiguous."""
    torch.manual_seed(0)
    a, b, scales = integers(48, 128), integers(128, 40), (torch.rand(48, 1), torch.rand(1, 40))
    for left, right in (
        (a, b),
        (a[:, 32:64], b.t().contiguous().t()[32:64]),
        (a[:, 3:51], b[3:51]),
        (a.t().contiguous().t(), b),
        (a[::2], b),
    ):
        scale = scales[0][: len(left)]
        expected = rescale(left.int() @ right.int(), scale, scales[1], torch.float32)
        assert torch.equal(product(left, scale, right, scales[1], torch.float32), expected)


# ---- layers


@pytest.fixture
def interpreted() -> Iterator[list[str]]:
    """The kernels on the CPU; yields what was launched."""
    launched: list[str] = []

    def cast(*args: object) -> object:
        launched.append("cast")
        return launch.cast_with(*args)  # type: ignore[arg-type]

    def multiply(*args: object) -> object:
        launched.append("multiply")
        return gpu.multiply_by_kernel(*args, TILES, 1)  # type: ignore[arg-type]

    with (
        torch.library._scoped_library("titanlite_quant", "IMPL") as casts,
        torch.library._scoped_library("titanlite_int8", "IMPL") as matmuls,
    ):
        casts.impl("amaxes", launch.amaxes, "CPU", allow_override=True)
        casts.impl("cast", cast, "CPU", allow_override=True)
        matmuls.impl("multiply", multiply, "CPU", allow_override=True)
        yield launched


def layer(linear: nn.Linear, recipe: str, target: str | None) -> nn.Module:
    return nn.Sequential(QuantLinear.from_linear(copy.deepcopy(linear), Int8Format(RECIPES[recipe], target=target)))


@pytest.mark.skipif(DEVICE == "cuda", reason="tests/gpu has them on the GPU")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("tokens", "dtype"), [(48, torch.float32), (19, torch.bfloat16)])
def test_layers(recipe: str, tokens: int, dtype: torch.dtype, interpreted: list[str]) -> None:
    """The kernels give a layer what emulation gives it, and each operand is cast once for both of its matmuls."""
    linear = nn.Linear(40, 56, dtype=dtype)
    x, grad = values("outliers", tokens, 40).to(dtype), values("random", tokens, 56).to(dtype)
    x[3, 5] = math.nan
    result = step(layer(linear, recipe, "sm_90"), x, grad)
    matmuls = len(RECIPES[recipe])
    # The weight's two layouts are cast when each is needed.
    assert (interpreted.count("cast"), interpreted.count("multiply")) == ({3: 4, 2: 4, 1: 2}[matmuls], matmuls)
    emulated = nn.Sequential(QuantLinear.from_linear(copy.deepcopy(linear), Int8Format(RECIPES[recipe], emulate=True)))
    for name, expected in step(emulated, x, grad).items():
        assert torch.equal(result[name].nan_to_num(-7), expected.nan_to_num(-7)), name


@pytest.mark.skipif(DEVICE == "cuda", reason="tests/gpu has them on the GPU")
def test_compiled_without_breaks() -> None:
    linear = nn.Linear(64, 48, bias=False)
    x, grad = values("random", 32, 64), values("random", 32, 48)
    compiled = layer(linear, "rowwise", "sm_90")
    compiled.compile(fullgraph=True, backend="aot_eager")
    expected, result = step(layer(linear, "rowwise", "sm_90"), x, grad), step(compiled, x, grad)
    for name in expected:
        assert torch.equal(result[name], expected[name]), name


def test_what_multiplies_where(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "torch._int_mm" in gpu.choice("sm_75")
    assert "torch._int_mm" not in gpu.choice("sm_80") + gpu.choice("gfx942")
    monkeypatch.setattr(gpu.kernels, "AVAILABLE", False)
    assert "torch._int_mm" in gpu.choice("sm_90")


def test_shapes_are_known_without_data() -> None:
    a, b = integers(16, 32), integers(24, 32).t()
    torch.library.opcheck(MULTIPLY, (a, torch.rand(16, 1), b, torch.rand(1, 24), torch.bfloat16))


# ---- bytes moved


@pytest.mark.skipif(DEVICE == "cuda", reason="counted in the interpreter")
@pytest.mark.parametrize(
    ("by_rows", "by_columns", "read", "written"), [(VECTOR, NONE, 2, 1), (NONE, VECTOR, 4, 1), (VECTOR, VECTOR, 4, 2)]
)
def test_bytes_moved_by_casts(by_rows: str, by_columns: str, read: int, written: int) -> None:
    x = matrix(256, 512)
    with Traffic() as traffic:
        launch.cast(x, torch.int8, by_rows, by_columns, False)
    with Traffic() as again:
        launch.recast(x.char(), torch.ones(256, 1), torch.int8, VECTOR, False)
    assert 2 <= again.read / x.numel() <= 2.12
    assert 1 <= again.written / x.numel() <= 1.02
    assert read <= traffic.read / x.numel() <= read * 1.05
    assert written <= traffic.written / x.numel() <= written * 1.05


@pytest.mark.skipif(DEVICE == "cuda", reason="counted in the interpreter")
def test_bytes_moved_by_matmuls() -> None:
    """Each operand is read once for each row or column of tiles; the product is written once, in its final dtype."""
    m, k, n = 128, 64, 192
    with Traffic() as traffic:
        product(integers(m, k), torch.rand(m, 1), integers(n, k).t(), torch.rand(1, n), torch.bfloat16)
    across, down = n // TILES[0].columns, m // TILES[0].rows
    assert traffic.written == 2 * m * n
    assert traffic.read == m * k * across + n * k * down + 4 * (m * across + n * down)


def test_long_sums_are_not_copied_they_overflow() -> None:
    """The kernel multiplies slices of operands that are longer than int32 holds."""
    a = torch.full((8, LONGEST + 64), 127, dtype=torch.int8)
    for part in a.split(LONGEST, 1):
        assert gpu._aligned(part).data_ptr() == part.data_ptr()


# ---- compiled for GPUs that are not here


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_90", "gfx942"])
def test_kernels_compile(target: str) -> None:
    """Without spills, with accesses of 16 bytes, and with offsets of 64 bits; on sm_75 the casts."""
    compiles(Path(__file__).with_name("compile_int8_kernels.py"), target)
