"""Estimates without devices, against what real runs of the same configuration hold and send."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support.forks import on_ranks
from tests.support.runs import ROOT, Run, environment, forked_run
from tests.unit.plan import real_step
from titanlite.config import load_config, packaged
from titanlite.data import load_tokenizer
from titanlite.plan.depth import peak_memory
from titanlite.plan.estimate import ASSUMED_VOCAB_SIZE, Estimate, estimate
from titanlite.plan.memory import MemoryTracker

DEBUG = {
    "training.seq_len": 64,
    "training.local_batch_size": 2,
    "training.seed": 0,
    "activation_checkpoint.mode": "none",
    "training.compile": "false",
}


def arguments(options: dict[str, Any]) -> list[str]:
    return [f"--{key}={value}" for key, value in options.items()]


@cache
def estimated(devices: int, file: str = "debug_model", **options: str) -> Estimate:
    given = {**DEBUG, **{key.replace("__", "."): value for key, value in options.items()}}
    return estimate(load_config(arguments(given), str(ROOT / "train_configs" / f"{file}.toml")), devices)


def really(folder: Path, devices: int, **options: str) -> list[dict[str, Any]]:
    given = {**DEBUG, **{key.replace("__", "."): value for key, value in options.items()}}
    shown = arguments({**given, "job.dump_folder": folder / "run"})
    return on_ranks(devices, folder / "ranks", environment(), real_step.report, shown)


def assert_same(prediction: Estimate, real: list[dict[str, Any]]) -> None:
    for rank in prediction.ranks:
        other = real[rank.rank]
        for key in ("parameters", "gradients", "optimizer"):
            assert getattr(rank, key) == other[key], key
        # Without the norm of the gradients, which the real run here leaves out.
        sent = sorted([*c, t.calls, t.nbytes, t.sent] for c, t in rank.traffic.items() if c.dimension != "all ranks")
        assert sent == other["traffic"]
        assert len(real) == 1 or sent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "options"),
    [
        pytest.param(1, {}, marks=pytest.mark.long),
        (2, {"training__global_batch_size": "8", "optimizer__moments": "float8_e4m3fn"}),
        pytest.param(
            2,
            {
                "training__global_batch_size": "8",
                "parallelism__fsdp_reduce_gradients": "microbatch",
                "optimizer__moments": "bfloat16",
            },
            marks=pytest.mark.long,
        ),
        (2, {"parallelism__tensor_parallel_degree": "2"}),
        (2, {"parallelism__pipeline_parallel_degree": "2"}),
        pytest.param(2, {"parallelism__context_parallel_degree": "2"}, marks=pytest.mark.long),
        pytest.param(2, {"parallelism__data_parallel_replicate_degree": "2"}, marks=pytest.mark.long),
    ],
    ids=["one", "accumulation, float8 moments", "accumulation of shards, bfloat16 moments", "TP", "PP", "CP", "HSDP"],
)
def test_a_real_run_holds_and_sends_as_much(tmp_path: Path, devices: int, options: dict[str, str]) -> None:
    if "parallelism__data_parallel_replicate_degree" in options:
        options = {**options, "parallelism__data_parallel_shard_degree": "1"}
    assert_same(estimated(devices, **options), really(tmp_path, devices, **options))


@pytest.mark.slow
def test_a_real_run_with_shards_that_are_uneven_holds_and_sends_as_much(tmp_path: Path) -> None:
    """3 shards of 256 rows: 86, 86 and 84, of which FSDP2 allocates 86."""
    prediction, real = estimated(3), really(tmp_path, 3)
    assert_same(prediction, real)
    (rank,) = prediction.ranks
    assert [r["parameters"] for r in real] == [rank.parameters] * 3
    assert [r["gradients"] for r in real] == [rank.gradients] * 3
    assert real[2]["optimizer"] < rank.optimizer
    assert any("do not divide into shards" in note for note in prediction.notes)
    assert not any("do not divide" in note for note in estimated(2).notes)


@pytest.mark.slow
def test_one_process_in_float32_holds_as_much_as_a_real_run(tmp_path: Path) -> None:
    """Its weights and gradients are not copied: the peak is that of the real run, to the byte. In bfloat16 they are."""
    options = {"training__mixed_precision_param": "float32"}
    prediction, real = estimated(1, **options), really(tmp_path, 1, **options)
    assert_same(prediction, real)
    (rank,) = prediction.ranks
    assert rank.peak == real[0]["peak"] + real[0]["optimizer"]
    assert rank.gathered == 0
    assert rank.movable == rank.optimizer  # with CPU offload the weights are copied to the device
    given = {**DEBUG, "training.mixed_precision_param": "float32"}
    config = load_config(arguments(given), str(ROOT / "train_configs" / "debug_model.toml"))
    assert peak_memory(config, 1, None) == rank.peak
    assert estimated(1, **options, training__compile="true").ranks[0].gathered == 0
    (cast,) = estimated(1).ranks
    assert cast.gathered > 0
    assert cast.movable == cast.optimizer + cast.parameters


@pytest.mark.parametrize("mode", ["none", "selective 2", "selective op", "full"])
def test_activations_are_those_that_autograd_saves(mode: str) -> None:
    """What is alive behind a forward without data, against the hooks through which autograd saves in a real one."""
    from titanlite.config.schema import ActivationCheckpoint
    from titanlite.distributed.activation_checkpoint import apply_activation_checkpoint
    from titanlite.models.layers import Decoder, DecoderArgs

    args = DecoderArgs(dim=64, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=128, vocab_size=128, max_seq_len=32)
    kind, _, option = mode.partition(" ")

    def build() -> Decoder:
        model = Decoder(args)
        apply_activation_checkpoint(model.layers, ActivationCheckpoint(mode=kind, selective_ac_option=option or "2"))  # type: ignore[arg-type]
        return model

    model = build()
    tokens = torch.zeros(2, 32, dtype=torch.int64)
    pointers = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), tokens)}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in pointers:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = model(tokens)
    with FakeTensorMode(), MemoryTracker() as tracker:
        model = build()
        tokens = torch.zeros(2, 32, dtype=torch.int64)
        before = tracker.live
        out = model(tokens)
        growth, result = tracker.live - before, out.untyped_storage().nbytes()
        if mode != "selective op":  # whose cache is not of saved tensors
            assert growth == sum(saved.values()) + result
        assert growth > result
        del out
        assert tracker.live == before
    del kept


@pytest.mark.slow
def test_less_is_kept_the_more_is_recomputed() -> None:
    def peak(mode: str, option: str = "2") -> int:
        ac = {"activation_checkpoint__mode": mode, "activation_checkpoint__selective_ac_option": option}
        return estimated(2, training__seq_len="512", training__local_batch_size="8", **ac).peak

    assert peak("full") < peak("selective", "op") < peak("selective", "2") < peak("none")
    compiled = estimated(2, training__seq_len="512", training__local_batch_size="8", training__compile="true").peak
    assert compiled < peak("none")


def test_pipeline_ranks_have_a_row_each() -> None:
    prediction = estimated(4, parallelism__pipeline_parallel_degree="2")
    assert [rank.rank for rank in prediction.ranks] == [0, 2]
    assert {c.name for rank in prediction.ranks for c in rank.traffic if c.dimension == "pipeline parallel"} == {
        "send",
        "receive",
    }


def run(folder: Path, ngpu: int, *options: str, **extra: str) -> Run:
    return forked_run([*options], environment(NGPU=str(ngpu), **extra), ROOT, folder)


@pytest.mark.parametrize(
    ("options", "mode", "message"),
    [
        ((), "foo", "COMM_MODE=foo: there is no such mode; known: fake"),
        (("--parallelism.data_parallel_shard_degree=3",), "fake", "but there are 512 processes: set NGPU=3"),
        (("--parallelism.tensor_parallel_degree=32",), "fake", "must divide the model's n_heads = 16"),
        (  # 256 rows over 256 shards, but 128 on each rank of tensor parallelism
            (
                *("--parallelism.tensor_parallel_degree=2", "--model.converters=int8"),
                "--int8.enable_fsdp_int8_all_gather",
            ),
            "fake",
            "has 128 rows on each rank of tensor parallelism",
        ),
        (("--training.enable_cpu_offload",), "fake", "is not modelled"),
    ],
)
def test_bad_input_ends_as_in_training(tmp_path: Path, options: tuple[str, ...], mode: str, message: str) -> None:
    ended = run(tmp_path, 512, *options, COMM_MODE=mode)
    assert ended.status == 2, ended.output
    assert message in ended.output
    assert "Traceback" not in ended.output
    assert len(ended.output.strip().splitlines()) == 1


@pytest.mark.slow
def test_asynchronous_tensor_parallelism_needs_no_gpu_for_an_estimate() -> None:
    options = {"parallelism__tensor_parallel_degree": "2", "training__compile": "true", "model__args__n_layers": "2"}
    plain = estimated(4, **options)
    overlapped = estimated(4, **options, parallelism__enable_async_tensor_parallel="true")
    assert overlapped.ranks == plain.ranks
    (note,) = {*overlapped.notes} - {*plain.notes}
    assert "parallelism.enable_async_tensor_parallel" in note


PACKAGED = {"debug_model": 1, "llama3_8b": 8, "llama3_70b": 256, "llama3_405b": 512}


@pytest.mark.parametrize(
    "name",
    [  # test_finetune_recipes runs those for fine-tuning, on small models
        pytest.param(n, marks=pytest.mark.long if n.startswith("finetune/") else [])
        for n in packaged.names()
        if not n.endswith("_fast")
    ],
)
@pytest.mark.slow
def test_every_packaged_file_is_estimated_for_its_devices(name: str) -> None:
    """With a small model: the parallelism is what the file has, and asynchronous where the file is torchtitan's."""
    argv = ["--model.flavor=debugmodel", "--training.seq_len=64", "--training.local_batch_size=1"]
    if name == "llama3_405b":
        argv.append("--parallelism.enable_async_tensor_parallel")
    devices = PACKAGED.get(name, 8)
    result = estimate(load_config(argv, packaged.find(name)), devices)
    assert result.world_size == devices
    assert result.peak > 0


