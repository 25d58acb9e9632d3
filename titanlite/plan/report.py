"""A plan as text, and as JSON."""

from __future__ import annotations

import json
import shlex
from typing import Any

from titanlite.plan.layout_memory import ROOM
from titanlite.plan.layouts import Layout, Plan

_DAY = 86400


def row(plan: Plan, layout: Layout, tokens: float, price: float | None) -> dict[str, Any]:
    """Return the prediction of a layout for ``tokens`` in all, at ``price`` for an hour of a device."""
    seconds = tokens / (layout.tps_per_device * plan.devices)
    hours = seconds / 3600 * plan.devices
    return {
        "options": layout.options,
        "fits": layout.fits,
        "tps_per_device": layout.tps_per_device,
        "mfu_pct": layout.mfu_pct(plan.model),
        "memory_gib": layout.memory.total,
        "memory_parts_gib": layout.memory._asdict(),
        "worst_memory_gib": layout.worst_gib,
        "step_time_s": layout.parts.seconds,
        "step_parts_s": layout.parts._asdict(),
        "exposed_communication_s": layout.parts.exposed,
        "tokens_per_step": layout.work.tokens_per_step,
        "days": seconds / _DAY,
        "device_hours": hours,
        "cost": None if price is None else hours * price,
    }


def dump(plan: Plan, tokens: float, price: float | None) -> str:
    """Return the plan as one JSON object."""
    about = {"model": plan.model.about, "device": plan.device.name, "devices": plan.devices, "tokens": tokens}
    counts = {"tried": plan.tried, "refused": plan.refused, "too_large": plan.too_large}
    layouts = [row(plan, layout, tokens, price) for layout in plan.layouts]
    return json.dumps({**about, **counts, "layouts": layouts}, indent=2)


def describe(plan: Plan, tokens: float, price: float | None) -> str:
    """Format the plan for printing."""
    lines = [
        f"{plan.model.about} on {plan.devices} x {plan.device.name}: {plan.tried:,} layouts, {plan.refused:,} refused, "
        f"{plan.too_large:,} too large for {ROOM:.0%} of {plan.device.memory_gib:g} GiB; predicted, not measured"
    ]
    if not plan.layouts:
        return "\n".join([*lines, "    the trainer would refuse all of them"])
    if not plan.layouts[0].fits:
        lines.append("    none fits; these need the least memory:")
    # "worst" is for expert parallelism: if all tokens choose experts of one device.
    heads = "tps/device", "mfu", "memory GiB", "worst GiB", "step s", "exposed s", "days", "device-hours", "cost"
    table = [["", *heads, "options"]]
    for number, layout in enumerate(plan.layouts, 1):
        values = row(plan, layout, tokens, price)
        worst, cost = values["worst_memory_gib"], values["cost"]
        table.append(
            [
                str(number),
                f"{values['tps_per_device']:,.0f}",
                f"{values['mfu_pct']:.1f}%",
                f"{values['memory_gib']:.1f}",
                "" if worst is None else f"{worst:.1f}",
                f"{values['step_time_s']:.3f}",
                f"{values['exposed_communication_s']:.3f}",
                f"{values['days']:,.2f}",
                f"{values['device_hours']:,.0f}",
                "" if cost is None else f"{cost:,.0f}",
                arguments(layout),
            ]
        )
    if not any(cells[4] for cells in table[1:]):
        table = [cells[:4] + cells[5:] for cells in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        right = "  ".join(cell.rjust(width) for cell, width in zip(cells[:-1], widths, strict=False))
        lines.append(f"    {right}  {cells[-1]}")
    return "\n".join(lines)


def explain(plan: Plan, number: int) -> str:
    """Return where the milliseconds and the GiB of layout ``number``, from 1, go."""
    layout = plan.layouts[number - 1]
    whole, memory = layout.parts.seconds, layout.memory.total
    lines = [f"layout {number}: {arguments(layout) or 'as configured'}", f"    a step: {whole * 1e3:,.1f} ms"]
    for name, seconds in sorted(layout.parts._asdict().items(), key=lambda part: -part[1]):
        if seconds:
            lines.append(f"        {name:<14} {seconds * 1e3:12,.1f} ms  {100 * seconds / whole:5.1f}%")
    lines.append(f"    memory: {memory:.2f} GiB")
    lines += [f"        {name:<14} {gib:12.2f} GiB" for name, gib in layout.memory._asdict().items()]
    if layout.worst_gib is not None:
        lines.append(f"    memory if all tokens choose experts of one device: {layout.worst_gib:.2f} GiB")
    return "\n".join(lines)


def arguments(layout: Layout) -> str:
    """Return the options of a layout as arguments of the command line."""
    return shlex.join(f"--{name}={_value(value)}" for name, value in layout.options.items())


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else ",".join(value) if isinstance(value, list) else str(value)
