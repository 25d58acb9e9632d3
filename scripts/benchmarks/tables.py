"""Fill the tables in the docs from the result files, and from the tests: what stands between ``<!-- name -->`` and
``<!-- /name -->``.

python scripts/benchmarks/tables.py            # writes them
python scripts/benchmarks/tables.py --check    # only says which are out of date, with status 1
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import counted_tables

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))
from tests.distributed.combinations import (  # noqa: E402
    EXPERT_VARIANTS,
    EXPERT_WAYS,
    VARIANTS,
    WAYS,
    composes,
    expert_cell,
    tried,
)

RESULTS = ROOT / "docs" / "benchmarks"
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def loss_parity(results: list[dict[str, Any]], prefixes: Sequence[str] = ("tensorwise", "rowwise")) -> list[list[str]]:
    """Return bf16, float32, and the configurations whose names begin with one of ``prefixes``."""
    rows = [["config", "final losses", "mean", "difference from bf16", "95% interval"]]
    for r in results:
        if r["config"] not in ("bf16", "float32") and not r["config"].startswith(tuple(prefixes)):
            continue
        losses = ", ".join(f"{loss:.4f}" for loss in r["final_loss"])
        low, high = r.get("interval_95_pct", (None, None))
        interval = "" if low is None else f"{low:+.3f}% to {high:+.3f}%"
        difference = "" if low is None else f"{r['difference_pct']:+.3f}%"
        rows.append([r["config"], losses, f"{r['mean_final_loss']:.4f}", difference, interval])
    return rows


def finetune(results: list[dict[str, Any]]) -> list[list[str]]:
    heads = ["", "loss of held-out answers", "mean", "below the pre-trained", "95% interval"]
    rows = [[*heads, "right", "normalized", "gain"]]
    for r in results:
        losses = ", ".join(f"{loss:.3f}" for loss in r["answer_loss"])
        right = [f"{100 * r[key]:.1f} +- {100 * r[f'{key}_stderr']:.1f}%" for key in ("accuracy", "accuracy_norm")]
        below = interval = gain = ""
        if "reduction_pct" in r:
            low, high = r["reduction_interval_95_pct"]
            below, interval = f"{r['reduction_pct']:.1f}%", f"{low:.1f}% to {high:.1f}%"
            gain = f"{100 * r['accuracy_gain']:+.1f} +- {100 * r['accuracy_gain_stderr']:.1f}"
        rows.append([r["config"], losses, f"{r['mean_answer_loss']:.3f}", below, interval, *right, gain])
    return rows


def memory_estimates(results: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["model", "GPUs", "batch", "config", "checkpointing", "loss", "published, GiB", "estimate, GiB", ""]]
    for r in results:
        if "published_gib" not in r:
            continue
        config = r["config"] + ("" if "model" in r["compile"] else ", eager")
        numbers = [f"{r['published_gib']:.2f}", f"{r['estimated_gib']:.2f}", f"{r['difference_pct']:+.1f}%"]
        rows.append(
            [r["model"], str(r["gpus"]), str(r["batch"]), config, r["activation_checkpoint"], r["loss"], *numbers]
        )
    return rows


def loss_chunks(results: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["", "loss", "1 chunk, GiB", "4 chunks", "16 chunks"]]
    figures: dict[tuple[str, str], list[str]] = {}
    for r in results:
        if "held_gib" in r:
            figures.setdefault(("output projection and loss alone", r["loss"]), []).append(f"{r['held_gib']:.2f}")
        elif "published_gib" not in r:
            run = f"step of {r['model']}, {r['gpus']} GPUs, batch {r['batch']}, {r['activation_checkpoint']}"
            figures.setdefault((run, r["loss"]), []).append(f"{r['estimated_gib']:.2f}")
    return rows + [[*names, *numbers] for names, numbers in figures.items()]


def accumulation(results: list[dict[str, Any]]) -> list[list[str]]:
    kinds = ["parameters", "optimizer state", "gradients", "unsharded gradients", "gathered parameters", "activations"]
    rows = [["microbatches", "reduced after each", "options", "peak, GiB", *kinds]]
    for r in (r for r in results if r["part"] == "estimate"):
        parts = [f"{r['at_peak_gib'].get(kind, 0.0):.2f}" for kind in kinds]
        options = ", ".join(f"`{option}`" for option in r["options"])
        each = "" if r["microbatches"] == 1 else "yes" if r["reduced"] == "microbatch" else "no"
        rows.append([str(r["microbatches"]), each, options, f"{r['peak_gib']:.2f}", *parts])
    return rows


def counted_accumulation(results: list[dict[str, Any]]) -> list[list[str]]:
    """Return what real processes held, and how much more that is than with one microbatch."""
    rows = [
        [
            "microbatches",
            "reduced after each",
            "a step allocates at most",
            "more than for one",
            "gradients of a process",
        ]
    ]
    counted = [r for r in results if r["part"] == "counted"]
    for r in counted:
        each = "" if r["microbatches"] == 1 else "yes" if r["reduced"] == "microbatch" else "no"
        more = r["peak_bytes"] - counted[0]["peak_bytes"]
        sizes = [f"{n / 1e6:,.2f} MB" for n in (r["peak_bytes"], more, r["gradients_bytes"])]
        rows.append([str(r["microbatches"]), each, *sizes])
    return rows


def finetune_memory(results: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["recipe", "microbatches", "checkpointing", "bfloat16, GiB", "float8, GiB"]]
    for bf16, float8 in zip(results[::2], results[1::2], strict=True):
        numbers = [f"{r['estimated_gib']:.1f}" for r in (bf16, float8)]
        rows.append([f"`{bf16['recipe']}`", str(bf16["microbatches"]), bf16["activation_checkpoint"], *numbers])
    return rows


def step_time(results: list[dict[str, Any]]) -> list[list[str]]:
    """Return every prediction against every published value."""
    rows = [["table", "run", "published tps", "predicted", "", "table left out", "published GiB", "predicted", ""]]
    for r in results:
        left_out = f"{r['left_out_error_pct']:+.1f}%" if r["fitted"] else "never fitted"
        cells = [f"{r['published_tps']:,.0f}", f"{r['all_tps']:,.0f}", f"{r['all_error_pct']:+.1f}%", left_out]
        memory = ["", "", ""]
        if "published_gib" in r:
            memory = [f"{r['published_gib']:.1f}", f"{r['gib']:.1f}", f"{r['memory_error_pct']:+.1f}%"]
        rows.append([r["table"], r["name"], *cells, *memory])
    return rows


def plan_cpu(results: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["flavor", "processes", "predicted", "the trainer's step", ""]]
    for r in results:
        times = [f"{r[key]:,.0f} ms" for key in ("predicted_ms", "step_ms")]
        rows.append([r["flavor"], str(r["processes"]), *times, f"{r['error_pct']:+.1f}%"])
    return rows


def plan_rankings(results: list[dict[str, Any]]) -> list[list[str]]:
    """Return for each published table, how many pairs of its runs are predicted in the published order."""
    rows = [
        ["table", "runs", "pairs that differ by more than 3%", "predicted in the published order", "table left out"]
    ]
    for r in results:
        if "pairs" in r:
            rows.append(
                [
                    r["config"],
                    str(len(r["published"])),
                    str(r["pairs"]),
                    str(r["pairs_agree"]),
                    str(r["left_out_agree"]),
                ]
            )
    return rows


def checkpoint_save(results: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["", "training is delayed by", "", "of it in waits", "", "held up for", ""]]
    for r in results:
        cells = []
        for key in ("delay", "wait", "held"):
            cells += [f"{r[f'{key}_s'] * 1e3:.0f} ms", f"{r[f'{key}_pct']:.1f}%"]
        rows.append([r["config"], *cells])
    return rows


def cpu_step(results: list[dict[str, Any]]) -> list[list[str]]:
    several = len({theirs.get("weights", "float32") for theirs in results[1::2]}) > 1
    rows = [["precision", "", "titanlite", "transformers", "ratio", "half of the pairs"]]
    rows[0] += ["weights there"] * several
    for ours, theirs in zip(results[::2], results[1::2], strict=True):
        low, high = ours["ratio_quartiles"]
        cells = [f"{r['step_ms']:.0f} ms" for r in (ours, theirs)]
        mode = "compiled" if ours["compile"] else "eager"
        ratio = f"{ours['ratio_to_transformers']:.3f}"
        rows.append([ours["config"], mode, *cells, ratio, f"{low:.3f} to {high:.3f}"])
        rows[-1] += [theirs["weights"]] if several else []
    return rows


def int8_layers(results: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["features", "", "bf16", "int8", "torchao's int8", "speed over bf16", "torchao's over bf16"]]
    rows[0] += ["matmuls alone, bf16", "int8", "casts alone"]
    by_shape: dict[tuple[int, int, bool], dict[str, dict[str, Any]]] = {}
    for r in results:
        if r["part"] == "layers":
            by_shape.setdefault((r["k"], r["n"], r["compile"]), {})[f"{r['system']} {r['config']}"] = r
    for (k, n, compiled), systems in by_shape.items():
        bf16, ours, theirs = (systems[name] for name in ("titanlite bf16", "titanlite int8", "torchao int8"))
        times = [f"{r['ms']:.1f} ms" for r in (bf16, ours, theirs)]
        ratios = [f"{r['ratio_to_bf16']:.2f}" for r in (ours, theirs)]
        parts = [f"{ours[part]:.1f} ms" for part in ("bf16_matmuls_ms", "int8_matmuls_ms", "casts_ms")]
        rows.append([f"{k} -> {n}", "compiled" if compiled else "eager", *times, *ratios, *parts])
    return rows


def int8_steps(results: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["model", "", "system", "tokens/s", "speed over bf16"]]
    for r in results:
        if r["part"] == "step":
            size, mode = f"{r['params'] / 1e6:.0f}M parameters", "compiled" if r["compile"] else "eager"
            name = f"{r['system']} {r['config']}"
            rows.append([size, mode, name, f"{r['tps']:,.0f}", f"{r['ratio_to_bf16']:.2f}"])
    return rows


def document_masks(results: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["sequence", "documents in it", "", "step without masks", "with masks", "ratio"]]
    for r in results:
        mode = "compiled" if r["compile"] else "eager"
        times = [f"{r[key]:,.0f} ms" for key in ("step_ms_without", "step_ms")]
        length = f"{r['seq_len']:,} tokens"
        rows.append([length, f"{r['documents_per_sequence']:.1f}", mode, *times, f"{r['ratio']:.2f}"])
    return rows


def moe_balance(results: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["", "largest share, each seed", "at equal load", "final loss, each seed", "against dense", "95% interval"]]
    for r in results:
        shares = ", ".join(f"{100 * share:.1f}%" for share in r.get("largest_share", []))
        equal = f"{100 * r['mean_share']:.2f}%" if "mean_share" in r else ""
        losses = ", ".join(f"{loss:.4f}" for loss in r["final_loss"])
        difference = ["", ""]
        if "difference_from_dense_pct" in r:
            low, high = r["interval_95_pct"]
            difference = [f"{r['difference_from_dense_pct']:+.2f}%", f"{low:+.2f}% to {high:+.2f}%"]
        rows.append([r["config"], shares, equal, losses, *difference])
    return rows


def moe_memory(results: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["model", "GPUs", "expert parallel", "peak", "with all tokens on one device", "the estimate took"]]
    for r in results:
        sizes = [f"{r[key]:.1f} GiB" for key in ("estimated_gib", "worst_gib")]
        rows.append([r["model"], f"{r['gpus']:,}", f"{r['expert_parallel']}", *sizes, f"{r['seconds']} s"])
    return rows


def plans(results: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["ranks", "plan of a first save", "by DCP's own planner", "plan of a later save"]]
    for r in results:
        first, dcp = (f"{r[key]:.2f} s" for key in ("first_s", "dcp_s"))
        rows.append([f"{r['ranks']:,}", first, dcp, f"{r['later_s'] * 1e3:.2f} ms"])
    return rows


def opening(results: list[dict[str, Any]]) -> list[list[str]]:
    rows = [
        ["ranks", "tensors", "read", "memory", "by DCP's reader", "its memory", "sent to each rank", "chosen by it"]
    ]
    for r in results:
        sizes = [f"{r[key] / 1e6:.0f} MB" for key in ("peak_bytes", "dcp_peak_bytes", "sent_bytes")]
        read, dcp, chosen = f"{r['read_s']:.2f} s", f"{r['dcp_s']:.2f} s", f"{r['chosen_s'] * 1e3:.0f} ms"
        rows.append([f"{r['ranks']:,}", f"{r['tensors']}", read, sizes[0], dcp, sizes[1], sizes[2], chosen])
    return rows


def agreement(results: list[dict[str, Any]]) -> list[list[str]]:
    given = [r for r in results if r["part"] == "agreement"]
    return [
        ["processes", *(f"{r['processes']}" for r in given)],
        ["one agreement", *(f"{r['agreement_s'] * 1e3:.1f} ms" for r in given)],
    ]


def weights(results: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["shards", "processes", "folder", "a process copies at most", "the disk delivers to all"]]
    for r in results:
        sizes = [f"{n / 1e6:,.1f} MB" for n in (r["bytes"], max(r["copied"]), r["of_disk"])]
        rows.append([r["shards"], f"{r['processes']}", *sizes])
    return rows


def corpus(results: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["start", "processes", "corpus", "documents", "until the slowest has opened it"]]
    for r in results:
        size = f"{r['bytes'] / 1e9:.1f} GB"
        rows.append([r["start"], f"{r['processes']}", size, f"{r['documents']:,}", f"{r['slowest_s']:.2f} s"])
    return rows


def time_budget(results: list[dict[str, Any]]) -> list[list[str]]:
    parts = list(dict.fromkeys(part for r in results for part in r["parts_ms"]))
    rows = [["config", "", *parts, "step"]]
    for r in results:
        shares = [f"{100 * r['parts_ms'].get(part, 0.0) / r['step_ms']:.0f}%" for part in parts]
        rows.append([r["config"], "compiled" if r["compile"] else "eager", *shares, f"{r['step_ms']:.0f} ms"])
    return rows


# By result file; after a slash, which of several tables of one.
TABLES: dict[str, Callable[[list[dict[str, Any]]], list[list[str]]]] = {
    "finetune": finetune,
    "loss_parity": loss_parity,
    "loss_parity_quantized/formats": partial(loss_parity, prefixes=("int8", "mxfp8")),
    "loss_parity_quantized/moments": partial(loss_parity, prefixes=("moments",)),
    "memory_estimates": memory_estimates,
    "memory_estimates/loss_chunks": loss_chunks,
    "finetune_memory": finetune_memory,
    "fast_files": counted_tables.fast_files,
    "step_time": step_time,
    "plan_rankings": plan_rankings,
    "plan_cpu": plan_cpu,
    "checkpoint_save": checkpoint_save,
    "cpu_step": cpu_step,
    "moe_speed": cpu_step,
    "moe_balance": moe_balance,
    "moe_memory": moe_memory,
    "compiled_block/rules": counted_tables.block_rules,
    "compiled_block": counted_tables.compiled_block,
    "compiled_block_kernels": counted_tables.compiled_block,
    "compiled_block_architectures": counted_tables.compiled_block_architectures,
    "int8_cpu/layers": int8_layers,
    "int8_cpu/steps": int8_steps,
    "int8_cpu_20M": int8_steps,
    "int8_cpu_narrow": int8_layers,
    "document_masks": document_masks,
    "accumulation/estimates": accumulation,
    "accumulation/counted": counted_accumulation,
    "thousand_ranks_plans": plans,
    "thousand_ranks_opening": opening,
    "thousand_ranks_seconds": agreement,
    "thousand_ranks_corpus": corpus,
    "thousand_ranks_weights": weights,
    "time_budget": time_budget,
    "float8_memory": counted_tables.float8_memory,
    "roofline_assumed/linears": counted_tables.predicted_linears,
    "roofline_assumed/steps": counted_tables.predicted_steps,
    "counted_step": counted_tables.counted_step,
    "whole_step": counted_tables.whole_step,
    "gather_casts": counted_tables.gather_casts,
}


def composition() -> list[list[str]]:
    """Return the combinations that the tests of parallelism try."""

    def cell(way: str, variant: str) -> str:
        return "yes" if tried(way, variant) else "(yes)" if composes(way, variant) else "refused"

    rows = [["", "float32", *VARIANTS]]
    return rows + [[way, "yes", *(cell(way, variant) for variant in VARIANTS)] for way in WAYS]


def expert_composition() -> list[list[str]]:
    """Return the combinations that the tests of models with experts try."""
    rows = [["", "float32", *EXPERT_VARIANTS]]
    return rows + [[way, *(expert_cell(way, variant) for variant in ("", *EXPERT_VARIANTS))] for way in EXPERT_WAYS]


FROM_TESTS: dict[str, Callable[[], list[list[str]]]] = {
    "composition": composition,
    "expert_composition": expert_composition,
}


def filled(text: str) -> str:
    """``text`` with its tables as the result files have them."""
    for name in [*TABLES, *FROM_TESTS]:
        opening, closing = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if opening not in text:
            continue
        about = ""
        if name in TABLES:
            content = json.loads((RESULTS / f"{name.split('/')[0]}.json").read_text(encoding="utf-8"))
            rows = TABLES[name](content["results"])
            where = f"{content['device']}, torch {content['torch']}"
            if "assumed" in name or name == "counted_step":
                where = "Assumed ceilings"
            about = f"\n{where}, {content['date']}: `{content['command']}`\n"
        else:
            rows = FROM_TESTS[name]()
        lines = ["| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
        before, after = text.split(opening)[0], text.split(closing)[1]
        text = before + opening + "\n".join(lines) + "\n" + about + closing + after
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    old = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        if filled(text) != text:
            old.append(path)
            if not args.check:
                path.write_text(filled(text), encoding="utf-8")
    print("\n".join(f"{'out of date' if args.check else 'filled'}: {path.relative_to(ROOT)}" for path in old))
    return int(args.check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