def test_renamed_options_are_among_the_notes() -> None:
    config = load_config(
        [*arguments(DEBUG), "--compile.enable=false"], str(ROOT / "train_configs" / "debug_model.toml")
    )
    assert any(note.endswith("is called training.compile here") for note in estimate(config, 1).notes)


@pytest.mark.slow
def test_the_key_does_what_the_variable_does(tmp_path: Path) -> None:
    """Once with the real command."""
    command = [sys.executable, "-m", "titanlite.commands", "--memory_estimation.enabled", "--training.seq_len=64"]
    by_key = subprocess.run(command, env=environment(NGPU="2"), cwd=ROOT, capture_output=True, text=True)
    by_variable = run(tmp_path, 2, "--training.seq_len=64", COMM_MODE="fake")
    assert by_key.returncode == by_variable.status == 0, by_key.stderr
    assert by_key.stderr + by_key.stdout == by_variable.output
    assert f"{ASSUMED_VOCAB_SIZE} tokens are assumed" in by_key.stdout


@pytest.mark.slow
def test_it_does_not_import_what_reads_data() -> None:
    """Which takes a second. (That no tokenizer is opened is shown below, with one that is not there.)"""
    code = "import sys, titanlite.plan.estimate; print({'datasets', 'tensorboard'} & {*sys.modules})"
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "set()"


