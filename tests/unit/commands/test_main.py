"""``titanlite`` itself: what it says of a subcommand that there is not, and where nobody reads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.runs import environment
from titanlite.commands import __main__ as command


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("trian", "train"),
        ("generat", "generate"),
        ("llama3_8b", "titanlite train llama3_8b"),
        ("llama3_8", "titanlite train llama3_8b"),
        ("finetune/phi_4_hellaswag", "titanlite train finetune/phi_4_hellaswag"),
        ("phi_4_hellaswag", "titanlite train phi_4_hellaswag"),
        ("mine.toml", "titanlite train mine.toml"),
        ("zzz", ""),
    ],
)
def test_an_unknown_subcommand(
    name: str, hint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["titanlite", name])
    assert command.main() == 2
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith(f"titanlite: error: {name}: there is no such subcommand")
    assert f'(did you mean "{hint}"?)' in first if hint else "did you mean" not in first


@pytest.mark.parametrize("arguments", [["config", "--reference"], ["config", "--diff", "llama3_8b", "debug_model"]])
def test_a_reader_that_has_ended(arguments: list[str]) -> None:
    """Such as head: that is no error of titanlite, and needs no traceback."""
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "titanlite.commands", *arguments]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, env=environment(), text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_full_disk_and_an_interrupt_need_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [sys.executable, "-m", "titanlite.commands", "config", "--reference"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, env=environment(), text=True)
    said = "titanlite config: the output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)

    def interrupted(_: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("titanlite.commands.config.main", interrupted)
    monkeypatch.setattr(sys, "argv", ["titanlite", "config", "--reference"])
    assert command.main() == 130
    assert capsys.readouterr() == ("", "")
