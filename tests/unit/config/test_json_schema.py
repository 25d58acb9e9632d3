"""The JSON schema accepts and refuses the same TOML files as the loader; ``titanlite config``."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tomli
import tomli_w

from tests.support.runs import ROOT
from titanlite.commands import config as command
from titanlite.config import load_config
from titanlite.config.aliases import with_aliases
from titanlite.config.json_schema import dump_schema, json_schema
from titanlite.config.options import Option, options_of
from titanlite.config.reference import option_reference
from titanlite.config.schema import JobConfig
from titanlite.config.unsupported import UNSUPPORTED
from titanlite.errors import ConfigError

SCHEMA = json_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
SHIPPED = sorted((ROOT / "train_configs").rglob("*.toml"))
# A file cannot name the first; the second must be there to load.
ELSEWHERE = ("job.config_file", "experimental.custom_args_module")
OPTIONS = [
    option
    for section, keys in options_of(JobConfig).items()
    for option in keys.values()
    if option.name not in (*UNSUPPORTED, *ELSEWHERE) and option.base is not object
]


def loads(tree: dict[str, Any], folder: Path) -> bool:
    file = folder / "my.toml"
    file.write_text(tomli_w.dumps(tree))
    try:
        load_config([], str(file))
    except ConfigError:
        return False
    return True


def assign(tree: dict[str, Any], name: str, value: Any) -> None:
    *sections, key = name.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[key] = value


def valid_value(option: Option, draw: random.Random) -> Any:
    if option.base is list:
        words = option.choices or ("a", "layers.2", "x y")
        return draw.sample(words, draw.randint(0, len(words)))
    if option.choices:
        return draw.choice(option.choices)
    values: list[Any] = {
        bool: [True, False],
        int: [-1, 0, 1, 2, 7, 4096, 1 << 24, 1 << 31],
        float: [0, 0.0, 1e-8, 0.5, 0.95, 1, 1.0, 3, 99.5, 1e6],
        str: ["a", "op", "2", "notes/x", "some text"],
    }[option.base]
    return draw.choice([value for value in values if option.rule is None or option.rule.holds(value)])


def valid_tree(draw: random.Random) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for option in draw.sample(OPTIONS, draw.randint(1, 25)):
        assign(tree, option.name, valid_value(option, draw))
    return tree


# Each adds one fault to a tree.
FAULTS: dict[str, Callable[[dict[str, Any], random.Random], None]] = {
    "misspelt key": lambda tree, draw: assign(tree, f"{draw.choice(OPTIONS).name}x", 1),
    "unknown section": lambda tree, draw: assign(tree, "trainning.steps", 1),
    "outside of a section": lambda tree, draw: assign(tree, "steps", 1),
    "text for a number": lambda tree, draw: assign(tree, of_type(draw, int, float).name, "ten"),
    "a number for text": lambda tree, draw: assign(tree, of_type(draw, str).name, 3),
    "text for a boolean": lambda tree, draw: assign(tree, of_type(draw, bool).name, "yes"),
    "a fraction for a whole number": lambda tree, draw: assign(tree, of_type(draw, int).name, 2.5),
    "a boolean for a number": lambda tree, draw: assign(tree, of_type(draw, int, float).name, True),
    "below the limit": lambda tree, draw: assign(tree, limited(draw).name, -7),
    "no choice": lambda tree, draw: assign(tree, draw.choice([o for o in OPTIONS if o.choices]).name, "other"),
    "numbers in a list": lambda tree, draw: assign(tree, of_type(draw, list).name, [1]),
    "not implemented": lambda tree, draw: assign(tree, "optimizer.early_step_in_backward", True),
    "a section that is none": lambda tree, draw: tree.update(training=3),
}


def of_type(draw: random.Random, *types: type) -> Option:
    return draw.choice([option for option in OPTIONS if option.base in types])


def limited(draw: random.Random) -> Option:
    return draw.choice([o for o in OPTIONS if o.rule is not None and o.base in (int, float)])


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_shipped_files_are_valid_and_name_the_schema(file: Path) -> None:
    text = file.read_text()
    VALIDATOR.validate(tomli.loads(text))
    directive = text.splitlines()[0].removeprefix("#:schema ")
    assert (file.parent / directive).resolve() == ROOT / "train_configs" / "titanlite.schema.json"


def test_the_shipped_schema_is_that_of_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails: titanlite config --schema > train_configs/titanlite.schema.json"""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert command.main(["--schema"]) == 0
    assert capsys.readouterr().out == dump_schema(SCHEMA)
    assert (ROOT / "train_configs" / "titanlite.schema.json").read_text() == dump_schema(SCHEMA)


