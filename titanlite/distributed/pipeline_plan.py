"""The plan of a pipeline: the cuts of the model, and the rank of each stage."""

from __future__ import annotations

import csv
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from torch import nn

from titanlite.config import JobConfig
from titanlite.config.parallelism import (
    CSV_SCHEDULE,
    LOOPED_SCHEDULES,
    SINGLE_STAGE_SCHEDULES,
    V_SCHEDULES,
    whole_backward,
)
from titanlite.config.refuse import refuse
from titanlite.errors import ConfigError, counted
from titanlite.models.layers import Mixture
from titanlite.registry import nearest


@dataclass(frozen=True)
class Plan:
    """The stages of a pipeline, and their ranks.

    Attributes:
        stages: the module names of each stage.
        ranks: the rank in ``mesh.pp`` of each stage.
    """

    stages: list[list[str]]
    ranks: list[int]

    def of(self, rank: int) -> list[int]:
        """Return the numbers of the stages of ``rank``, in order."""
        return [stage for stage, owner in enumerate(self.ranks) if owner == rank]

    def __str__(self) -> str:
        """Return the modules of each rank, for the log."""
        names = [s[0] if len(s) == 1 else f"{s[0]} to {s[-1]}" for s in self.stages]
        ranks = sorted({*self.ranks})
        return "; ".join(f"pipeline rank {rank}: " + " and ".join(names[s] for s in self.of(rank)) for rank in ranks)


Chain = Sequence[tuple[str, ...]]


def plan_pipeline(model: nn.Module, chain: Chain, config: JobConfig, ranks: int) -> Plan:
    """Return the stages of a pipeline over ``ranks`` ranks.

    Args:
        chain: the module names of ``model`` in the order of the forward; the names of one tuple stay in one stage.

    Raises:
        ConfigError: the configured stages do not fit the ranks or the schedule.
    """
    p = config.parallelism
    schedule = p.pipeline_parallel_schedule
    owners: list[int] = []
    if schedule == CSV_SCHEDULE:
        owners = _owners_in_csv(config, ranks)
        wanted, why = len(owners), f"the schedule in {p.pipeline_parallel_schedule_csv} has"
    else:
        each = 1 if schedule in SINGLE_STAGE_SCHEDULES else 2
        wanted, why = each * ranks, f'"{schedule}" over {ranks} processes has'
    stages = _asked_for(chain, config)
    if stages is None:
        if wanted > len(chain):
            raise ConfigError(
                f"{why} {wanted} stages, and the model cannot be cut into more than {len(chain)}; use fewer processes",
                key="parallelism.pipeline_parallel_degree",
                value=ranks,
            )
        costs = [sum(matmul_elements(model, name) for name in names) for names in chain]
        stages = [[name for i in stage for name in chain[i]] for stage in balanced(costs, wanted)]
    looped = schedule in LOOPED_SCHEDULES
    fits = len(stages) in range(wanted, len(chain) + 1, ranks) if looped else len(stages) == wanted
    if not fits:
        key = "split_points" if p.pipeline_parallel_split_points else "layers_per_stage"
        refuse(
            config,
            f"parallelism.pipeline_parallel_{key}",
            f"makes {len(stages)} stages ({'; '.join(', '.join(stage) for stage in stages)}), and {why} {wanted}"
            f"{' or another multiple of the processes' if looped else ''}; change it, or leave it out for stages with "
            "about the same work",
        )
    if owners:
        return Plan(stages, owners)
    if schedule in V_SCHEDULES:
        return Plan(stages, [min(stage, 2 * ranks - 1 - stage) for stage in range(2 * ranks)])
    return Plan(stages, [stage % ranks for stage in range(len(stages))])


def _asked_for(chain: Chain, config: JobConfig) -> list[list[str]] | None:
    """Return the stages that the configuration describes; None if it does not describe any."""
    p = config.parallelism
    points, each = p.pipeline_parallel_split_points, p.pipeline_parallel_layers_per_stage
    begins = [names[0] for names in chain]
    if each is not None:
        points = [name for name in begins if "." in name][each::each]
    elif not points:
        return None
    for point in points:
        if point not in begins[1:]:
            refuse(
                config,
                "parallelism.pipeline_parallel_split_points",
                f'no stage can begin at "{point}"{nearest(point, begins[1:])}; can be {begins[1]} to {begins[-1]}',
            )
    cuts = [0, *(begins.index(point) for point in points), len(chain)]
    if cuts != sorted({*cuts}):
        refuse(config, "parallelism.pipeline_parallel_split_points", "must be in the order of the model")
    return [[name for names in chain[a:b] for name in names] for a, b in itertools.pairwise(cuts)]


