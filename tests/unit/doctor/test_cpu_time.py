"""The time of a step from that of its operators: all of them can be timed, in one process and in two."""

from __future__ import annotations

import json

import pytest

from titanlite.commands import plan as command

SIZES = ["debug_model", "--training.seq_len=32", "--training.local_batch_size=1", "--model.args.n_layers=1"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_on_this_machine_is_predicted(capsys: pytest.CaptureFixture[str], processes: int) -> None:
    batch = f"--training.global_batch_size={2 * processes}"  # two microbatches
    assert command.main([*SIZES, batch, "--device=cpu", f"--devices={processes}", "--json"]) == 0
    (layout,) = json.loads(capsys.readouterr().out)["layouts"]
    assert layout["not_timed"] == []
    assert layout["fits"]
    parts = layout["step_parts_s"]
    assert layout["step_time_s"] == pytest.approx(sum(parts.values()))
    assert layout["tps_per_device"] == pytest.approx(2 * 32 / layout["step_time_s"])
    assert all(parts[part] > 0 for part in ("matmuls", "attention", "others", "host"))
    assert (parts["communication"] > 0) == (processes == 2)
    assert 0 < layout["memory_gib"] < 1


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("--training.compile", "training.compile"),
        ("--devices=0", "--devices = 0"),
        ("--write=my.toml", "--write"),
        ("--explain=1", "--explain"),
        ("--devices=2 --parallelism.tensor_parallel_degree=2", "parallelism.tensor_parallel_degree"),
        ("--training.local_batch_size=100000000", "GiB"),
    ],
)
def test_what_is_no_plan_of_a_cpu_is_refused(capsys: pytest.CaptureFixture[str], option: str, key: str) -> None:
    assert command.main([*SIZES, "--device=cpu", *option.split()]) == 2
    assert key in capsys.readouterr().err
