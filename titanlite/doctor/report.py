"""The examination of a machine as text."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from titanlite.config.number_formats import NUMBER_FORMATS
from titanlite.doctor.examine import Examination
from titanlite.doctor.probe import BASE
from titanlite.doctor.verdict import Row
from titanlite.metrics.report import table, titanlite_command


def describe(examination: Examination, argv: Sequence[str]) -> str:
    """Format the examination for printing. ``argv`` are the trainer's arguments."""
    lines = [table("this machine", examination.machine), "features"]
    names = [(feature.name, feature.option) for feature in examination.features]
    widths = [max(map(len, column)) for column in zip(*names, strict=True)]
    for feature in examination.features:
        there = "yes" if feature.there else "no "
        name, option = (text.ljust(width) for text, width in zip(feature[:2], widths, strict=True))
        lines.append(f"    {there}  {name}  {option}  needs {feature.needs}")
    lines += _ceilings(examination)
    lines += _layers(examination.rows)
    lines += _steps(examination.rows)
    failed = [f"{row['what']}: {row['why']}" for row in examination.rows if row["kind"] == "failed"]
    for reason in [*failed, *([examination.unfinished] if examination.unfinished else [])]:
        lines.append(f"    not measured: {reason}")
    lines += [f"which format, for {examination.model}", *(f"    {reason}" for reason in examination.verdict.reasons)]
    lines.append(f"    {conclusion(examination)}")
    lines += [f"    attention: {examination.attention}", "what to type", f"    {command(examination, argv)}"]
    return "\n".join(lines)


def conclusion(examination: Examination) -> str:
    """Return the verdict in one sentence."""
    verdict = examination.verdict
    if verdict.gain is None:
        return "no step was measured, so there is no advice on formats: high precision is safe"
    name = verdict.options.get("model.converters")
    if name is None:
        return "no format makes a step faster here: train in high precision"
    return f"{name} should make a step {verdict.gain:.2f} times as fast as high precision"


def command(examination: Examination, argv: Sequence[str]) -> str:
    """Return the line to type."""
    options = [f"--{key}={value}" for key, value in examination.verdict.options.items()]
    converters = " ".join(part for part in (*argv, *options) if part.startswith("--model.converters"))
    unused = tuple(f"--{n.name}." for n in NUMBER_FORMATS if n.name not in converters)  # the trainer would refuse them
    given = [argument for argument in argv if not argument.startswith(unused)]
    return shlex.join([*shlex.split(titanlite_command()), "train", *given, *options])


def _ceilings(examination: Examination) -> Iterator[str]:
    yield "measured ceilings"
    for row in examination.rows:
        if row["kind"] == "copy":
            yield f"    copy           {row['bytes_per_s'] / 1e9:10,.1f} GB/s, read and written"
        elif row["kind"] == "matmul":
            note = ", emulated" if row["emulated"] else ""
            yield f"    {row['format']:<14} {row['flops_per_s'] / 1e9:10,.0f} GFLOP/s, matmul without casts{note}"
    reduced = examination.all_reduce
    if reduced is not None and "why" in reduced:
        yield f"    all-reduce     not measured among {reduced['processes']} processes: {reduced['why']}"
    elif reduced is not None:
        yield (
            f"    all-reduce     {reduced['bytes_per_s'] / 1e9:10,.2f} GB/s sent by each of {reduced['processes']} "
            f"processes ({reduced['backend']}), {reduced['latency_s'] * 1e6:,.0f} us for a few numbers"
        )


def _layers(rows: Sequence[Row]) -> Iterator[str]:
    layers = [row for row in rows if row["kind"] == "layer"]
    if layers:
        tokens = layers[0]["tokens"]
        yield f"linear layers, forward and backward of {tokens:,} tokens: ms, and the speed over high precision"
        for row in layers:
            ratio = "" if row["format"] == BASE else f"{row['speedup']:6.2f}x" + (" emulated" * row["emulated"])
            k, n = row["features"]
            mode = "compiled" if row["compiled"] else "eager"
            yield f"    {mode:<8}  {row['layer']:<16} {k:>6} -> {n:<6}  {row['format']:<14} {row['ms']:9.3f}{ratio}"


def _steps(rows: Sequence[Row]) -> Iterator[str]:
    steps = [row for row in rows if row["kind"] == "step"]
    if steps:
        yield "training steps"
    for row in steps:
        mode = "compiled" if row["compiled"] else "eager"
        blocks = f"{row['blocks']} of {row['of']} blocks"
        kept = f", without {', '.join(row['filter_fqns'])}" if row["filter_fqns"] else ""
        ratio = "" if row["format"] == BASE else f"{row['speedup']:6.2f}x"
        yield f"    {mode:<8}  {blocks}, {row['tokens']:,} tokens  {row['format']:<14} {row['ms']:9.1f} ms{ratio}{kept}"