def test_the_assumed_vocabulary_is_the_shipped_one() -> None:
    assert load_tokenizer("").vocab_size == ASSUMED_VOCAB_SIZE


@pytest.mark.slow
def test_8b_takes_less_than_a_minute_and_no_memory_to_speak_of() -> None:
    start = time.perf_counter()
    prediction = estimated(
        8, "llama3_8b", training__compile="true", training__seq_len="8192", model__tokenizer_path="not/there"
    )
    assert time.perf_counter() - start < 60
    assert prediction.ranks[0].parameters > 3 << 30
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 3 << 20  # KiB


@pytest.mark.slow
@pytest.mark.parametrize("compile", ["false", "true"])
@pytest.mark.parametrize(
    "recipe", ["rowwise", *(pytest.param(r, marks=pytest.mark.long) for r in ("tensorwise", "rowwise_with_gw_hp"))]
)
def test_float8_of_gpus_is_estimated_without_one(recipe: str, compile: str) -> None:
    """The casts are the operators that GPUs have kernels for."""
    options = {"training__compile": compile, "training__seq_len": "512", "model__args__n_layers": "2"}
    bf16 = estimated(1, **options)
    converted = {"model__converters": "float8", "float8__recipe_name": recipe, "float8__kernels": "triton"}
    float8 = estimated(1, **converted, **options)
    assert float8.about["converter float8"] == f"{recipe}, 15 of 15 linear layers"
    kept = float8.ranks[0].activations / bf16.ranks[0].activations
    assert kept < 0.95  # also with gw_hp, whose inputs stay as they are: SwiGLU's product is not among them


@pytest.mark.slow
def test_the_kernels_of_an_estimate_are_those_of_a_compiled_run() -> None:
    """Those that auto takes by count. Own kernels would keep less here."""
    options = {"training__compile": "true", "training__seq_len": "512", "model__args__n_layers": "2"}
    options |= {"model__converters": "float8", "float8__recipe_name": "rowwise_with_gw_hp"}
    peak = {
        kernels: estimated(1, float8__kernels=kernels, **options).peak for kernels in ("auto", "inductor", "triton")
    }
    assert peak["auto"] == peak["inductor"] > peak["triton"]


def test_the_ways_of_the_cpu_are_not_those_of_gpus() -> None:
    """Attention in float32, and gradients reduced where they lie: this process would do both if it trained."""
    prediction = estimated(1, training__mixed_precision_param="bfloat16")
    assert "attention" not in prediction.about
    from_one_device = prediction.ranks[0].at_peak.get("unsharded gradients", 0)
    assert from_one_device < prediction.ranks[0].gradients / 2


@pytest.mark.slow
def test_its_processes_end_with_it() -> None:
    """Also when a signal ends it, as it ends those of the advice after an out-of-memory error."""
    code = "from titanlite.config import load_config; from titanlite.plan.estimate import estimate\n"
    code += "estimate(load_config(['--model.flavor=70B', '--training.seq_len=8192']), 8)"
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment())
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    give_up = time.monotonic() + 60
    while not (pids := children.read_text().split()) and time.monotonic() < give_up:
        time.sleep(0.05)
    run.kill()
    run.wait()
    assert pids
    give_up = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
