"""float8.kernels = "auto" on a GPU: both kinds of kernels are timed and compared; nothing that fails ends the run."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("triton")

from tests.support.forks import on_ranks
from tests.support.runs import environment
from titanlite.config import JobConfig, load_config, resolve_degrees
from titanlite.config.schema import Comm, Parallelism
from titanlite.converters import float8 as converter
from titanlite.converters.float8 import KINDS, Float8Converter
from titanlite.converters.registry import TimedOption, options_to_time
from titanlite.distributed.mesh import build_mesh
from titanlite.distributed.runtime import start_runtime
from titanlite.doctor import time_blocks, timed_choice
from titanlite.doctor.timed_choice import NothingToTime, Timing, choose, decide
from titanlite.quant.float8 import format
from titanlite.quant.kernels import reference

KERNELS = "float8.kernels"
BY_COUNT = {kind: TimedOption(KERNELS, KINDS, kind) for kind in KINDS}
EQUAL = {"inductor": 0.05, "triton": 0.06}
GATHER = "float8.enable_fsdp_float8_all_gather"
OPTIONS = [
    *("--model.converters=float8", "--float8.recipe_name=rowwise", "--training.compile", "--compile.backend=aot_eager"),
    *("--model.args.dim=64", "--model.args.n_heads=2", "--model.args.n_kv_heads=2", "--model.args.ffn_dim=128"),
    *("--training.seq_len=32", "--training.local_batch_size=2", "--activation_checkpoint.mode=none"),
    "--parallelism.tensor_parallel_degree=2",
    *(f"--{GATHER}", "--float8.filter_fqns=output,layers.5.attention"),
]


@pytest.mark.parametrize(
    ("by_count", "seconds", "kind"),
    [
        ("inductor", ([1.0, 1.1, 1.0], [1.2, 1.3, 1.2]), "inductor"),
        ("inductor", ([1.2, 1.3, 1.2], [1.0, 1.1, 1.0]), "triton"),
        ("triton", ([1.0, 1.1, 1.0], [1.2, 1.3, 1.2]), "inductor"),
        ("inductor", ([1.01, 1.0, 1.01], [1.0, 1.0, 1.0]), "inductor"),  # as good as equal
        ("triton", ([1.0, 1.0, 1.0], [1.01, 1.0, 1.01]), "triton"),
        ("inductor", ([1.0, 9.0, 1.0], [1.2, 1.0, 1.2]), "inductor"),  # one round that something else slowed
    ],
)
def test_the_faster_kind_is_taken(by_count: str, seconds: tuple[list[float], list[float]], kind: str) -> None:
    decision = decide(BY_COUNT[by_count], Timing(1, dict(zip(("inductor", "triton"), seconds, strict=True)), EQUAL))
    assert (decision.kind, decision.warning) == (kind, "")
    assert "forward and backward of 1 block took" in decision.why


@pytest.mark.parametrize("by_count", ["inductor", "triton"])
@pytest.mark.parametrize(
    ("inductor", "triton", "kind"), [(0.05, 0.4, "inductor"), (0.05, math.nan, "inductor"), (math.nan, 0.05, "triton")]
)
def test_the_kind_that_computes_something_else_is_not_taken(
    by_count: str, inductor: float, triton: float, kind: str
) -> None:
    seconds = {"inductor": [1.0] * 3, "triton": [1.0] * 3}
    seconds[{"inductor": "triton", "triton": "inductor"}[kind]] = [0.1] * 3
    decision = decide(BY_COUNT[by_count], Timing(1, seconds, {"inductor": inductor, "triton": triton}))
    assert decision.kind == kind
    assert f"{inductor:.3g} with the compiler's kernels and {triton:.3g} with titanlite's" in decision.warning


@pytest.mark.parametrize("error", [1.4, math.nan])
def test_where_both_are_wrong_the_count_decides(error: float) -> None:
    both = Timing(1, {"inductor": [1.0], "triton": [1.0]}, {"inductor": error, "triton": error})
    for by_count in ("inductor", "triton"):
        decision = decide(BY_COUNT[by_count], both)
        assert decision.kind == by_count
        assert "Please report it" in decision.warning


# ---- timing


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU as a device with float8 units, in a process group of one."""
    monkeypatch.setattr(format, "must_emulate", lambda device, target, dtypes, emulate, compiled: emulate)
    monkeypatch.setattr(converter, "native_dtypes", lambda architecture: set(format.DTYPES))
    monkeypatch.setattr(converter, "why_not", lambda *args, **kwargs: None)
    monkeypatch.setattr(time_blocks, "_SECONDS", 0.01)
    dist.init_process_group("gloo", init_method="tcp://localhost:0", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def config_of(*options: str) -> JobConfig:
    return load_config([*OPTIONS, *options])


@pytest.mark.slow
def test_a_block_is_timed_and_compared(native: None) -> None:
    """A run's options for more processes, and filters of layers of other blocks, are no hindrance."""
    timing = time_blocks.measure(config_of(), torch.device("cpu"), KERNELS, [*KINDS])
    assert timing.blocks == 1
    assert all(len(seconds) >= 3 and min(seconds) > 0 for seconds in timing.seconds.values())
    assert all(0.01 < error < 0.2 for error in timing.errors.values())  # that of float8
    assert timing.errors["triton"] == pytest.approx(timing.errors["inductor"], rel=0.05)
    assert not decide(BY_COUNT["inductor"], timing).warning


@pytest.mark.slow
def test_a_kernel_that_is_wrong_is_noticed(native: None) -> None:
    def wrong(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return reference.cast_with(x.roll(1, 0), *args)

    with torch.library._scoped_library("titanlite_quant", "IMPL") as library:
        library.impl("cast", wrong, "CPU", allow_override=True)
        # The shards of a gather are cast by it whatever the kind, so both kinds would be wrong.
        timing = time_blocks.measure(config_of(f"--{GATHER}=false"), torch.device("cpu"), KERNELS, [*KINDS])
    assert timing.errors["inductor"] < 0.1 < 1 < timing.errors["triton"]
    decision = decide(BY_COUNT["triton"], timing)
    assert decision.kind == "inductor"
    assert "Please report it" in decision.warning


# ---- the choice of a run


@pytest.mark.slow
def test_a_failure_is_a_warning(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the child process, which has no GPU here."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with caplog.at_level(logging.WARNING):
        assert timed_choice._ask(config_of(), BY_COUNT["triton"], 100.0) == "triton: by count"
    assert "no block could be timed (RuntimeError: there is no GPU)" in caplog.text


def test_where_no_layer_of_a_block_is_converted_there_is_nothing_to_time(native: None) -> None:
    config = config_of("--float8.filter_fqns=attention,feed_forward")
    with pytest.raises(NothingToTime, match="no linear layer of a block"):
        time_blocks.measure(config, torch.device("cpu"), KERNELS, [*KINDS])


def test_too_little_time_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert timed_choice._ask(config_of(), BY_COUNT["inductor"], 0.2) == "inductor: by count"
    assert "no block could be timed (0 s were not enough)" in caplog.text


def choose_on_ranks(earlier: dict[str, Any], *options: str) -> tuple[str, str]:
    """Return the choice of a rank, from its configuration and its header. Only rank 0 knows an earlier run."""
    runtime, config = start_runtime(Comm()), config_of(*options)
    config.float8.kernels_chosen = "inductor: in another start"
    earlier = earlier if runtime.rank == 0 else {}
    timed_choice.options_to_time = lambda config, device: [BY_COUNT["inductor"]]  # type: ignore[assignment]
    seconds = {"inductor": [1.2] * 3, "triton": [1.0] * 3}

    def timing(config: JobConfig, option: TimedOption, seconds_left: float) -> Timing:
        assert runtime.rank == 0
        return Timing(1, seconds, EQUAL)

    timed_choice.time_in_child = timing
    header = choose(config, runtime, earlier)
    dist.destroy_process_group()
    return config.float8.kernels_chosen, header.get(KERNELS, "")


def test_all_ranks_take_the_choice_of_the_first(tmp_path: Path) -> None:
    ranks = on_ranks(2, tmp_path / "two", environment(), choose_on_ranks, {})
    assert ranks[0] == ranks[1]
    assert ranks[0][0] == ranks[0][1]
    assert ranks[0][0].startswith("triton: forward and backward of 1 block took 1200.00 ms with the compiler's kernels")


@pytest.mark.parametrize("options", [[], ["--training.deterministic"]])
def test_all_ranks_keep_the_choice_of_the_run(tmp_path: Path, options: list[str]) -> None:
    before = {"float8": {"recipe_name": "rowwise", "kernels_chosen": "triton: then"}, "compile": {"block_fusion": True}}
    ranks = on_ranks(2, tmp_path / "two", environment(), choose_on_ranks, before, *options)
    assert ranks == [["triton: then", "triton: then"]] * 2


def test_deterministic_runs_go_by_count(tmp_path: Path) -> None:
    assert on_ranks(1, tmp_path / "one", environment(), choose_on_ranks, {}, "--training.deterministic") == [["", ""]]


def test_a_compiled_run_on_a_gpu_has_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter, "architecture", lambda device: "sm_90")
    gpu = torch.device("cuda")

    def kind(*options: str) -> str | None:
        choices = options_to_time(config_of("--compile.backend=inductor", *options), gpu)
        return choices[0].by_count if choices else None

    assert kind() == "inductor"
    assert kind("--compile.no-block_fusion") == "triton"
    for option in ("--float8.kernels=triton", "--float8.emulate", "--training.no-compile", "--compile.backend=eager"):
        assert kind(option) is None


@pytest.mark.parametrize(
    ("recipe", "fusion", "kept"), [("rowwise", True, True), ("tensorwise", True, False), ("rowwise", False, False)]
)
def test_a_run_that_goes_on_keeps_its_choice(recipe: str, fusion: bool, kept: bool) -> None:
    before = {
        "float8": {"recipe_name": recipe, "kernels_chosen": "inductor: as before"},
        "compile": {"block_fusion": fusion},
    }
    assert timed_choice._kept(config_of(), BY_COUNT["triton"], before) == ("inductor: as before" if kept else "")


def test_a_run_of_an_older_titanlite_stays_with_the_count() -> None:
    before = {"float8": {"recipe_name": "rowwise"}, "compile": {"block_fusion": True}}
    assert timed_choice._kept(config_of(), BY_COUNT["inductor"], before) == "inductor: by count, as before"


def test_the_converter_takes_what_was_chosen(native: None) -> None:
    mesh = build_mesh(resolve_degrees(Parallelism(), 1), "cpu")
    for chosen, kernels in (("triton: it was faster", "triton"), ("", "inductor"), ("foo: bar", "inductor")):
        config = config_of("--compile.backend=inductor")
        config.float8.kernels_chosen = chosen
        assert Float8Converter(config, mesh)._choose_kernels() == kernels


def test_there_is_no_choice_on_the_cpu() -> None:
    assert options_to_time(config_of("--compile.backend=inductor"), torch.device("cpu")) == []
