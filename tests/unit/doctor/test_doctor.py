"""``titanlite doctor``: the verdict follows from the measurements, every machine gets a report, and formats that gain
nothing are not advised."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import ROOT, environment
from titanlite.commands import doctor
from titanlite.config import load_config
from titanlite.converters.linears import native_instead
from titanlite.doctor import allreduce, examine, probe, shallow
from titanlite.doctor.ceilings import matmul_ceilings
from titanlite.doctor.machine import machine, read_fact
from titanlite.doctor.probe import BASE
from titanlite.doctor.report import command
from titanlite.doctor.verdict import decide
from titanlite.quant.int8.format import Int8Format


def layer(
    format: str, speedup: float, name: str = "attention.wq", compiled: bool = False, emulated: bool = False
) -> Any:
    row = {"kind": "layer", "format": format, "layer": name, "compiled": compiled, "speedup": speedup}
    return {**row, "emulated": emulated, "ms": 1 / speedup}


def step(format: str, ms: float, base_ms: float, compiled: bool = False, filter_fqns: list[str] | None = None) -> Any:
    row = {"kind": "step", "format": format, "ms": ms, "speedup": base_ms / ms, "compiled": compiled}
    return {**row, "filter_fqns": filter_fqns or []}


def test_a_format_that_does_not_gain_is_not_advised() -> None:
    rows = [layer(BASE, 1.0), layer("int8", 0.8), step(BASE, 10, 10), step("int8", 11, 10)]
    verdict = decide(rows, compile_asked=False)
    assert verdict.options == {}
    assert verdict.gain == 1.0
    (reason,) = verdict.reasons
    assert reason.startswith("int8 has units here")
    assert reason.endswith("it will not gain")


def test_a_format_that_gains_is_advised_with_the_filters_it_was_measured_with() -> None:
    rows = [
        *(layer(BASE, 1.0), layer("int8", 1.5), layer("int8", 0.9, "output"), layer("float8", 0.1, emulated=True)),
        *(step(BASE, 10, 10, True), step("int8", 8, 10, True, ["output"])),
    ]
    verdict = decide(rows, compile_asked=False)
    assert verdict.options == {
        "training.compile": "true",
        "model.converters": "int8",
        "int8.filter_fqns": "output",
    }
    assert verdict.gain == pytest.approx(1.25)
    assert any("emulated" in reason for reason in verdict.reasons)


def test_a_gain_counts_against_the_fastest_high_precision() -> None:
    """Eager int8 that beats eager bfloat16 is no advice where compiled bfloat16 is faster than both."""
    eager = [step(BASE, 20, 20), step("int8", 15, 20)]
    compiled = [step(BASE, 10, 10, True), step("int8", 10.1, 10, True)]
    verdict = decide([layer("int8", 1.5), *eager, *compiled], compile_asked=True)
    assert (verdict.options, verdict.gain) == ({}, 1.0)


def test_without_a_step_there_is_no_advice() -> None:
    verdict = decide([layer("int8", 2.0)], compile_asked=False)
    assert (verdict.options, verdict.gain) == ({}, None)
    assert "no step was measured" in verdict.reasons[0]


def test_a_fact_that_cannot_be_read_is_no_error() -> None:
    def broken() -> str:
        raise FileNotFoundError("nvidia-smi")

    assert read_fact(broken) == "unknown (FileNotFoundError: nvidia-smi)"
    facts = machine(torch.device("cpu"))
    assert facts["versions"].startswith("titanlite ")
    assert torch.__version__ in facts["versions"]
    # What a machine with a broken driver gives: every fact of a GPU is unknown, and none raises.
    assert not torch.cuda.is_available() or machine(torch.device("cuda", 0))
    if not torch.cuda.is_available():
        assert machine(torch.device("cuda", 0))["peak"].startswith("unknown (")


def test_the_header_names_formats_with_units() -> None:
    assert native_instead("sm_90").startswith("; float8 and int8 have units on sm_90")
    assert native_instead("sm_80").startswith("; int8 has units on sm_80")
    assert native_instead("sm_70") == ""


def test_ceilings_are_those_of_matmuls() -> None:
    """An int8 matmul of this machine, emulated, is at most as fast as the float32 matmul that it is."""
    emulated = Int8Format(emulate=True)
    rates = dict(matmul_ceilings(torch.device("cpu"), {"int8": emulated}))
    assert [*rates] == ["float32", "bfloat16", "int8"]
    assert all(1e8 < rate < 1e14 for rate in rates.values())
    assert rates["int8"] < 1.5 * rates["float32"]


def test_facts_alone_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["llama3_8b", "--json", "--no-measure", "--training.compile=false"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"machine", "model", "features", "rows", "verdict", "attention", "all_reduce"} <= {*report}
    assert report["model"] == "llama3 8B"
    assert {feature["option"] for feature in report["features"]} >= {"training.compile", "model.converters=int8"}
    assert report["rows"] == []


def test_bad_options_are_refused_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--model.flavor=17B", "--no-measure"]) == 2
    assert "17B" in capsys.readouterr().err


@pytest.fixture
def process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method="tcp://localhost:0", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_options_for_many_processes_and_filters_leave_all_to_measure(
    process: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gathers have no meaning here, the first layer of a size may be left out, and one block of two is checkpointed."""
    monkeypatch.setitem(probe._ROUNDS_SECONDS, "cpu", 0.01)
    monkeypatch.setitem(shallow._SECONDS, "cpu", 1e-9)  # as few blocks as there can be
    shape = ["--model.args.dim=64", "--model.args.n_heads=2", "--model.args.n_kv_heads=2", "--model.args.ffn_dim=128"]
    config = load_config(
        [
            *shape,
            *("--training.seq_len=32", "--training.local_batch_size=1", "--parallelism.tensor_parallel_degree=2"),
            *("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=2"),
            *("--int8.filter_fqns=output,wq,w1", "--int8.enable_fsdp_int8_all_gather"),
            "--mx.enable_tensor_parallel_mxfp8_all_gather",
        ],
        str(ROOT / "train_configs" / "debug_model.toml"),
    )
    probing = probe.Probe(config, torch.device("cpu"))
    probing._convert()
    probing.rates = {"bfloat16": 1e10, "float32": 1e10}
    probing._layers(False)
    probing._steps(False)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row for row in rows if row["kind"] in ("failed", "refused")] == []
    layers = {row["layer"].rpartition(".")[2] for row in rows if row["kind"] == "layer" and row["format"] == "int8"}
    converted = {"wk", "wv", "wo", "w2", "w3"}
    assert (layers <= converted and len(layers) == 1) if probing.emulated["int8"] else layers == converted
    assert {row["format"] for row in rows if row["kind"] == "layer"} == {BASE, "float8", "int8", "mx"}
    assert {row["blocks"] for row in rows if row["kind"] == "step"} == {2}


