"""The tables of what is counted or computed without a GPU, for tables.py: a result's rows in, a table's cells out."""

from __future__ import annotations

from typing import Any


def compiled_block(results: list[dict[str, Any]]) -> list[list[str]]:
    heads = ("tokens", "recomputed", "config", "system", "casts by", "fused by")
    counts = ("launches", "mb", "sectors_mb", "kept_mib")
    rows = [[*heads, "launches", "MB", "in sectors", "MiB kept", "of its peer's MB"]]
    peers = {(row["tokens"], row["ac"], row["config"]): row["mb"] for row in results if row["system"] != "titanlite"}
    for row in results:
        casts = {"triton": "own kernels", "inductor": "the compiler"}.get(row["kernels"], "")
        fusion = "block rules" if row["fusion"] == "block" else "the compiler"
        figures = [f"{row[key]:,.0f}" for key in counts]
        peer = peers.get((row["tokens"], row["ac"], row["config"])) if row["system"] == "titanlite" else None
        ratio = "" if peer is None else f"{row['mb'] / peer:.2f}"
        rows.append([f"{row['tokens']:,}", row["ac"], row["config"], row["system"], casts, fusion, *figures, ratio])
    return rows


def block_rules(results: list[dict[str, Any]]) -> list[list[str]]:
    """The blocks of the fewest tokens, without the block rules and with them. The shares of the peer's are the larger
    of plain bytes and of sectors."""
    rows = [["config", "recomputed", "peer", "its MB", "MB without block rules", "with", "share of the peer's"]]
    rows[0] += ["share with matmuls", "launches", "the peer's", "MiB kept", "the peer's"]
    cases = {(r["system"], r["fusion"], r["config"], r["ac"]): r for r in results if r["tokens"] == 8192}
    for (system, fusion, config, ac), ours in cases.items():
        peers = (cases.get((name, "compiler", config, ac)) for name in ("torchao", "torchtitan"))
        peer = next((row for row in peers if row), None)
        if (system, fusion) != ("titanlite", "block") or peer is None:
            continue
        without = cases["titanlite", "compiler", config, ac]
        share = max(ours[key] / peer[key] for key in ("mb", "sectors_mb"))
        whole = (ours["mb"] + ours["matmuls_mb"]) / (peer["mb"] + peer["matmuls_mb"])
        moved = [f"{row['mb']:,.0f}" for row in (peer, without, ours)]
        rest = [f"{row[key]:,.0f}" for key in ("launches", "kept_mib") for row in (ours, peer)]
        rows.append([config, ac, peer["system"], *moved, f"{share:.2f}", f"{whole:.2f}", *rest])
    return rows


def compiled_block_architectures(results: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["GPU", "recomputed", "config", "launches", "MB", "in sectors", "of torchao's MB", "of its launches"]]
    peers = {(r["architecture"], r["ac"], r["config"]): r for r in results if r["system"] != "titanlite"}
    for r in (r for r in results if r["system"] == "titanlite"):
        peer = peers.get((r["architecture"], r["ac"], r["config"]))
        figures = [f"{r[key]:,.0f}" for key in ("launches", "mb", "sectors_mb")]
        ratios = ["", ""] if peer is None else [f"{r[key] / peer[key]:.2f}" for key in ("mb", "launches")]
        rows.append([r["architecture"], r["ac"], r["config"], *figures, *ratios])
    return rows


def predicted_linears(results: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["M", "K", "N", "config", "bf16", "float8", "of that casts", "speed over bf16"]]
    for r in results:
        if "predicted_speedup" in r:
            times = [f"{r[key]:.0f} us" for key in ("bf16_us", "float8_us", "casts_us")]
            size = [str(r[key]) for key in ("m", "k", "n")]
            rows.append([*size, r["config"], *times, f"{r['predicted_speedup']:.2f}"])
    return rows


