"""Grouped matmuls in number formats: each group as a linear layer by itself, against float64, and against torchao's."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.float8.test_float8_oracle import sqnr
from titanlite.converters.experts import convert_experts
from titanlite.float8 import Float8LinearConfig
from titanlite.models.layers import Experts, MixtureArgs
from titanlite.quant import devices
from titanlite.quant.format import Format, Use
from titanlite.quant.grouped_mm import QuantGroupedMatmul, quantized_grouped_mm
from titanlite.quant.groups import Groups
from titanlite.quant.int8.format import Int8Format
from titanlite.quant.mx.format import MXFormat
from titanlite.quant.recipes import GROUPED_RECIPES, grouped_format

K, M = 64, 96
SIZES = {
    "odd": [3, 17, 64, 1],
    "empty": [0, 33, 0, 7],
    "all in one": [0, 0, 70, 0],
    "no tokens": [0, 0, 0, 0],
}
RECIPES = [*GROUPED_RECIPES]


def operands(sizes: list[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, the weight of each group [groups, M, K], offsets, and the gradient of the output."""
    torch.manual_seed(0)
    a, w = torch.randn(sum(sizes), K, dtype=dtype), torch.randn(len(sizes), M, K, dtype=dtype)
    grad = torch.randn(sum(sizes), M, dtype=dtype)
    return a.requires_grad_(), w.requires_grad_(), torch.tensor(sizes).cumsum(0).int(), grad


def step(a: Tensor, w: Tensor, offsets: Tensor, grad: Tensor, recipe: str) -> list[Tensor]:
    """The output, and the gradients of rows and weights."""
    out = quantized_grouped_mm(a, w.transpose(1, 2), offsets, recipe)
    return [out, *torch.autograd.grad(out, (a, w), grad)]


