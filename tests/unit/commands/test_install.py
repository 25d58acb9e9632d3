"""From nothing to a trained model: a bare clone in an empty home, and a wheel in a fresh environment."""

from __future__ import annotations

import json
import subprocess
import time
import zipfile
from pathlib import Path

import pytest

from tests.support.installs import User, clean_environment, install_wheel, make_clone, make_wheel
from tests.support.runs import TINY

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(1500)]


def test_a_bare_clone_trains_with_one_command(tmp_path: Path) -> None:
    clone = make_clone(tmp_path / "clone")
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
    wheel = make_wheel(tmp_path / "wheels")
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
    programs = install_wheel(wheel, tmp_path / "venv")
    outside = tmp_path / "outside"
    outside.mkdir()
    user = User(outside, clean_environment(tmp_path / "home", programs))
    options = {**TINY, "training.steps": 5, "job.dump_folder": "run"}
    user.types(f"titanlite {' '.join(f'--{key}={value}' for key, value in options.items())}")
    assert len((outside / "run" / "metrics.jsonl").read_text().splitlines()) == 5
    where = user.types("python -c 'import titanlite; print(titanlite.__file__)'")
    assert where.startswith(str(tmp_path / "venv"))
