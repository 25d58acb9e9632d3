"""Where the end of a run begins. Nothing here imports torch."""

from __future__ import annotations


def last_part(rows: int) -> int:
    """Return how many of the last rows say where a run ends: a quarter, at least 100, and at most half of them."""
    return max(1, min(rows // 2, max(rows // 4, 100)))
