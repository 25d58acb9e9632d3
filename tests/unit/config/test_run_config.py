"""config.toml of a run folder: it refers to the folder that it lies in, and its paths are right from everywhere."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from titanlite.config import JobConfig, dump_toml, load_config
from titanlite.config.run_config import (
    CONFIG,
    mark_as_made_here,
    read_run_config,
    run_config_of,
    was_made_here,
    write_run_config,
)
from titanlite.errors import ConfigError


def written(folder: Path, **options: str) -> JobConfig:
    """The configuration of these options, as config.toml in ``folder``."""
    config = load_config([f"--{key.replace('__', '.')}={value}" for key, value in options.items()])
    folder.mkdir(parents=True)
    write_run_config(config, folder)
    return config


@pytest.mark.parametrize(
    "way", ["where it was", "moved", "copied", "linked folder", "linked file", "as a base", "here"]
)
def test_the_run_folder_is_the_one_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    folder = tmp_path / "a" / "run"
    config = written(folder, training__steps="7", job__dump_folder="./outputs")
    file = folder / CONFIG
    match way:
        case "moved":
            folder, file = tmp_path / "moved", tmp_path / "moved" / CONFIG
            shutil.move(tmp_path / "a" / "run", folder)
        case "copied":
            folder, file = tmp_path / "copy", tmp_path / "copy" / CONFIG
            shutil.copytree(tmp_path / "a" / "run", folder)
        case "linked folder":
            (tmp_path / "link").symlink_to("a/run")
            folder, file = tmp_path / "link", tmp_path / "link" / CONFIG
        case "linked file":
            file = tmp_path / "latest.toml"
            file.symlink_to("a/run/config.toml")
        case "as a base":
            file = tmp_path / "longer.toml"
            file.write_text('base = "a/run/config.toml"\n[optimizer]\nlr = 1e-4\n')
        case "here":
            monkeypatch.chdir(folder)
            folder, file = Path("."), Path(CONFIG)
    again = load_config([], str(file))
    assert Path(again.job.dump_folder) == folder
    assert again.training == config.training
    assert load_config(["--job.dump_folder=elsewhere"], str(file)).job.dump_folder == "elsewhere"


def test_a_folder_that_is_written_into_the_file_counts(tmp_path: Path) -> None:
    written(tmp_path / "run")
    file = tmp_path / "run" / CONFIG
    file.write_text(file.read_text().replace("[job]\n", '[job]\ndump_folder = "another"\n'))
    assert load_config([], str(file)).job.dump_folder == str(tmp_path / "run" / "another")


def test_a_copy_under_another_name_needs_a_folder(tmp_path: Path) -> None:
    written(tmp_path / "run")
    copy = shutil.copy(tmp_path / "run" / CONFIG, tmp_path / "mine.toml")
    with pytest.raises(ConfigError, match=r"mine\.toml, line 4: .* add --job\.dump_folder"):
        load_config([], copy)
    assert load_config(["--job.dump_folder=mine"], copy).job.dump_folder == "mine"
    derived = tmp_path / "derived.toml"
    derived.write_text('base = "mine.toml"\n[job]\ndump_folder = "derived"\n')
    assert load_config([], str(derived)).job.dump_folder == "derived"


def test_paths_are_right_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    inner = tmp_path / "run" / "checkpoint" / "step-1"
    written(
        Path("run"),
        training__dataset_path="notes/*.txt",
        model__tokenizer_path="~/tokenizer",
        checkpoint__initial_load_path=str(inner),
    )
    (tmp_path / "elsewhere").mkdir()
    shutil.move("run", "elsewhere/moved")
    monkeypatch.chdir("elsewhere")
    again = load_config([], "moved/config.toml")
    assert again.training.dataset_path == str(tmp_path / "notes" / "*.txt")
    assert again.model.tokenizer_path == str(tmp_path / "home" / "tokenizer")
    assert again.checkpoint.initial_load_path == "moved/checkpoint/step-1"
    assert again.validation.dataset_path is None
    assert again.parallelism.pipeline_parallel_schedule_csv == ""


def test_a_current_folder_whose_name_is_no_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / os.fsdecode(b"caf\xe9")
    here.mkdir()
    monkeypatch.chdir(here)
    written(Path("run"), training__dataset_path="notes.txt")
    again = load_config([], "run/config.toml")
    assert again.training.dataset_path is not None
    assert Path(again.training.dataset_path).resolve() == (here / "notes.txt").resolve()


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    config = written(tmp_path / "run")
    before = (tmp_path / "run" / CONFIG).read_bytes()
    config.job.description = "\udcff"
    with pytest.raises(UnicodeEncodeError):
        write_run_config(config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [CONFIG]
    assert (tmp_path / "run" / CONFIG).read_bytes() == before


@pytest.mark.parametrize("named", ["./outputs", "moved", ""])
@pytest.mark.parametrize("way", ["moved", "base"])
def test_a_run_of_an_older_version_goes_on_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, way: str
) -> None:
    """Its config.toml names the folder by the path that it had, and its other paths as they were typed."""
    monkeypatch.chdir(tmp_path)
    config = load_config([f"--job.dump_folder={named}", "--training.dataset_path=notes.txt"])
    Path("moved").mkdir()
    Path("moved", CONFIG).write_text(dump_toml(config))
    file = Path("moved", CONFIG)
    assert load_config([], str(file)).job.dump_folder == named  # no run lies beside it
    Path("moved", "metrics.jsonl").touch()
    if way == "base":
        file = Path("longer.toml")
        file.write_text('base = "moved/config.toml"\n')
    again = load_config([], str(file))
    assert again.job.dump_folder == "moved"
    assert again.training.dataset_path == "notes.txt"
    assert [named for notice in again.notices if "goes on in moved" in notice] == ([named] if named != "moved" else [])
    explicit = load_config(["--job.dump_folder=mine"], str(file))
    assert (explicit.job.dump_folder, explicit.notices) == ("mine", [])


@pytest.mark.parametrize("value", ["3", "[]", "true"])
def test_a_reference_that_is_no_path(tmp_path: Path, value: str) -> None:
    (tmp_path / CONFIG).write_text(f"run_folder = {value}\n")
    with pytest.raises(ConfigError, match=r"config\.toml, line 1: run_folder = .*must be a path"):
        load_config([], str(tmp_path / CONFIG))


def test_a_moved_folder_is_the_user_s_and_a_copy_is_not(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert not was_made_here(tmp_path / "run")
    mark_as_made_here(tmp_path / "run")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert was_made_here(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "copy")
    assert not was_made_here(tmp_path / "copy")


MODULE = """
from dataclasses import dataclass, field
print("the module runs")

