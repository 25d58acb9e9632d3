"""Checkpoints on disk: complete or not there, and every damage found."""

from __future__ import annotations

import json
import os
import subprocess
import tracemalloc
from dataclasses import asdict
from pathlib import Path

import pytest

from titanlite.checkpoint.folder import (
    SUMS,
    DamagedCheckpoint,
    clear_leftovers,
    commit,
    delete,
    latest_checkpoint,
    partial_folder,
    problems_of,
    read_sums,
    saved_steps,
    set_damaged_aside,
    step_folder,
    strays_in,
    write_file,
)
from titanlite.checkpoint.storage import INFO, Info, read_info, verify
from titanlite.training.run_folder import drop_rows_after


def make(root: Path, step: int) -> Path:
    partial = partial_folder(root, step)
    partial.mkdir(parents=True)
    sums = {name: write_file(partial / name, f"{name} of {step}\n" * 50) for name in ("a.distcp", ".metadata", "b b")}
    commit(partial, step_folder(root, step), sums)
    return step_folder(root, step)


def test_a_checkpoint_is_there_once_it_is_complete(tmp_path: Path) -> None:
    partial_folder(tmp_path, 3).mkdir()
    assert saved_steps(tmp_path) == []
    assert clear_leftovers(tmp_path) == [".partial-step-3"]
    folder = make(tmp_path, 10)
    make(tmp_path, 9)
    (tmp_path / "step-x").mkdir()
    (tmp_path / "step-007").mkdir()
    assert saved_steps(tmp_path) == [9, 10]
    assert not partial_folder(tmp_path, 10).exists()
    assert verify(folder) == sum(path.stat().st_size for path in folder.iterdir() if path.name != SUMS)
    assert clear_leftovers(tmp_path) == []


def test_what_is_only_called_like_a_checkpoint_is_none(tmp_path: Path) -> None:
    make(tmp_path, 10)
    (tmp_path / "step-50").touch()
    (tmp_path / "step-60").mkdir()
    (tmp_path / "step-70").symlink_to("gone")
    (tmp_path / "step-80").mkdir()
    (tmp_path / "step-80" / "notes.txt").touch()
    assert saved_steps(tmp_path) == [10]
    assert [path.name for path in strays_in(tmp_path)] == ["step-50", "step-60", "step-70", "step-80"]
    (tmp_path / "step-80" / ".metadata").touch()  # of a checkpoint that is damaged
    assert saved_steps(tmp_path) == [10, 80]


@pytest.mark.parametrize("config", ["", '[checkpoint]\nfolder = "saved/here"', '[checkpoint]\nfolder = "../elsewhere"'])
def test_the_latest_checkpoint_of_a_run(tmp_path: Path, config: str) -> None:
    run, folder = tmp_path / "run", "saved/here" if "saved" in config else "checkpoint"
    run.mkdir()
    if config:
        (run / "config.toml").write_text(config)
    make(tmp_path / "elsewhere", 900)
    assert latest_checkpoint(run) == run
    for step in (9, 10):
        make(run / folder, step)
    (run / folder / "step-11").touch()
    assert latest_checkpoint(run) == run / folder / "step-10"
    assert latest_checkpoint(run / folder) == run / folder / "step-10"
    assert latest_checkpoint(run / folder / "step-9") == run / folder / "step-9"
    assert latest_checkpoint(tmp_path / "gone") == tmp_path / "gone"


def test_the_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    done = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK") == 3


@pytest.mark.parametrize("name", ["a.distcp", ".metadata", "b b", SUMS])
def test_every_flipped_bit_is_found_and_named(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path, 1)
    file = folder / name
    whole = file.read_bytes()
    for at in range(0, len(whole), 7):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        with pytest.raises(DamagedCheckpoint, match="is changed") as raised:
            verify(folder)
        assert raised.value.problems[0].startswith(name)
    file.write_bytes(whole)
    verify(folder)


@pytest.mark.parametrize("name", ["a.distcp", ".metadata", "b b", SUMS])
def test_truncated_and_missing_files_are_found_and_named(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path, 1)
    file = folder / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpoint, match=f"{name} is changed"):
        verify(folder)
    file.unlink()
    with pytest.raises(DamagedCheckpoint, match=f"{name} is missing"):
        verify(folder)


def test_all_damaged_files_are_named_at_once(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    (folder / "a.distcp").unlink()
    (folder / "b b").write_text("something else")
    assert problems_of(folder, read_sums(folder), sorted(read_sums(folder))) == [
        "a.distcp is missing",
        "b b is changed (its SHA-256 is another)",
    ]


def test_what_is_deleted_or_damaged_is_no_checkpoint_any_more(tmp_path: Path) -> None:
    delete(make(tmp_path, 1))
    assert saved_steps(tmp_path) == []
    for number in ("", "-2"):
        assert set_damaged_aside(make(tmp_path, 2)) == tmp_path / f"damaged-step-2{number}"
    assert saved_steps(tmp_path) == []
    assert clear_leftovers(tmp_path) == [".deleting-step-1"]


def test_every_flipped_bit_of_what_is_not_tensors_is_found_before_it_is_believed(tmp_path: Path) -> None:
    partial, final = partial_folder(tmp_path, 7), step_folder(tmp_path, 7)
    partial.mkdir()
    info = Info(7, {"name": "llama3", "flavor": "debugmodel", "args": {}}, seed=3)
    text = json.dumps({"format": 1, **asdict(info)}, indent=1)
    commit(partial, final, {INFO: write_file(partial / INFO, text)})
    assert read_info(final) == info
    for position in range(len(text)):
        changed = bytearray(text.encode())
        changed[position] ^= 1 << position % 8
        (final / INFO).write_bytes(changed)
        with pytest.raises(DamagedCheckpoint, match=f"step-7 is damaged: {INFO} is changed"):
            read_info(final)


def test_a_checkpoint_that_cannot_be_removed_does_not_stop_the_next(tmp_path: Path) -> None:
    first = delete(make(tmp_path, 1))
    second = delete(make(tmp_path, 1))
    assert saved_steps(tmp_path) == []
    assert clear_leftovers(tmp_path) == sorted([first.name, second.name])


def test_rows_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    drop_rows_after(file, 3)
    assert not file.exists()
    rows = [json.dumps({"step": step}) for step in (1, 2, 3, 4, 5)]
    file.write_text("\n".join(rows) + "\n" + rows[0][:-3])  # a row cut off by a kill
    drop_rows_after(file, 3)
    assert file.read_text() == "\n".join(rows[:3]) + "\n"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rows_are_dropped_one_by_one(tmp_path: Path) -> None:
    """The rows of a long run need not fit into memory, nor does a line that is no row."""
    file = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step, "padding": "x" * 100_000}) + "\n" for step in range(100)]
    with file.open("w") as lines:
        lines.writelines(rows)
        lines.write("0" * 20_000_000)
    tracemalloc.start()
    drop_rows_after(file, 97)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6_000_000
    assert file.read_text() == "".join(rows[:98])


def test_a_file_is_on_the_disk_when_it_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, fsync = [], os.fsync

    def recorded(handle: int) -> None:
        sizes.append(os.fstat(handle).st_size)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", recorded)
    write_file(tmp_path / "a", "text")
    assert sizes == [4]
