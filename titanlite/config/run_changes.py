"""``changes.jsonl`` of a run folder: the options that a run which went on had in its earlier steps.

``config.toml`` has the latest options alone. Each row has a ``step``, and ``options``: those that are others after it,
each with its value before and after, as in TOML.
"""

from __future__ import annotations

import json
from pathlib import Path

from titanlite.config.run_config import CHANGES

Changes = dict[str, tuple[str, str]]  # by option: the value before, and after

_MOST_BYTES = 1 << 20


def read_changes(folder: Path) -> dict[int, Changes]:
    """Return the changes of a run by the step after which they were made, ascending. Lines that are no rows are left
    out; the folder may be from somebody else."""
    file = folder / CHANGES
    changes: dict[int, Changes] = {}
    try:
        if not file.is_file() or file.stat().st_size > _MOST_BYTES:  # a pipe would block, a device has no end
            return {}
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            row = json.loads(line)
            changes[int(row["step"])] = {f"{name}": (f"{old}", f"{new}") for name, (old, new) in row["options"].items()}
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
            continue
    return dict(sorted(changes.items()))


def keep_changes(folder: Path, step: int, changes: Changes) -> None:
    """Write that a run goes on after ``step`` with ``changes`` to the options that its folder had until now.

    Changes after later steps are undone, since these steps are made again.

    Raises:
        OSError: the file cannot be written.
    """
    earlier = read_changes(folder)
    changes = dict(changes)
    for later in sorted((s for s in earlier if s >= step), reverse=True):
        for name, (old, new) in earlier.pop(later).items():
            changes[name] = (old, changes.get(name, (old, new))[1])
    if changes := {name: values for name, values in changes.items() if values[0] != values[1]}:
        earlier[step] = changes
    if not earlier and not (folder / CHANGES).exists():
        return
    rows = (json.dumps({"step": after, "options": options}) + "\n" for after, options in earlier.items())
    partial = folder / f".{CHANGES}.partial"
    partial.write_text("".join(rows), encoding="utf-8")
    partial.rename(folder / CHANGES)


def options_before(changes: dict[int, Changes]) -> dict[tuple[int, int], dict[str, str]]:
    """Return the options of earlier steps that are not those of the end, by the first and last of these steps."""
    before: dict[tuple[int, int], dict[str, str]] = {}
    ends: dict[str, int] = {}
    for step, options in changes.items():
        for name, (old, _) in options.items():
            before.setdefault((ends.get(name, 0) + 1, step), {})[name] = old
            ends[name] = step
    return before
