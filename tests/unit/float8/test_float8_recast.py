"""The cast of what was gathered with scales of rows, along its other dimension: by the kernels, the bits that the cast
of a float32 copy would have."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from tests.unit.float8.interpreted import exact_conversions
from tests.unit.float8.test_float8_kernels import DEVICE, Traffic
from titanlite.float8 import Float8LinearConfig
from titanlite.quant.float8.casts import CastConfig, ScalingGranularity
from titanlite.quant.float8.matmul import cast
from titanlite.quant.float8.numerics import FP8_DTYPES, amax_of, amax_to_scale, dequantize, quantize
from titanlite.quant.format import Operand, Use
from titanlite.quant.kernels import launch

GRANULARITIES = {"tensor": ScalingGranularity.TENSORWISE, "vector": ScalingGranularity.AXISWISE}
each_layout = pytest.mark.parametrize("layout", GRANULARITIES)
each_power = pytest.mark.parametrize("power_of_2", [False, True])


@pytest.fixture(scope="module", autouse=True)
def as_on_a_gpu() -> Iterator[None]:
    with exact_conversions():
        yield


def by_rows(x: Tensor, dtype: torch.dtype, power_of_2: bool) -> tuple[Tensor, Tensor]:
    scale = amax_to_scale(amax_of(x, 1), dtype, power_of_2)
    return quantize(x, scale, dtype), scale


def check(data: Tensor, scale: Tensor, dtype: torch.dtype, layout: str, power_of_2: bool) -> None:
    """Compare with the plain cast of a float32 copy."""
    config = CastConfig(scaling_granularity=GRANULARITIES[layout], target_dtype=dtype)
    expected = cast(dequantize(data, scale), config, contracted=0, power_of_2=power_of_2, emulate=True)
    on_device = data.to(DEVICE), scale.to(DEVICE)
    transposed, new_scale = (t.cpu() for t in launch.recast(*on_device, dtype, layout, power_of_2))
    assert transposed.is_contiguous()
    assert expected.scale is not None
    assert (transposed.t().shape, transposed.dtype) == (expected.data.shape, expected.data.dtype)
    assert (new_scale.shape, new_scale.dtype) == (expected.scale.shape, torch.float32)
    for a, b, bits in ((transposed.t(), expected.data, torch.uint8), (new_scale, expected.scale, torch.int32)):
        same = (a.contiguous().view(bits) == b.contiguous().view(bits)) | (a.float().isnan() & b.float().isnan())
        assert same.all(), f"{(~same).sum()} of {same.numel()} differ"


def adversarial(m: int, n: int) -> Tensor:
    """Rows of very different magnitudes; zeros, subnormals, the largest numbers."""
    x = torch.randn(m, n) * torch.exp(12 * torch.randn(m, 1))
    x[0], x[1], x[:, 2] = 0.0, -0.0, 0.0
    x[2] = torch.finfo(torch.float32).tiny / 8
    x[3] *= torch.finfo(torch.float32).max / x[3].abs().max().clamp(min=1e-12) / 2
    return x


@each_layout
@each_power
@pytest.mark.parametrize(
    ("arrived", "dtype"), [(d, d) for d in FP8_DTYPES] + [(torch.float8_e4m3fn, torch.float8_e5m2)], ids=str
)
def test_it_is_the_cast_of_a_copy(arrived: torch.dtype, dtype: torch.dtype, layout: str, power_of_2: bool) -> None:
    torch.manual_seed(0)
    for shape in ((67, 131), (64, 256), (4, 3)):
        check(*by_rows(adversarial(*shape), arrived, power_of_2), dtype, layout, power_of_2)


@each_layout
@each_power
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_nothing_finite_is_made_of_nans_and_infinities(bad: float, layout: str, power_of_2: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 48)
    x[7, 11] = bad
    data, scale = by_rows(x, torch.float8_e4m3fn, power_of_2)
    check(data, scale, torch.float8_e4m3fn, layout, power_of_2)
    if not math.isfinite(bad):
        transposed, _ = launch.recast(data.to(DEVICE), scale.to(DEVICE), torch.float8_e4m3fn, layout, power_of_2)
        assert transposed.cpu().float()[11, 7].isnan()


@each_layout
@pytest.mark.parametrize("arrived", FP8_DTYPES, ids=str)
def test_every_byte(arrived: torch.dtype, layout: str) -> None:
    """All 256 bytes of each dtype, with scales that no cast would have chosen, in a slice of a wider matrix."""
    torch.manual_seed(0)
    data = torch.arange(256, dtype=torch.uint8).view(8, 32).repeat(2, 2)[:, :40].view(arrived)
    scale = torch.exp(40 * torch.randn(16, 1))
    scale[3], scale[4] = math.nan, 0.0
    check(data, scale, torch.float8_e4m3fn, layout, False)
    check(data, scale[5], torch.float8_e4m3fn, layout, False)


@settings(max_examples=40, deadline=None)
@given(
    st.binary(min_size=4, max_size=36),
    st.lists(st.floats(width=32, min_value=0), min_size=4, max_size=4),
    st.sampled_from(list(itertools.product(FP8_DTYPES[:2], GRANULARITIES))),
)
def test_any_bytes_and_scales(values: bytes, scales: list[float], case: tuple[torch.dtype, str]) -> None:
    data = torch.frombuffer(bytearray(values[: len(values) // 4 * 4]), dtype=torch.uint8).view(4, -1)
    check(data.view(case[0]), torch.tensor(scales).view(4, 1), case[0], case[1], False)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(width=32), min_size=4, max_size=24), st.sampled_from(FP8_DTYPES), st.booleans())
def test_any_float(values: list[float], dtype: torch.dtype, power_of_2: bool) -> None:
    x = torch.tensor(values[: len(values) // 4 * 4]).view(4, -1)
    check(*by_rows(x, dtype, power_of_2), dtype, "vector", power_of_2)


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_with_gw_hp"])
@pytest.mark.parametrize("shape", [(33, 130), (0, 16), (16, 0)], ids=str)
def test_a_weight_that_was_gathered(recipe: str, shape: tuple[int, int]) -> None:
    """By the format: the kernels' operator where they cast, and the same operand where plain operations do."""
    torch.manual_seed(0)
    config = Float8LinearConfig.from_recipe_name(recipe)
    native, plain, fused = (
        dataclasses.replace(config, **options).format
        for options in ({"target": "sm_90"}, {"emulate": True}, {"target": "sm_90", "kernels": "inductor"})
    )
    w = torch.randn(shape)
    arrived = native.cast(w, Use("weight", 1))
    expected = plain.recast(arrived, "weight")
    for format in (native, fused):
        mine = format.recast(arrived, "weight")
        assert mine.data.t().is_contiguous() or format is fused
        assert torch.equal(mine.data.float(), expected.data.float())
        assert mine.scale is not None
        assert expected.scale is not None
        assert torch.equal(mine.scale, expected.scale)
        assert mine.scale.ndim == (2 if recipe == "rowwise" else 0)


