"""The tokenizer of a run: from its weights into its log, its folder, its checkpoints and their exports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import Run, run_trainer
from tests.unit.checkpoint.test_tokenizer_of_weights import other_tokenizer
from titanlite.checkpoint.storage import read_info, verify
from titanlite.data import load_tokenizer
from titanlite.inference.convert import convert
from titanlite.inference.load import describe, tokenizer_of

CHECKPOINTS = {"checkpoint__enable_checkpoint": "true", "checkpoint__interval": 1, "training__steps": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def other(place: Path) -> Path:
    return other_tokenizer(place / "other")


@pytest.fixture(scope="module")
def run(place: Path, other: Path) -> Run:
    """A run of one step with another tokenizer than the shipped one."""
    run = run_trainer(place, name="first", model__tokenizer_path=other, **CHECKPOINTS)
    assert run.status == 0, run.output
    return run


@pytest.fixture(scope="module")
def exported(place: Path, run: Run) -> Path:
    convert(run.folder / "checkpoint" / "step-1", place / "exported")
    return place / "exported"


def digest(path: Path | str) -> str:
    return load_tokenizer(str(path)).identity["sha256"]


def refused(run: Run, *words: str) -> None:
    assert run.status == 2, run.output
    assert "Traceback" not in run.output
    assert "model.tokenizer_path" in run.output
    for word in words:
        assert word in run.output


def test_run_checkpoint_and_export_carry_it(run: Run, exported: Path, other: Path) -> None:
    step = run.folder / "checkpoint" / "step-1"
    verify(step)  # its sums cover the copy
    assert digest(run.folder / "tokenizer") == digest(step) == digest(exported) == digest(other)
    assert read_info(step).tokenizer["sha256"] == digest(other)
    for folder in (run.folder / "tokenizer", exported):
        assert json.loads((folder / "tokenizer_identity.json").read_text())["sha256"] == digest(other)
    assert f"{other}/tokenizer.json, 2,048 tokens, sha256 {digest(other)[:12]} (model.tokenizer_path)" in run.output


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
@pytest.mark.slow
def test_a_run_that_begins_with_weights_takes_theirs(
    kind: str, run: Run, exported: Path, other: Path, tmp_path: Path
) -> None:
    source = exported if kind == "export" else run.folder / "checkpoint"
    begun = run_trainer(tmp_path, checkpoint__initial_load_path=source, **CHECKPOINTS)
    assert begun.status == 0, begun.output
    assert "(of the weights in " in begun.output
    assert digest(begun.folder / "tokenizer") == digest(other)
    # The same first loss as with the tokenizer named: the texts have its ids.
    named = run_trainer(
        tmp_path, name="named", checkpoint__initial_load_path=source, model__tokenizer_path=other, training__steps=1
    )
    assert begun.losses() == named.losses()
    shutil.copytree(begun.folder, tmp_path / "moved")
    shutil.rmtree(begun.folder)
    again = run_trainer(tmp_path, name="moved", **{**CHECKPOINTS, "training__steps": 2})
    assert again.status == 0, again.output
    assert digest(tmp_path / "moved" / "checkpoint" / "step-2") == digest(other)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "first", **CHECKPOINTS, "training__steps": 2},
        {"name": "x", "checkpoint__initial_load_path": "first/checkpoint"},
        {"name": "x", "checkpoint__initial_load_path": "exported"},
    ],
    ids=["resume", "checkpoint", "export"],
)
def test_another_one_is_refused(options: dict[str, Any], run: Run, exported: Path, other: Path, place: Path) -> None:
    shipped = place / "shipped"
    shipped.mkdir(exist_ok=True)
    for name, text in load_tokenizer().files().items():
        (shipped / name).write_text(text)
    before = (run.folder / "config.toml").read_bytes()
    words = ("the argument --model.tokenizer_path", digest(other)[:12], digest(shipped)[:12], "normalizer")
    refused(run_trainer(place, model__tokenizer_path=shipped, **options), *words)
    assert (run.folder / "config.toml").read_bytes() == before
    if options["name"] == "x":
        explicit = {"checkpoint__exclude_from_loading": "tokenizer", **options, "name": f"y{exported.name}"}
        asked = run_trainer(place, model__tokenizer_path=shipped, training__steps=1, **explicit)
        assert asked.status == 0, asked.output
        assert digest(asked.folder / "tokenizer") == digest(shipped)
        shutil.rmtree(asked.folder)


def test_the_path_of_a_moved_run_is_not_needed(run: Run, other: Path, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "moved")
    options = {**CHECKPOINTS, "training__steps": 2, "model__tokenizer_path": "not/here/tokenizer.json"}
    moved = run_trainer(tmp_path, name="moved", **options)
    assert moved.status == 0, moved.output
    assert "there is no such file here; the copy in" in moved.output
    assert read_info(tmp_path / "moved" / "checkpoint" / "step-2").tokenizer_path == f"{other}/tokenizer.json"
    refused(run_trainer(tmp_path, name="new", **options), "no such file")


def test_one_that_does_not_fit_the_weights(exported: Path, tmp_path: Path) -> None:
    """Theirs is found in the folder, but has more tokens than their vocabulary."""
    folder = tmp_path / "weights"
    shutil.copytree(exported, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    content["added_tokens"] += [{"id": 2048 + i, "content": f"<new {i}>", **flags} for i in range(300)]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    refused(run_trainer(tmp_path, checkpoint__initial_load_path=folder), "delete", "tokenizer_identity.json")
    (folder / "tokenizer_identity.json").unlink()
    run = run_trainer(tmp_path, checkpoint__initial_load_path=folder)
    assert run.status == 2
    assert "the tokenizer has 2348 tokens, more than the 2048 of this" in run.output


def test_generate_and_convert_take_the_copy(run: Run, exported: Path, other: Path, tmp_path: Path) -> None:
    step = run.folder / "checkpoint" / "step-1"
    for folder in (step, exported):
        assert tokenizer_of(describe(folder)).tokenizer.identity["sha256"] == digest(other)
    convert(exported, tmp_path / "back")
    info = read_info(tmp_path / "back" / "step-0")
    assert info.tokenizer["sha256"] == digest(tmp_path / "back" / "step-0") == digest(other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"checkpoint__initial_load_path": "x"}, "no effect without"),
        ({"model__tokenizer_path": "other", **CHECKPOINTS}, "no effect without"),
        (
            {
                "checkpoint__initial_load_path": "x",
                "model__tokenizer_path": "other",
                "checkpoint__initial_load_model_weights_only": "false",
            },
            "exclude dataloader too",
        ),
    ],
)
def test_where_another_tokenizer_cannot_be_asked_for(
    options: dict[str, Any], words: str, place: Path, other: Path
) -> None:
    run = run_trainer(place, name="z", checkpoint__exclude_from_loading="tokenizer", **options)
    assert run.status == 2
    assert "checkpoint.exclude_from_loading" in run.output
    assert words in run.output
