"""The Triton kernels on a GPU, at the sizes they are for."""

from __future__ import annotations

import pytest
import torch

from titanlite.float8 import devices, kernels
from titanlite.float8.kernels import reference
from titanlite.float8.kernels.choose import measure

NATIVE = torch.cuda.is_available() and devices.has_native_float8(torch.device("cuda"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not NATIVE, reason="needs a GPU with float8 units")]

SCALES = ("none", "tensor", "vector")
LAYOUTS = [(by_rows, by_columns) for by_rows in SCALES for by_columns in SCALES][1:]


@pytest.mark.parametrize(("by_rows", "by_columns"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32], ids=str)
def test_casts_are_the_reference(
    by_rows: kernels.Layout, by_columns: kernels.Layout, dtype: torch.dtype, source: torch.dtype
) -> None:
    torch.manual_seed(0)
    for shape in [(8192, 4096), (1024, 14336), (333, 1000), (1, 16), (4097, 16)]:
        x = (torch.randn(shape, device="cuda") * torch.exp(8 * torch.randn(shape[0], 1, device="cuda"))).to(source)
        for bad in (0.0, float("nan"), float("inf")):
            x[shape[0] // 2, shape[1] // 2] = bad
            for power_of_2 in (False, True):
                found = kernels.cast(x, dtype, by_rows, by_columns, power_of_2)
                for a, b in zip(found, reference.cast(x, dtype, by_rows, by_columns, power_of_2), strict=True):
                    assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
                    assert ((a.float() == b.float()) | (a.float().isnan() & b.float().isnan())).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rescaling(dtype: torch.dtype) -> None:
    product = torch.randn(8192, 4096, device="cuda").to(dtype)
    rows, columns = torch.rand(8192, 1, device="cuda") * 1e3, torch.rand(1, 4096, device="cuda") * 1e-3
    for scales in ((rows, columns), (rows, columns[0, 0]), (rows[0, 0], columns)):
        assert torch.equal(kernels.rescale(product, *scales, dtype), reference.rescale(product, *scales, dtype))


def test_what_is_faster_can_be_measured() -> None:
    times = measure(4096, 4096, torch.float8_e4m3fn, "vector", "vector", True)
    assert 0 < times.triton < 1e4
    assert 0 < times.inductor < 1e4
