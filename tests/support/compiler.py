"""Scripts that compile kernels, each for a GPU that need not be there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.runs import environment


def compiles(script: Path, target: str) -> None:
    """Run ``script``, which compiles its kernels for ``target``, in a process of its own: there is no way back from the
    interpreter in this one.

    Raises:
        AssertionError: it failed.
    """
    command = [sys.executable, "-W", "ignore", script, target]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compiled" in done.stdout
