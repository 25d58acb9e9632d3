"""Mixtures of experts in every way to spread them, against one process: the same losses, the same tokens for each
expert, the exchange that the degrees imply, other variants of training, and checkpoints."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed.combinations import BATCH, EXPERT_VARIANTS, EXPERT_WAYS, SEQ_LEN, VARIANTS, expert_cell
from tests.distributed.test_launcher import start_in
from tests.distributed.test_parallel import (
    BOUNDS,
    DIM,
    LAYERS,
    ONE,
    Cluster,
    Reports,
    check_gradients,
    check_parity,
    column,
)
from tests.support.runs import ROOT, Run, checkpoints, run_trainer, saved
from titanlite.checkpoint.storage import load, saved_shapes
from titanlite.commands import convert

# Microbatches accumulate, and few labels are scored: microbatches, and shares of sequences, have from none to many.
SEQUENCES = {1: 2, 2: 2, 4: 1}  # of a microbatch, by the degree of data parallelism
EXPERTS, EXPERT_DIM = 8, 32
FAMILY = {
    "model.name": "qwen3_moe",
    "model.flavor": "tiny",
    "model.args.n_experts": EXPERTS,
    "model.args.experts_per_token": 3,
    "experts.balance_loss": 0.05,
    "experts.z_loss": 0.01,
    "training.local_batch_size": SEQUENCES[1],
    "mask": 32,
}
# It has shared experts, groups, a dense first block, and latent attention, whose heads are of two sizes.
DEEPSEEK = {
    "model.name": "deepseek_v3",
    "model.flavor": "tiny",
    "experts.bias_update_rate": 0.01,
    "training.local_batch_size": SEQUENCES[1],
    "mask": 32,
}
# Its other form, whose queries are made of hidden states.
MOONLIGHT = {"model.flavor": "tiny_moonlight"}
# Ways that it is tried with, and whether scripts/test.sh --long alone does. The parts of EP 2 are in the others.
DEEPSEEK_WAYS = {
    ("EP 2", ""): "(yes)",
    ("TP 2, EP 2", ""): "yes",
    ("CP 2, EP 2", ""): "yes",
    ("PP 2 x FSDP 2, EP 2", ""): "yes",
    ("TP 2", ""): "(yes)",
    ("CP 2", ""): "(yes)",
    ("CP 2 x TP 2, EP 4", ""): "(yes)",
    ("PP 2 x TP 2, EP 2", ""): "(yes)",
    ("PP 2 x CP 2, EP 2", ""): "(yes)",
    ("TP 2, EP 2", "moonlight"): "yes",
    ("CP 2, EP 2", "moonlight"): "(yes)",
    ("PP 2 x TP 2, EP 2", "moonlight"): "(yes)",
    ("PP 2 x CP 2, EP 2", "moonlight"): "(yes)",
}
QUANT = re.compile("rowwise|mxfp8")
# What one process computes differently too.
WITH_ONE = re.compile("rowwise|mxfp8|balance")


def spread(options: dict[str, Any], name: str) -> dict[str, Any]:
    """The options of a run on one process, spread in a way."""
    way = EXPERT_WAYS[name]
    return {**way.all_options(), **options, "training.local_batch_size": SEQUENCES[way.replicate * way.shard]}


def as_many_sequences(variant: str, processes: int) -> dict[str, Any]:
    """Return the sequences that a process takes at a time, so that one computes what two do.

    The gradient of an expert's weight has scales of its tokens, which are those of a microbatch on all processes of
    expert parallelism; so is the load of a balance loss over ``global_batch``. Over ``batch``, it is that of each
    process.
    """
    if variant == "balance over batch":
        return {"training.local_batch_size": BATCH // 2}
    same = variant.endswith("experts") or variant == "balance over global_batch"
    return {"training.local_batch_size": BATCH // processes} if same else {}


def deepseek_case(way: str, variant: str = "") -> tuple[str, dict[str, Any]]:
    """The name of a run of deepseek_v3, and its options beside those of the way."""
    name = ", ".join(filter(None, (way, "deepseek_v3", variant)))
    return name, {**DEEPSEEK, **{"": {}, "moonlight": MOONLIGHT, **VARIANTS}[variant]}


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """The ways that the chosen tests ask for."""
    tests = [i.callspec.params for i in request.session.items if i.path == request.path and hasattr(i, "callspec")]
    latent = {(test["way"], test["deepseek"]) for test in tests if "deepseek" in test}
    latent |= {(way, "") for way, variant in latent if variant in VARIANTS}  # which they are compared with
    tests = [test for test in tests if "deepseek" not in test]
    ways = {name: EXPERT_WAYS[name] for name in {test["way"]: None for test in tests}}
    cluster = Cluster(tmp_path_factory.mktemp("experts"))
    options = EXPERT_VARIANTS
    varied = {(test["way"], test["variant"]): None for test in tests if "variant" in test}
    with_one = {
        f"{ONE}, {v}": {**FAMILY, **options[v], **as_many_sequences(v, 1)} for _, v in varied if WITH_ONE.search(v)
    }
    with_one |= dict(deepseek_case(ONE, v) for _, v in sorted(latent) if v != "compile")
    cluster.run(1, {ONE: FAMILY, **with_one})
    for processes in sorted({EXPERT_WAYS[way].processes for way in {*ways, *(way for way, _ in latent)}}):
        group = {name: spread(FAMILY, name) for name, way in ways.items() if way.processes == processes}
        more = {
            f"{way}, {v}": {**group[way], **options[v], **as_many_sequences(v, processes)}
            for way, v in varied
            if way in group
        }
        for way, v in sorted(latent):
            if EXPERT_WAYS[way].processes == processes:
                name, given = deepseek_case(way, v)
                more[name] = spread(given, way)
        cluster.run(processes, group | more)
    return cluster.reports


MARKS = {"yes": pytest.mark.slow, "(yes)": pytest.mark.long}
WAYS = [pytest.param(way, marks=MARKS[expert_cell(way)]) for way in EXPERT_WAYS]
BALANCED = [variant for variant in EXPERT_VARIANTS if variant.startswith("balance")]


@pytest.mark.parametrize("way", WAYS)
def test_experts_train_as_on_one_process(runs: Reports, way: str) -> None:
    one, many = runs[ONE], runs[way]
    check_parity(one, many)
    check_gradients(one, many, 1e-5)
    assert column(many, "expert_tokens") == column(one, "expert_tokens")
    for key in ("balance_loss", "router_entropy"):
        assert column(many, key) == pytest.approx(column(one, key), rel=1e-5)


@pytest.mark.parametrize(
    ("way", "deepseek"), [pytest.param(*case, marks=MARKS[when]) for case, when in DEEPSEEK_WAYS.items()]
)
def test_biases_move_alike(runs: Reports, way: str, deepseek: str) -> None:
    one, many = (runs[deepseek_case(spread, deepseek)[0]] for spread in (ONE, way))
    expected = one[0]["biases"]
    assert len(expected) == LAYERS - 1
    assert all(any(bias) for bias in expected.values())
    check_parity(one, many)
    check_gradients(one, many, 1e-5)
    assert column(many, "expert_tokens") == column(one, "expert_tokens")
    for rank in many:
        assert rank["biases"] == {layer: expected[layer] for layer in rank["biases"]}
    assert {layer for rank in many for layer in rank["biases"]} == expected.keys()


@pytest.mark.slow
@pytest.mark.parametrize("deepseek", ["compile", "rowwise"])
@pytest.mark.parametrize("way", ["TP 2, EP 2"])
def test_latent_attention_compiled_and_in_float8_under_tensor_parallelism(
    runs: Reports, way: str, deepseek: str
) -> None:
    varied = runs[deepseek_case(way, deepseek)[0]]
    if deepseek == "compile":
        check_parity(runs[deepseek_case(way)[0]], varied)
        assert all(len({*report["graphs"]}) == 1 for report in varied)  # nothing after the first step
        return
    loss, first_norm, norm = BOUNDS["rowwise"]
    plain, one = (runs[deepseek_case(ONE, variant)[0]] for variant in ("", deepseek))
    assert column(varied, "loss") == pytest.approx(column(one, "loss"), rel=loss)
    assert column(varied, "grad_norm")[0] == pytest.approx(column(one, "grad_norm")[0], rel=first_norm)
    assert column(varied, "grad_norm") == pytest.approx(column(one, "grad_norm"), rel=norm)
    assert column(varied, "loss") != pytest.approx(column(plain, "loss"), rel=1e-6)


ROWS = 3 * SEQUENCES[2] * SEQ_LEN  # of a microbatch: a token for each of its experts


def exchanges(report: dict[str, Any]) -> dict[str, int]:
    return {name.removeprefix("ep/"): calls for name, calls in report["calls"].items() if name.startswith("ep/")}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["EP 2"])
def test_the_exchange_sends_the_rows_of_each_expert_and_their_weights(runs: Reports, way: str) -> None:
    """Of each mixture: the loads; in forward the rows, their weights, and the results; in backward as much back."""
    mixtures = LAYERS * BATCH // 2 // SEQUENCES[2]
    for report in runs[way]:
        assert exchanges(report) == {
            "exchange_loads": mixtures,
            "to_experts": 3 * mixtures,
            "from_experts": 3 * mixtures,
        }
        assert report["bytes"]["ep/to_experts"] == mixtures * ROWS * (2 * DIM + 1) * 4
        assert report["bytes"]["ep/exchange_loads"] == mixtures * EXPERTS * 4
        assert not any(name.startswith("expert_fsdp/") for name in report["calls"])  # each expert is on one process
    sent, returned = (sum(r["bytes"][f"ep/{name}_experts"] for r in runs[way]) for name in ("to", "from"))
    assert sent == returned


@pytest.mark.slow
@pytest.mark.parametrize("way", ["FSDP 4, EP 2"])
def test_fsdp_gathers_the_experts_of_a_process_over_those_that_have_the_same(runs: Reports, way: str) -> None:
    """Half of the experts of each block, over two processes: in forward and backward of each microbatch. Their
    gradients are reduced once."""
    shard = 3 * EXPERTS * DIM * EXPERT_DIM * 4 // 4  # bytes, of float32
    for report in runs[way]:
        calls, nbytes = ({k: v for k, v in report[key].items() if "expert_fsdp/" in k} for key in ("calls", "bytes"))
        gathers = 2 * LAYERS * BATCH // 4 // SEQUENCES[4]
        assert calls == {"expert_fsdp/all_gather": gathers, "expert_fsdp/reduce_scatter": LAYERS}
        assert nbytes == {"expert_fsdp/all_gather": gathers * shard, "expert_fsdp/reduce_scatter": LAYERS * shard}


@pytest.mark.parametrize(
    ("way", "variant"),
    [
        pytest.param(way, variant, marks=MARKS[cell])
        for way in EXPERT_WAYS
        for variant in EXPERT_VARIANTS
        if variant not in BALANCED and (cell := expert_cell(way, variant))
    ],
)
def test_experts_train_with_checkpointing_compiled_and_in_float8(runs: Reports, way: str, variant: str) -> None:
    plain, varied = runs[way], runs[f"{way}, {variant}"]
    if QUANT.search(variant):
        loss, _, norm = BOUNDS["rowwise"]
        one = runs[f"{ONE}, {variant}"]
        assert column(varied, "loss") == pytest.approx(column(one, "loss"), rel=loss)
        assert column(varied, "grad_norm") == pytest.approx(column(one, "grad_norm"), rel=norm)
    elif "compile" in variant:
        check_parity(plain, varied)
    else:
        assert column(varied, "loss") == column(plain, "loss")
        assert column(varied, "grad_norm") == column(plain, "grad_norm")
    if variant == "AC selective op":  # it keeps what was exchanged
        assert [exchanges(report) for report in varied] == [exchanges(report) for report in plain]
    for report in varied:
        if "compile" in variant:  # nothing after the first step, though loads change
            assert report["graphs"][0] > 0
            assert report["graphs"] == [report["graphs"][0]] * len(report["graphs"])


@pytest.mark.slow
@pytest.mark.parametrize("variant", BALANCED)
@pytest.mark.parametrize("way", ["EP 2"])
def test_balance_losses_over_batches_are_those_of_one_process(runs: Reports, way: str, variant: str) -> None:
    """Over ``global_batch``, of one that takes the sequences of both at a time; over ``batch``, of one that takes those
    of one process after the other."""
    one, many = runs[f"{ONE}, {variant}"], runs[f"{way}, {variant}"]
    check_parity(one, many)
    check_gradients(one, many, 1e-5)
    assert column(many, "balance_loss") == pytest.approx(column(one, "balance_loss"), rel=1e-5)
    assert column(many, "balance_loss") != pytest.approx(column(runs[ONE], "balance_loss"), rel=1e-3)


SHARED = {"training__mixed_precision_param": "float32", "training__global_batch_size": 4, "training__steps": 6} | {
    f"model__args__{name}": size
    for name, size in {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 2,
        "n_experts": 8,
        "expert_dim": 16,
    }.items()
}
# A name, its processes and degree, and the run and step that it goes on from: the last two are a chain.
CONTINUED = (
    ("EP 2", 2, 2, "straight", 2),
    ("one process", 1, 1, "straight", 2),
    ("FSDP 4, EP 2", 4, 2, "one process", 4),
)


def bias_of(run: Run) -> Tensor:
    """The bias of the router of the mixture of ``SHARED``, after its last step."""
    name = "model.layers.1.feed_forward.router.bias"
    bias = {name: torch.empty(8)}
    load(run.folder / "checkpoint" / "step-6", bias)
    return bias[name]


@pytest.mark.slow
def test_experts_continue_to_the_bit_and_under_other_degrees(tmp_path: Path) -> None:
    """With the biases of routers, which move at each step by the loads of all processes."""

    def run(name: str, processes: int, degree: int) -> Run:
        options = {"parallelism__expert_parallel_degree": degree, "training__local_batch_size": 1}
        done = run_trainer(
            *(tmp_path, processes, name), model__name="deepseek_v3", **checkpoints(2), **SHARED, **options
        )
        assert done.status == 0, done.output
        return done

    straight = run("straight", 2, 2)
    before = saved(straight.folder, 6)
    for name, processes, degree, origin, step in CONTINUED:
        shutil.copytree(tmp_path / origin, tmp_path / name)
        for later in range(step + 2, 7, 2):
            shutil.rmtree(tmp_path / name / "checkpoint" / f"step-{later}")
        continued = run(name, processes, degree)
        assert f"resuming from step {step}" in continued.output
        assert continued.losses() == pytest.approx(straight.losses(), rel=1e-6)
        assert torch.equal(bias_of(continued), bias_of(straight))
        if name == "EP 2":
            assert saved(continued.folder, 6) == before
    assert bias_of(straight).any()
    step, exported = straight.folder / "checkpoint" / "step-6", tmp_path / "exported"
    assert convert.main([str(step), str(exported), "--dtype=float32"]) == 0
    theirs = {key: value for file in exported.glob("*.safetensors") for key, value in load_file(file).items()}
    mine = {name: torch.empty(shape) for name, shape in saved_shapes(step).items() if name[:6] == "model."}
    load(step, mine)
    for name, place in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        stack = [theirs[f"model.layers.1.mlp.experts.{expert}.{place}.weight"] for expert in range(8)]
        assert torch.equal(torch.stack(stack), mine[f"model.layers.1.feed_forward.experts.{name}"])


DIES = """
import os, signal
from torch import Tensor
from titanlite.converters import register_converter
from titanlite.models.layers import Mixture

