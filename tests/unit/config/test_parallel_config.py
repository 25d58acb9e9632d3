"""Degrees of parallelism and their options: what does not go together is refused, with the values, the rule, both
options and a way out; what does go together is not."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.support.runs import ROOT
from titanlite.config import JobConfig, check_config, load_config, pipeline_microbatches, resolve_degrees
from titanlite.config.parallelism import Degrees, whole_backward
from titanlite.config.schema import Parallelism
from titanlite.distributed.context_parallel import ContextParallel
from titanlite.distributed.mesh import Mesh, build_mesh
from titanlite.distributed.parallelize import check, parallelize
from titanlite.errors import ConfigError
from titanlite.models.layers import LAYOUT, Decoder, DecoderArgs
from titanlite.models.llama3.spec import FLAVORS

SHORT = {
    "replicate": "parallelism.data_parallel_replicate_degree",
    "shard": "parallelism.data_parallel_shard_degree",
    "cp": "parallelism.context_parallel_degree",
    "rotate": "parallelism.context_parallel_rotate_method",
    "tp": "parallelism.tensor_parallel_degree",
    "whole_logits": "parallelism.disable_loss_parallel",
    "async_tp": "parallelism.enable_async_tensor_parallel",
    "pp": "parallelism.pipeline_parallel_degree",
    "schedule": "parallelism.pipeline_parallel_schedule",
    "csv": "parallelism.pipeline_parallel_schedule_csv",
    "points": "parallelism.pipeline_parallel_split_points",
    "layers": "parallelism.pipeline_parallel_layers_per_stage",
    "micro": "parallelism.pipeline_parallel_microbatch_size",
    "batch": "training.local_batch_size",
    "global": "training.global_batch_size",
    "seq": "training.seq_len",
    "compile": "training.compile",
    "components": "compile.components",
    "offload": "training.enable_cpu_offload",
    "ac": "activation_checkpoint.mode",
    "ac_option": "activation_checkpoint.selective_ac_option",
    "converters": "model.converters",
    "chunks": "training.loss_chunks",
    "fp8_gather": "float8.enable_fsdp_float8_all_gather",
}
Options = dict[str, Any]


def arguments(options: Options) -> list[str]:
    return [f"--{SHORT[key]}={str(value).lower() if value is True else value}" for key, value in options.items()]


def config_of(options: Options) -> JobConfig:
    return load_config(arguments(options))


def refusal(options: Options, world: int) -> str:
    with pytest.raises(ConfigError) as error:
        check_config(config_of(options), world)
    return str(error.value)


# ---- what is refused: (options, processes, what the message has, in this order)

NO_EFFECT = {
    "rotate": ("alltoall", '"alltoall"', "context_parallel_degree"),
    "whole_logits": (True, "true", "tensor_parallel_degree"),
    "async_tp": (True, "true", "tensor_parallel_degree"),
    "points": ("layers.1", '["layers.1"]', "pipeline_parallel_degree"),
    "layers": (2, "2", "pipeline_parallel_degree"),
    "schedule": ("GPipe", '"GPipe"', "pipeline_parallel_degree"),
    "csv": ("plan.csv", '"plan.csv"', "pipeline_parallel_degree"),
    "micro": (2, "2", "pipeline_parallel_degree"),
}

ZERO_BUBBLE = {"pp": 2, "schedule": "InterleavedZeroBubble"}
REFUSED: dict[str, tuple[Options, int, list[str]]] = {
    **{
        f"{key} without effect": (
            {key: value, "shard": -1},
            2,
            [
                f"{SHORT[key]} = {shown} (the argument --{SHORT[key]})",
                f"no effect with parallelism.{without} = 1",
                "set",
            ],
        )
        for key, (value, shown, without) in NO_EFFECT.items()
    },
    "product": (
        {"replicate": 2, "shard": 3, "cp": 5, "tp": 7, "pp": 11},
        8,
        [
            *(
                "data_parallel_replicate_degree 2 x data_parallel_shard_degree 3 x context_parallel_degree 5",
                "_degree 7",
            ),
            *("pipeline_parallel_degree 11 = 2310, but there are 8 processes", "NGPU=2310", "shard_degree = -1"),
        ],
    ),
    "nothing left to infer": (
        {"replicate": 2, "cp": 2, "tp": 3},
        18,
        ["shard_degree -1", "other than data_parallel_shard_degree multiply to 12", "not divide the 18", "NGPU=18"],
    ),
    "more than there are": ({"tp": 4}, 2, ["tensor_parallel_degree 4", "multiply to 4", "not divide the 2 processes"]),
    "sequence over context": (
        {"cp": 4, "seq": 100},
        4,
        [
            "training.seq_len = 100 (the argument --training.seq_len)",
            "multiple of 2 x context_parallel_degree = 8, for example 104",
        ],
    ),
    "sequence over tensor": (
        {"tp": 8, "seq": 2044},
        8,
        ["training.seq_len = 2044", "multiple of tensor_parallel_degree = 8", "for example 2048"],
    ),
    "sequence over both": (
        {"cp": 2, "tp": 4, "seq": 12},  # a multiple of 2 x 2, and of 4
        8,
        [
            *("= 12", "2 x context_parallel_degree = 4 and of"),
            "context_parallel_degree x tensor_parallel_degree = 8, for example 16",
        ],
    ),
    "asynchronous without the compiler": (
        {"tp": 2, "async_tp": True},
        2,
        ["enable_async_tensor_parallel = true", "the argument", "overlaps", "set training.compile"],
    ),
    "asynchronous, only the loss compiled": (
        {"tp": 2, "async_tp": True, "compile": True, "components": "loss"},
        2,
        ["enable_async_tensor_parallel = true", "set training.compile"],
    ),
    "schedule misspelt": (
        {"pp": 2, "schedule": "Interleaved1F1"},
        2,
        ['pipeline_parallel_schedule = "Interleaved1F1"', 'did you mean "Interleaved1F1B"', "known: 1F1B, GPipe"],
    ),
    "CSV without its schedule": (
        {"pp": 2, "csv": "plan.csv"},
        2,
        ['schedule_csv = "plan.csv"', 'needs parallelism.pipeline_parallel_schedule = "PipelineScheduleMulti"'],
    ),
    "schedule without its CSV": (
        {"pp": 2, "schedule": "PipelineScheduleMulti"},
        2,
        ['pipeline_parallel_schedule = "PipelineScheduleMulti"', "set parallelism.pipeline_parallel_schedule_csv"],
    ),
    "CSV that is not there": (
        {"pp": 2, "schedule": "PipelineScheduleMulti", "csv": "nowhere.csv"},
        2,
        ['schedule_csv = "nowhere.csv"', "no such file", "relative to"],
    ),
    "stages given twice": (
        {"pp": 2, "points": "layers.2", "layers": 2},
        2,
        ["layers_per_stage = 2 (the argument", "split_points = ['layers.2']", "one or the other"],
    ),
    "split backward, checkpointed": (
        {**ZERO_BUBBLE, "ac_option": "op"},  # the default of activation_checkpoint.mode is selective
        2,
        [
            *('schedule = "InterleavedZeroBubble"', 'activation_checkpoint.selective_ac_option = "op" (the argument'),
            *("can be used once", "or compile"),
        ],
    ),
    "microbatch does not divide": (
        {"pp": 2, "micro": 3, "batch": 8},
        2,
        ["microbatch_size = 3 (the argument", "must divide training.local_batch_size = 8"],
    ),
    "too few for 1F1B": (
        {"pp": 4, "batch": 6, "micro": 2},
        4,
        [
            *(
                'schedule = "1F1B"',
                "over 4 processes",
                "at least 4 microbatches",
                "not 3 microbatches",
                "local_batch_size = 6",
            ),
            *("microbatches of 2", "global_batch_size = 6 over 1", "raise training.local_batch_size"),
        ],
    ),
    **{
        f"uneven rounds of {schedule}": (
            {"pp": 2, "schedule": schedule, "ac": "none", "batch": 5},
            2,
            [f'schedule = "{schedule}"', "over 2", "5 // 2 = 2 rounds", "not 5 microbatches", "multiple of 2"],
        )
        for schedule in ("Interleaved1F1B", "InterleavedZeroBubble")
    },
    "batch over replicas and shards": (
        {"replicate": 2, "shard": 2, "tp": 2, "batch": 2, "global": 12},
        8,
        ["training.global_batch_size = 12", "the data-parallel degree = 2 x 4 = 8", "for example 8"],
    ),
    "offloaded and gathered in float8": (
        {"offload": True, "converters": "float8", "fp8_gather": True},
        2,
        ["training.enable_cpu_offload = true", "float8.enable_fsdp_float8_all_gather = true", "one or the other"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused(name: str) -> None:
    options, world, fragments = REFUSED[name]
    assert re.search(".*".join(map(re.escape, fragments)), refusal(options, world), re.DOTALL), refusal(options, world)


@pytest.mark.parametrize("key", NO_EFFECT)
def test_an_option_without_effect_goes_with_its_dimension(key: str, tmp_path: Path) -> None:
    """The message's first way out is one."""
    value, _, without = NO_EFFECT[key]
    also: dict[str, Options] = {
        "csv": {"schedule": "PipelineScheduleMulti"},
        "async_tp": {"compile": True},
    }
    if key == "csv":
        value = tmp_path / "plan.csv"
        value.touch()
    degree = next(short for short, name in SHORT.items() if name == f"parallelism.{without}")
    check_config(config_of({key: value, degree: 2, **also.get(key, {})}), 2)


