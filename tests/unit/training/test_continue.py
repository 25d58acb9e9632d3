"""A run folder that is moved, copied, changed, or asked for other things than before."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support import runs
from tests.support.runs import LITTLE, Run, checkpoints, environment, forked_run
from titanlite.commands import convert, generate
from titanlite.config.run_changes import options_before, read_changes
from titanlite.config.run_config import mark_as_made_here

run_trainer = partial(runs.run_trainer, **LITTLE)
ON = checkpoints(2)
NONE_FOUND = "starting at step 1"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 3 steps with the checkpoints 2 and 3, whose data are named by a relative path."""
    parent = tmp_path_factory.mktemp("first")
    (parent / "notes.txt").write_text("to be or not to be, that is the question\n" * 500)
    data = {"training__dataset": "text", "training__dataset_path": "notes.txt"}
    run = run_trainer(parent, **ON, **data)
    assert run.status == 0, run.output
    assert f"no checkpoint found in {run.folder}/checkpoint, {NONE_FOUND}" in run.output
    return run


def goes_on(run: Run, after: int) -> None:
    assert run.status == 0, run.output
    assert f"resuming from step {after}" in run.output
    assert NONE_FOUND not in run.output
    assert [row["step"] for row in run.rows()] == list(range(1, run.rows()[-1]["step"] + 1))


def by_its_config(folder: Path, parent: Path, *arguments: str) -> Run:
    return forked_run(list(arguments), environment(CONFIG_FILE=str(folder / "config.toml"), NGPU="1"), parent, folder)


def moved(folder: Path, to: Path) -> Path:
    return Path(shutil.move(folder, to))


def linked(folder: Path, to: Path) -> Path:
    to.symlink_to(folder)
    return to


def with_linked_checkpoints(folder: Path, to: Path) -> Path:
    mark_as_made_here(folder)  # in a folder from elsewhere, links that lead out are refused
    shutil.move(folder / "checkpoint", to.with_name("large-disk"))
    (folder / "checkpoint").symlink_to(to.with_name("large-disk"))
    return folder


WAYS: dict[str, Callable[[Path, Path], Path]] = {
    "moved": moved,
    "copied": lambda folder, to: Path(shutil.copytree(folder, to)),
    "linked": linked,
    "linked checkpoints": with_linked_checkpoints,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_goes_on_by_its_own_configuration(first: Run, tmp_path: Path, way: str) -> None:
    shutil.copytree(first.folder, tmp_path / "run")
    folder = WAYS[way](tmp_path / "run", tmp_path / "other")
    before = sorted(path.name for path in tmp_path.iterdir())
    run = by_its_config(folder, tmp_path, "--training.steps=4")
    goes_on(run, after=3)
    assert run.losses()[:3] == first.losses()
    assert (folder / "checkpoint" / "step-4").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == before  # nothing in the old place, or elsewhere


def test_a_folder_that_is_copied_while_it_is_in_use(first: Run, tmp_path: Path) -> None:
    """The lock is the process's, not the file's; what a save and a row left unfinished is cleared."""
    folder = Path(shutil.copytree(first.folder, tmp_path / "run"))
    (folder / ".lock").write_text("1\n")
    shutil.copytree(folder / "checkpoint" / "step-3", folder / "checkpoint" / ".partial-step-9")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "lo\xff')
    goes_on(by_its_config(folder, tmp_path, "--training.steps=4"), after=3)


@pytest.fixture
def again(first: Run, tmp_path: Path) -> Any:
    """The first command once more, in a copy of its folder, but for the options of checkpoints."""
    shutil.copytree(first.folder, tmp_path / "run")
    data = {"training__dataset": "text", "training__dataset_path": first.folder.parent / "notes.txt"}
    return partial(run_trainer, tmp_path, **data, training__deterministic="true")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, ["checkpoint.enable_checkpoint = false (the default)", "checkpoint/step-3", "--checkpoint.enable_ch"]),
        ({"job__config_file": "off.toml"}, ["checkpoint.enable_checkpoint = false (off.toml, line 2)"]),
        ({"checkpoint__folder": "other"}, ["checkpoint.enable_checkpoint", "--checkpoint.folder=checkpoint"]),
        ({**ON, "checkpoint__folder": "other"}, ['checkpoint.folder = "other"', "--checkpoint.folder=checkpoint"]),
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_a_run_with_checkpoints_is_not_retired(
    again: Any, tmp_path: Path, options: dict[str, Any], parts: list[str], with_config: bool
) -> None:
    (tmp_path / "off.toml").write_text("[checkpoint]\nenable_checkpoint = false\n")
    if not with_config:
        if "checkpoint__folder" in options:
            return  # nothing says where the run had its checkpoints
        (tmp_path / "run" / "config.toml").unlink()
    before = sorted(path for path in tmp_path.rglob("*") if path.name != ".lock")
    run = again(**options)
    assert run.status == 2, run.output
    assert run.output.count("titanlite: error:") == 1
    assert all(part in run.output for part in parts), run.output
    assert sorted(path for path in tmp_path.rglob("*") if path.name != ".lock") == before


def test_one_word_begins_anew_and_loses_nothing(again: Any, first: Run) -> None:
    run = again(checkpoint__enable_checkpoint="false", training__steps=1)
    assert run.status == 0, run.output
    assert [row["step"] for row in run.rows()] == [1]
    assert not (run.folder / "checkpoint").exists()
    (kept,) = (run.folder / "earlier").iterdir()
    assert (kept / "checkpoint" / "step-3" / "checkpoint.json").is_file()
    goes_on(by_its_config(kept, run.folder, "--training.steps=4"), after=3)  # it can still be continued


