"""What casts and multiplies on a GPU, which the header of a run says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.support.runs import ROOT
from titanlite.config import load_config
from titanlite.converters.int8 import Int8Converter
from titanlite.converters.mx import MXConverter
from titanlite.distributed.mesh import Degrees, Mesh, build_mesh
from titanlite.distributed.target import Target


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
