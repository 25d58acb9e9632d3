"""Mixtures of experts in every way to spread them, against one process: the same losses, the same tokens for each
expert, and the collectives that the degrees imply."""

from __future__ import annotations

import pytest

from tests.distributed.combinations import EXPERT_WAYS, EXPERT_WAYS_LONG
from tests.distributed.test_parallel import ONE, Cluster, Reports, check_parity, column

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


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """The ways that the chosen tests ask for."""
    tests = [i.callspec.params for i in request.session.items if i.path == request.path and hasattr(i, "callspec")]
    ways = {name: EXPERT_WAYS[name] for name in {test["way"]: None for test in tests}}
    cluster = Cluster(tmp_path_factory.mktemp("experts"))
    cluster.run(1, {ONE: FAMILY})
    for processes in sorted({way.processes for way in ways.values()}):
        group = {name: {**way.all_options(), **FAMILY} for name, way in ways.items() if way.processes == processes}
        cluster.run(processes, group)
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