def test_100_valid_files_are_accepted(tmp_path: Path) -> None:
    draw = random.Random(0)
    for _ in range(100):
        tree = valid_tree(draw)
        assert loads(tree, tmp_path), tree
        VALIDATOR.validate(tree)


def test_100_files_with_one_fault_are_refused(tmp_path: Path) -> None:
    draw = random.Random(1)
    for number in range(100):
        tree = valid_tree(draw)
        fault = [*FAULTS][number % len(FAULTS)]
        FAULTS[fault](tree, draw)
        assert not VALIDATOR.is_valid(tree), (fault, tree)
        if fault != "not implemented":  # which the checks refuse, after loading
            assert not loads(tree, tmp_path), (fault, tree)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_the_limits_of_each_option_are_those_of_the_loader(option: Option) -> None:
    numbers = [
        -2,
        -1,
        0,
        1,
        2,
        100,
        10_001,
        1 << 24,
        (1 << 24) + 1,
        1 << 31,
        10**9 + 1,
        -0.5,
        0.5,
        1.5,
        99.9,
        1e31,
        1e-31,
    ]
    texts = [
        "",
        "a",
        "op",
        "0",
        "01",
        "3",
        "-3",
        "..",
        "a/../b",
        "/a",
        ".",
        "./",
        "a/b",
        "./a",
        " ",
        ".a",
        "a.",
        "x" * 201,
    ]
    for value in [*numbers, float("inf"), *texts, "x" * 201, [], ["a"], True]:
        if option.is_path and isinstance(value, str):
            continue  # it is looked up
        tree: dict[str, Any] = {}
        assign(tree, option.name, value)
        try:
            option.convert(value, "here")
        except ConfigError:
            if value != float("inf"):  # which is no JSON
                assert not VALIDATOR.is_valid(tree), value
        else:
            VALIDATOR.validate(tree)


def test_older_names_are_known() -> None:
    for section, keys in with_aliases(options_of(JobConfig)).items():
        for option in keys.values():
            table = SCHEMA
            for part in section.split("."):
                table = table["properties"][part]
            assert table["properties"][option.key].get("deprecated", False) == bool(option.alias_of)
    VALIDATOR.validate({"base": "x.toml", "training": {"batch_size": 3}, "debug": {"seed": 1}})
    assert not VALIDATOR.is_valid({"training": {"batch_size": "3"}})


# ---- titanlite config --diff


def diff(capsys: pytest.CaptureFixture[str], *names: object) -> list[str]:
    assert command.main(["--diff", *map(str, names)]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_difference_in_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.toml").write_text(f'base = "{ROOT}/train_configs/debug_model.toml"\n[optimizer]\nlr = 1\n')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text('run_folder = "."\n[job]\nname = "x"\n[model]\nconverters = ["y"]\n')
    assert diff(capsys, "debug_model", tmp_path / "a.toml") == ["optimizer.lr: 0.003 -> 1.0"]
    assert diff(capsys, tmp_path / "a.toml", tmp_path / "a.toml") == []
    lines = diff(capsys, tmp_path / "a.toml", tmp_path / "run")
    assert 'model.converters: [] -> ["y"]' in lines
    assert "training.seed: 0 -> unset" in lines
    assert not any(line.startswith("job.dump_folder") for line in lines)


def test_no_difference_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--diff", "debug_model", "debug_model"]) == 0
    assert "no option differs" in capsys.readouterr().err
    assert command.main(["--diff", "debug_model", str(tmp_path)]) == 2
    assert "a folder without config.toml" in capsys.readouterr().err
    assert command.main(["--diff", "debug_modle", "debug_model"]) == 2
    said = capsys.readouterr().err
    assert "debug_modle: there is no such file" in said
    assert "debug_model" in said.partition("comes with")[2]


def test_a_file_that_cannot_be_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.toml").write_text("[training]\nstepz = 1\n")
    assert command.main(["--diff", "debug_model", str(tmp_path / "a.toml")]) == 2
    assert "training.stepz" in capsys.readouterr().err


def test_the_reference_of_options_is_current() -> None:
    """If this fails: titanlite config --reference > docs/options.md"""
    page = option_reference()
    assert (ROOT / "docs" / "options.md").read_text() == page
    sections = dict(re.findall(r"^## ([\w.]+)\n\n((?:\|.*\n)+)", page, flags=re.MULTILINE))
    for option in OPTIONS:
        assert (f"\n| `{option.key}` | " in sections.get(option.section, "")) == (option.name not in UNSUPPORTED)
