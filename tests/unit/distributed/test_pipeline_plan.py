"""Where a pipeline cuts a model: the cheapest cut, who has which stage, what was asked for, and the parts."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping
from torch.testing._internal.distributed.fake_pg import FakeStore

from titanlite.config import JobConfig, check_config, load_config
from titanlite.config.parallelism import CSV_SCHEDULE, LOOPED_SCHEDULES, SINGLE_STAGE_SCHEDULES, V_SCHEDULES, Degrees
from titanlite.distributed.init import WeightInit
from titanlite.distributed.mesh import Mesh, build_mesh
from titanlite.distributed.parallelize import chain
from titanlite.distributed.pipeline import Boundary, Pipeline, part_of
from titanlite.distributed.pipeline_plan import Plan, balanced, matmul_elements, plan_pipeline
from titanlite.errors import ConfigError
from titanlite.models.layers import LAYOUT, Decoder, DecoderArgs, MixtureArgs

SMALL = DecoderArgs(dim=32, n_layers=6, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=128, max_seq_len=16)
SCHEDULES = [*SINGLE_STAGE_SCHEDULES, *LOOPED_SCHEDULES, *V_SCHEDULES]
PREFIX = "parallelism.pipeline_parallel_"


@pytest.fixture(scope="module")
def meta() -> Decoder:
    with torch.device("meta"):
        return Decoder(SMALL)


@pytest.fixture(scope="module")
def model() -> Decoder:
    model = Decoder(SMALL)
    model.init_weights(WeightInit(model, 0))
    return model


def config_of(pp: int = 2, **options: Any) -> JobConfig:
    """Of options of pipeline parallelism, without their prefix."""
    given = {f"{PREFIX}{key}": value for key, value in {"degree": pp, **options}.items()}
    return load_config(["--activation_checkpoint.mode=none", *(f"--{key}={value}" for key, value in given.items())])


def plan_of(model: nn.Module, pp: int = 2, **options: Any) -> Plan:
    return plan_pipeline(model, chain(model, LAYOUT), config_of(pp, **options), pp)


def refusal(model: nn.Module, pp: int = 2, **options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        plan_of(model, pp, **options)
    return str(error.value)


# ---- the cheapest cut


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.data())
@settings(deadline=None, max_examples=200)
def test_balanced_is_the_best_of_all_cuts(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))

    def price(cuts: tuple[int, ...]) -> tuple[int, int]:
        parts = [sum(costs[a:b]) for a, b in itertools.pairwise((0, *cuts, len(costs)))]
        return max(parts), sum(part**2 for part in parts)

    ranges = balanced(costs, stages)
    assert [i for part in ranges for i in part] == [*range(len(costs))]
    assert len(ranges) == stages
    assert all(ranges)
    every = itertools.combinations(range(1, len(costs)), stages - 1)
    assert price(tuple(part.start for part in ranges[1:])) == min(map(price, every))


def test_a_costly_end_does_not_decide_where_the_beginning_is_cut() -> None:
    costs = [3, 5, 3, 7, 2, 9]
    parts = [sum(costs[i] for i in part) for part in balanced(costs, 5)]
    assert (max(parts), sum(part**2 for part in parts)) == (9, 205)


def test_work_is_that_of_the_matmuls(meta: Decoder) -> None:
    attention = 2 * 32 * 32 + 2 * 32 * 16
    assert matmul_elements(meta, "layers.3") == attention + 3 * 32 * 48
    assert matmul_elements(meta, "output") == 32 * 128
    assert matmul_elements(meta, "tok_embeddings") == matmul_elements(meta, "norm") == 0


def test_the_work_of_a_mixture_is_that_of_the_experts_that_a_token_uses() -> None:
    """A dense block, then mixtures with a shared expert."""
    mixture = MixtureArgs(16, 3, 24, n_shared_experts=2, n_dense_layers=1)
    with torch.device("meta"):
        model = Decoder(DecoderArgs(32, 4, 4, 2, ffn_dim=480, vocab_size=128, mixture=mixture))
    attention = 2 * 32 * 32 + 2 * 32 * 16
    assert matmul_elements(model, "layers.0") == attention + 3 * 32 * 480
    assert matmul_elements(model, "layers.1") == attention + 3 * 32 * (3 + 2) * 24 + 32 * 16
    assert plan_of(model, 2).stages == [
        ["tok_embeddings", "layers.0"],
        [*(f"layers.{i}" for i in (1, 2, 3)), "output", "norm"],
    ]


def test_the_costly_ends_get_fewer_layers() -> None:
    """An output projection of four layers' work."""
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    with torch.device("meta"):
        model = Decoder(
            DecoderArgs(dim=32, n_layers=8, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=4 * layer // 32)
        )
    stages = plan_of(model, 3).stages
    assert [sum("layers" in name for name in stage) for stage in stages] == [4, 4, 0]
    assert stages[2] == ["output", "norm"]


# ---- who has which stage


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_are_where_the_schedule_has_them(meta: Decoder, schedule: str, ranks: int) -> None:
    plan = plan_of(meta, ranks, schedule=schedule)
    stages = ranks if schedule in SINGLE_STAGE_SCHEDULES else 2 * ranks
    style = "v" if schedule in V_SCHEDULES else "loop"
    assert dict(enumerate(plan.ranks)) == generate_stage_to_rank_mapping(ranks, stages, style)
    assert [name for stage in plan.stages for name in stage] == [
        name for names in chain(meta, LAYOUT) for name in names
    ]
    for rank in range(ranks):
        assert [plan.ranks[stage] for stage in plan.of(rank)] == [rank] * (stages // ranks)
        assert plan.of(rank) == sorted(plan.of(rank))


def test_a_plan_in_words(meta: Decoder) -> None:
    assert str(plan_of(meta, 2, split_points="layers.1")) == (
        "pipeline rank 0: tok_embeddings to layers.0; pipeline rank 1: layers.1 to norm"
    )
    shown = str(plan_of(meta, 2, schedule="ZBVZeroBubble", split_points="layers.0,layers.3,layers.5"))
    assert shown == (
        "pipeline rank 0: tok_embeddings and layers.5 to norm; "
        "pipeline rank 1: layers.0 to layers.2 and layers.3 to layers.4"
    )
    assert shown == str(
        Plan(
            [["tok_embeddings"], ["layers.0", "layers.2"], ["layers.3", "layers.4"], ["layers.5", "norm"]], [0, 1, 1, 0]
        )
    )


# ---- what was asked for


def begins(plan: Plan) -> list[str]:
    return [stage[0] for stage in plan.stages]


@pytest.mark.parametrize(
    ("pp", "schedule", "points"),
    [
        (3, "1F1B", "layers.2,layers.3"),
        (2, "GPipe", "output"),
        (2, "ZBVZeroBubble", "layers.0,layers.1,layers.2"),
        (2, "Interleaved1F1B", "layers.0,layers.1,layers.2,layers.3,output"),  # three stages per process
    ],
)
def test_split_points_begin_stages(meta: Decoder, pp: int, schedule: str, points: str) -> None:
    plan = plan_of(meta, pp, schedule=schedule, split_points=points)
    assert begins(plan) == ["tok_embeddings", *points.split(",")]
    assert [name for stage in plan.stages for name in stage] == [
        name for names in chain(meta, LAYOUT) for name in names
    ]
    assert Counter(plan.ranks) == dict.fromkeys(range(pp), len(plan.stages) // pp)


@pytest.mark.parametrize(
    ("pp", "each", "schedule", "firsts"),
    [
        (2, 3, "1F1B", ["layers.3"]),
        (3, 2, "GPipe", ["layers.2", "layers.4"]),
        (2, 4, "1F1B", ["layers.4"]),  # the last stage has what is left
        (3, 1, "LoopedBFS", [f"layers.{i}" for i in range(1, 6)]),
    ],
)
def test_layers_per_stage(meta: Decoder, pp: int, each: int, schedule: str, firsts: list[str]) -> None:
    assert begins(plan_of(meta, pp, layers_per_stage=each, schedule=schedule)) == ["tok_embeddings", *firsts]


@pytest.mark.parametrize(
    ("pp", "options", "fragments"),
    [
        (
            2,
            {"split_points": "layers.6"},
            ['= ["layers.6"] (the argument', 'no stage can begin at "layers.6"', "layers.0 to output"],
        ),
        (2, {"split_points": "tok_embeddings"}, ["no stage can begin at"]),
        (2, {"split_points": "norm"}, ["no stage can begin at"]),  # it goes with the output
        (2, {"split_points": "layer.3"}, ['did you mean "layers.3"']),
        (3, {"split_points": "layers.4,layers.2"}, ['["layers.4", "layers.2"]', "in the order of the model"]),
        (3, {"split_points": "layers.2,layers.2"}, ['["layers.2", "layers.2"]', "in the order of the model"]),
        (
            2,
            {"split_points": "layers.1,layers.2"},
            [
                'split_points = ["layers.1", "layers.2"] (the argument',
                "makes 3 stages",
                "layers.2, layers.3",
                '"1F1B" over 2 processes has 2;',
                "leave it out",
            ],
        ),
        (
            2,
            {"split_points": "layers.1,layers.2", "schedule": "Interleaved1F1B"},
            ["makes 3 stages", "over 2 processes has 4 or another multiple"],
        ),
        (
            2,
            {"split_points": "layers.1", "schedule": "Interleaved1F1B"},
            ["makes 2 stages", "has 4 or another multiple"],
        ),
        (
            2,
            {"split_points": "layers.0,layers.1,layers.2,layers.3,layers.4", "schedule": "ZBVZeroBubble"},
            ["makes 6 stages", '"ZBVZeroBubble" over 2 processes has 4;'],
        ),
        (
            3,
            {"layers_per_stage": 3},
            ["layers_per_stage = 3 (the argument", "makes 2 stages", '"1F1B" over 3 processes has 3;'],
        ),
        (2, {"layers_per_stage": 9}, ["layers_per_stage = 9 (the argument", "makes 1 stages"]),
        (9, {}, ["pipeline_parallel_degree = 9", '"1F1B" over 9 processes has 9 stages', "more than 8;"]),
        (5, {"schedule": "LoopedBFS"}, ["pipeline_parallel_degree = 5", "has 10 stages", "use fewer processes"]),
    ],
)
def test_stages_that_cannot_be(meta: Decoder, pp: int, options: dict[str, Any], fragments: list[str]) -> None:
    message = refusal(meta, pp, **options)
    assert re.search(".*".join(map(re.escape, fragments)), message), message


# ---- a schedule of the user's own


def csv_plan(meta: Decoder, folder: Path, text: str, pp: int = 2, **options: Any) -> Plan:
    (folder / "own.csv").write_text(text)
    return plan_of(meta, pp, schedule=CSV_SCHEDULE, schedule_csv=folder / "own.csv", **options)


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        ("0F0,0F1,,0B0,0B1\n,1F0,1F1,1B0,1B1\n", [0, 1]),
        (",1F0,1B0\n0F0,,,0B0", [1, 0]),  # the other way round, and no newline at the end
        ("0F0 , 3F0, 3I0,3W0,0B0\n,1F0,2F0,\t2B0,1B0\n", [0, 1, 1, 0]),
        ("0F0,2F0,2B0,0B0\n1F0,3F0,3B0,1B0\n", [0, 1, 0, 1]),
        ("0F0,1F0,2F0,2B0,1B0,0B0\n3F0,3B0\n", [0, 0, 0, 1]),  # uneven
    ],
)
def test_stages_are_where_the_file_has_them(meta: Decoder, tmp_path: Path, text: str, ranks: list[int]) -> None:
    plan = csv_plan(meta, tmp_path, text)
    assert plan.ranks == ranks
    assert len(plan.stages) == len(ranks)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("0F0,0B0\n", ["has 1 row,", "one for each of 2 processes"]),
        ("0F0\n1F0\n2F0\n", ["has 3 rows", "one for each of 2 processes"]),
        ("", ["has 0 rows"]),
        ("0F0,0B0\n1F0,1X0\n", ['row 2: "1X0" must be', "0F1"]),
        ("0F0,0b0\n1F0\n", ['row 1: "0b0" must be']),
        ("0F,0B0\n1F0\n", ['row 1: "0F" must be']),
        ("0F0;0B0\n1F0;1B0\n", ['row 1: "0F0;0B0" must be']),
        ("0F0,0SEND_F0\n1F0\n", ['"0SEND_F0" must be']),
        ("0F0\n2F0\n", ["each stage from 0 on must be in one row", "[(0, 0), (2, 1)]"]),
        ("1F0\n2F0\n", ["each stage from 0 on must be in one row"]),
        ("0F0,1F0\n1F0\n", ["each stage from 0 on must be in one row", "(1, 0), (1, 1)"]),
    ],
)
def test_files_that_are_no_schedule(meta: Decoder, tmp_path: Path, text: str, fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        csv_plan(meta, tmp_path, text)
    message = str(error.value)
    assert message.startswith(f'{PREFIX}schedule_csv = "{tmp_path}/own.csv"')
    assert re.search(".*".join(map(re.escape, fragments)), message), message


def test_a_file_leaves_no_process_idle(meta: Decoder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf'{PREFIX}schedule_csv = ".*" \(.*\): .*2'):
        csv_plan(meta, tmp_path, "0F0,1F0,1B0,0B0\n,,\n")


def test_a_file_that_is_not_text(meta: Decoder, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(ConfigError, match="schedule_csv"):
        plan_of(meta, 2, schedule=CSV_SCHEDULE, schedule_csv=tmp_path / "own.csv")


def test_stages_that_the_file_does_not_deal_out_evenly(meta: Decoder, tmp_path: Path) -> None:
    """Nobody asked for split points or layers per stage, so it is the file's fault, if it is one."""
    message, plan = "", None
    try:
        plan = csv_plan(meta, tmp_path, "0F0,2F0,2B0,0B0\n1F0,1B0\n")
    except ConfigError as e:
        message = str(e)
    assert (plan is not None and plan.ranks == [0, 1, 0]) or message.startswith(f"{PREFIX}schedule_csv"), message


def test_split_points_must_fit_the_file(meta: Decoder, tmp_path: Path) -> None:
    text = "0F0,2F0,2B0,0B0\n1F0,3F0,3B0,1B0\n"
    assert begins(csv_plan(meta, tmp_path, text, split_points="layers.0,layers.1,layers.2"))[1:] == [
        "layers.0",
        "layers.1",
        "layers.2",
    ]
    with pytest.raises(ConfigError, match=r"split_points .* makes 2 stages .* the schedule in .*own\.csv has 4"):
        csv_plan(meta, tmp_path, text, split_points="layers.1")


@pytest.mark.parametrize("cell", ["1I0", "1W0"])
def test_a_file_may_split_the_backward_only_where_it_can_be(meta: Decoder, tmp_path: Path, cell: str) -> None:
    (tmp_path / "own.csv").write_text(f"0F0,0B0\n1F0,{cell}\n")
    options: dict[str, Any] = {"schedule": CSV_SCHEDULE, "schedule_csv": tmp_path / "own.csv"}
    config = config_of(**options)
    for mode in ("none", "full", "selective"):
        config.activation_checkpoint.mode = mode  # type: ignore[assignment]
        plan_pipeline(meta, chain(meta, LAYOUT), config, 2)
    config.activation_checkpoint.selective_ac_option = "op"
    with pytest.raises(ConfigError, match=r"activation_checkpoint.selective_ac_option = \"op\""):
        plan_pipeline(meta, chain(meta, LAYOUT), config, 2)
    (tmp_path / "own.csv").write_text("0F0,0B0\n1F0,1B0\n")
    plan_pipeline(meta, chain(meta, LAYOUT), config, 2)


# ---- against PyTorch's schedules themselves


@contextmanager
def processes(pp: int) -> Iterator[Mesh]:
    """The mesh of rank 0, of processes of which the others are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=pp)
    try:
        yield build_mesh(Degrees(1, 1, 1, 1, pp), "cpu")
    finally:
        dist.destroy_process_group()


def start(plan: Plan, config: JobConfig, mesh: Mesh, microbatches: int) -> Any:
    boundary = Boundary((1, 4), (1, 4, 8), (1, 4, 16), torch.float32)
    parts = [nn.Identity() for _ in plan.of(0)]
    pipeline = Pipeline(
        plan, parts, boundary, mesh, torch.device("cpu"), config.parallelism, microbatches, lambda x, y: x.sum()
    )
    return pipeline._schedule


def is_accepted(config: JobConfig, pp: int) -> bool:
    try:
        check_config(config, pp)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("pp", [2, 3, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_accepted_is_what_pytorch_can_run(schedule: str, pp: int) -> None:
    """Each microbatch once forward and once backward through each stage, for every number that is accepted; and what is
    refused, PyTorch would not run, or only by leaving processes idle."""
    with torch.device("meta"):
        model = Decoder(DecoderArgs(dim=32, n_layers=8, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=128))
    accepted = []
    with processes(pp) as mesh:
        for count in range(1, 10):
            config = config_of(pp, schedule=schedule)
            config.training.local_batch_size = count
            plan = plan_pipeline(model, chain(model, LAYOUT), config, pp)
            if not is_accepted(config, pp):
                if schedule not in V_SCHEDULES:
                    with pytest.raises(ConfigError, match="icrobatches"):
                        start(plan, config, mesh, count)
                continue
            accepted.append(count)
            built = start(plan, config, mesh, count)
            if schedule in SINGLE_STAGE_SCHEDULES:
                continue
            seen = Counter(
                (
                    a.stage_index,
                    "B" if a.computation_type.value in "BW" else a.computation_type.value,
                    a.microbatch_index,
                )
                for actions in built.pipeline_order.values()
                for a in actions
                if a is not None and a.computation_type.value in "FBW"
            )
            assert seen == Counter(itertools.product(range(2 * pp), "FB", range(count)))
            assert built.stage_index_to_group_rank == dict(enumerate(plan.ranks))
    assert {pp * k for k in range(1, 10 // pp) if pp * k >= 2 * pp - 1} <= {*accepted}


def test_a_file_that_does_not_have_all_microbatches_is_refused(meta: Decoder, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("0F0,0B0\n1F0,1B0\n")
    config = config_of(2, schedule=CSV_SCHEDULE, schedule_csv=tmp_path / "own.csv")
    plan = plan_pipeline(meta, chain(meta, LAYOUT), config, 2)
    with processes(2) as mesh:
        start(plan, config, mesh, 1)
        with pytest.raises(ConfigError, match=r'pipeline_parallel_schedule = "PipelineScheduleMulti": .*own\.csv: '):
            start(plan, config, mesh, 2)


# ---- the parts


def cut(model: nn.Module, stages: int) -> list[list[str]]:
    costs = [1] * len(chain(model, LAYOUT))
    return [[name for i in stage for name in chain(model, LAYOUT)[i]] for stage in balanced(costs, stages)]


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("given_positions", [False, True])
def test_parts_in_a_row_are_the_model(model: Decoder, stages: int, given_positions: bool) -> None:
    tokens = torch.randint(SMALL.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    positions = torch.randperm(12, generator=torch.Generator().manual_seed(2)) if given_positions else None
    whole = model(tokens, positions)
    x = tokens
    for names in cut(model, stages):
        x = part_of(model, names)(x, positions)
    assert torch.equal(x, whole)
    if given_positions:
        assert not torch.equal(whole, model(tokens))


def test_parts_share_what_the_model_has_under_its_names(model: Decoder) -> None:
    whole = dict(model.named_parameters())
    parts = [part_of(model, names) for names in cut(model, 3)]
    shared = [dict(part.named_parameters()) for part in parts]
    assert sorted(name for part in shared for name in part) == sorted(whole)
    for parameters in shared:
        assert all(param is whole[name] for name, param in parameters.items())
    for part, names in zip(parts, cut(model, 3)):
        assert isinstance(part, Decoder)
        children = {*(f"layers.{i}" for i in part.layers), *(n for n, m in part.named_children() if n != "layers")}
        assert children == {*names}
        assert all(part.get_submodule(name) is model.get_submodule(name) for name in names)
        assert part.rope is model.rope
    union = {name: value for part in parts for name, value in part.state_dict().items()}
    assert union.keys() == model.state_dict().keys()


def test_the_whole_model_stays_as_it_was(model: Decoder) -> None:
    tokens = torch.arange(8)[None]
    before, names, keys = model(tokens), [name for name, _ in model.named_modules()], [*model.state_dict()]
    part = part_of(model, ["layers.2", "layers.3"])
    layers = part.get_submodule("layers")
    assert isinstance(layers, nn.ModuleDict)
    layers["2"] = nn.Identity()  # what parallelizing a part may do to it
    layers.pop("3")
    part.register_buffer("rope", torch.zeros(1))
    part.forward = lambda x: x  # type: ignore[method-assign]
    part.__class__ = type("Other", (Decoder,), {})
    assert [name for name, _ in model.named_modules()] == names
    assert [*model.state_dict()] == keys
    assert type(model) is Decoder
    assert torch.equal(model(tokens), before)


def test_hooks_of_a_part_are_its_own(model: Decoder) -> None:
    """FSDP2 hangs its own on each part."""
    first, second = (part_of(model, names) for names in cut(model, 2))
    called = []
    handles = [
        first.register_forward_pre_hook(lambda *_: called.append("pre")),
        first.register_forward_hook(lambda *_: called.append("post")),
        first.register_full_backward_hook(lambda *_: called.append("backward")),
    ]
    try:
        second(torch.randn(1, 4, SMALL.dim, requires_grad=True)).sum().backward()
        model(torch.arange(4)[None])
        assert called == []
        first(torch.arange(4)[None])
        assert called == ["pre", "post"]
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad()


def test_a_part_in_evaluation_does_not_take_the_others_along(model: Decoder) -> None:
    first, second = (part_of(model, names) for names in cut(model, 2))
    first.eval()
    assert not first.training
    assert second.training
    assert model.training
    first.train()


def test_stages_of_the_plan_hold_all_work(meta: Decoder) -> None:
    """What the stages multiply with adds up to what the model does."""
    total = sum(m.weight.numel() for m in meta.modules() if isinstance(m, nn.Linear))
    for pp in (2, 3, 4):
        plan = plan_of(meta, pp)
        work = [sum(matmul_elements(meta, name) for name in stage) for stage in plan.stages]
        assert sum(work) == total
        # No stage is more than one module's work above an even share.
        assert max(work) <= math.ceil(total / pp) + max(matmul_elements(meta, name) for name in ("layers.0", "output"))