def test_weights_in_int8_are_no_matter_of_speed(process: None, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(["--int8.recipe_name=weights"], str(ROOT / "train_configs" / "debug_model.toml"))
    probe.Probe(config, torch.device("cpu"))._convert()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["format"] for row in rows if row["kind"] == "refused"] == ["int8"]


def test_options_of_a_format_that_is_not_advised_are_not_in_the_line_to_type() -> None:
    examination = examine.examine(load_config([], None), [], measure=False)
    given = ["--int8.recipe_name=rowwise", "--training.steps=5"]
    assert command(examination, given).endswith("train --training.steps=5")
    assert command(examination, ["--model.converters=int8", *given]).endswith("rowwise --training.steps=5")


@pytest.mark.slow
def test_a_measuring_process_that_dies_leaves_a_report() -> None:
    rows, unfinished = examine._probe(["--model.flavor=17B"], 60)
    assert rows == []
    assert "ended early" in unfinished
    assert "17B" in unfinished


@pytest.mark.slow
def test_all_reduce_among_processes() -> None:
    measurement = allreduce.measure(2, 60)
    assert measurement["processes"] == 2
    assert measurement["backend"] == "gloo"
    assert measurement["bytes_per_s"] > 1e6
    assert 0 < measurement["latency_s"] < 10


@pytest.mark.slow
def test_a_small_model_is_measured_in_less_than_a_minute(tmp_path: Path) -> None:
    """The whole command, on a model so small that int8 has nothing to gain in eager mode."""
    sizes = ["--model.args.n_layers=1", "--model.args.dim=64", "--model.args.n_heads=2", "--model.args.n_kv_heads=2"]
    options = [*sizes, "--model.args.ffn_dim=64", "--training.seq_len=64", "--training.local_batch_size=2"]
    options.append("--activation_checkpoint.mode=none")
    command = [sys.executable, "-m", "titanlite.commands", "doctor", "--json", "--processes=1", *options]
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - begin < 60
    report = json.loads(done.stdout)
    kinds = {row["kind"] for row in report["rows"]}
    assert {"copy", "matmul", "layer"} <= kinds or report["unfinished"]
    assert [row for row in report["rows"] if row["kind"] in ("failed", "refused")] == []
    int8 = [row for row in report["rows"] if row["kind"] == "layer" and row["format"] == "int8" and not row["compiled"]]
    if int8:
        assert all(row["speedup"] < 1.03 for row in int8)
    assert report["verdict"]["options"].get("model.converters") in (None, "int8")
