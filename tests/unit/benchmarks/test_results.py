"""The commit that the result files of the benchmarks name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import results


@pytest.mark.slow
def test_results_of_other_benchmarks_are_no_change_of_what_is_measured(tmp_path: Path) -> None:
    script = tmp_path / "scripts" / "benchmarks" / "results.py"
    table = tmp_path / "docs" / "benchmarks" / "table.json"
    for file, text in ((script, Path(results.__file__).read_text()), (table, "{}")):
        file.parent.mkdir(parents=True)
        file.write_text(text)
    author = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "All"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)

    def commit() -> str:
        code = [sys.executable, "-c", "import results; print(results.commit())"]
        return subprocess.run(code, cwd=script.parent, capture_output=True, text=True, check=True).stdout.strip()

    name = commit()
    assert len(name) == 8
    table.write_text('{"new": 1}')
    assert commit() == name
    script.write_text(script.read_text() + "\n")
    assert commit() == f"{name}-dirty"


def test_a_copy_without_git_can_be_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TITANLITE_COMMIT", "0123abcd")
    assert results.commit() == "0123abcd"
