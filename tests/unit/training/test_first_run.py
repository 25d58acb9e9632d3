"""A first run keeps its model, and its last words are commands that work."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.support.runs import LITTLE, environment, forked_run, run_trainer
from titanlite.checkpoint.folder import latest_checkpoint


def test_a_run_without_checkpoints_keeps_its_model_and_the_next_one_moves_it(tmp_path: Path) -> None:
    first = run_trainer(tmp_path, training__steps=2, checkpoint__keep_model="true")
    assert first.status == 0, first.output
    assert latest_checkpoint(first.folder) == first.folder / "model" / "step-2"
    assert "run it again" not in first.output
    second = run_trainer(tmp_path, training__steps=1)
    assert second.status == 0, second.output
    assert "what to do next" not in second.output
    assert not (first.folder / "model").exists()
    (kept,) = first.folder.glob("earlier/*/model/step-2/checkpoint.json")
    assert latest_checkpoint(kept.parents[2]) == kept.parent


def typed(command: str, folder: Path) -> str:
    """Return the output of a command line in a shell."""
    done = subprocess.run(command, shell=True, env=environment(), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


@pytest.mark.slow
def test_the_commands_at_the_end_work_as_printed(tmp_path: Path) -> None:
    """Also after a run on two processes, of which a comparison would notice if the next ones had one."""
    run = run_trainer(tmp_path, 2, name="a run", **LITTLE, training__steps=16, checkpoint__keep_model="true")
    assert run.status == 0, run.output
    commands = re.findall(r"^    (\d)\. .*:\n        (.*)$", run.output.partition("what to do next:")[2], re.MULTILINE)
    assert [number for number, _ in commands] == ["1", "2", "3", "4"]
    talk, own_text, low_precision, compare = (command for _, command in commands)
    assert typed(talk, tmp_path).startswith("import")
    assert "training finished" in typed(own_text, tmp_path)
    # It begins as the one before, which a shell has read: so it needs no launcher.
    shared, *_ = own_text.partition("--job.dump_folder=")
    assert low_precision.startswith(shared)
    env = dict(word.split("=", 1) for word in shlex.split(shared) if "=" in word)
    converted = forked_run(shlex.split(low_precision.removeprefix(shared)), environment(**env), tmp_path, tmp_path, 2)
    assert converted.status == 0, converted.output
    assert "3. compare" in converted.output  # it is in low precision
    compared = typed(compare, tmp_path)
    assert "95% interval" in compared.replace("\n", " ")  # so they do compare
    assert "rowwise" in compared
