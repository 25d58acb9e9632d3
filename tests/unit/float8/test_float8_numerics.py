"""Scales and rounding: exactness, bounds, and what happens to what is not a number."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from titanlite.float8 import CastConfig, ScalingGranularity, ScalingType
from titanlite.quant.float8.matmul import cast, scaled_mm
from titanlite.quant.float8.numerics import (
    EPS,
    FP8_DTYPES,
    amax_of,
    amax_to_scale,
    dequantize,
    quantize,
    round_down_to_power_of_2,
)
from titanlite.quant.format import Operand

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MANTISSA = {E4M3: 3, E5M2: 2, torch.float8_e4m3fnuz: 3, torch.float8_e5m2fnuz: 2}


# ---- powers of two


def test_rounding_down_is_exact_over_every_exponent() -> None:
    """Each power of two of float32, subnormal ones too, and its neighbours, against frexp in float64."""
    powers = torch.ldexp(torch.ones(277, dtype=torch.float64), torch.arange(-149, 128)).float()
    assert (powers > 0).all()
    assert torch.isfinite(powers).all()
    below, above = torch.nextafter(powers, torch.tensor(0.0)), torch.nextafter(powers, torch.tensor(math.inf))
    x = torch.cat([powers, below, above, powers * 1.5, torch.tensor([torch.finfo(torch.float32).max])])
    x = x[torch.isfinite(x) & (x > 0)]
    _, exponent = torch.frexp(x.double())
    expected = torch.ldexp(torch.ones_like(x, dtype=torch.float64), exponent - 1).float()
    assert torch.equal(round_down_to_power_of_2(x), expected)
    assert torch.equal(round_down_to_power_of_2(-x), -expected)
    assert torch.equal(round_down_to_power_of_2(powers), powers)


def test_rounding_down_keeps_what_is_no_finite_number() -> None:
    x = torch.tensor([0.0, math.inf, -math.inf, math.nan])
    rounded = round_down_to_power_of_2(x)
    assert torch.equal(rounded[:3], x[:3])
    assert rounded[3].isnan()


@pytest.mark.parametrize("dtype", FP8_DTYPES, ids=str)
def test_powers_of_two_are_divided_by_exactly(dtype: torch.dtype) -> None:
    """Every byte, with every scale that a finite amax can have, and with that of an amax that is none."""
    data = torch.arange(256, dtype=torch.uint8).view(dtype)
    amaxes = torch.cat([torch.ldexp(torch.ones(400), torch.arange(-272, 128)), torch.tensor([math.inf, math.nan, 0.0])])
    scale = amax_to_scale(amaxes[:, None], dtype, power_of_2=True)
    quotients = dequantize(data, scale)
    torch.testing.assert_close(dequantize(data, scale, True), quotients, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=300, deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=0, exclude_min=True))
def test_rounding_down_is_the_largest_power_below(value: float) -> None:
    rounded = round_down_to_power_of_2(torch.tensor(value)).double().item()
    assert math.frexp(rounded)[0] == 0.5
    assert rounded <= value < 2 * rounded


# ---- scales


@pytest.mark.parametrize("dtype", FP8_DTYPES, ids=str)
def test_scale_against_its_formula(dtype: torch.dtype) -> None:
    amax = torch.tensor([1e-30, 0.0, 1e-12, 0.37, 448.0, 3e38])
    expected = [torch.finfo(dtype).max / max(a, EPS) for a in amax.double().tolist()]
    assert torch.equal(amax_to_scale(amax, dtype), torch.tensor(expected, dtype=torch.float64).float())


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(width=32, min_value=0, allow_infinity=False), min_size=2, max_size=2),
    st.booleans(),
    st.sampled_from(FP8_DTYPES),
)
def test_a_larger_amax_never_has_a_larger_scale(amaxes: list[float], power_of_2: bool, dtype: torch.dtype) -> None:
    small, large = amax_to_scale(torch.tensor(sorted(amaxes)), dtype, power_of_2)
    assert small >= large
    assert large > 0


# ---- quantization

elements = st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100)
matrices = st.tuples(st.integers(1, 5), st.integers(1, 7)).flatmap(
    lambda shape: st.lists(elements, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]).map(
        lambda v: torch.tensor(v).view(shape)
    )
)
BAD = [math.nan, math.inf, -math.inf]
granularities = st.sampled_from([None, 0, 1])


def quantized(x: Tensor, dtype: torch.dtype, dim: int | None, power_of_2: bool) -> Operand:
    scale = amax_to_scale(amax_of(x, dim), dtype, power_of_2)
    return Operand(quantize(x, scale, dtype), scale)


@settings(max_examples=300, deadline=None)
@given(matrices, granularities, st.booleans(), st.sampled_from(FP8_DTYPES))
def test_error_is_bounded(x: Tensor, dim: int | None, power_of_2: bool, dtype: torch.dtype) -> None:
    """Half a unit in the last place: 2^-(mantissa bits + 1) of a normal value, half the smallest step of the others,
    each as far as float32 can say."""
    data, scale = quantized(x, dtype, dim, power_of_2)
    assert scale is not None
    error = (dequantize(data, scale).double() - x.double()).abs()
    relative = 2.0 ** -(MANTISSA[dtype] + 1)
    smallest_step = torch.finfo(dtype).smallest_normal * 2.0 ** -MANTISSA[dtype]
    bound = torch.maximum(x.double().abs() * relative, smallest_step / 2 / scale.double())
    assert (error <= bound * (1 + 1e-5)).all()


@settings(max_examples=200, deadline=None)
@given(matrices, granularities, st.sampled_from(FP8_DTYPES), st.integers(-20, 20))
def test_powers_of_two_change_nothing(x: Tensor, dim: int | None, dtype: torch.dtype, shift: int) -> None:
    """With power-of-two scales, rescaling the input by one moves the scale and leaves every byte as it is."""
    x = torch.where(x.abs() < 1e-3, 0.0, x)  # no subnormals, and amaxes above EPS on both sides
    x[0, 0], x[-1, -1] = 1.0, 1.0
    live = (amax_of(x, dim) > 0).expand(x.shape)
    data, scale = quantized(x, dtype, dim, power_of_2=True)
    shifted, shifted_scale = quantized(x * 2.0**shift, dtype, dim, power_of_2=True)
    assert scale is not None
    assert shifted_scale is not None
    assert torch.equal(data.view(torch.uint8)[live], shifted.view(torch.uint8)[live])
    moved = (shifted_scale.double() * 2.0**shift == scale.double()) | (amax_of(x, dim) == 0)
    assert moved.all()


@settings(max_examples=200, deadline=None)
@given(
    matrices,
    granularities,
    st.booleans(),
    st.sampled_from(FP8_DTYPES),
    st.sampled_from(BAD),
)
def test_what_is_not_finite_becomes_nan(
    x: Tensor, dim: int | None, power_of_2: bool, dtype: torch.dtype, bad: float
) -> None:
    """All that shares its scale is NaN; what does not is as it was."""
    before = dequantize(*quantized(x, dtype, dim, power_of_2))  # type: ignore[arg-type]
    x = x.clone()
    x[0, 0] = bad
    after = dequantize(*quantized(x, dtype, dim, power_of_2))  # type: ignore[arg-type]
    shared = torch.zeros_like(x, dtype=torch.bool)
    shared[(slice(None), slice(None)) if dim is None else (0, slice(None)) if dim == 1 else (slice(None), 0)] = True
    assert after[shared].isnan().all()
    assert torch.equal(after[~shared], before[~shared])


@pytest.mark.parametrize("bad", BAD)
def test_a_given_scale_does_not_hide_what_is_not_finite(bad: float) -> None:
    x = torch.ones(16, 16)
    x[3, 4] = bad
    config = CastConfig(scaling_type=ScalingType.STATIC, static_scale=2.0, target_dtype=E4M3)
    data, scale = cast(x, config, contracted=1, power_of_2=False, scale=torch.tensor(2.0), emulate=True)
    values = dequantize(data, scale)  # type: ignore[arg-type]
    assert values[3, 4].isnan()
    assert values.isnan().sum() == 1


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_zeros_are_finite(dim: int | None) -> None:
    assert torch.equal(dequantize(*quantized(torch.zeros(3, 4), E4M3, dim, False)), torch.zeros(3, 4))  # type: ignore[arg-type]


# ---- the two ways to multiply


def operands(granularity: ScalingGranularity, dtype: Any, power_of_2: bool, emulate: bool) -> tuple[Operand, Operand]:
    torch.manual_seed(0)
    config = CastConfig(scaling_granularity=granularity, target_dtype=dtype)
    a = cast(torch.randn(20, 64), config, contracted=1, power_of_2=power_of_2, emulate=emulate)
    b = cast(torch.randn(64, 48), config, contracted=0, power_of_2=power_of_2, emulate=emulate)
    return a, b


@pytest.mark.parametrize("granularity", ScalingGranularity, ids=lambda g: g.value)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fast_accum", [False, True])
def test_native_matmul_is_the_emulated_one(
    granularity: ScalingGranularity, out_dtype: torch.dtype, fast_accum: bool
) -> None:
    """``torch._scaled_mm`` has a kernel for the CPU too: the native path runs here, layouts, scales and all."""
    a, b = operands(granularity, E4M3, power_of_2=True, emulate=False)
    expected = scaled_mm(a, b, out_dtype=out_dtype, fast_accum=fast_accum, emulate=True)
    product = scaled_mm(a, b, out_dtype=out_dtype, fast_accum=fast_accum, emulate=False)
    assert product.dtype == out_dtype
    tolerance = 2 * torch.finfo(out_dtype).eps
    assert torch.allclose(
        product.double(), expected.double(), rtol=tolerance, atol=tolerance * expected.abs().max().item()
    )


def test_one_side_may_have_one_scale_and_the_other_many() -> None:
    a, _ = operands(ScalingGranularity.AXISWISE, E4M3, True, emulate=False)
    _, b = operands(ScalingGranularity.TENSORWISE, E4M3, True, emulate=False)
    for left, right in ((a, b), (b.t(), a.t())):
        for fast in (False, True):
            expected = scaled_mm(left, right, out_dtype=torch.bfloat16, fast_accum=fast, emulate=True)
            product = scaled_mm(left, right, out_dtype=torch.bfloat16, fast_accum=fast, emulate=False)
            assert torch.allclose(product.float(), expected.float(), rtol=0.02, atol=0.1)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 31])
def test_token_counts_are_padded(tokens: int) -> None:
    torch.manual_seed(0)
    config = CastConfig(target_dtype=E4M3)
    g, x = torch.randn(tokens, 32), torch.randn(tokens, 16)
    a = cast(g, config, contracted=0, power_of_2=False, emulate=False).t()
    b = cast(x, config, contracted=0, power_of_2=False, emulate=False)
    product = scaled_mm(a, b, out_dtype=torch.float32, fast_accum=False, emulate=False)
    expected = scaled_mm(a, b, out_dtype=torch.float32, fast_accum=False, emulate=True)
    assert torch.allclose(product, expected, rtol=1e-5, atol=1e-4)
