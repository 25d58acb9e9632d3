"""The least memory of a run: never above what a step holds, not far below it, and known at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import run_trainer
from titanlite.config import JobConfig, check_config, load_config, resolve_degrees
from titanlite.errors import ConfigError
from titanlite.metrics import device as device_module
from titanlite.models.spec import get_model_spec
from titanlite.plan.estimate import estimate
from titanlite.plan.least import Least, check_memory, least_memory
from titanlite.training.model_shape import choose_shape

SMALL = ["--training.seq_len=128", "--training.local_batch_size=8", "--model.args.n_layers=2"]


def configured(*options: str) -> JobConfig:
    return load_config([*SMALL, *options])


def least_of(config: JobConfig, devices: int) -> Least:
    spec, flavor, *_ = choose_shape(config)
    args = spec.configure(flavor, 2048, config.training.seq_len)
    with torch.device("meta"):
        size: Any = spec.build(args).size()  # type: ignore[operator]
    return least_memory(config, size, args, resolve_degrees(config.parallelism, devices))


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


FULL, NONE = "--activation_checkpoint.mode=full", "--activation_checkpoint.mode=none"
SELECTIVE = "--activation_checkpoint.selective_ac_option"
FLOAT8 = "--model.converters=float8"


@pytest.mark.parametrize(
    ("devices", "options", "share"),
    [
        (1, [NONE], 0.5),
        (1, [FULL], 0.7),
        (1, [f"{SELECTIVE}=2"], 0.5),
        (1, [f"{SELECTIVE}=op"], 0.3),
        (1, [NONE, "--training.mixed_precision_param=float32"], 0.5),
        (1, [NONE, FLOAT8], 0.4),
        (1, [NONE, FLOAT8, "--float8.recipe_name=rowwise"], 0.4),
        (1, [NONE, "--training.compile"], 0.4),
        (1, [NONE, "--training.compile", FLOAT8], 0.4),
        (2, [NONE, "--parallelism.data_parallel_replicate_degree=2"], 0.4),
        (2, [NONE, "--parallelism.tensor_parallel_degree=2"], 0.3),
        (2, [FULL, "--parallelism.tensor_parallel_degree=2", "--parallelism.disable_loss_parallel"], 0.3),
        (1, [FULL, "--training.loss_chunks=4"], 0.3),
        (2, [FULL, "--parallelism.tensor_parallel_degree=2", "--training.loss_chunks=4"], 0.2),
        (2, [FULL, "--parallelism.context_parallel_degree=2"], 0.4),
        (2, [NONE, "--parallelism.pipeline_parallel_degree=2"], 0.2),
        (1, [NONE, "--training.global_batch_size=32"], 0.4),
        slow(1, [NONE, "--model.name=mistral", "--model.args.sliding_window=16"], 0.3),
        slow(1, [NONE, "--model.name=phi3", "--model.args.partial_rotary_factor=0.5"], 0.3),
        slow(2, [NONE, "--model.name=qwen2", "--parallelism.tensor_parallel_degree=2"], 0.2),
        slow(2, [NONE, "--model.name=qwen3", "--parallelism.pipeline_parallel_degree=2"], 0.2),
        slow(2, [NONE, "--model.name=deepseek_v3"], 0.3),
        slow(2, [NONE, "--model.name=llama", "--model.args.tie_embeddings=true"], 0.3),
    ],
)
@pytest.mark.slow
def test_it_is_below_what_a_step_holds_and_not_far(devices: int, options: list[str], share: float) -> None:
    config = configured(*options)
    peak, least = estimate(config, devices).peak, least_of(config, devices).peak
    assert share * peak < least <= peak, (least / peak, least, peak)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"training__seq_len": 10**8}, "training.seq_len"),
        ({"training__local_batch_size": 10**8}, "training.local_batch_size"),
        ({"training__global_batch_size": 4 * 10**9}, "training.global_batch_size"),
        ({"training__seq_len": 1 << 62, "training__local_batch_size": 1 << 62}, "training.seq_len"),
        ({"training__global_batch_size": 1 << 63}, "training.global_batch_size"),
        ({"model__flavor": "70B"}, "model.flavor"),
    ],
)
def test_what_cannot_fit_is_refused_at_once_with_figures(tmp_path: Path, options: dict[str, Any], key: str) -> None:
    run = run_trainer(tmp_path, timeout=90, **options)  # without the refusal, the kernel ends it after longer
    assert run.status == 2, run.output
    assert f"titanlite: error: {key} = " in run.output
    assert "GiB" in run.output or "no device holds" in run.output
    assert not (run.folder / "metrics.jsonl").exists()


def gpu_of(gib: int, monkeypatch: pytest.MonkeyPatch, config: JobConfig) -> None:
    """Check as on a GPU of as much memory, in a machine of a terabyte."""
    monkeypatch.setattr("titanlite.plan.least.total_memory", lambda device: gib << 30)
    monkeypatch.setattr("titanlite.plan.least.host_memory", lambda: 1 << 40)
    spec = get_model_spec("llama3")
    args = spec.configure(spec.flavor("8B"), 128256, config.training.seq_len)
    check_memory(config, spec, args, resolve_degrees(config.parallelism, 8), torch.device("cuda"))


def test_a_gpu_that_is_large_enough_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = load_config(["--training.seq_len=8192", "--training.local_batch_size=1", "--training.compile"])
    gpu_of(80, monkeypatch, fits)
    with pytest.raises(ConfigError) as error:
        gpu_of(10, monkeypatch, fits)
    assert error.value.key == "model.flavor"
    long = load_config(["--training.seq_len=8192", "--training.local_batch_size=64", "--training.compile"])
    with pytest.raises(ConfigError) as error:
        gpu_of(80, monkeypatch, long)
    assert error.value.key == "training.local_batch_size"
    offload = load_config(["--training.seq_len=8192", "--training.local_batch_size=1", "--training.enable_cpu_offload"])
    gpu_of(24, monkeypatch, offload)
    with pytest.raises(ConfigError) as error:
        gpu_of(20, monkeypatch, offload)
    assert error.value.key == "training.seq_len"


def test_the_memory_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = device_module.host_memory()
    assert whole >= device_module.total_memory(torch.device("cpu"))
    (tmp_path / "memory.max").write_text(f"{1 << 30}\n")
    real = device_module.Path
    monkeypatch.setattr(
        device_module, "Path", lambda name: real(tmp_path / "memory.max" if "memory.max" in name else name)
    )
    assert device_module.host_memory() == 1 << 30
    (tmp_path / "memory.max").write_text("max\n")
    assert device_module.host_memory() == whole


def test_estimates_refuse_as_much() -> None:
    with pytest.raises(ConfigError, match="no device holds"):
        check_config(configured(f"--training.seq_len={1 << 60}"), 1, train=False)
