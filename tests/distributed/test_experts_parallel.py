"""Mixtures of experts in every way to spread them, against one process: the same losses, the same tokens for each
expert, the exchange that the degrees imply, other variants of training, and checkpoints."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.combinations import BATCH, EXPERT_WAYS, EXPERT_WAYS_LONG, SEQ_LEN, VARIANTS
from tests.distributed.test_parallel import BOUNDS, DIM, LAYERS, ONE, Cluster, Reports, check_parity, column
from tests.support.runs import Run, checkpoints, run_trainer, saved

# Few labels are scored, and microbatches accumulate: they, and shares of sequences, have from none to many.
FAMILY = {
    "model.name": "qwen3_moe",
    "model.flavor": "tiny",
    "model.args.n_experts": 8,
    "model.args.experts_per_token": 3,
    "experts.balance_loss": 0.05,
    "experts.z_loss": 0.01,
    "training.local_batch_size": 1,
    "mask": 16,
}
VARIED = ("AC selective op", "compile", "compile, rowwise, AC selective op")
VARIED_LONG = ("AC full", "compile, AC full")  # they have no mechanism of their own
QUANT = re.compile("rowwise|mxfp8")
# Experts in number formats, which are compared with one process as VARIED is with the same recipe.
QUANTIZED: dict[str, dict[str, Any]] = {
    "rowwise experts": {**VARIANTS["rowwise"], "float8.moe_fqns": "experts"},
    "mxfp8 experts": {**VARIANTS["mxfp8"], "mx.moe_fqns": "experts"},
}


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """The ways that the chosen tests ask for."""
    tests = [i.callspec.params for i in request.session.items if i.path == request.path and hasattr(i, "callspec")]
    ways = {name: EXPERT_WAYS[name] for name in {test["way"]: None for test in tests}}
    cluster = Cluster(tmp_path_factory.mktemp("experts"))
    variants = {
        variant: {**VARIANTS, **QUANTIZED}[variant]
        for variant in {test.get("variant", ""): None for test in tests}
        if variant
    }
    in_formats = {f"{ONE}, {v}": {**FAMILY, **o} for v, o in variants.items() if QUANT.search(v)}
    cluster.run(1, {ONE: FAMILY, **in_formats})
    for processes in sorted({way.processes for way in ways.values()}):
        group = {name: {**way.all_options(), **FAMILY} for name, way in ways.items() if way.processes == processes}
        varied = {f"EP 2, {v}": {**group["EP 2"], **o} for v, o in variants.items()} if "EP 2" in group else {}
        cluster.run(processes, group | varied)
    return cluster.reports


WAYS = [
    pytest.param(way, marks=[pytest.mark.long] if way in EXPERT_WAYS_LONG else [pytest.mark.slow])
    for way in EXPERT_WAYS
]


@pytest.mark.parametrize("way", WAYS)
def test_experts_train_as_on_one_process(runs: Reports, way: str) -> None:
    one, many = runs[ONE], runs[way]
    check_parity(one, many)
    assert column(many, "expert_tokens") == column(one, "expert_tokens")
    for key in ("balance_loss", "router_entropy"):
        assert column(many, key) == pytest.approx(column(one, key), rel=1e-5)


ROWS = 3 * SEQ_LEN  # of a microbatch: a token for each of its experts


def exchanges(report: dict[str, Any]) -> dict[str, int]:
    return {name.removeprefix("ep/"): calls for name, calls in report["calls"].items() if name.startswith("ep/")}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["EP 2"])
def test_the_exchange_sends_the_rows_of_each_expert_and_their_weights(runs: Reports, way: str) -> None:
    """Of each mixture: the loads; in forward the rows, their weights, and the results; in backward as much back."""
    mixtures = LAYERS * BATCH // 2
    for report in runs[way]:
        assert exchanges(report) == {
            "exchange_loads": mixtures,
            "to_experts": 3 * mixtures,
            "from_experts": 3 * mixtures,
        }
        assert report["bytes"]["ep/to_experts"] == mixtures * ROWS * (2 * DIM + 1) * 4
    sent, returned = (sum(r["bytes"][f"ep/{name}_experts"] for r in runs[way]) for name in ("to", "from"))
    assert sent == returned


@pytest.mark.parametrize(
    ("way", "variant"),
    [pytest.param("EP 2", variant, marks=pytest.mark.slow) for variant in (*VARIED, *QUANTIZED)]
    + [pytest.param("EP 2", variant, marks=pytest.mark.long) for variant in VARIED_LONG],
)
def test_experts_train_with_checkpointing_compiled_and_in_float8(runs: Reports, way: str, variant: str) -> None:
    plain, varied = runs[way], runs[f"{way}, {variant}"]
    if QUANT.search(variant):
        loss, _, norm = BOUNDS["rowwise"]
        one = runs[f"{ONE}, {variant}"]
        assert column(varied, "loss") == pytest.approx(column(one, "loss"), rel=loss)
        assert column(varied, "grad_norm") == pytest.approx(column(one, "grad_norm"), rel=10 * norm)
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


SHARED = {"training__mixed_precision_param": "float32", "training__global_batch_size": 4, "training__steps": 4} | {
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
CONTINUED = {"EP 2": (2, 2), "one process": (1, 1), "FSDP 4, EP 2": (4, 2)}


@pytest.mark.slow
def test_experts_continue_to_the_bit_and_under_other_degrees(tmp_path: Path) -> None:
    def run(name: str, processes: int, degree: int) -> Run:
        options = {"parallelism__expert_parallel_degree": degree, "training__local_batch_size": 1}
        done = run_trainer(*(tmp_path, processes, name), model__name="qwen3_moe", **checkpoints(2), **SHARED, **options)
        assert done.status == 0, done.output
        return done

    straight = run("straight", 2, 2)
    before = saved(straight.folder, 4)
    for name, (processes, degree) in CONTINUED.items():
        shutil.copytree(straight.folder, tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoint" / "step-4")
        continued = run(name, processes, degree)
        assert "resuming from step 2" in continued.output
        assert continued.losses() == pytest.approx(straight.losses(), rel=1e-6)
        if name == "EP 2":
            assert saved(continued.folder, 4) == before
