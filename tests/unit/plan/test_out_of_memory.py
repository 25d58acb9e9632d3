"""Runs that run out of memory, really, and what they are told."""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import ROOT, faulty
from titanlite.config import JobConfig, load_config
from titanlite.launch.shortage import Shortage
from titanlite.metrics.device import GIB
from titanlite.plan.advice import Advice, Knob, Need, describe, find_advice, knobs
from titanlite.plan.estimate import ASSUMED_VOCAB_SIZE
from titanlite.plan.predicted import reserved_peak

SHORT = Shortage(
    rank=0, world_size=1, device="cpu", room=4 * GIB, requested=GIB, unused=0, native_formats=[], config=""
)
GPU = replace(SHORT, device="cuda", native_formats=["float8"])


def read(*arguments: str) -> JobConfig:
    return load_config([f"--{argument}" for argument in arguments], str(ROOT / "train_configs" / "debug_model.toml"))


def shown(shortage: Shortage, *arguments: str) -> set[str]:
    return {knob.shown(shortage) for knob in knobs(read(*arguments), shortage)}


BATCHES = {
    "--training.local_batch_size=1 --training.global_batch_size=8",
    "--training.local_batch_size=4 --training.global_batch_size=8",
}


def test_only_what_is_not_on_yet_is_offered() -> None:
    off = ("activation_checkpoint.mode=none", "training.local_batch_size=8")
    assert shown(SHORT, *off) == {
        "--activation_checkpoint.mode=full",
        "--activation_checkpoint.mode=selective --activation_checkpoint.selective_ac_option=op",
        "--parallelism.fsdp_reshard_after_forward=always",
        "--training.compile=true",
        "--training.loss_chunks=8",
        *BATCHES,
    }
    on = (
        "activation_checkpoint.mode=full",
        "parallelism.fsdp_reshard_after_forward=always",
        "training.compile",
        "training.loss_chunks=2",
        "training.local_batch_size=1",
    )
    assert shown(SHORT, *on) == set()
    assert shown(SHORT, *on, "training.mixed_precision_param=float32", "optimizer.implementation=foreach") == {
        "--training.mixed_precision_param=bfloat16",
        "--optimizer.implementation=fused",
    }


def test_gpus_have_more_to_offer() -> None:
    on = ("activation_checkpoint.mode=full", "parallelism.fsdp_reshard_after_forward=always", "training.compile")
    on += ("training.loss_chunks=2",)
    more = shown(replace(GPU, world_size=2), *on, "training.local_batch_size=4")
    assert more == {
        "--model.converters=float8",
        "--training.enable_cpu_offload=true",
        "--training.local_batch_size=1 --training.global_batch_size=8",
        "--training.local_batch_size=2 --training.global_batch_size=8",
        "--parallelism.context_parallel_degree=2 --parallelism.data_parallel_shard_degree=1 "
        "--training.global_batch_size=8",
        "on 4 devices: --parallelism.context_parallel_degree=2 --parallelism.data_parallel_shard_degree=2 "
        "--training.global_batch_size=8",
        "on 4 devices: --parallelism.data_parallel_shard_degree=4 --training.global_batch_size=8 "
        "--training.local_batch_size=2",
    }
    all_on = ("model.converters=float8", "float8.force_recompute_fp8_weight_in_bwd", "training.enable_cpu_offload")
    assert not {"number format", "offload"} & {knob.group for knob in knobs(read(*on, *all_on), GPU)}


def test_the_same_devices_hold_one_copy_rather_than_two() -> None:
    replicas = ("parallelism.data_parallel_replicate_degree=2", "parallelism.data_parallel_shard_degree=2")
    assert ("--parallelism.data_parallel_replicate_degree=1 --parallelism.data_parallel_shard_degree=4") in shown(
        replace(GPU, world_size=4), *replicas
    )