@register_converter("dies")
class Dies:
    def __init__(self, config, mesh):
        self.left = 5

    def convert(self, model):
        if os.environ["RANK"] == "1":
            last = [m for m in model.modules() if isinstance(m, Mixture)][-1]
            last.router.register_forward_hook(self.routed)
        return "rank 1 does not come to an exchange"

    def routed(self, router, inputs, routing):
        self.left -= type(routing.logits) is Tensor  # no estimate's
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def post_optimizer_hook(self, model):
        pass
"""


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    yield from start_in(tmp_path)


@pytest.mark.slow
def test_a_rank_that_dies_on_its_way_to_the_exchange_ends_the_others(started: Any, tmp_path: Path) -> None:
    """The tokens of its router are chosen, and the other rank waits for them."""
    (tmp_path / "dies.py").write_text(DIES)
    run = started(
        2,
        env={"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        **{**SHARED, "training__steps": 100, "parallelism__expert_parallel_degree": 2},
        model__name="qwen3_moe",
        training__local_batch_size=1,
        experimental__custom_import="dies",
        model__converters="dies",
        comm__train_timeout_seconds=60,
    )
    assert run.process.wait(timeout=60) == 1
    assert re.search(r"rank 1 \(process \d+\) ended with SIGKILL; the others were ended\n$", run.output())
    assert run.says_where(0)
    assert "in _exchange_loads" in run.output()
    assert run.workers() == []