# ---- what is accepted

ACCEPTED: list[tuple[Options, int]] = [
    ({}, 1),
    ({}, 6),
    ({"replicate": 3, "shard": -1}, 12),
    ({"replicate": 2, "shard": 1}, 2),
    ({"shard": 2, "cp": 2, "tp": 2, "pp": 2, "replicate": 2}, 32),
    ({"cp": 3, "tp": 2, "seq": 12}, 6),
    ({"tp": 5, "seq": 15}, 5),
    ({"cp": 1, "seq": 7}, 3),
    ({"cp": 2, "rotate": "alltoall"}, 4),
    ({"tp": 2, "whole_logits": True}, 2),
    ({"tp": 2, "async_tp": True, "compile": True, "components": "model"}, 2),
    ({"pp": 2, "points": "layers.1,layers.3", "schedule": "Interleaved1F1B"}, 2),
    ({"pp": 2, "layers": 3}, 2),
    ({"pp": 4, "batch": 4}, 4),
    ({"pp": 4, "batch": 1, "schedule": "GPipe"}, 4),
    ({"pp": 4, "batch": 1, "schedule": "LoopedBFS"}, 4),
    # Gradient accumulation fills the pipeline.
    ({"pp": 4, "shard": 2, "batch": 2, "global": 16, "micro": 2}, 8),
    # PyTorch's own examples of rounds.
    ({"pp": 4, "batch": 10, "schedule": "Interleaved1F1B"}, 4),
    ({"pp": 4, "batch": 3, "schedule": "Interleaved1F1B"}, 4),
    ({"pp": 3, "batch": 1, "schedule": "ZBVZeroBubble", "ac": "none"}, 3),
    (ZERO_BUBBLE, 2),
    ({**ZERO_BUBBLE, "ac": "full"}, 2),
    ({**ZERO_BUBBLE, "ac": "none", "compile": True, "components": "loss"}, 2),
    # The other schedules run a backward as a whole.
    ({"pp": 2, "schedule": "Interleaved1F1B", "ac_option": "op"}, 2),
    ({"pp": 2, "schedule": "Interleaved1F1B", "ac": "full", "compile": True}, 2),
    ({"offload": True, "converters": "float8"}, 2),
    ({"offload": True, "tp": 2, "pp": 2}, 8),
    ({"converters": "float8", "fp8_gather": True, "tp": 2, "replicate": 2}, 8),
]