def alone(format: Format, x: Tensor, w: Tensor, g: Tensor) -> list[Tensor]:
    """The three matmuls of one group as those of a linear layer, whose casts have oracles of their own."""
    matmuls = (
        (format.cast(x, Use("input", 1)), format.cast(w, Use("weight", 1)).t(), "output"),
        (format.cast(g, Use("grad_output", 1)), format.cast(w, Use("weight", 0)), "grad_input"),
        (format.cast(g, Use("grad_output", 0)).t(), format.cast(x, Use("input", 0)), "grad_weight"),
    )
    return [format.multiply(a, b, matmul, torch.float32) for a, b, matmul in matmuls]  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_each_group_is_a_linear_layer_by_itself(recipe: str, sizes: list[int]) -> None:
    a, w, offsets, grad = operands(sizes)
    outputs, grads_a, grads_w = [], [], []
    format = grouped_format(recipe).emulated
    for x, matrix, g in zip(a.detach().split(sizes), w.detach(), grad.split(sizes), strict=True):
        out, grad_x, grad_matrix = alone(format, x, matrix, g)
        outputs, grads_a, grads_w = [*outputs, out], [*grads_a, grad_x], [*grads_w, grad_matrix]
    mine = step(a, w, offsets, grad, recipe)
    for one, other in zip(mine, (torch.cat(outputs), torch.cat(grads_a), torch.stack(grads_w)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    assert not mine[2][[size == 0 for size in sizes]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("recipe", "bound"), [("float8_rowwise", 28), ("mxfp8", 28), ("int8_rowwise", 40)])
def test_products_are_near_the_exact_ones(recipe: str, bound: float, dtype: torch.dtype) -> None:
    sizes = SIZES["odd"]
    a, w, offsets, grad = operands(sizes, dtype)
    exact_a, exact_w = (x.detach().double().requires_grad_() for x in (a, w))
    exact = torch.cat([x @ matrix.T for x, matrix in zip(exact_a.split(sizes), exact_w, strict=True)])
    wanted = [exact, *torch.autograd.grad(exact, (exact_a, exact_w), grad.double())]
    for mine, theirs in zip(step(a, w, offsets, grad, recipe), wanted, strict=True):
        assert mine.dtype is dtype
        assert sqnr(theirs, mine.double()) > bound


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["a", "b", "grad"])
def test_what_is_not_finite_stays_in_its_group(recipe: str, bad: float, place: str) -> None:
    """One element: all that it is a factor of is NaN, and nothing else changes."""
    a, w, offsets, grad = operands(SIZES["odd"])
    clean = step(a, w, offsets, grad, recipe)
    with torch.no_grad():
        {"a": a[5], "b": w[1, 7], "grad": grad[5]}[place][9] = bad  # of the second group, rows 3 to 19
    mine = step(a, w, offsets, grad, recipe)
    second = torch.zeros(len(a), dtype=torch.bool)
    second[3:20] = True
    reached = [torch.zeros_like(x, dtype=torch.bool) for x in mine]  # output, gradients of rows and of weights
    if place == "a":
        reached[0][5], reached[2][1, :, 9] = True, True
    elif place == "b":
        reached[0][second, 7], reached[1][second, 9] = True, True
    else:
        reached[1][5], reached[2][1, 9] = True, True
    for now, before, at in zip(mine, clean, reached, strict=True):
        assert now[at].isnan().all()
        # A scale of several elements takes more with it, in the group alone.
        touched = second if now.ndim == 2 else torch.tensor([False, True, False, False])
        assert torch.equal(now[~touched], before[~touched])
        if not at.any():
            assert torch.equal(now, before)


@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_after_the_last_group_take_part_in_nothing(recipe: str) -> None:
    a, w, offsets, grad = operands([*SIZES["odd"], 6])
    w = w.detach()[:4].requires_grad_()
    with torch.no_grad():
        a[-6:], grad[-6:] = torch.nan, torch.nan
    out, grad_a, grad_w = step(a, w, offsets[:4], grad, recipe)
    fewer = step(a.detach()[:-6].requires_grad_(), w, offsets[:4], grad[:-6], recipe)
    for mine, other in zip((out[:-6], grad_a[:-6], grad_w), fewer, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_is_compiled_again_as_the_groups_change(recipe: str) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    format = grouped_format(recipe)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(a: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
        return quantized_grouped_mm(a, w.transpose(1, 2), offsets, format)

    for sizes in ([3, 17, 64, 1], [0, 85, 0, 0], [20, 20, 20, 25]):
        a, w, offsets, grad = operands(sizes)
        out = compiled(a, w, offsets)
        mine = [out, *torch.autograd.grad(out, (a, w), grad)]
        for one, other in zip(mine, step(a, w, offsets, grad, recipe), strict=True):
            torch.testing.assert_close(one, other)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_backward_has_a_byte_per_element_of_the_rows() -> None:
    sizes = SIZES["odd"]
    a, w, offsets, _ = operands(sizes)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        quantized_grouped_mm(a, w.transpose(1, 2), offsets, "float8_rowwise")
    data = [x for x in saved if x.element_size() == 1]
    assert [x.shape[0] for x in data] == [K]
    # Each group is filled up to a multiple of 16 rows.
    assert sum(sizes) <= data[0].shape[1] <= sum(sizes) + 16 * (len(sizes) + 1)


def test_padding_begins_each_group_at_a_multiple() -> None:
    x = torch.arange(1.0, 9.0)[:, None]
    groups = Groups(torch.tensor([3, 3, 7], dtype=torch.int32), 8, 4)
    padded = groups.padded(x)[:, 0].tolist()
    assert groups.ends.tolist() == [4, 4, 8]
    assert padded[:9] == [1, 2, 3, 0, 4, 5, 6, 7, 8]
    assert not any(padded[9:])
    assert len(padded) % 4 == 0
    assert groups.number.tolist()[:9] == [0, 0, 0, 0, 2, 2, 2, 2, 3]
    assert groups.amax(groups.padded(x))[:, 0].tolist() == [3, 0, 7, 8]


@pytest.mark.parametrize(
    ("format", "why"),
    [
        (Float8LinearConfig().format, "use rowwise"),
        (Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp").format, "use rowwise"),
        (MXFormat(grad_weight=False), "use mxfp8"),
        (Int8Format(("output",)), "use rowwise"),
    ],
)
def test_options_without_a_grouped_matmul_are_refused(format: Any, why: str) -> None:
    a, w, offsets, _ = operands(SIZES["odd"])
    with pytest.raises(ValueError, match=why):
        quantized_grouped_mm(a, w.transpose(1, 2), offsets, format)


def test_what_does_not_fit_is_refused() -> None:
    a, w, offsets, _ = operands(SIZES["odd"])
    with pytest.raises(ValueError, match="must be"):
        quantized_grouped_mm(a, w, offsets, "mxfp8")
    with pytest.raises(ValueError, match="multiples of 32"):
        quantized_grouped_mm(a[:, :48], w.transpose(1, 2)[:, :48], offsets, "mxfp8")
    with pytest.raises(ValueError, match="no such recipe; known: float8_rowwise"):
        quantized_grouped_mm(a, w.transpose(1, 2), offsets, "float9")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda a, b, o: (a.bfloat16(), b, o), "a is torch.bfloat16 and b torch.float32; cast both to one of torch.bf"),
        (lambda a, b, o: (a.int(), b.int(), o), "a is torch.int32 and b torch.int32; cast both"),
        (lambda a, b, o: (a, b, o.long()), r"offsets are torch.int64; they must be int32: use offsets.int\(\)"),
        (lambda a, b, o: (a, b.to("meta"), o), "a is on cpu, b on meta, offsets on cpu; move them to one device"),
        (lambda a, b, o: (a, b, o.flip(0)), r"offsets = \[85, 84, 20, 3\] for 85 rows.*use sizes.cumsum"),
        (lambda a, b, o: (a, b, o + 1), r"offsets = \[4, 21, 85, 86\] for 85 rows"),
        (lambda a, b, o: (a, b, o - 4), r"offsets = \[-1, 16, 80, 81\] for 85 rows"),
    ],
)
def test_operands_of_other_kinds_are_refused(change: Any, why: str) -> None:
    a, w, offsets, _ = operands(SIZES["odd"])
    with pytest.raises(ValueError, match=why):
        quantized_grouped_mm(*change(a, w.transpose(1, 2), offsets), "float8_rowwise")


def test_float8_says_once_that_units_write_bfloat16_only(caplog: pytest.LogCaptureFixture) -> None:
    devices._lacks_result.cache_clear()
    format, cpu = dataclasses.replace(grouped_format("float8_rowwise"), target="sm_90"), torch.device("cpu")  # type: ignore[type-var]
    assert format.for_groups(cpu, torch.bfloat16) is format
    assert caplog.messages == []
    for _ in range(2):
        assert format.for_groups(cpu, torch.float32).emulate
    assert caplog.messages == [
        "a grouped matmul in float8 is emulated on sm_90 where its result is in torch.float32: the units write "
        "torch.bfloat16 only"
    ]


def test_a_module_computes_in_the_format_or_as_before() -> None:
    a, w, offsets, _ = operands(SIZES["odd"])
    module = QuantGroupedMatmul(grouped_format("mxfp8"), lambda a, b, offsets: a)
    assert torch.equal(module(a, w.transpose(1, 2), offsets), step(a, w, offsets, torch.ones(85, M), "mxfp8")[0])
    module.in_high_precision = True
    assert module(a, w.transpose(1, 2), offsets) is a


# ---- torchao


def test_float8_casts_are_those_of_torchao() -> None:
    pytest.importorskip("torchao.prototype.moe_training")
    from torchao.prototype.moe_training.utils import torch_to_float8_per_group_colwise

    sizes = [16, 32, 48]  # theirs takes no others
    a, _, offsets, _ = operands(sizes)
    format = grouped_format("float8_rowwise")
    groups = Groups(offsets, len(a), format.multiple)
    data, scale = format.cast_columns(a.detach(), groups, Use("input", 0))
    theirs, their_scale = torch_to_float8_per_group_colwise(
        a.detach(), offsets, torch.float8_e4m3fn, round_scales_to_power_of_2=True
    )
    assert torch.equal(data[:, : len(a)].float(), theirs.t().float())
    assert scale is not None
    assert torch.equal(scale[: len(sizes)].flatten(), their_scale)


def test_mxfp8_is_that_of_torchao() -> None:
    pytest.importorskip("torchao.prototype.moe_training")
    from torchao.prototype.moe_training.mxfp8_grouped_mm import _to_mxfp8_then_scaled_grouped_mm
    from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

    a, w, offsets, grad = operands([32, 0, 96, 64], torch.bfloat16)  # theirs takes multiples of 32
    theirs = _to_mxfp8_then_scaled_grouped_mm(
        a, w.transpose(1, 2), offsets, kernel_preference=KernelPreference.EMULATED
    )
    wanted = [theirs, *torch.autograd.grad(theirs, (a, w), grad)]
    for mine, other in zip(step(a, w, offsets, grad, "mxfp8"), wanted, strict=True):
        assert sqnr(other.float(), mine.float()) >= 40


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_projections_of_one_input_share_its_casts(recipe: str) -> None:
    """Bits and gradients are as without, and one copy of the input is kept for backward, not two."""

    def run(shared: bool) -> tuple[list[Tensor], int]:
        torch.manual_seed(0)
        experts = Experts(K, MixtureArgs(n_experts=4, experts_per_token=1, expert_dim=M))
        for param in experts.parameters():
            nn.init.normal_(param)
        convert_experts(nn.ModuleDict({"experts": experts}), "float8", grouped_format(recipe), ["experts"])
        if not shared:
            experts._forward_pre_hooks.clear()
        a, _, offsets, _ = operands(SIZES["odd"])
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if tensor.dtype in (torch.float8_e4m3fn, torch.int8) and tensor.shape[0] == K:
                saved[tensor.untyped_storage()._cdata] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = experts(a.clone(), torch.ones(len(a)), offsets)
        return [out, *torch.autograd.grad(out.sum(), (a, *experts.parameters()))], len(saved)

    (together, one), (apart, two) = run(True), run(False)
    assert all(torch.equal(x, y) for x, y in zip(together, apart, strict=True))
    assert (one, two) == (1, 2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_microbatch_casts_a_weight_twice(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/moe.md says: for the output, and for the gradient of the rows."""
    format = grouped_format(recipe).emulated
    weights, cast = {K: 0, M: 0}, type(format).cast_rows

    def counted(self: Any, x: Tensor, use: Use) -> Any:
        if use.operand == "weight":
            weights[x.shape[1]] += 1
        return cast(self, x, use)

    monkeypatch.setattr(type(format), "cast_rows", counted)
    a, w, offsets, grad = operands(SIZES["odd"])
    for _ in range(3):
        quantized_grouped_mm(a, w.transpose(1, 2), offsets, format).backward(grad)
    assert weights == {K: 3, M: 3}