def test_pipelines_have_smaller_microbatches() -> None:
    options = ("parallelism.pipeline_parallel_degree=2", "training.local_batch_size=4")
    stages = replace(GPU, world_size=2)
    assert "batch" not in {knob.group for knob in knobs(read(*options), stages)}
    larger = "parallelism.pipeline_parallel_microbatch_size=2"
    assert "--parallelism.pipeline_parallel_microbatch_size=1" in shown(stages, *options, larger)


FULL = Knob("activation_checkpoint", {"activation_checkpoint.mode": "full"}, 1)
MORE = Knob("mesh", {"parallelism.data_parallel_shard_degree": 2}, 2)


def test_what_would_have_been_enough_says_so() -> None:
    advice = Advice(Need(5 * GIB, GIB), [(MORE, 3 * GIB), (FULL, int(4.5 * GIB))], None, [])
    text = describe(advice, SHORT)
    assert "an estimated 5.000 GiB at its peak, and there were about 4.000 GiB" in text
    assert "        3.000      2.000  enough  on 2 devices: --parallelism.data_parallel_shard_degree=2" in text
    assert "        4.500      0.500          --activation_checkpoint.mode=full" in text
    assert "Even all that go together would not have been enough on 1 of these devices" in text
    enough = describe(replace(advice, together=(FULL, 2 * GIB)), SHORT)
    assert "enough  together: --activation_checkpoint.mode=full" in enough
    assert "not have been enough" not in enough


@pytest.mark.slow
def test_on_a_gpu_that_plans_know_advice_is_by_their_memory_model() -> None:
    """Options that the model does not see, such as the optimizer's implementation, count as in the estimates."""
    options = ("training.local_batch_size=1", "optimizer.implementation=foreach", "model.args.n_layers=2")
    options += ("training.loss_chunks=2", "parallelism.fsdp_reshard_after_forward=always")  # fewer estimates
    config, gpu = read(*options), replace(GPU, native_formats=[], device_name="NVIDIA H100 80GB HBM3")
    planned = find_advice(config, gpu, ASSUMED_VOCAB_SIZE)
    estimated = find_advice(config, replace(gpu, device_name="another"), ASSUMED_VOCAB_SIZE)
    assert planned.now.peak == reserved_peak(config, 1, ASSUMED_VOCAB_SIZE) != estimated.now.peak
    peaks = {knob.shown(gpu): (knob, peak) for knob, peak in planned.alone}
    full, peak = peaks["--activation_checkpoint.mode=full"]
    assert peak == reserved_peak(full.apply(config), 1, ASSUMED_VOCAB_SIZE)
    before = {knob.shown(gpu): peak for knob, peak in estimated.alone}
    ratio = planned.now.peak / estimated.now.peak
    fused = "--optimizer.implementation=fused"
    assert (fused in peaks) == (fused in before)
    if fused in before:
        assert peaks[fused][1] == pytest.approx(before[fused] * ratio)


def test_an_estimate_below_what_there_was_is_no_promise() -> None:
    """What was asked for last did not fit, whatever the estimate says: less than that saved is not enough."""
    text = describe(Advice(Need(3 * GIB, 0), [(FULL, int(2.5 * GIB))], None, []), SHORT)
    assert "What estimates leave out did not fit" in text
    assert "        2.500      0.500          --activation" in text


def test_what_is_not_known_is_not_said() -> None:
    text = describe(Advice(Need(3 * GIB, 0), [(FULL, GIB)], None, [MORE]), replace(SHORT, room=None, unused=2 * GIB))
    assert "enough" not in text
    assert "        1.000      2.000  --activation_checkpoint.mode=full" in text
    assert "Not estimated within 180 s: on 2 devices: --parallelism" in text
    assert "2.000 GiB were reserved, but in pieces too small: with PYTORCH_CUDA_ALLOC_CONF" in text
    assert "No option that is not on yet takes less." in describe(Advice(Need(GIB, 0), [], None, []), SHORT)


