"""``changes.jsonl``: the options that a run had in its earlier steps."""

from __future__ import annotations

from pathlib import Path

from titanlite.config.run_changes import keep_changes, options_before, read_changes


def test_the_options_of_earlier_steps(tmp_path: Path) -> None:
    keep_changes(tmp_path, 10, {})
    assert not [*tmp_path.iterdir()]
    keep_changes(tmp_path, 20, {"optimizer.lr": ("1", "2")})
    keep_changes(tmp_path, 40, {"optimizer.lr": ("2", "3"), "training.steps": ("40", "60")})
    assert options_before(read_changes(tmp_path)) == {
        (1, 20): {"optimizer.lr": "1"},
        (21, 40): {"optimizer.lr": "2"},
        (1, 40): {"training.steps": "40"},
    }


def test_steps_that_are_made_again_are_forgotten(tmp_path: Path) -> None:
    keep_changes(tmp_path, 20, {"optimizer.lr": ("1", "2")})
    keep_changes(tmp_path, 20, {"optimizer.lr": ("2", "3")})  # it ended before it had saved again
    assert read_changes(tmp_path) == {20: {"optimizer.lr": ("1", "3")}}
    keep_changes(tmp_path, 40, {"optimizer.lr": ("3", "4"), "processes": ("1", "2")})
    keep_changes(tmp_path, 30, {"processes": ("2", "1")})
    assert read_changes(tmp_path) == {20: {"optimizer.lr": ("1", "3")}, 30: {"optimizer.lr": ("3", "4")}}
    keep_changes(tmp_path, 20, {"optimizer.lr": ("4", "1")})
    assert read_changes(tmp_path) == {}


def test_hostile_rows_are_left_out(tmp_path: Path) -> None:
    rows = ["", "[]", "{}", '{"step": 1e999, "options": {}}', '{"step": 1, "options": {"a": 3}}', "[" * 100_000, "\0"]
    (tmp_path / "changes.jsonl").write_text("\n".join([*rows, '{"step": 2, "options": {"a": ["1", "2"]}}']))
    assert read_changes(tmp_path) == {2: {"a": ("1", "2")}}
