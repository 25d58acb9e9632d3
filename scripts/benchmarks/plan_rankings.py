"""The rankings that the cost model makes: of the alternatives inside each published table, and of all layouts of
Llama 3 70B on 256 devices.

    python scripts/benchmarks/plan_rankings.py --out docs/benchmarks/plan_rankings.json

Nothing is measured but the seconds that the enumeration takes. ``pairs_agree`` counts the pairs of runs of a table
whose published speeds differ by more than 3%, and which the prediction puts in the published order; ``left_out_agree``
those by constants that are fitted without the table.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from typing import Any

import harness
import results
from step_time import predictions, read_runs

from titanlite.config import load_config
from titanlite.plan.devices import find_device
from titanlite.plan.layouts import make_plan
from titanlite.plan.refusals import planned_model

APART = 0.03  # runs repeat to about as much
FLAVOR, DEVICE, DEVICES = "70B", "h100-500w", 256  # of the large plan


def tables() -> list[dict[str, Any]]:
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in predictions(read_runs())[1]:
        runs.setdefault(run["table"], []).append(run)
    rows = []
    for table, of_table in runs.items():
        published, predicted = (
            [run["name"] for run in sorted(of_table, key=lambda run: -run[key])] for key in ("published_tps", "all_tps")
        )
        apart = [
            (one, other)
            for one, other in itertools.combinations(of_table, 2)
            if abs(one["published_tps"] / other["published_tps"] - 1) > APART
        ]
        agree = {
            key: sum((a["published_tps"] > b["published_tps"]) == (a[key] > b[key]) for a, b in apart)
            for key in ("all_tps", "left_out_tps")
        }
        row: dict[str, Any] = {"system": "titanlite", "config": table, "published": published, "predicted": predicted}
        row |= {"pairs": len(apart), "pairs_agree": agree["all_tps"], "left_out_agree": agree["left_out_tps"]}
        rows.append({**row, "same": published == predicted})
    return rows


def large(top: int) -> list[dict[str, Any]]:
    config = load_config(
        ["--model.name=llama3", f"--model.flavor={FLAVOR}", "--training.seq_len=8192", "--training.compile"]
    )
    begin = time.process_time()
    plan = make_plan(config, planned_model(config), find_device(DEVICE), DEVICES, top)
    seconds = time.process_time() - begin
    counts = {"tried": plan.tried, "refused": plan.refused, "too_large": plan.too_large, "seconds": round(seconds, 2)}
    rows: list[dict[str, Any]] = [{"system": "titanlite", "config": "70B on 256", **counts}]
    for rank, layout in enumerate(plan.layouts, 1):
        figures = {"tps": round(layout.tps_per_device, 1), "mfu_pct": round(layout.mfu_pct(plan.model), 1)}
        figures["memory_gib"] = round(layout.memory.total, 1)
        rows.append({"system": "titanlite", "config": "70B on 256", "rank": rank, **figures, "options": layout.options})
    return rows


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--top", type=int, default=10)
    args = parser.parse_args()
    rows = [*tables(), *large(args.top)]
    for row in rows:
        print(json.dumps(row))
    results.save("plan_rankings", rows, args, kind="cpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