@pytest.mark.parametrize(("options", "world"), ACCEPTED, ids=str)
def test_what_goes_together_is_accepted(options: Options, world: int) -> None:
    check_config(config_of(options), world)


@pytest.mark.parametrize(
    ("options", "before", "now"),
    [
        ({"ac": "none"}, "", ""),
        ({"ac": "full"}, "", ""),
        ({}, "", ""),
        ({"ac_option": "op"}, "can be used once", "can be used once"),
        ({"ac_option": "op", "compile": True, "components": "loss"}, "can be used once", "can be used once"),
        ({"ac_option": "op", "compile": True}, "training.compile = true", ""),
        ({"compile": True}, "training.compile = true", ""),
        ({"compile": True, "components": "loss"}, "", ""),
        ({"converters": "float8"}, 'model.converters = ["float8"]', ""),
        ({"chunks": 2}, "training.loss_chunks = 2", ""),
    ],
    ids=str,
)
def test_a_backward_in_halves_is_refused_where_torch_fails(options: Options, before: str, now: str) -> None:
    for versions, words in ((("2.11.0+cu130", "2.12.1"), before), (("2.13.0+cpu", "2.14.1"), now)):
        for torch_version in versions:
            reason = whole_backward(config_of({**ZERO_BUBBLE, **options}), torch_version)
            assert words in reason if words else reason is None, torch_version


