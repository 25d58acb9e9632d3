"""The trainer on a real GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.runs import checkpoints, saved
from titanlite.config.schema import Optimizer, Training
from titanlite.optim import build_optimizer
from titanlite.training.step_guard import StepGuard, StepRecord

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_the_gpu_trains_as_the_cpu(train: Any) -> None:
    options = {"training__mixed_precision_param": "float32", "training__steps": 5}
    gpu = train(name="gpu", **options)
    cpu = train(name="cpu", env={"CUDA_VISIBLE_DEVICES": ""}, **options)
    assert gpu.status == 0, gpu.output
    assert gpu.losses() == pytest.approx(cpu.losses(), rel=1e-4)
    assert gpu.rows()[0]["reserved_gib"] > gpu.rows()[0]["memory_gib"]
    assert f"memory: {gpu.rows()[0]['reserved_gib']:5.2f}GiB(" in gpu.output


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("compile", ["false", "true"])
def test_compile_and_activation_checkpointing(train: Any, mode: str, compile: str) -> None:
    options = {"activation_checkpoint__mode": mode, "activation_checkpoint__selective_ac_option": "op"}
    plain = train(name="plain", training__steps=20)
    run = train(name="run", training__compile=compile, training__steps=20, timeout=600, **options)
    assert run.status == 0, run.output
    assert run.losses() == pytest.approx(plain.losses(), rel=2e-2)  # bfloat16, other kernels


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_float8_with_compile_and_activation_checkpointing(train: Any, recipe: str, mode: str) -> None:
    options = {"activation_checkpoint__mode": mode, "activation_checkpoint__selective_ac_option": "op"}
    float8 = {"model__converters": "float8", "float8__recipe_name": recipe, "training__compile": "true"}
    float8["float8__kernels"] = "inductor"  # tests/gpu/test_gpu_float8.py has the choice by time
    plain = train(name="plain", training__steps=20)
    run = train(name="run", training__steps=20, timeout=600, **options, **float8)
    assert run.status == 0, run.output
    assert "compiled" in run.output
    assert "again" not in run.output
    assert run.losses() == pytest.approx(plain.losses(), rel=5e-2)


@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
def test_a_stopped_run_ends_as_a_straight_one(train: Any, mode: str) -> None:
    options = {**checkpoints(3, async_mode=mode), "training__compile": "true", "timeout": 600}
    straight = train(name="straight", **options, training__steps=6)
    assert straight.status == 0, straight.output
    assert train(name="stopped", **options, training__steps=3).status == 0
    stopped = train(name="stopped", **options, training__steps=6)
    assert "resuming from step 3" in stopped.output
    assert stopped.losses() == straight.losses()
    assert saved(stopped.folder, 6) == saved(straight.folder, 6)


def test_a_run_of_the_cpu_goes_on_on_the_gpu_and_back(train: Any) -> None:
    cpu = {"env": {"CUDA_VISIBLE_DEVICES": ""}}
    assert train(**checkpoints(2), **cpu, training__steps=2).status == 0
    there = train(**checkpoints(2), training__steps=4)
    assert there.status == 0, there.output
    assert "random.0.cuda begins from the seed" in there.output
    back = train(**checkpoints(2), **cpu, training__steps=6)
    assert back.status == 0, back.output
    assert [row["step"] for row in back.rows()] == [*range(1, 7)]


def test_cpu_offload_changes_no_loss(train: Any) -> None:
    plain, offloaded = train(name="plain"), train(name="offloaded", training__enable_cpu_offload="true")
    assert offloaded.status == 0, offloaded.output
    assert offloaded.losses() == pytest.approx(plain.losses(), rel=1e-3)  # AdamW on the other device
    assert offloaded.rows()[-1]["memory_gib"] < plain.rows()[-1]["memory_gib"]


def test_deterministic_runs_are_byte_identical(train: Any) -> None:
    runs = [train(name=f"run{i}", training__deterministic="true", training__steps=10) for i in range(2)]
    assert runs[0].losses() == runs[1].losses()


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_a_skipped_update_waits_for_nothing_and_changes_no_bit(name: str) -> None:
    guard = StepGuard(Training(on_bad_step="skip"), torch.device("cuda"))
    param = torch.nn.Parameter(torch.randn(64, 64, device="cuda"))
    optimizer = build_optimizer([("weight", param)], Optimizer(name=name))
    seen = []
    for value in (1.0, 2.0, float("nan"), 1.0):
        loss, param.grad = torch.full((), value, device="cuda"), torch.full_like(param, value)
        torch.cuda.set_sync_debug_mode("error")
        try:
            record = guard.step(optimizer, loss, loss.double(), loss, torch.ones_like(loss))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert StepRecord.of(record).is_bad == (value != value)
        seen.append([x.detach().cpu().numpy().tobytes() for x in (param, *optimizer.state[param].values())])
    assert seen[2] == seen[1] != seen[0]
    assert seen[3] != seen[2]


def test_a_loss_that_is_not_finite_is_skipped_where_it_is_seen_later(train: Any) -> None:
    run = train(
        optimizer__lr=1e30,
        optimizer__weight_decay=0,
        training__steps=200,
        metrics__log_freq=100,
        training__on_bad_step="skip",
        training__max_skipped_in_a_row=4,
    )
    assert run.status == 1, run.output
    assert run.output.count("WARNING - step") == 4
    assert "4 skipped steps in a row" in run.output


def test_a_loss_that_is_not_finite_stops_the_run(train: Any) -> None:
    run = train(optimizer__lr=1e30, optimizer__weight_decay=0, training__steps=200, metrics__log_freq=100)
    assert run.status == 1, run.output
    assert "is not finite" in run.output
