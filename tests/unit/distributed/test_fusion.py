"""titanlite.distributed.fusion: its rules can be taken back, and leave code for the CPU alone.

What the rules do to code for GPUs: tests/unit/benchmarks/test_compiled_block.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._inductor.config as inductor
from torch import Tensor

from titanlite.distributed.fusion import BlockFusion, use_block_fusion


@pytest.fixture(autouse=True)
def _taken_back() -> Iterator[None]:
    before = inductor.get_config_copy()
    use_block_fusion()
    use_block_fusion()  # a second time changes nothing
    yield
    use_block_fusion(False)
    assert inductor.get_config_copy() == before


def test_the_compiler_is_told() -> None:
    assert inductor.inductor_choices_class is BlockFusion
    assert inductor.combo_kernels


@pytest.mark.slow
def test_code_for_the_cpu_is_right() -> None:
    """Sums over rows and columns, a transposed copy, and operators over lists of tensors."""

    def compute(x: Tensor, y: Tensor) -> list[Tensor]:
        scaled = x / x.abs().amax(1, keepdim=True)
        lists = torch._foreach_mul([x, y.t()], [scaled, y.t().contiguous()])
        return [scaled, scaled.t().contiguous(), scaled.sum(0), torch.cat((x, scaled), 1), *lists]

    inputs = torch.randn(96, 2048), torch.randn(64, 32)
    torch.testing.assert_close(torch.compile(compute)(*inputs), compute(*inputs))
