"""Print the estimate of a configuration: what ``COMM_MODE=fake`` and ``memory_estimation.enabled`` run.

``python -m titanlite.plan.command`` takes the number of devices from WORLD_SIZE.
"""

# ruff: noqa: E402
from __future__ import annotations

import sys

from titanlite.launch.command_line import read_config, report

CONFIG = read_config(sys.argv[1:]) if __name__ == "__main__" else None

import os

from titanlite.errors import ConfigError, counted
from titanlite.metrics.device import GIB
from titanlite.metrics.report import table
from titanlite.plan.auto_checkpoint import choose
from titanlite.plan.estimate import Estimate, estimate

COLUMNS = {  # the columns of the table, and the attributes of RankEstimate
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer state": "optimizer",
    "activations": "activations",
    "gathered, unreduced": "gathered",
}


def describe(result: Estimate) -> str:
    """Format the estimate for printing."""
    memory = [["rank", *COLUMNS, "peak"]]
    for r in result.ranks:
        memory.append([str(r.rank), *(_gib(getattr(r, name)) for name in (*COLUMNS.values(), "peak"))])
    sent = [["rank", "dimension", "collective", "ranks", "calls", "GiB", "GiB sent by this rank"]]
    for r in result.ranks:
        for c, t in r.traffic.items():
            sent.append([str(r.rank), *c[:2], str(c.ranks), str(t.calls), _gib(t.nbytes), _gib(t.sent)])
    return "\n".join(
        [
            table(f"estimate for {counted(result.world_size, 'device')}, made without any", result.about),
            "memory of each device, GiB",
            *_aligned(memory),
            "collectives of a step",
            *_aligned(sent),
            "notes",
            *(f"    {note}" for note in result.notes),
        ]
    )


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f}" if nbytes >= GIB / 10 else f"{nbytes / GIB:.2g}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["    " + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def main() -> int:
    config, devices = CONFIG or read_config(sys.argv[1:]), int(os.environ.get("WORLD_SIZE", 1))
    about = {}
    try:
        if config.activation_checkpoint.mode == "auto":
            choose(config, devices, None, round(config.memory_estimation.device_gib * GIB)).apply(config)
            about["auto has chosen"] = config.activation_checkpoint.chosen
        result = estimate(config, devices)
    except ConfigError as e:
        return report(e, config)
    result.about |= about
    print(describe(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