def test_linked_checkpoints_that_are_set_aside_stay_linked(again: Any, tmp_path: Path) -> None:
    mark_as_made_here(tmp_path / "run")
    shutil.move(tmp_path / "run" / "checkpoint", tmp_path / "large-disk")
    (tmp_path / "run" / "checkpoint").symlink_to("../large-disk")
    assert again().status == 2
    run = again(checkpoint__enable_checkpoint="false", training__steps=1)
    assert run.status == 0, run.output
    (kept,) = (run.folder / "earlier").iterdir()
    assert (kept / "checkpoint" / "step-3" / "checkpoint.json").is_file()
    assert not (run.folder / "checkpoint").exists()


def test_checkpoints_behind_a_link_that_leads_nowhere(again: Any, tmp_path: Path) -> None:
    mark_as_made_here(tmp_path / "run")
    shutil.move(tmp_path / "run" / "checkpoint", tmp_path / "large-disk")
    (tmp_path / "run" / "checkpoint").symlink_to("../small-disk")
    run = again(**ON)
    assert run.status == 2
    assert 'checkpoint.folder = "checkpoint"' in run.output
    assert "small-disk" in run.output


def test_a_folder_with_checkpoints_and_nothing_else_goes_on(again: Any, tmp_path: Path) -> None:
    for name in ("config.toml", "metrics.jsonl", ".lock", ".made-here"):
        (tmp_path / "run" / name).unlink()
    run = again(**ON, training__steps=4)
    assert run.status == 0, run.output
    assert "resuming from step 3" in run.output
    assert [row["step"] for row in run.rows()] == [4]


def test_one_notice_has_the_old_and_new_options(again: Any) -> None:
    run = again(
        **ON,
        ngpu=2,
        training__local_batch_size=2,
        training__steps=5,
        optimizer__lr=1e-3,
        lr_scheduler__decay_ratio=0.5,
        metrics__log_freq=5,
        checkpoint__keep_latest_k=3,
    )
    assert run.status == 0, run.output
    (notice,) = [line for line in run.output.splitlines() if "other options than before" in line]
    assert notice.partition("before: ")[2].split(", ") == [
        "optimizer.lr: 0.0008 -> 0.001",
        "lr_scheduler.decay_ratio: unset -> 0.5",
        "training.local_batch_size: 4 -> 2",
        "training.steps: 3 -> 5",
        "processes: 1 -> 2",
    ]
    before = options_before(read_changes(run.folder))
    assert before.keys() == {(1, 3)}
    assert before[1, 3]["optimizer.lr"] == "0.0008"
    assert before[1, 3]["processes"] == "1"


def test_the_same_options_are_no_notice(again: Any, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run" / "checkpoint" / "step-3")  # as after a kill
    run = again(**ON)
    goes_on(run, after=2)
    assert "other options than before" not in run.output
    assert read_changes(run.folder) == {}


def test_strays_neither_stop_a_run_nor_are_continued(again: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoint"
    (folder / "step-4").write_text("notes")
    (folder / "step-50").mkdir()
    run = again(**ON, training__steps=4)
    goes_on(run, after=3)
    assert run.output.count("has the name of a checkpoint, and not its files") == 2
    assert (folder / "step-4" / "checkpoint.json").is_file()
    assert (folder / "stray-step-4").read_text() == "notes"
    assert (folder / "step-50").is_dir()


def test_the_code_of_a_strange_folder_is_said_before_it_runs(first: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(first.folder, tmp_path / "strange"))
    file = folder / "config.toml"
    file.write_text(file.read_text().replace('custom_import = ""', 'custom_import = "hooks"'))
    (tmp_path / "hooks.py").write_text('print("the code runs", flush=True)\n')
    said = 'experimental.custom_import = "hooks" ('
    for ngpu, size in ((1, 4), (2, 2)):
        given = [f"--training.local_batch_size={size}", f"--training.steps={3 + ngpu}"]
        env = environment(CONFIG_FILE=str(file), NGPU=str(ngpu))
        run = forked_run(given, env, tmp_path, folder, ngpu)
        goes_on(run, after=2 + ngpu)
        assert run.output.count(said) == 1, run.output
        assert run.output.index(said) < run.output.index("the code runs") or ngpu == 2


def test_its_latest_checkpoint_is_what_generate_and_convert_take(
    first: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    latest = str(first.folder / "checkpoint" / "step-3")
    for path in (first.folder, first.folder / "checkpoint"):
        given = ["--checkpoint", str(path), "--prompt", "to", "--max_new_tokens", "1"]
        assert generate.main(given) == 0
        assert latest in capfd.readouterr().err
        assert convert.main([str(path), str(tmp_path / f"as-{path.name}")]) == 0
        assert latest in capfd.readouterr().out
    (tmp_path / "empty").mkdir()
    shutil.copy(first.folder / "config.toml", tmp_path / "empty")
    assert convert.main([str(tmp_path / "empty"), str(tmp_path / "nothing")]) == 2
    assert "a run without checkpoints" in capfd.readouterr().err


def test_another_run_begins_with_its_latest_checkpoint(first: Run, tmp_path: Path) -> None:
    run = run_trainer(tmp_path, **ON, checkpoint__initial_load_path=first.folder, training__steps=1)
    assert run.status == 0, run.output
    assert f"{first.folder / 'checkpoint' / 'step-3'}, its weights alone" in run.output
    assert NONE_FOUND in run.output
