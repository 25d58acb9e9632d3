"""The run folder: one writer at a time, and nothing of an earlier run lost."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from tests.support.forks import Place, start
from tests.support.runs import environment
from titanlite.config.run_config import CONFIG, LOCK, METRICS
from titanlite.errors import ConfigError
from titanlite.training.run_folder import RunFolder


def hold(path: Path) -> None:
    folder = RunFolder(path)
    print("locked", flush=True)
    time.sleep(60)
    del folder


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    output = tmp_path / "output.txt"
    holder = start(Place(environment(), tmp_path, output), hold, tmp_path / "run")
    try:
        give_up = time.monotonic() + 60
        while not (output.exists() and output.read_text() == "locked\n"):
            assert time.monotonic() < give_up
            time.sleep(0.02)
        with pytest.raises(ConfigError, match=rf"job.dump_folder = .*another run \(process {holder.pid}\)"):
            RunFolder(tmp_path / "run")
        RunFolder(tmp_path / "another")
    finally:
        holder.kill()
        holder.join()
    RunFolder(tmp_path / "run")
    assert (tmp_path / "run" / ".lock").read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize("content", ["", "12", "x\n", None])
def test_a_holder_that_has_not_written_its_number_yet(
    tmp_path: Path, content: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = RunFolder(tmp_path)

    def wait(seconds: float) -> None:
        lock = holder.path / LOCK
        lock.unlink() if content is None and lock.exists() else None

    if content is not None:
        (tmp_path / LOCK).write_text(content)
    monkeypatch.setattr("time.sleep", wait)
    with pytest.raises(ConfigError, match=r"another run is writing to this folder"):
        RunFolder(tmp_path)


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"job.dump_folder = .*cannot be written: .*--job.dump_folder"):
        RunFolder(tmp_path / path)


def test_a_file_system_without_locks_is_not_called_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(ConfigError, match=r"job.dump_folder = .* has no locks"):
        RunFolder(tmp_path)


def test_setting_aside_loses_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    for run in range(3):
        (folder.path / CONFIG).write_text(f"config {run}")
        (folder.path / METRICS).write_text(f"metrics {run}")
        (folder.path / "logs" / "tb").mkdir(parents=True)
        (folder.path / "logs" / "tb" / "events").write_text(f"events {run}")
        for file in (folder.path / CONFIG, folder.path / METRICS, folder.path / "logs" / "tb"):
            os.utime(file, (1e9, 1e9))
        folder.set_earlier_aside([CONFIG, METRICS, "logs/tb", "never_there"])
        assert not any((folder.path / name).exists() for name in (CONFIG, METRICS, "logs/tb"))
    asides = sorted((folder.path / "earlier").iterdir())
    assert len(asides) == 3
    for run, aside in enumerate(asides):
        assert (aside / CONFIG).read_text() == f"config {run}"
        assert (aside / METRICS).read_text() == f"metrics {run}"
        assert (aside / "logs" / "tb" / "events").read_text() == f"events {run}"


@pytest.mark.parametrize("names", [["logs", "logs/tb"], ["logs/tb", "logs"], ["logs", "./logs"], ["a/logs", "b/logs"]])
def test_folders_in_each_other_and_of_one_name_are_set_aside(tmp_path: Path, names: list[str]) -> None:
    folder = RunFolder(tmp_path / "run")
    for name in names:
        (folder.path / name).mkdir(parents=True, exist_ok=True)
        (folder.path / name / "events").write_text(name)
    before = {name: (folder.path / name / "events").read_text() for name in names}
    folder.set_earlier_aside(names)
    (aside,) = (folder.path / "earlier").iterdir()
    assert {name: (aside / name / "events").read_text() for name in names} == before


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for path in (tmp_path / "a" / "b" / "run", tmp_path / "there"):
        RunFolder(path).discard()
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    kept = RunFolder(tmp_path / "kept")
    (kept.path / CONFIG).touch()
    kept.discard()
    assert sorted(path.name for path in kept.path.iterdir()) == [LOCK, CONFIG]


def test_whoever_waits_for_a_folder_that_is_discarded_makes_it_again(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run")
    timer = threading.Timer(0.2, lambda: (first.discard(), first._lock.close()))
    timer.start()
    second = RunFolder(tmp_path / "run")
    timer.join()
    assert (tmp_path / "run" / LOCK).read_text() == f"{os.getpid()}\n"
    with pytest.raises(ConfigError, match="another run"):
        RunFolder(tmp_path / "run")
    second.discard()
    assert not (tmp_path / "run").exists()


def test_what_is_not_named_stays(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    folder.set_earlier_aside([CONFIG, METRICS])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "notes.txt"]


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "config.toml", "checkpoint", "tb/events", "earlier/1/x"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe"])
def test_nothing_outside_is_written(tmp_path: Path, name: str, kind: str) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    other.write_text("precious\n")
    if kind == "pipe":
        os.mkfifo(run / name)
    else:
        (run / name).symlink_to(other if kind == "link" else tmp_path / "none")
    with pytest.raises(ConfigError, match=rf"{name} in the run folder is a (link to .*outside of it|pipe)") as raised:
        RunFolder(run)
    assert raised.value.key == "job.dump_folder"
    assert other.read_text() == "precious\n"
    assert not (tmp_path / "none").exists()


def test_links_to_a_run_folder_and_within_it_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real" / "checkpoint").mkdir(parents=True)
    (tmp_path / "real" / "latest").symlink_to("checkpoint")
    (tmp_path / "run").symlink_to("real")
    RunFolder(tmp_path / "run")
    assert (tmp_path / "real" / ".lock").exists()