@given(st.tuples(*[st.sampled_from([1, 1, 2, 3])] * 5), st.integers(1, 40))
@settings(deadline=None)
def test_an_inferred_degree_fills_the_processes_or_is_refused(sizes: tuple[int, ...], world: int) -> None:
    replicate, _, cp, tp, pp = sizes
    parallelism = Parallelism(
        data_parallel_replicate_degree=replicate,
        context_parallel_degree=cp,
        tensor_parallel_degree=tp,
        pipeline_parallel_degree=pp,
    )
    others = replicate * cp * tp * pp
    if world % others:
        with pytest.raises(ConfigError, match=rf"multiply to {others}, .* the {world} process"):
            resolve_degrees(parallelism, world)
        return
    degrees = resolve_degrees(parallelism, world)
    assert math.prod(degrees) == world
    assert degrees == Degrees(replicate, world // others, cp, tp, pp)
    assert degrees.model_shards * replicate == world


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 64))
@settings(deadline=None)
def test_the_sequence_length_that_is_proposed_is_taken(cp: int, tp: int, seq: int) -> None:
    config = JobConfig()
    config.parallelism.context_parallel_degree, config.parallelism.tensor_parallel_degree = cp, tp
    config.training.seq_len = seq
    try:
        check_config(config, cp * tp)
    except ConfigError as e:
        config.training.seq_len = int(str(e).split("for example ")[1])
        assert seq < config.training.seq_len <= seq + cp * math.lcm(2 if cp > 1 else 1, tp)
        check_config(config, cp * tp)
    else:
        assert seq % (cp * tp) == 0
        assert cp == 1 or seq % (2 * cp) == 0


def test_the_microbatches_of_a_step_are_those_of_all_that_accumulates() -> None:
    config = config_of({"pp": 2, "shard": 3, "batch": 4, "micro": 2, "global": 36})
    assert pipeline_microbatches(config, 3) == 36 // 3 // 2
    assert pipeline_microbatches(config_of({"pp": 2, "shard": 3, "batch": 4}), 3) == 4


# ---- torchtitan's files of June 2025


def published(name: str, *others: str) -> JobConfig:
    path = ROOT / "tests" / "data" / "torchtitan_2025_06" / f"{name}.toml"
    return load_config(["--model.tokenizer_path=", *others], str(path))


