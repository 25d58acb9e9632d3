"""The summary of a run of scripts/gpu_suite.sh, for people: ``suite_summary.py OUT RAN`` writes OUT/summary.txt from
the result files in OUT and from RAN, the suite's own list (section, outcome, seconds, detail, between tabs).

The targets are ratios of one run on one H100 or H200. Of ``linear.json`` those rows are read that are ours, compiled,
with Triton's kernels, which are the default, by ``config``, ``m``, ``k``, ``n`` and ``speedup_over_bf16``; of
``casts.json`` by ``system`` and ``of_copy``, the share of a copy's bandwidth; of ``roofline.json`` by
``step_of_floor``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import harness

Row = dict[str, Any]


class Target(NamedTuple):
    """``value`` is sought in the rows of the files ``sources``, in this order, that ``where`` holds for; of several the
    worst counts."""

    measure: str
    bound: float
    value: str
    sources: tuple[str, ...]
    where: Callable[[Row], bool]
    at_most: bool = False


def _is(**wanted: Any) -> Callable[[Row], bool]:
    return lambda row: all(row.get(key) == value for key, value in wanted.items())


def _ours(config: str, compile: bool = True) -> Callable[[Row], bool]:
    return _is(system="titanlite", config=config, compile=compile)


_RECIPES = {"tensorwise": 1.30, "rowwise": 1.25, "rowwise_with_gw_hp": 1.20}
TARGETS = (
    *(
        Target(f"{config} over torchtitan+torchao", bound, "speedup_over_peer", ("peers",), _ours(config))
        for config, bound in (("bf16", 1.05), ("tensorwise", 1.10), ("rowwise", 1.20))
    ),
    *(
        Target(f"{recipe} over our bf16, compiled", bound, "speedup_over_bf16", ("train", "peers"), _ours(recipe))
        for recipe, bound in _RECIPES.items()
    ),
    *(
        Target(
            f"linear, rowwise, 8192 x {k} x {n}, over bf16",
            bound,
            "speedup_over_bf16",
            ("linear",),
            _is(system="titanlite", config="rowwise", compile=True, kernels="triton", m=8192, k=k, n=n),
        )
        for k, n, bound in ((4096, 4096, 1.50), (4096, 14336, 1.65))
    ),
    Target("quantization kernels, of copy bandwidth", 0.80, "of_copy", ("casts",), _is(system="titanlite")),
    *(
        Target(f"{recipe}, peak memory over bf16's", 1.0, "memory_over_bf16", ("train", "peers"), _ours(recipe), True)
        for recipe in _RECIPES
    ),
    *(
        Target(f"{recipe} over our bf16, eager", 1.10, "speedup_over_bf16", ("eager",), _ours(recipe, compile=False))
        for recipe in ("tensorwise", "rowwise")
    ),
    Target("whole step, of the floor", 0.80, "step_of_floor", ("roofline",), lambda row: True),
)

_NAMES = (  # of a row's case
    *("system", "config", "kernels", "compile", "kept", "batch", "kernel", "scales", "dtype", "fast_accum", "gemm"),
    *("m", "k", "n"),
)


def judged(target: Target, files: dict[str, list[Row]]) -> Row:
    row: Row = {"measure": target.measure, "target": f"{'<=' if target.at_most else '>='} {target.bound:.2f}"}
    for source in target.sources:
        rows = [r for r in files.get(source, []) if target.where(r) and r.get(target.value) is not None]
        if target.value == "speedup_over_peer":
            rows = [r for r in rows if r["same_computation"]]
        values = [r[target.value] for r in rows if "wrong" not in str(r.get("failed"))]
        if values:
            worst = max(values) if target.at_most else min(values)
            met = worst <= target.bound if target.at_most else worst >= target.bound
            return {**row, "found": f"{worst:.3f}", "": "met" if met else "MISSED", "from": f"{source}.json"}
    return {**row, "found": "", "": "not measured", "from": ""}


def failures(files: dict[str, list[Row]]) -> list[str]:
    """Return the reasons of rows that failed, or were left out; each reason once, with the first case."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for name, rows in files.items():
        for row in rows:
            said = row.get("failed") or []
            reasons = [said] if isinstance(said, str) else [*said]
            if row.get("same_computation") is False:
                reasons.append("the two systems did not compute the same: their ratio is void")
            for reason in reasons:
                case = ", ".join(f"{key} {row[key]}" for key in _NAMES if key in row)
                by_reason.setdefault((name, reason), []).append(case)
    others = {key: f" (and {len(cases) - 1} others)" if len(cases) > 1 else "" for key, cases in by_reason.items()}
    return [f"{name}: {cases[0]}{others[name, reason]}: {reason}" for (name, reason), cases in by_reason.items()]


def summary(out: Path, ran: Path) -> str:
    contents = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))}
    files: dict[str, list[Row]] = {name: content["results"] for name, content in contents.items()}
    lines = [line.split("\t") for line in ran.read_text(encoding="utf-8").splitlines()]
    about: Row = next(iter(contents.values()), {})
    head = ", ".join(f"{key} {about[key]}" for key in ("device", "torch", "triton", "commit", "date") if key in about)
    parts = [head or "no benchmark left a result"]
    if any(content.get("toy") for content in contents.values()):
        parts.append("Toy sizes on the CPU: the figures below say nothing about speed.")
    sections = [dict(zip(("section", "outcome", "seconds", "detail"), (*line[:3], line[3][:100]))) for line in lines]
    parts.append(harness.show(sections, ("section", "outcome", "seconds", "detail")))
    parts.append(
        harness.show([judged(target, files) for target in TARGETS], ("measure", "target", "found", "", "from"))
    )
    if said := failures(files):
        parts.append("\n".join(["Failed or left out in the result files:", *(f"  {line}" for line in said)]))
    return "\n\n".join(parts) + "\n"


def main() -> int:
    out, ran = map(Path, sys.argv[1:])
    text = summary(out, ran)
    (out / "summary.txt").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