@dataclass
class Extra:
    number: int = 1

@dataclass
class JobConfig:
    extra: Extra = field(default_factory=Extra)
"""


def test_code_that_a_strange_run_folder_names_is_said_before_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for number, way in enumerate(["strange", "one's own", "named by the user"]):
        monkeypatch.delenv("TITANLITE_SAID", raising=False)
        name = f"extra_{tmp_path.name.replace('-', '_')}_{number}"
        (tmp_path / f"{name}.py").write_text(MODULE)
        written(tmp_path / f"run-{number}", experimental__custom_args_module=name)
        if way == "one's own":
            mark_as_made_here(tmp_path / f"run-{number}")
        capfd.readouterr()
        arguments = [f"--experimental.custom_args_module={name}"] if way == "named by the user" else []
        sys.modules.pop(name, None)  # it was imported when the file was written
        load_config(arguments, f"run-{number}/config.toml")
        shown = capfd.readouterr()
        assert "the module runs" in shown.out
        assert (name in shown.err) == (way == "strange")


def test_unset_options_and_the_file_it_came_from_are_left_out(tmp_path: Path) -> None:
    tree = run_config_of(load_config([]), tmp_path)
    assert "dump_folder" not in tree["job"]
    assert "config_file" not in tree["job"]
    assert "seed" not in tree["training"]


@pytest.mark.parametrize("kind", ["pipe", "device", "huge"])
def test_a_configuration_that_is_no_file_is_none(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "config.toml"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        with file.open("wb") as stream:
            stream.truncate(1 << 40)
    assert read_run_config(tmp_path) == {}


def test_a_data_set_of_the_hub_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the same from everywhere, also where the folder has moved."""
    written(tmp_path / "run", training__dataset="chat", training__dataset_path="hub:a/b")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert load_config([], str(tmp_path / "moved" / CONFIG)).training.dataset_path == "hub:a/b"
