"""What casts and multiplies on a GPU, which the header of a run says, and which layers are too small for int8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.support.runs import ROOT
from titanlite.config import load_config
from titanlite.converters.int8 import Int8Converter
from titanlite.converters.linears import AUTO_FILTER
from titanlite.converters.mx import MXConverter
from titanlite.distributed.mesh import Degrees, Mesh, build_mesh
from titanlite.distributed.target import Target
from titanlite.errors import ConfigError
from titanlite.quant.int8.format import is_native
from titanlite.quant.linear import QuantLinear


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    torch.distributed.init_process_group("gloo", init_method="tcp://localhost:0", rank=0, world_size=1)
    yield build_mesh(Degrees(1, 1, 1, 1, 1), "cpu")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "units", "said"),
    [
        ("int8", "sm_90", "multiply with the scales applied"),
        ("int8", "sm_75", "torch._int_mm multiplies: Triton compiles no int8 product for sm_75"),
        ("int8", "gfx942", "multiply with the scales applied"),
        ("mx", "sm_100", "one pass, and torch._scaled_mm multiplies"),
        ("mx", "sm_90", "emulated"),
    ],
)
def test_the_choice_is_said(name: str, units: str, said: str, mesh: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    caplog.set_level("INFO")
    target = replace(mesh, target=Target("cuda", units))
    config = load_config([f"--model.converters={name}"], str(ROOT / "train_configs" / "debug_model.toml"))
    converter = {"int8": Int8Converter, "mx": MXConverter}[name](config, target)
    messages = [r.getMessage() for r in caplog.records if units in r.getMessage()]
    assert len(messages) == 1
    assert said in messages[0]
    assert converter.format.target == units  # type: ignore[attr-defined]


def layers(*options: str, mesh: Mesh) -> dict[str, nn.Module]:
    """Convert a narrow, a wide and an output layer to int8."""
    config = load_config(["--model.converters=int8", *options], str(ROOT / "train_configs" / "debug_model.toml"))
    sizes = {"narrow": (256, 768), "wide": (768, 768), "output": (768, 2048)}
    model = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
    Int8Converter(config, mesh).convert(model)
    return dict(model.named_children())


@pytest.mark.skipif(
    not is_native("cpu") or torch.cpu._is_amx_tile_supported(),
    reason="emulated, or with AMX, where no size is measured",
)
def test_layers_too_small_for_int8(mesh: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    """On a CPU small layers are left out if asked for, and the table says that they will not gain if not."""
    caplog.set_level("INFO")
    converted = layers(mesh=mesh)
    assert {name for name, layer in converted.items() if isinstance(layer, QuantLinear)} == {"narrow", "wide"}
    assert caplog.text.count("(will not gain: too small)") == 1
    converted = layers(f"--int8.filter_fqns=output,{AUTO_FILTER}", mesh=mesh)
    assert {name for name, layer in converted.items() if isinstance(layer, QuantLinear)} == {"wide"}
    assert f"high precision ({AUTO_FILTER})" in caplog.text


@pytest.mark.parametrize("options", [["--int8.recipe_name=weights"], ["--int8.emulate"]])
def test_sizes_that_were_not_measured(options: list[str], mesh: Mesh) -> None:
    with pytest.raises(ConfigError, match="which sizes gain in int8 has not been measured"):
        layers(f"--int8.filter_fqns=output,{AUTO_FILTER}", *options, mesh=mesh)
