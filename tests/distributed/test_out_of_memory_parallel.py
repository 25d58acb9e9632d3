"""One process of several runs out of memory."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.plan.test_out_of_memory import assert_advised, out_of_memory

pytestmark = pytest.mark.slow


def test_the_rank_that_ran_out_of_memory_ends_the_run_and_is_named(train: Any) -> None:
    run = train(2, **out_of_memory(at=2, rank=1))
    assert run.status == 1
    assert run.output.count("titanlite: error:") == 1
    assert "Traceback" not in run.output
    assert "error: rank 1 ran out of memory in step 2, at " in run.output
    assert "was here when it was ended" not in run.output
    others = "--parallelism.context_parallel_degree=2", "--training.loss_chunks=8"
    assert_advised(run.output, "--training.local_batch_size=1", "--training.compile=true", *others)