@pytest.mark.parametrize("world", [8, 64, 128, 512])
@pytest.mark.parametrize("name", ["llama3_70b", "llama3_405b"])
def test_published_files_are_accepted_at_the_sizes_that_they_are_for(name: str, world: int) -> None:
    config = published(name)
    check_config(config, world)
    degrees = resolve_degrees(config.parallelism, world)
    assert degrees == Degrees(1, world // 8, 1, 8, 1)
    with mesh_of(degrees) as mesh:
        check(FLAVORS[config.model.flavor].configured(128256, config.training.seq_len), LAYOUT, mesh, config)


def test_published_files_take_more_dimensions() -> None:
    check_config(published("llama3_70b", *arguments({"replicate": 2, "cp": 2, "pp": 4})), 256)
    check_config(published("llama3_405b", *arguments({"replicate": 2, "cp": 2})), 256)


@pytest.mark.parametrize("world", [4, 12, 100])
def test_published_files_are_refused_at_sizes_that_do_not_fit(world: int) -> None:
    with pytest.raises(ConfigError, match=rf"tensor_parallel_degree 8 .*multiply to 8, .* the {world} process"):
        check_config(published("llama3_70b"), world)


# ---- degrees that do not fit the model


@contextmanager
def mesh_of(degrees: Degrees) -> Iterator[Mesh]:
    """The mesh of rank 0, of processes of which the others are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=math.prod(degrees))
    try:
        yield build_mesh(degrees, "cpu")
    finally:
        dist.destroy_process_group()


MODEL = DecoderArgs(dim=64, n_layers=2, n_heads=8, n_kv_heads=8, ffn_dim=128, vocab_size=256)


@pytest.mark.parametrize(
    ("args", "tp", "size"),
    [
        (FLAVORS["8B"], 16, "n_kv_heads = 8"),
        (FLAVORS["405B"], 48, "n_heads = 128"),
        (FLAVORS["3B"], 3, "n_kv_heads = 8"),
        (replace(MODEL, ffn_dim=132), 8, "ffn_dim = 132"),
        (replace(MODEL, vocab_size=250), 4, "vocab_size = 250"),
        (replace(MODEL, n_heads=6), 4, "n_heads = 6"),
    ],
)
def test_a_tensor_parallel_degree_that_does_not_divide_the_model(args: DecoderArgs, tp: int, size: str) -> None:
    with mesh_of(Degrees(1, 2, 1, tp, 1)) as mesh, pytest.raises(ConfigError) as error:
        check(args, LAYOUT, mesh, JobConfig())
    for part in (f"tensor_parallel_degree = {tp}: ", f"must divide the model's {size}", "another degree or flavor"):
        assert part in str(error.value)


def test_what_a_layout_does_not_name_is_not_trained_apart() -> None:
    """A parameter that tensor parallelism does not know would have another gradient on each rank, and a block without
    a slot would attend to its part of the sequence alone."""
    args = DecoderArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, vocab_size=128, max_seq_len=32)

    def model() -> Any:
        with torch.device("meta"):
            return Decoder(args)

    config = load_config(["--activation_checkpoint.mode=none"])
    with mesh_of(Degrees(1, 1, 1, 2, 1)) as mesh:
        extra = model()
        extra.layers["1"].attention.register_parameter("scale", nn.Parameter(torch.empty(16, device="meta")))
        with pytest.raises(ConfigError, match=r"layout does not say how to shard layers\.1\.attention\.scale"):
            parallelize(extra, LAYOUT, mesh, config)
    with mesh_of(Degrees(1, 1, 2, 1, 1)) as mesh:
        without = model()
        without.layers["1"].attention = nn.Identity()
        with pytest.raises(ConfigError, match="block 1 has no AttentionSlot") as refused:
            parallelize(without, LAYOUT, mesh, config)
        assert (refused.value.key, refused.value.value) == ("parallelism.context_parallel_degree", 2)


def test_tied_embeddings_do_not_go_through_a_pipeline() -> None:
    with mesh_of(Degrees(1, 1, 1, 2, 2)) as mesh, pytest.raises(ConfigError) as error:
        check(FLAVORS["1B"], LAYOUT, mesh, JobConfig())
    for part in ("pipeline_parallel_degree = 2", "(tied)", "shard with data_parallel_shard_degree", "another flavor"):
        assert part in str(error.value)


def test_a_sliding_window_is_not_computed_in_shares_of_the_sequence() -> None:
    args = replace(FLAVORS["8B"], sliding_window=64, max_seq_len=128)
    with mesh_of(Degrees(1, 1, 2, 1, 1)) as mesh:
        with pytest.raises(ConfigError, match="sliding window of 64 positions") as error:
            check(args, LAYOUT, mesh, JobConfig())
        assert (error.value.key, error.value.value) == ("parallelism.context_parallel_degree", 2)
        check(replace(args, max_seq_len=64), LAYOUT, mesh, JobConfig())  # it sees the whole sequence
        q = torch.zeros(1, 2, 32, 8)
        with pytest.raises(ValueError, match="a window of 63 positions in a sequence of 64"):
            ContextParallel(mesh.cp).attention(q, q, q, window=63)


@pytest.mark.parametrize(
    ("args", "degrees"),
    [
        (MODEL, Degrees(1, 1, 1, 8, 1)),
        (MODEL, Degrees(3, 5, 7, 1, 1)),  # nothing but tensor parallelism divides a layer
        (FLAVORS["1B"], Degrees(1, 2, 2, 8, 1)),
        (FLAVORS["8B"], Degrees(1, 1, 1, 8, 3)),
    ],
)
def test_degrees_that_fit_the_model(args: DecoderArgs, degrees: Degrees) -> None:
    with mesh_of(degrees) as mesh:
        check(args, LAYOUT, mesh, JobConfig())


# ---- through the command


@pytest.mark.parametrize("name", ["product", "split backward, checkpointed", "sequence over both", "too few for 1F1B"])
def test_the_launcher_refuses_before_torch_starts(train: Any, tmp_path: Path, name: str) -> None:
    """A torch that cannot be imported comes first on the path of the command."""
    options, world, fragments = REFUSED[name]
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "torch.py").write_text('raise ImportError("torch was started")')
    given = {SHORT[key].replace(".", "__"): value for key, value in options.items()}
    mode = {"activation_checkpoint__mode": "selective"}  # of which the test's command has another
    run = train(ngpu=world, env={"PYTHONPATH": f"{tmp_path / 'first'}:{ROOT}"}, **{**mode, **given})
    assert run.status == 2, run.output
    assert run.output.startswith("titanlite: error: ")
    for fragment in fragments:
        if fragment != "the default":
            assert fragment in run.output
    assert "Traceback" not in run.output
    assert "torch was started" not in run.output
    assert not run.folder.exists()
