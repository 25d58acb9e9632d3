"""When does float8 pay? The speed of a float8 linear layer over bfloat16's, predicted for any M tokens of K features to
N from what the device reaches: matmuls on large shapes, and a copy.

    python scripts/benchmarks/roofline.py --out docs/benchmarks/roofline.json --check docs/benchmarks/linear.json
    python scripts/benchmarks/roofline.py --bf16-tflops=700 --fp8-tflops=1300 --bandwidth-gbs=4000 --csv roofline.csv

A matmul takes the time of its FLOPs or of its bytes, whichever is longer; casts and the passes that apply scales take
the time of the bytes they move at the speed of a copy (cost.py counts them, from the recipe's configuration). What is
left out, launches and the small matmuls that reach less, makes the prediction too good; ``--check`` says by how much,
against a result of linear.py. Ceilings that are not given are measured; with all of them given, no GPU is needed.

The prediction is written as CSV and, where matplotlib is installed (pip install matplotlib), as a heat map: beside
--out, or where --csv says. ``--train`` holds a result of train.py or peers.py against the floor of its step
(step_floor.py): the time of the step's matmuls, attention and memory traffic at what was measured for each.
``--attention-tflops`` predicts the floors of steps that nobody has measured, from the ceilings alone.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import matmul
import results
import step_floor
import torch
from cost import Ceilings, predict
from matmul import E4M3, quantized

from titanlite.quant.float8.devices import scales_rows_in_matmuls

K_AND_N = [512, 1024, 2048, 4096, 8192, 14336, 16384, 28672]
RATES = Ceilings._fields[:4]
LARGE = 8192  # rows and columns: a matmul that reaches what there is to reach
COPIED = 1 << 30  # bytes, read and written


def measured(args: argparse.Namespace) -> Ceilings:
    """Return the ceilings: those that are given, and the others measured, on random data."""
    tera = {"bf16": args.bf16_tflops, "fp8": args.fp8_tflops, "fp8_full": args.fp8_full_tflops or args.fp8_tflops}
    rates = {name: rate * 1e12 for name, rate in tera.items() if rate}
    if args.bandwidth_gbs:
        rates["bandwidth"] = args.bandwidth_gbs * 1e9
    missing = [name for name in RATES if name not in rates]
    if missing:
        rates |= {name: rate for name, rate in _measure(args.device, args.rounds).items() if name in missing}
    # Where all is given, it is for a Hopper GPU of now.
    follow = bool(missing) and args.device == "cuda" and not scales_rows_in_matmuls(torch.device("cuda"))
    return Ceilings(**rates, scales_follow=follow)


def _measure(device: str, rounds: int) -> dict[str, float]:
    toy = device == "cpu"
    size = 64 if toy else LARGE
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(0, 100, ((1 << 16) if toy else COPIED,), device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    x, y = quantized(a, E4M3, None), quantized(b, E4M3, None).t()
    times: dict[str, Callable[[], object]] = {
        "bf16": functools.partial(torch.mm, a, b.t()),
        "bandwidth": functools.partial(target.copy_, source),
    }
    for name, fast in (("fp8", True), ("fp8_full", False)):
        times[name] = matmul.ours(x, y, fast, True) if toy else matmul.raw(x, y, fast)
    seconds = harness.time_running(times, device, rounds, 5)
    work = {"bandwidth": 2 * source.nbytes}
    return {name: work.get(name, 2 * size**3) / taken for name, taken in seconds.items()}


def prediction(config: str, m: int, k: int, n: int, at: Ceilings) -> dict[str, Any]:
    bf16, float8 = predict("bf16", m, k, n, at), predict(config, m, k, n, at)
    return {
        "system": "roofline",
        "config": config,
        "m": m,
        "k": k,
        "n": n,
        "bf16_us": bf16.seconds * 1e6,
        "float8_us": float8.seconds * 1e6,
        "casts_us": float8.casts * 1e6,
        "rescales_us": float8.rescales * 1e6,
        "predicted_speedup": bf16.seconds / float8.seconds,
    }


def checked(linear: dict[str, Any], at: Ceilings) -> list[dict[str, Any]]:
    """The prediction for each of our compiled layers in a result of linear.py, and its error in percent."""
    predictions = []
    for row in linear["results"]:
        if row["system"] != "titanlite" or not row["compile"] or not row.get("speedup_over_bf16"):
            continue
        predicted = prediction(row["config"], row["m"], row["k"], row["n"], at)
        measured = row["speedup_over_bf16"]
        error = 100 * (predicted["predicted_speedup"] / measured - 1)
        predictions.append({**predicted, "kernels": row["kernels"], "measured_speedup": measured, "error_pct": error})
    return predictions


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        columns = [key for key in rows[0] if key != "system"]
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A map for each recipe and M: K down, N across."""
    pyplot = harness.pyplot()
    if pyplot is None:
        return

    def values(key: str) -> list[Any]:
        return list(dict.fromkeys(row[key] for row in rows))

    tokens, configs, ks, ns = (values(key) for key in ("m", "config", "k", "n"))
    speed = {(r["config"], r["m"], r["k"], r["n"]): r["predicted_speedup"] for r in rows}
    size = (1.5 + (1.5 + 0.55 * len(ns)) * len(configs), (1.5 + 0.45 * len(ks)) * len(tokens))
    figure, axes = pyplot.subplots(len(tokens), len(configs), figsize=size, squeeze=False, layout="constrained")
    for (i, m), (j, config) in itertools.product(enumerate(tokens), enumerate(configs)):
        grid = [[speed[config, m, k, n] for n in ns] for k in ks]
        image = axes[i][j].imshow(grid, cmap="RdYlGn", vmin=0, vmax=2, origin="lower", aspect="auto")
        for y, x in itertools.product(range(len(ks)), range(len(ns))):
            axes[i][j].text(x, y, f"{grid[y][x]:.2f}", ha="center", va="center", fontsize=7)
        axes[i][j].set_xticks(range(len(ns)), ns, rotation=60, fontsize=7)
        axes[i][j].set_yticks(range(len(ks)), ks, fontsize=7)
        axes[i][j].set(title=f"{config}, M = {m}", xlabel="N", ylabel="K")
    figure.colorbar(image, ax=axes, label="predicted speed over bfloat16")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def result_of(path: Path, name: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        parser.error(f"{path}: {e}; must be a result file of {name}")
    if content.get("name") not in name.split(" or "):
        parser.error(f"{path}: is a result of {content.get('name')}, must be one of {name}")
    return content


def main(argv: list[str] | None = None) -> int:
    parser = harness.gpu_parser(__doc__)
    parser.add_argument("--bf16-tflops", type=float, help="TFLOP/s that bfloat16 matmuls reach")
    parser.add_argument("--fp8-tflops", type=float, help="float8, with fast accumulation")
    parser.add_argument("--fp8-full-tflops", type=float, help="float8, with full accumulation; by default the same")
    parser.add_argument("--bandwidth-gbs", type=float, help="GB/s of a copy, reads and writes together")
    parser.add_argument(
        "--m", type=harness.numbers, default=[2048, 8192, 16384], help="tokens, by default 2048,8192,16384"
    )
    sweep = ",".join(map(str, K_AND_N))
    parser.add_argument("--k", type=harness.numbers, default=K_AND_N, help=f"features in, by default {sweep}")
    parser.add_argument("--n", type=harness.numbers, default=K_AND_N, help=f"features out, by default {sweep}")
    parser.add_argument("--csv", type=Path, help="write the prediction here, and the heat map beside it")
    parser.add_argument("--check", type=Path, metavar="FILE", help="a result of linear.py to be held against")
    parser.add_argument(
        "--train", type=Path, metavar="FILE", action="append", default=[], help="a result of train.py or peers.py"
    )
    parser.add_argument(
        "--attention-tflops",
        type=float,
        help="causal attention's, forward and backward, not counting what is masked; predicts whole steps, too",
    )
    parser.add_argument(
        "--layers", type=int, default=16, choices=range(1, 33), metavar="1..32", help="of the predicted steps"
    )
    parser.add_argument(
        "--batches", type=harness.numbers, default=[1, 2], help="of the predicted steps, by default 1,2"
    )
    parser.add_argument("--rounds", type=int, default=10, help="how often each ceiling is measured")
    args = parser.parse_args(argv)
    given = (args.bf16_tflops, args.fp8_tflops, args.bandwidth_gbs)
    if not all(given) or args.train:
        harness.check_device(parser, args.device)
    linear = result_of(args.check, "linear", parser) if args.check else None
    steps = [result_of(path, "train or peers", parser) for path in args.train]
    torch.manual_seed(0)
    return report(args, linear, steps)


def report(args: argparse.Namespace, linear: dict[str, Any] | None, steps: list[dict[str, Any]]) -> int:
    budget = harness.Budget(args.seconds)
    at = measured(args)
    ceilings = ("bf16_tflops", "fp8_tflops", "fp8_full_tflops", "bandwidth_gbs")
    shown = dict(zip(ceilings, (*(rate / 1e12 for rate in at[:3]), at.bandwidth / 1e9)))
    if args.attention_tflops:
        shown["attention_tflops"] = args.attention_tflops
    print("ceilings: " + ", ".join(f"{name} {value:.6g}" for name, value in shown.items()))
    sweep = [
        prediction(config, m, k, n, at)
        for config, m, k, n in itertools.product(harness.RECIPES, args.m, args.k, args.n)
    ]
    table = args.csv or (args.out.with_suffix(".csv") if args.out else None)
    if table is not None:
        write_csv(sweep, table)
        draw(sweep, table.with_suffix(".png"))
    predictions = checked(linear, at) if linear else []
    if linear:
        columns = ("config", "kernels", "m", "k", "n", "predicted_speedup", "measured_speedup", "error_pct")
        print(harness.show(predictions, columns))
    if predictions:
        errors = [abs(row["error_pct"]) for row in predictions]
        print(f"error of the prediction: median {statistics.median(errors):.1f}%, at most {max(errors):.1f}%")
    floors: list[dict[str, Any]] = []
    if args.attention_tflops:
        floors = step_floor.predicted(at, args.attention_tflops * 1e12, args.layers, args.batches)
        print(harness.show(floors, (*step_floor.COLUMNS[:-2], "floor_tps", "speedup_over_bf16")))
    if steps:
        floors += step_floor.floors(steps, at, args, budget)
        print(harness.show(floors, step_floor.COLUMNS))
    budget.print_left_out()
    results.save("roofline", [*floors, *predictions, *sweep], args, ceilings=shown, left_out=budget.left_out)
    if not linear and not steps:
        shortest = [row for row in sweep if row["m"] == args.m[-1] and row["k"] == row["n"]]
        print(harness.show(shortest, ("config", "m", "k", "n", "casts_us", "rescales_us", "predicted_speedup")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
