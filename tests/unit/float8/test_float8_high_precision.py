"""``high_precision``: a converted model computes what the unconverted one does, and afterwards what it did."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from titanlite.float8 import (
    CastConfig,
    Float8LinearConfig,
    ScalingType,
    convert_to_float8_training,
    high_precision,
    sync_float8_amax_and_scale_history,
)

DELAYED = CastConfig(scaling_type=ScalingType.DELAYED)
CONFIGS = {
    "tensorwise": Float8LinearConfig(emulate=True),
    "rowwise": Float8LinearConfig.from_recipe_name("rowwise"),
    "delayed": Float8LinearConfig(
        emulate=True,
        cast_config_input=DELAYED,
        cast_config_weight=DELAYED,
        cast_config_grad_output=DELAYED,
        cast_config_input_for_grad_weight=DELAYED,
        cast_config_weight_for_grad_input=DELAYED,
        cast_config_grad_output_for_grad_weight=DELAYED,
    ),
}


def model(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32, bias=False)).to(dtype)


def step(layers: nn.Module, x: Tensor) -> None:
    layers(x).square().mean().backward()
    sync_float8_amax_and_scale_history(layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_model_without_float8_to_the_bit(name: str, dtype: torch.dtype) -> None:
    plain, layers = model(dtype), convert_to_float8_training(model(dtype), config=CONFIGS[name])
    x = torch.randn(3, 16, 64, dtype=dtype)
    step(layers, x)
    before = layers(x)
    state = {key: buffer.clone() for key, buffer in layers.named_buffers()}
    with high_precision(layers):
        inside = layers(x)
    assert torch.equal(inside, plain(x))
    assert not inside.requires_grad
    assert torch.equal(layers(x), before)
    assert not torch.equal(before, inside)
    assert all(torch.equal(buffer, state[key]) for key, buffer in layers.named_buffers())


def test_an_error_ends_it_too() -> None:
    layers = convert_to_float8_training(model(torch.float32), config=CONFIGS["tensorwise"])
    x = torch.randn(16, 64)
    before = layers(x)
    with pytest.raises(KeyError), high_precision(layers):
        raise KeyError
    assert torch.equal(layers(x), before)
    assert torch.is_grad_enabled()


def test_weights_that_arrive_in_float8_are_refused() -> None:
    config = Float8LinearConfig(emulate=True, enable_fsdp_float8_all_gather=True)
    layers = convert_to_float8_training(model(torch.float32), config=config)
    message = r"enable_fsdp_float8_all_gather gathers weights in float8.*leave the flag"
    with pytest.raises(ValueError, match=message), high_precision(layers):
        pass


def test_compiled_once_more() -> None:
    plain, layers = model(torch.float32), convert_to_float8_training(model(torch.float32), config=CONFIGS["tensorwise"])
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    x = torch.randn(16, 64)
    before = compiled(x)
    with high_precision(layers):
        torch.testing.assert_close(compiled(x), plain(x), rtol=0, atol=0)
    assert torch.equal(compiled(x), before)
