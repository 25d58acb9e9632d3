"""From nothing to a trained model: a bare clone in an empty home, and a wheel in a fresh environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.support.runs import ROOT, TINY

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(1500)]


def clean_environment(home: Path) -> dict[str, str]:
    """What a new user has: a PATH, and how packages are found on this machine."""
    home.mkdir()
    kept = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "UV_", "SSL_", "https_proxy", "http_proxy"))}
    # Without the environment that runs these tests: it has titanlite installed, a newcomer's has not.
    path = [p for p in os.environ["PATH"].split(":") if Path(p) != Path(sys.executable).parent]
    return {**kept, "HOME": str(home), "PATH": ":".join(path), "CUDA_VISIBLE_DEVICES": ""}


def test_a_bare_clone_trains_with_one_command(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    env = clean_environment(tmp_path / "home")
    command = [str(clone / "run_train.sh")]
    first = subprocess.run([*command, "--help"], env=env, cwd=clone, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert "installing titanlite" in first.stderr
    start = time.monotonic()
    first_step = None
    output = []
    with subprocess.Popen(
        command, env=env, cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            output.append(line)
            if first_step is None and "step:" in line:
                first_step = time.monotonic() - start
    seconds = time.monotonic() - start
    assert run.returncode == 0, "".join(output)
    assert "installing" not in "".join(output)  # never twice
    assert first_step is not None
    assert first_step < 12
    rows = [json.loads(line) for line in (clone / "outputs" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] - rows[-1]["loss"] > 3
    assert seconds < 180
    assert (clone / "outputs" / "tb").is_dir()
    status = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True)
    assert status.stdout == ""  # a run leaves nothing that git would want


def test_a_wheel_trains_outside_the_clone(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", wheels, ROOT], check=True)
    (wheel,) = wheels.glob("titanlite-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "titanlite/compare/page.html",
        "titanlite/train_configs/debug_model.toml",
        "titanlite/train_configs/titanlite.schema.json",
        "titanlite/train_configs/finetune/phi_4_hellaswag_float8.toml",
        "titanlite/data/assets/tokenizer.json",
        "titanlite/models/llama3/spec.py",
    ):
        assert name in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"titanlite"}
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python = venv / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    # The dependencies, by path: installing them once more would take minutes and show nothing.
    site = next((venv / "lib").glob("python3*/site-packages"))
    deps = [p for p in sys.path if p.endswith("site-packages")]
    (site / "deps.pth").write_text("\n".join(deps) + "\n")
    outside = tmp_path / "outside"
    outside.mkdir()
    options = {**TINY, "training.steps": 5, "job.dump_folder": "run"}
    run = subprocess.run(
        [venv / "bin" / "titanlite", *(f"--{key}={value}" for key, value in options.items())],
        env=clean_environment(tmp_path / "home"),
        cwd=outside,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert len((outside / "run" / "metrics.jsonl").read_text().splitlines()) == 5
    where = subprocess.run(
        [python, "-c", "import titanlite; print(titanlite.__file__)"],
        cwd=outside,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(venv))