def test_one_scale_for_the_tensor_stays() -> None:
    format = Float8LinearConfig.from_recipe_name("tensorwise").format
    arrived = Operand(torch.randn(4, 4).to(torch.float8_e4m3fn), torch.tensor(2.0))
    assert format.recast(arrived, "weight") is arrived


@each_layout
def test_the_shapes_are_known_without_data(layout: str) -> None:
    data, scale = by_rows(torch.randn(33, 64), torch.float8_e4m3fn, True)
    without_schema = (
        "test_faketensor",
        "test_autograd_registration",
        "test_aot_dispatch_dynamic",
    )  # needs sums of float8
    operator = torch.ops.titanlite_quant.recast.default
    torch.library.opcheck(operator, (data, scale, data.dtype, layout, True), test_utils=without_schema)


@pytest.mark.skipif(DEVICE == "cuda", reason="counted in the interpreter")
@each_layout
def test_bytes_per_element(layout: str) -> None:
    data, scale = by_rows(torch.randn(256, 512), torch.float8_e4m3fn, True)
    with Traffic() as traffic:
        launch.recast(data, scale, data.dtype, layout, True)
    # Once for the amaxes, once for the cast. Each tile reads 4 bytes for the scale of a row and the amax of a column.
    assert 2 <= traffic.read / data.numel() <= 2.12
    assert 1 <= traffic.written / data.numel() <= 1.02
