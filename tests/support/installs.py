"""titanlite as users get it: a clone, and a wheel in an environment of its own; and a user who types commands."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.runs import ROOT, environment


@dataclass(frozen=True)
class User:
    """Someone who types in ``folder``, with the environment ``env``."""

    folder: Path
    env: dict[str, str]

    def types(self, command: str) -> str:
        """Run a command line; return what it prints to stdout.

        Raises:
            AssertionError: its status is not 0; with the end of its output.
        """
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (command, done.stdout[-4000:], done.stderr[-4000:])
        return done.stdout


def clean_environment(home: Path, *programs: Path) -> dict[str, str]:
    """Return the environment of a new user: an empty home, a PATH with the folders ``programs`` in front, and the
    variables of this machine that say where packages are and how many threads to use."""
    home.mkdir(exist_ok=True)
    of_machine = ("PIP_", "UV_", "SSL_", "https_proxy", "http_proxy", "OMP_")
    kept = {k: v for k, v in os.environ.items() if k.startswith(of_machine)}
    # Without the environment that runs these tests: it has titanlite installed, a newcomer's has not.
    path = [p for p in os.environ["PATH"].split(":") if Path(p) != Path(sys.executable).parent]
    return {**kept, "HOME": str(home), "PATH": ":".join([*map(str, programs), *path]), "CUDA_VISIBLE_DEVICES": ""}


def make_clone(folder: Path) -> Path:
    """Clone what is committed here."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


def user_of_clone(folder: Path, **env: str) -> User:
    """In a clone that is set up, with an empty home, and with ``env`` beside what this process has: both folders are
    made in ``folder``. The clone uses this environment."""
    clone = make_clone(folder / "clone")
    programs = clone / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, module in (("titanlite", "titanlite.commands"), ("python", "")):
        start = f"-m {module}" if module else ""
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {start} "$@"\n')
        (programs / name).chmod(0o755)
    (folder / "home").mkdir()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    place = environment(HOME=str(folder / "home"), PATH=path, PYTHONPATH=str(clone), **env)
    del place["CONFIG_FILE"]
    return User(clone, place)


def make_wheel(folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT], check=True)
    (wheel,) = folder.glob("titanlite-*.whl")
    return wheel


def install_wheel(wheel: Path, venv: Path) -> Path:
    """Install a wheel into a new environment, and return the folder of its programs.

    The dependencies are those of this environment, by path: installing them once more would take minutes and show
    nothing.
    """
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    programs = venv / "bin"
    subprocess.run([programs / "python", "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    site = next((venv / "lib").glob("python3*/site-packages"))
    dependencies = [p for p in sys.path if p.endswith("site-packages")]
    (site / "deps.pth").write_text("\n".join(dependencies) + "\n")
    return programs
