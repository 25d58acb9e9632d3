"""FSDP2 over gloo processes against one process: the same weights, the same tokens, the same losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import report_start
from tests.support.forks import on_ranks
from tests.support.runs import LITTLE, dotted, environment

BATCHES = 50
GLOBAL_BATCH = 8


def start(folder: Path, world: int) -> list[dict[str, Any]]:
    """What each of ``world`` processes starts from, by rank."""
    options = {
        "job.dump_folder": folder / f"run-{world}",
        "training.seq_len": 64,
        "training.local_batch_size": GLOBAL_BATCH // world,
        "training.seed": 7,
        "metrics.enable_tensorboard": "false",
        **dotted(LITTLE),
    }
    return on_ranks(world, folder / f"ranks-{world}", environment(), report_start.report, BATCHES, options)


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("starts")
    return {world: start(folder, world) for world in (1, 2, 4)}


@pytest.mark.parametrize("world", [2, 4])
def test_initial_weights_do_not_depend_on_the_sharding(starts: Any, world: int) -> None:
    (one,) = starts[1]
    assert len(set(one["weights"].values())) > len(one["weights"]) / 2  # they are not all the same tensor
    for rank in starts[world]:
        assert rank["weights"] == one["weights"]
        assert rank["local_elements"] <= 1.01 * one["elements"] / world  # and they are sharded


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("part", ["inputs", "labels"])
def test_global_batches_do_not_depend_on_the_number_of_processes(starts: Any, world: int, part: str) -> None:
    (one,) = starts[1]
    joined = [[row for rank in starts[world] for row in rank[part][k]] for k in range(BATCHES)]
    assert joined == one[part]
    assert len({json.dumps(batch) for batch in joined}) == BATCHES


def test_two_processes_train_as_one_with_double_the_batch(train: Any) -> None:
    common = {
        **LITTLE,
        "training__mixed_precision_param": "float32",
        "training__steps": 10,
        "training__global_batch_size": 8,
    }
    one = train(1, name="one", training__local_batch_size=8, **common)
    two = train(2, name="two", training__local_batch_size=4, **common)
    assert (one.status, two.status) == (0, 0), one.output + two.output
    assert two.losses() == pytest.approx(one.losses(), rel=1e-5)


@pytest.mark.slow
def test_two_replicas_of_one_shard_sum_the_gradients_of_their_microbatches(train: Any) -> None:
    """Each reduction has one shard, and nothing to copy."""
    common = {
        **LITTLE,
        "training__mixed_precision_param": "float32",
        "training__steps": 4,
        "training__global_batch_size": 8,
    }
    one = train(1, name="one", training__local_batch_size=8, **common)
    replicas = {"parallelism__data_parallel_replicate_degree": 2, "parallelism__data_parallel_shard_degree": 1}
    for reduce in ("step", "microbatch"):
        options = {**common, **replicas, "parallelism__fsdp_reduce_gradients": reduce}
        two = train(2, name=reduce, training__local_batch_size=2, **options)
        assert two.status == 0, two.output
        assert two.losses() == pytest.approx(one.losses(), rel=1e-5)
    assert [r["grad_norm"] for r in two.rows()] == pytest.approx([r["grad_norm"] for r in one.rows()], rel=1e-3)
    assert [r["tokens_seen"] for r in two.rows()] == [r["tokens_seen"] for r in one.rows()]
    # It is the mean and the maximum over two different halves.
    assert all(row["max_loss"] > row["loss"] for row in two.rows())
    assert all(row["max_loss"] == row["loss"] for row in one.rows())


def test_accumulated_microbatches_train_as_one_batch(train: Any) -> None:
    common = {
        **LITTLE,
        "training__mixed_precision_param": "float32",
        "training__steps": 5,
        "training__global_batch_size": 8,
    }
    whole = train(1, name="whole", training__local_batch_size=8, **common)
    parts = train(1, name="parts", training__local_batch_size=2, **common)
    assert parts.status == 0, parts.output
    assert parts.losses() == pytest.approx(whole.losses(), rel=1e-5)


@pytest.mark.parametrize("reshard", ["always", "never"])
@pytest.mark.slow
def test_resharding_after_forward_changes_no_loss(train: Any, reshard: str) -> None:
    default = train(2, name="default", **LITTLE)
    other = train(2, name=reshard, **LITTLE, parallelism__fsdp_reshard_after_forward=reshard)
    assert other.status == 0, other.output
    assert other.losses() == default.losses()
