"""Shared by all tests."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton's own modules when they are first imported

from tests.support.runs import run_trainer

# Shells start jobs in the background with SIGINT ignored, which processes inherit; tests send it to theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tiny",
        action="store_true",
        help="test_finetune_recipes.py: run all ten recipes, each on a small folder of its architecture with random "
        "weights (else scripts/test.sh leaves five of them to --all)",
    )


@pytest.fixture(autouse=True, scope="module")
def compiler() -> None:
    """Each file starts with a compiler that remembers nothing: which files share a process is chance."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def train(tmp_path: Path) -> Any:
    """:func:`run_trainer` in the test's own folder."""
    return partial(run_trainer, tmp_path)
