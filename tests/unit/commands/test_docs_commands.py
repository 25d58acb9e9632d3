"""The commands of the README and of the tutorial, run as they are typed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.docs import typed_on
from tests.support.installs import User, clean_environment, install_wheel, make_clone, make_wheel, user_of_clone
from tests.support.runs import ROOT

pytestmark = [pytest.mark.long, pytest.mark.alone, pytest.mark.timeout(3600)]

# Of the README, what needs an account of the hub, 8 GPUs, or is these tests.
NEEDS_MORE = ("tokenizer download", "llama3_8b.toml", "scripts/test.sh")


@pytest.fixture
def user(tmp_path: Path) -> User:
    return user_of_clone(tmp_path, NO_COLOR="1")


def test_the_tutorial(user: User) -> None:
    """From the first run to an exported model; what it says of them is so."""
    outputs = {command: user.types(command) for command in typed_on(ROOT / "docs" / "tutorial.md")}
    compared = next(text for command, text in outputs.items() if " compare " in command)
    assert "95% interval" in " ".join(compared.split())
    for file in ("compare.html", "compare.png", "exported/model.safetensors", "exported/README.md"):
        assert (user.folder / "runs" / file).is_file()
    first, tuned, exported = (
        float(re.findall(r"accuracy +([\d.]+)", text)[0])
        for command, text in outputs.items()
        if " evaluate " in command
    )
    assert first == pytest.approx(0.25, abs=0.1)
    assert tuned > 0.7
    assert exported == pytest.approx(tuned, abs=0.03)
    answer = next(text for command, text in outputs.items() if " generate " in command)
    assert answer.rstrip().endswith("# part of the library: asyncio")


def of_the_readme() -> list[str]:
    commands = [command for command in typed_on(ROOT / "README.md") if not any(part in command for part in NEEDS_MORE)]
    assert len(commands) >= 11
    return commands


def test_the_readme(tmp_path: Path) -> None:
    """From top to bottom, in a bare clone, with an empty home."""
    user = User(make_clone(tmp_path / "clone"), clean_environment(tmp_path / "home"))
    for command in of_the_readme():
        user.types(command)


def test_the_readme_with_a_wheel(tmp_path: Path) -> None:
    """In a folder that has a text and nothing else, with the words that the README says to type there."""
    programs = install_wheel(make_wheel(tmp_path / "wheels"), tmp_path / "venv")
    (tmp_path / "outside" / "docs").mkdir(parents=True)
    (tmp_path / "outside" / "docs" / "text.md").write_text((ROOT / "docs" / "data.md").read_text())
    user = User(tmp_path / "outside", clean_environment(tmp_path / "home", programs))
    for command in of_the_readme():
        user.types(command.replace("./run_train.sh", "titanlite train").replace(".venv/bin/titanlite", "titanlite"))
