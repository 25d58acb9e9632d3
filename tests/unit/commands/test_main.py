"""``titanlite`` itself: what it says of a subcommand that there is not."""

from __future__ import annotations

import sys

import pytest

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
