"""torchao.float8's names: they are there, take its arguments, and agree with it."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import pytest
import torch
from torch import nn

from titanlite import float8
from titanlite.float8 import Float8LinearConfig, _auto_filter_for_recipe
from titanlite.float8.config import ScalingGranularity
from titanlite.float8.float8_linear_utils import swap_linear_layers
from titanlite.float8.inference import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8MMConfig,
    Float8StaticActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    PerRow,
    PerTensor,
    quantize_,
)
from titanlite.float8.types import granularity_of

NAMES = {
    "config": "CastConfig Float8GemmConfig Float8LinearConfig Float8LinearRecipeName ScalingGranularity ScalingType "
    "e4m3_dtype e5m2_dtype",
    "float8_linear": "Float8Linear",
    "float8_linear_utils": "convert_to_float8_training swap_linear_layers _auto_filter_for_recipe "
    "_auto_filter_for_rowwise _auto_filter_for_tensorwise",
    "float8_tensor_parallel": "Float8ColwiseParallel Float8RowwiseParallel PrepareFloat8ModuleInput",
    "float8_utils": "EPS FP8_TYPES IS_ROCM amax_to_scale compute_error fp8_tensor_statistics tensor_to_amax "
    "tensor_to_scale to_fp8_saturated _round_scale_down_to_power_of_2",
    "fsdp_utils": "precompute_float8_dynamic_scale_for_fsdp",
    "inference": "Float8MMConfig FP8Granularity",
    "types": "FP8Granularity",
}


@pytest.mark.parametrize("module", NAMES)
def test_names(module: str) -> None:
    theirs = importlib.import_module(f"torchao.float8.{module}")
    ours = importlib.import_module(f"titanlite.float8.{module}")
    for name in NAMES[module].split():
        assert hasattr(theirs, name), name
        assert hasattr(ours, name), name


def test_names_of_the_package() -> None:
    import torchao.float8

    internal = {"Float8TrainingTensor", "GemmInputRole", "LinearMMConfig", "ScaledMMConfig"}
    assert {*torchao.float8.__all__, "Float8MMConfig"} - internal <= set(dir(float8))


@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize("dim", [None, 0, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_are_torchaos(dtype: torch.dtype, dim: int | None, power_of_2: bool) -> None:
    theirs = importlib.import_module("torchao.float8.float8_utils")
    ours = importlib.import_module("titanlite.float8.float8_utils")
    granularity = "TENSORWISE" if dim is None else "AXISWISE"
    x = torch.randn(32, 48, dtype=dtype)
    scales = [
        module.tensor_to_scale(
            x,
            torch.float8_e4m3fn,
            scaling_granularity=getattr(kinds, granularity),
            axiswise_dim=dim,
            round_scales_to_power_of_2=power_of_2,
        )
        for module, kinds in ((ours, ScalingGranularity), (theirs, theirs.ScalingGranularity))
    ]
    assert torch.equal(*scales)
    assert torch.equal(*(m.to_fp8_saturated(100 * x, torch.float8_e4m3fn).float() for m in (ours, theirs)))
    assert torch.equal(*(m.compute_error(x, x + 0.1) for m in (ours, theirs)))
    with pytest.raises(ValueError, match=r"float8_dtype=torch.int8: must be one of"):
        ours.amax_to_scale(x.amax(), torch.int8)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_the_automatic_filter_is_torchaos(recipe: str) -> None:
    import torchao.float8

    ours = _auto_filter_for_recipe(recipe, ["output", "attention.wk"])
    theirs = torchao.float8._auto_filter_for_recipe(recipe, ["output", "attention.wk"])
    sizes = (1024, 1040, 2048, 2064, 4096, 4112, 4100)
    for k in sizes:
        for n in sizes:
            layer = nn.Linear(k, n, device="meta")
            for name in ("layers.0.w1", "output", "layers.0.attention.wk"):
                assert ours(layer, name) is theirs(layer, name)
    assert ours(nn.Linear(8192, 8192, device="meta"), "output_norm.scale")  # torchao's filter takes it as "output"
    assert not ours(nn.ReLU(), "x")


def test_swap_linear_layers() -> None:
    class Other(nn.Linear):
        pass

    def make(layer: nn.Linear) -> nn.Linear:
        return Other(layer.in_features, layer.out_features)

    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 5)))
    assert swap_linear_layers(model, make, module_filter_fn=lambda _, name: name != "0") is model
    assert [type(model[0]), type(model[1][0])] == [nn.Linear, Other]
    assert type(swap_linear_layers(model[0], make)) is Other
    model[0].child = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="the root is a linear layer with children"):
        swap_linear_layers(model[0], make)


def test_options_of_old_versions(caplog: pytest.LogCaptureFixture) -> None:
    import dataclasses

    with caplog.at_level(logging.WARNING, logger="titanlite.float8"):
        config = Float8LinearConfig(enable_amax_init=False, enable_pre_and_post_forward=False)
        assert dataclasses.replace(config, emulate=True) == Float8LinearConfig(emulate=True)
    assert [r.getMessage() for r in caplog.records] == [
        "Float8LinearConfig(enable_amax_init=False) has no effect: torchao removed the option",
        "Float8LinearConfig(enable_pre_and_post_forward=False) has no effect: torchao removed the option",
    ]


def test_granularities_of_torchao_are_taken() -> None:
    from torchao.quantization import granularity as theirs

    assert granularity_of(theirs.PerTensor()) == PerTensor()
    assert granularity_of(theirs.PerRow()) == PerRow()
    assert granularity_of(theirs.PerGroup(32)) is None
    with pytest.raises(ValueError, match=r"PerRow\(dim=0\)"):
        granularity_of(theirs.PerRow(0))
    configs = [
        Float8DynamicActivationFloat8WeightConfig(granularity=[theirs.PerRow(), theirs.PerRow()]),  # type: ignore[arg-type]
        Float8WeightOnlyConfig(granularity=theirs.PerRow()),  # type: ignore[arg-type]
    ]
    assert all(config.granularity == PerRow() for config in configs)


def quantized(config: Any, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32))
    quantize_(model, config, device="cpu")
    return model(x)  # type: ignore[no-any-return]


def test_fields_of_the_inference_configurations() -> None:
    from torchao.quantization.quantize_.common import KernelPreference

    x = torch.randn(8, 64)
    dynamic = Float8DynamicActivationFloat8WeightConfig
    plain = quantized(dynamic(), x)
    same = dynamic(
        torch.float8_e4m3fn,
        torch.float8_e4m3fn,
        None,
        mm_config=Float8MMConfig(emulate=True),
        kernel_preference=KernelPreference.AUTO,  # type: ignore[arg-type]
        set_inductor_config=False,
        version=2,
    )
    assert torch.equal(quantized(same, x), plain)
    assert not torch.equal(quantized(dynamic(activation_dtype=torch.float8_e5m2), x), plain)
    assert not torch.equal(quantized(dynamic(weight_dtype=torch.float8_e5m2), x), plain)
    # An upper bound of the amax clamps what is larger; a lower bound coarsens small inputs.
    assert quantized(dynamic(activation_value_ub=0.5), x).norm() < 0.6 * plain.norm()
    assert torch.equal(quantized(dynamic(activation_value_ub=1e6, activation_value_lb=1e-6), x), plain)
    amax = x.abs().amax()
    static = Float8StaticActivationFloat8WeightConfig
    assert torch.allclose(
        quantized(static(act_quant_scale=amax / 448), x), quantized(static(activation_amax=amax), x), rtol=1e-5
    )
