"""The commands of the README and of the tutorial, run as they are typed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.docs import blocks_of
from tests.support.runs import ROOT, environment

pytestmark = [pytest.mark.long, pytest.mark.alone, pytest.mark.timeout(3600)]

# What they need is not on a machine without GPUs, accounts or a network.
NEEDS_MORE = ("llama3_8b", "llama3_70b", "tokenizer download", "scripts/test.sh")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone of what is committed, which uses the environment of these tests, and has files that readers have."""
    folder = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    scripts = folder / ".venv" / "bin"
    scripts.mkdir(parents=True)
    for name, module in (("titanlite", "titanlite.commands"), ("python", "")):
        start = f"-m {module}" if module else ""
        (scripts / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {start} "$@"\n')
        (scripts / name).chmod(0o755)
    (folder / "my.toml").write_text('base = "train_configs/debug_model.toml"\n')
    notes = tmp_path / "home" / "notes"
    notes.mkdir(parents=True)
    (notes / "notes.txt").write_text("".join(f"On day {day} it rained for {day % 7} hours.\n" for day in range(30_000)))
    return folder


def typed(page: str) -> list[str]:
    """The command lines of a page."""
    lines = []
    for block in blocks_of(ROOT / page):
        if block.language == "bash":
            code = block.code.replace("\\\n", " ")
            lines += [line for line in code.splitlines() if shlex.split(line, comments=True)]
    return lines


def run(command: str, clone: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = environment(HOME=str(clone.parent / "home"), PATH=path, PYTHONPATH=str(clone), NO_COLOR="1")
    del env["CONFIG_FILE"]
    done = subprocess.run(["bash", "-c", command], cwd=clone, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stdout[-4000:], done.stderr[-4000:])
    return done


def test_the_tutorial(clone: Path) -> None:
    """From the first run to an exported model; what it says of them is so."""
    outputs = {command: run(command, clone).stdout for command in typed("docs/tutorial.md")}
    compared = next(text for command, text in outputs.items() if " compare " in command)
    assert "95% interval" in " ".join(compared.split())
    for file in ("compare.html", "compare.png", "exported/model.safetensors", "exported/README.md"):
        assert (clone / "runs" / file).is_file()
    bits = [
        float(re.findall(r"bits per byte +([\d.]+)", text)[0])
        for command, text in outputs.items()
        if " evaluate " in command
    ]
    first, tuned, exported = bits
    assert tuned < first
    assert exported == pytest.approx(tuned, rel=0.02)


def test_the_readme(clone: Path) -> None:
    """From top to bottom, no step failing."""
    commands = [command for command in typed("README.md") if not any(word in command for word in NEEDS_MORE)]
    assert len(commands) >= 9
    for command in commands:
        run(command, clone)
