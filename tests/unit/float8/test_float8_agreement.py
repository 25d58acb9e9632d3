"""The casts of the parts of a tensor, with amaxes that the ranks agreed on: together they are the cast of the whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from titanlite.float8 import CastConfig, Float8LinearConfig, ScalingGranularity
from titanlite.quant.float8.format import Float8Format
from titanlite.quant.format import Operand, Use

AXISWISE = CastConfig(scaling_granularity=ScalingGranularity.AXISWISE)
CONFIGS = {
    "tensorwise": Float8LinearConfig(),
    "tensorwise, power of 2": Float8LinearConfig(round_scales_to_power_of_2=True),
    "rowwise": Float8LinearConfig.from_recipe_name("rowwise"),
    "rowwise_with_gw_hp": Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp"),
    "rows, any scale": Float8LinearConfig(
        cast_config_input=AXISWISE, cast_config_weight=AXISWISE, cast_config_grad_output=AXISWISE
    ),
}


def format_of(name: str, emulate: bool) -> Float8Format:
    return dataclasses.replace(CONFIGS[name], emulate=emulate).format


def values(operand: Operand) -> Tensor:
    data = operand.data.float()
    return data if operand.scale is None else data / operand.scale


@pytest.mark.parametrize("emulate", [True, False], ids=["plain operations", "kernels"])
@pytest.mark.parametrize("sharded", [0, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_parts_are_cast_as_the_whole(name: str, sharded: int, emulate: bool) -> None:
    format = format_of(name, emulate)
    whole = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    parts = whole.chunk(2, sharded)
    for part in parts[1:]:
        part.mul_(3)  # another amax
    for operand in ("input", "weight", "grad_output"):
        uses = tuple(Use(operand, contracted) for contracted in (1, 0))  # type: ignore[arg-type]
        to_agree = tuple(use for use in uses if format.agrees(use, sharded))
        if "power of 2" in name or name.startswith("rowwise"):
            assert not to_agree
        local = [format.amaxes(part, to_agree) for part in parts]
        agreed = {use: torch.maximum(local[0][use], local[1][use]) for use in to_agree}
        if name == "tensorwise":
            agreed = dict.fromkeys(uses, agreed[uses[0]])
        one, other = (
            format.cast_both(part, operand, None, (agreed.get(uses[0]), agreed.get(uses[1])))  # type: ignore[arg-type]
            for part in parts
        )
        expected = format.cast_both(whole, operand)  # type: ignore[arg-type]
        for i, use in enumerate(uses):
            got = torch.cat((values(one[i]), values(other[i])), sharded)
            assert torch.equal(got, values(expected[i])), (operand, use)
            alone = torch.cat([values(format.cast(part, use, None, agreed.get(use))) for part in parts], sharded)
            assert torch.equal(alone, values(expected[i])), (operand, use)


def test_the_amax_of_a_tensor_is_computed_once_for_both_uses() -> None:
    format = format_of("tensorwise", True)
    uses = (Use("input", 1), Use("input", 0))
    amaxes = format.amaxes(torch.randn(4, 16), uses)
    assert amaxes[uses[0]] is amaxes[uses[1]]
