"""The order of the tests for a GPU, whose time may end before they do."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs of the trainer last, where there are no other tests, whose order is not ours."""
    if all(item.path.parent == Path(__file__).parent for item in items):
        items.sort(key=lambda item: "train" in getattr(item, "fixturenames", ()))
