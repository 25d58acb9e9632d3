"""Plans of a save, kept for the next one: what each rank writes, and where, does not change while a run goes on."""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint.planner import SavePlanner

from titanlite.checkpoint.planner import FlatPlanner


class PlanCache:
    """The plans of one series of saves.

    DCP compares the plan of each rank with that of the save before. A rank with the same plan sends nothing; if all are
    the same, rank 0 does not plan. The first save of a series, and one of other tensors, plan as without a cache.

    Args:
        series: the name of the series; the same on all ranks. DCP keeps plans by name, for the whole process.
    """

    def __init__(self, series: str) -> None:
        self._series = f"titanlite: {series}"

    def planner(self) -> SavePlanner:
        """Return the planner of the next save."""
        return FlatPlanner(self._series)

    def clear(self) -> None:
        """Forget the plans. Call it on all ranks after a failed save, of which some may have kept more than others."""
        for plans in _kept():
            plans.pop(self._series, None)

    def __len__(self) -> int:
        """Return how many kinds of plans are kept: of this rank, and on rank 0 of all ranks."""
        return sum(self._series in plans for plans in _kept())


def _kept() -> tuple[dict[str, Any], ...]:
    return (
        SavePlanner._cached_save_plan,
        SavePlanner._cached_final_save_plan,
        SavePlanner._cached_all_plans,
        SavePlanner._cached_global_plan,
        SavePlanner._cached_metadata,
    )