def counted_step(results: list[dict[str, Any]]) -> list[list[str]]:
    parts = {"matmul_s": "matmuls", "attention_s": "attention", "block_s": "other kernels of blocks", "ends_s": "ends"}
    head = ["tokens", "recomputed", "config", *parts.values(), "step", "speed over the peer", "over bf16"]
    rows = [head]
    for r in (r for r in results if r["system"] == "titanlite"):
        times = [f"{1e3 * r[key]:.0f} ms" for key in (*parts, "step_s")]
        over = [f"{r[key]:.2f}" if r.get(key) else "" for key in ("over_peer", "over_bf16")]
        rows.append([f"{r['tokens']:,}", r["ac"], r["config"], *times, *over])
    return rows


def whole_step(results: list[dict[str, Any]]) -> list[list[str]]:
    parts = ("blocks", "casts", "fsdp", "ends", "optimizer")
    rows = [["config", "gathered in", "GPUs", *(f"{part}, GB" for part in parts), "in all, GB", "launches"]]
    for r in results:
        moved = [f"{r[f'{part}_mb'] / 1e3:.1f}" for part in parts]
        rows.append([r["config"], r["gathered"], str(r["gpus"]), *moved, f"{r['mb'] / 1e3:.0f}", f"{r['launches']:,}"])
    return rows


def gather_casts(results: list[dict[str, Any]]) -> list[list[str]]:
    casts = {"shard": "a shard", "again": "a gathered weight"}
    kinds = {"": "by the kernels", "plain_": "by plain operations", "compiled_": "compiled"}
    rows = [["cast", "config", "ideal", *kinds.values(), *(f"launches {kind}" for kind in kinds.values())]]
    for r in results:
        moved = [f"{r[key]:.2f}" if key in r else "" for key in ("ideal", "counted", "plain", "compiled")]
        launches = [str(r.get(f"{kind}launches", "")) for kind in kinds]
        rows.append([casts[r["cast"]], r["config"], *moved, *launches])
    return rows


def predicted_steps(results: list[dict[str, Any]]) -> list[list[str]]:
    parts = {
        "matmul_s": "matmuls",
        "attention_s": "attention",
        "memory_s": "memory",
        "casts_s": "casts",
        "floor_s": "step",
    }
    rows = [["batch", "config", *parts.values(), "of that again", "tokens/s", "speed over bf16"]]
    for r in results:
        if "floor_s" in r:
            again = {key: r.get(key.replace("_s", "_again_s"), 0.0) for key in parts}
            times = [f"{1e3 * (r[key] + again[key]):.0f} ms" for key in parts] + [f"{1e3 * sum(again.values()):.0f} ms"]
            rows.append(
                [str(r["batch"]), r["config"], *times, f"{r['floor_tps']:,.0f}", f"{r['speedup_over_bf16']:.2f}"]
            )
    return rows


def float8_memory(results: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["", "checkpointing", "config", "kept per layer", "of bf16's", "peak of the step", "of bf16's"]]
    for r in results:
        kept = ["", ""]
        if "kept_per_layer_mib" in r:
            kept = [f"{r['kept_per_layer_mib']:.0f} MiB", f"{r['kept_over_bf16']:.3f}"]
        peak = [f"{r['estimated_peak_gib']:.2f} GiB", f"{r['peak_over_bf16']:.3f}"]
        mode = "compiled" if r["compile"] else "eager"
        rows.append([mode, r["activation_checkpoint"], r["config"], *kept, *peak])
    return rows


def fast_files(results: list[dict[str, Any]]) -> list[list[str]]:
    """Return the packaged files, each with the fast one after it."""
    rows = [["file", "GPUs", "config", "checkpointing", "planned, GiB", "estimated, GiB"]]
    for r in results:
        mode = r["activation_checkpoint"] + (" (auto)" if r["auto"] else "")
        memory = [f"{r[key]:.2f}" for key in ("planned_gib", "estimated_gib")]
        rows.append([f"`{r['file']}`", str(r["gpus"]), r["config"], mode, *memory])
    return rows
