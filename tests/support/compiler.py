"""Scripts that compile kernels, each for a GPU that need not be there."""

from __future__ import annotations

import runpy
import sys
import tempfile
from pathlib import Path

from tests.support import forks
from tests.support.runs import environment


def compiles(script: Path, target: str) -> None:
    """Run ``script``, which compiles its kernels for ``target``, in a process of its own: there is no way back from the
    interpreter in this one.

    Raises:
        AssertionError: it failed.
    """
    with tempfile.TemporaryDirectory(prefix="titanlite-test-") as scratch:
        output = Path(scratch, "output.txt")
        process = forks.start(forks.Place(environment(), forks.ROOT, output), _run, str(script), target)
        statuses, said = forks.join([process], timeout=300), output.read_text()
    assert statuses == [0], said
    assert "compiled" in said


def _run(script: str, target: str) -> None:
    sys.argv = [script, target]
    runpy.run_path(script, run_name="__main__")