def out_of_memory(at: int, rank: int = 0) -> dict[str, Any]:
    """Options for a run whose step ``at`` is its last; of what could be on, little is off: each estimate takes time."""
    on = {"activation_checkpoint__mode": "full", "parallelism__fsdp_reshard_after_forward": "always"}
    large = {"training__seq_len": 1024, "training__local_batch_size": 2, "training__steps": at + 1}
    large |= {"model__args__n_layers": 2}
    return {**faulty(OOM_AT=at, OOM_RANK=rank), "model__converters": "fault", **large, **on}


@pytest.mark.slow
def test_a_run_without_memory_ends_with_what_would_have_saved_it(train: Any) -> None:
    run = train(**out_of_memory(at=3))
    assert run.status == 1
    assert run.output.count("titanlite: error:") == 1
    assert "Traceback" not in run.output
    assert re.search(r"error: rank 0 ran out of memory in step 3, at \S+/\w+\.py:\d+, in \w+: \w", run.output)
    assert "DefaultCPUAllocator: can't allocate memory: you tried to allocate" in run.output
    assert_advised(run.output, "--training.local_batch_size=1", "--training.compile=true", "--training.loss_chunks=8")
    assert [row["step"] for row in run.rows()] == [1, 2]


def assert_advised(output: str, *options: str) -> None:
    """These options are offered, the best first, and all together, which saves no less."""
    rows = re.findall(r"^ +([\d.]+) +([\d.]+)  (?:enough|      )  (.*)", output, re.MULTILINE)
    *alone, (_, most, together) = rows
    by_option = {option.split()[0]: float(saved) for _, saved, option in alone}
    assert by_option.keys() == {*options}
    assert list(by_option.values()) == sorted(by_option.values(), reverse=True)
    assert together.startswith("together: ")
    assert float(most) >= max(by_option.values())


@pytest.mark.slow
def test_without_memory_for_the_model_there_is_an_answer_too(train: Any, tmp_path: Path) -> None:
    (tmp_path / "greedy.py").write_text(
        """
import sys

def allocate(*_):
    raise MemoryError

sys.modules["__main__"].allocate = allocate
"""
    )
    options = {**out_of_memory(at=1), "training__local_batch_size": 1, "training__compile": "true"}
    run = train(**{**options, "experimental__custom_import": "greedy", "model__converters": ""})
    assert run.status == 1
    assert "rank 0 ran out of memory before the first step, at ./greedy.py:5, in allocate: raise" in run.output
    assert "MemoryError: Python has no memory left" in run.output
    assert "No option that is not on yet takes less." in run.output


@pytest.mark.slow
def test_an_estimate_that_fails_is_one_line_and_leaves_no_process(train: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(
        """
import sys
import tests.support.faults
from titanlite.converters import register_converter

@register_converter("broken")
class Broken:
    def __init__(self, config, mesh):
        pass
    def convert(self, model):
        if sys.argv[0].endswith("advice.py"):
            raise RuntimeError("not here")
        return "nothing"
    def post_optimizer_hook(self, model):
        pass
"""
    )
    options = out_of_memory(at=2)
    options["env"] |= {"TMPDIR": str(tmp_path)}  # where the advice is told of the shortage
    run = train(**{**options, "experimental__custom_import": "broken", "model__converters": "fault,broken"})
    assert run.status == 1
    assert "titanlite: there is no estimate of it: RuntimeError: not here" in run.output
    assert "Traceback" not in run.output
    give_up = time.monotonic() + 5
    while (left := advising(tmp_path)) and time.monotonic() < give_up:
        time.sleep(0.1)
    assert left == []


def advising(folder: Path) -> list[str]:
    """The processes whose arguments name a shortage in this folder."""
    command_lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            arguments = path.read_bytes().decode(errors="replace")
            command_lines += [arguments] if "titanlite.plan.advice" in arguments and str(folder) in arguments else []
    return command_lines