def matmul_elements(model: nn.Module, name: str) -> int:
    """Return the number of weights that a module multiplies a token with; its work is proportional to it. Of experts
    those count that a token chooses."""
    modules = [*model.get_submodule(name).modules()]
    linears = sum(m.weight.numel() for m in modules if isinstance(m, nn.Linear))
    return linears + sum(m.used_params() for m in modules if isinstance(m, Mixture))


def balanced(costs: Sequence[int], stages: int) -> list[range]:
    """Cut ``costs``, in order, into ``stages`` non-empty parts, so that the cost of the costliest part is minimal. Of
    such cuts, return the one with the least sum of squared costs."""
    n, total = len(costs), [0, *itertools.accumulate(costs)]
    # The price of the costliest part first: the cheapest beginning need not be part of the cheapest whole.
    costliest: list[float] = [0, *[math.inf] * n]
    squares: list[tuple[float, tuple[int, ...]]] = [(0, (0,)), *[(math.inf, ())] * n]
    for part in range(1, stages + 1):
        costliest = [
            min((max(costliest[i], total[j] - total[i]) for i in range(part - 1, j)), default=math.inf)
            for j in range(n + 1)
        ]
    limit = costliest[n]
    for part in range(1, stages + 1):
        squares = [
            min(
                (
                    (squares[i][0] + (total[j] - total[i]) ** 2, (*squares[i][1], j))
                    for i in range(part - 1, j)
                    if total[j] - total[i] <= limit
                ),
                default=(math.inf, ()),
            )
            for j in range(n + 1)
        ]
    return [range(a, b) for a, b in itertools.pairwise(squares[n][1])]


_CELL = re.compile(r"^(\d+)([FBIW])(\d+)$")


def _owners_in_csv(config: JobConfig, ranks: int) -> list[int]:
    """Return the rank of each stage in the user's schedule file."""
    path = config.parallelism.pipeline_parallel_schedule_csv

    def refuse_schedule(why: str) -> NoReturn:
        refuse(config, "parallelism.pipeline_parallel_schedule_csv", why)

    try:
        with Path(path).expanduser().open(newline="", encoding="utf-8") as file:
            rows = [[text.strip() for text in row] for row in csv.reader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        refuse_schedule(f"cannot be read ({e}); correct the file")
    if len(rows) != ranks:
        refuse_schedule(f"has {counted(len(rows), 'row')}, must be one for each of {ranks} processes; change either")
    owners: set[tuple[int, int]] = set()
    forwards: defaultdict[int, list[int]] = defaultdict(list)
    kinds: set[str] = set()
    for rank, row in enumerate(rows):
        for text in filter(None, row):
            match = _CELL.match(text)
            if match is None:
                refuse_schedule(
                    f'row {rank + 1}: "{text}" must be a stage, F, B, I or W, and a microbatch, such as 0F1'
                )
            stage, kind, microbatch = int(match[1]), match[2], int(match[3])
            owners.add((stage, rank))
            kinds.add(kind)
            if kind == "F":
                forwards[stage].append(microbatch)
    if [stage for stage, _ in sorted(owners)] != [*range(len(owners))]:
        refuse_schedule(f"each stage from 0 on must be in one row; the (stage, row) are {sorted(owners)}")
    idle = sorted({*range(ranks)} - {rank for _, rank in owners})
    if idle:
        refuse_schedule(f"each of {ranks} processes must have a stage; row {idle[0] + 1} has none")
    last = forwards[len(owners) - 1]
    if last != sorted(last):
        # The runtime stores the losses in the order of the forwards, and reads them by the number of the microbatch.
        refuse_schedule(f"the last stage must take the microbatches in their order, not {last}")
    if kinds & {"I", "W"} and (why := whole_backward(config)):
        refuse_schedule(why)
    return [rank for _, rank in sorted(owners)]
