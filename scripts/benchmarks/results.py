"""The result files of the benchmarks: one JSON object, in the same form for all of them."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def device(kind: str = "cuda") -> str:
    """The device as the result files name it: the GPU, where there is one and ``kind`` is not "cpu"."""
    if kind != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def commit() -> str | None:
    """The commit that is measured: TITANLITE_COMMIT, for copies without .git, or git's answer; None without either.
    "-dirty" follows where a file was changed since, other than in docs/, where results of other benchmarks are."""
    if given := os.environ.get("TITANLITE_COMMIT"):
        return given
    try:
        name = _git("rev-parse", "--short=8", "HEAD")
        return f"{name}-dirty" if _git("diff", "HEAD", "--name-only", "--", ":/", ":(top,exclude)docs") else name
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git, or no repository
        return None


def _git(*command: str) -> str:
    done = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def version(package: str) -> str | None:
    """The installed version of ``package``; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def save(
    name: str, results: list[dict[str, Any]], args: argparse.Namespace, kind: str | None = None, **about: Any
) -> None:
    """:func:`write` to ``args.out`` if it is given, for the device ``kind``, or ``args.device`` where the benchmark has
    that option; there ``toy`` says whether sizes were those of the CPU."""
    if args.out is None:
        return
    if "device" in args:
        about = {"toy": args.device == "cpu", **about}
        kind = args.device
    write(name, results, args.out, kind or "cuda", **about)


def write(name: str, results: list[dict[str, Any]], output: Path, kind: str = "cuda", **about: Any) -> None:
    """Write ``results`` with what they depend on: date, commit, device, versions and the command.

    Args:
        kind: of the device, as of :func:`device`.
        about: what else is to be known of all results.
    """
    content = {
        "name": name,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit(),
        "device": device(kind),
        "torch": torch.__version__,
        "triton": version("triton"),
        "command": " ".join(["python", f"scripts/benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        **about,
        "results": results,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: a benchmark that is stopped leaves what it wrote before.
    unfinished = output.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(output)
