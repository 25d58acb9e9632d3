"""The prediction in the header of a run, and its error in the summary."""

from __future__ import annotations

import pytest

from titanlite.config import load_config, packaged
from titanlite.plan.devices import device_called, find_device
from titanlite.plan.layouts import fixed_plan
from titanlite.plan.predicted import Prediction, predict
from titanlite.plan.refusals import planned_model


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("AMD Instinct MI300X OAM", "mi300x"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA L40", None),
        ("CPU, 2 threads", None),
    ],
)
def test_devices_are_known_by_the_names_that_torch_reports(reported: str, name: str | None) -> None:
    device = device_called(reported)
    assert (device and device.name) == name


def test_it_is_that_of_a_fixed_plan() -> None:
    config = load_config([], packaged.find("llama3_8b"))
    model = planned_model(config)
    (layout,) = fixed_plan(config, model, find_device("h100"), 8).layouts
    prediction = predict(config, model.args, "NVIDIA H100 80GB HBM3", 8)
    assert prediction is not None
    assert prediction.seconds == layout.parts.seconds
    assert prediction.memory_gib == layout.memory.total
    assert predict(config, model.args, "CPU, 2 threads", 8) is None


def test_what_the_cost_model_does_not_cover_has_no_prediction() -> None:
    config = load_config([], packaged.find("debug_model"))
    args = planned_model(config).args
    assert predict(config, args, "NVIDIA H200", 1) is not None
    assert predict(config, object(), "NVIDIA H200", 1) is None
    mx = load_config(["--model.converters=mx"], packaged.find("debug_model"))
    assert predict(mx, args, "NVIDIA H200", 1) is None


def test_its_error_is_said() -> None:
    prediction = Prediction(seconds=2.0, memory_gib=50.0, tokens_per_device=8000)
    assert prediction.error(5000.0, 40.0) == ("2 s per step, 25% more than measured; 50.0 GiB, 25% more than measured")
    assert prediction.error(None, 100.0) == "50.0 GiB, 50% less than measured"
