"""torchtitan's contract: its keys of June and July 2025, their later names, its command lines, and torchao's tools."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tomli
import tomli_w

from tests.support.docs import prose_of, tables_in, text_of
from tests.support.runs import ROOT
from tests.unit.config.torchtitan_keys import keys_by_date
from titanlite.config import JobConfig, check_config, dump_toml, load_config
from titanlite.config.aliases import ALIASES, CONVERTERS, with_aliases
from titanlite.config.options import Option, options_of
from titanlite.config.unsupported import UNSUPPORTED
from titanlite.errors import ConfigError

DATES = keys_by_date()
EVER = {name: value for keys in DATES.values() for name, value in keys.items()}  # with the latest default of each
TOKENIZER = ROOT / "titanlite" / "data" / "assets" / "tokenizer.json"
SCHEMA = options_of(JobConfig)
# The defaults that are not torchtitan's of 31 July.
DIFFERENT = {
    "job.dump_folder": "./outputs",
    "metrics.enable_tensorboard": True,
    "model.tokenizer_path": "",
    "training.dataset": "pystdlib",
    "checkpoint.last_save_model_weights_only": False,
    "validation.dataset": "",
    "validation.local_batch_size": None,
    "validation.seq_len": None,
    "validation.interval": 100,
    "validation.steps": 10,
}


def get(config: JobConfig, name: str) -> Any:
    section, key = ALIASES.get(name, name).split(".")
    return getattr(getattr(config, section), key)


def write(path: Path, values: dict[str, Any]) -> str:
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, key = name.split(".")
        table = tree
        for section in sections:
            table = table.setdefault(section, {})
        table[key] = value
    path.write_text(tomli_w.dumps(tree))
    return str(path)


# ---- keys and defaults


@pytest.mark.parametrize("date", DATES)
def test_a_file_with_every_key_of_a_day_loads(date: str, tmp_path: Path) -> None:
    """At torchtitan's defaults, with a tokenizer that is here."""
    given = {name: value for name, value in DATES[date].items() if value is not None and name != "job.config_file"}
    given["model.tokenizer_path"] = str(TOKENIZER)
    file = write(tmp_path / "every_key.toml", given)
    config = load_config([], file)
    check_config(config, 2)
    for name, value in given.items():
        assert get(config, name) == value, name
        assert config.origin(ALIASES.get(name, name)).startswith(f"{file}, line "), name
    renamed = [name for name in given if name in ALIASES]
    assert len(config.notices) == len(renamed)
    for name, notice in zip(renamed, sorted(config.notices, key=lambda n: renamed.index(n.split()[0])), strict=True):
        assert notice.startswith(f"{name} ({file}, line ")
        assert notice.endswith(f" {ALIASES[name]} here")


def test_defaults_are_torchtitans_but_for_those_that_are_listed() -> None:
    config = JobConfig()
    present = {ALIASES.get(name, name): value for name, value in EVER.items()}
    assert {name: get(config, name) for name in present if get(config, name) != present[name]} == DIFFERENT


@pytest.mark.parametrize("name", sorted(DIFFERENT))
def test_the_documents_list_the_defaults_that_differ(name: str) -> None:
    theirs = next(value for key, value in reversed(EVER.items()) if ALIASES.get(key, key) == name)
    row = next(row for row in text_of(ROOT / "docs" / "torchtitan.md").splitlines() if row.startswith(f"| `{name}` |"))
    ours, shown = (cell.strip(" `") for cell in row.split("|")[2:4])
    spelled = {None: "unset", True: "true", False: "false", "": "empty"}
    assert (ours, shown) == (str(spelled.get(DIFFERENT[name], DIFFERENT[name])), str(spelled.get(theirs, theirs)))


@pytest.mark.parametrize("name", sorted({*ALIASES, *UNSUPPORTED}))
def test_the_documents_list_every_alias_and_every_key_that_is_not_implemented(name: str) -> None:
    assert f"`{name}`" in text_of(ROOT / "docs" / "torchtitan.md")


def test_the_documents_list_what_is_added() -> None:
    theirs = {ALIASES.get(name, name) for name in EVER} | {*UNSUPPORTED}
    sections = {name.split(".")[0] for name in theirs}
    added = {f"[{section}]": None for section in SCHEMA if section not in sections}
    for section, keys in SCHEMA.items():
        if section in sections:
            added |= {f"[{section}] {key}": None for key, option in keys.items() if option.name not in theirs}
    (table,) = (
        table for table in tables_in(prose_of(ROOT / "docs" / "torchtitan.md")) if {*table[0]} == {"section", "added"}
    )
    listed = []
    for row in table:
        words = re.findall(r"`([^`]+)`", row["added"])
        prefix = "" if row["section"] == "whole sections" else row["section"].strip("`") + " "
        listed += [prefix + word for word in words]
    assert sorted(listed) == sorted(added)


# ---- aliases

OPTIONS = with_aliases(SCHEMA)
RENAMED = [opt for keys in OPTIONS.values() for opt in keys.values() if opt.alias_of]


def another(opt: Option) -> Any:
    """A value that is not the default."""
    if opt.choices:
        return next(choice for choice in opt.choices if choice != opt.default)
    return {bool: not opt.default, int: 7, float: 0.25, str: "elsewhere", list: ["a.b", "c"]}[opt.base]


def test_the_renamed_keys_of_the_window_are_aliases() -> None:
    assert {name for name in EVER if name.split(".")[1] not in SCHEMA[name.split(".")[0]]} <= {*ALIASES}
    assert {f"{CONVERTER}.recipe_name", f"{CONVERTER}.filter_fqns"} <= {opt.name for opt in RENAMED}


CONVERTER = next(iter(CONVERTERS))


@pytest.mark.parametrize("opt", RENAMED, ids=lambda opt: opt.name)
def test_an_alias_works_wherever_its_present_name_does(opt: Option, tmp_path: Path) -> None:
    value = another(opt)
    text = ",".join(value) if opt.base is list else str(value).lower() if opt.base is bool else str(value)
    section, key = opt.alias_of.split(".")
    write(tmp_path / "base.toml", {opt.name: value})
    (tmp_path / "a.toml").write_text('base = "base.toml"')
    for argv, file, origin in (
        ([f"--{opt.name}={text}"], None, f"the argument --{opt.name}"),
        ([f"--{opt.name.replace('_', '-')}", text], None, f"the argument --{opt.name}"),
        ([], str(tmp_path / "base.toml"), f"{tmp_path / 'base.toml'}, line 2"),
        ([], str(tmp_path / "a.toml"), f"{tmp_path / 'base.toml'}, line 2"),
    ):
        config = load_config(argv, file)
        assert getattr(getattr(config, section), key) == value
        assert config.origin(opt.alias_of) == origin
        assert config.notices == [f"{opt.name} ({origin}) is called {opt.alias_of} here"]
        dumped = tomli.loads(dump_toml(config))
        assert dumped[section][key] == value
        assert opt.name.split(".")[-1] not in dumped.get(opt.name.split(".")[0], {}) or opt.name in SCHEMA


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--compile.enable"], "training.compile", True),
        (["--training.compile", "--compile.no-enable"], "training.compile", "refused"),
        (["--training.batch-size=3"], "training.local_batch_size", 3),
        (["--training.batch_size=3", "--training.local_batch_size=3"], "training.local_batch_size", 3),
        (["--training.batch_size=3", "--training.batch_size=4"], "training.local_batch_size", 4),
        (["--training.batch_size=3", "--training.local_batch_size=4"], "training.local_batch_size", "refused"),
        (["--checkpoint.last_save_model_only", "--checkpoint.model_weights_only=false"], "", "refused"),
        ([f"--{CONVERTER}.recipe_name", "rowwise"], "float8.recipe_name", "rowwise"),
        ([f"--model.converters={CONVERTER}"], "model.converters", ["float8"]),
        ([f"--model.converters=fused_rmsnorm,{CONVERTER}"], "model.converters", ["fused_rmsnorm", "float8"]),
    ],
)
def test_aliases_on_the_command_line(argv: list[str], name: str, value: Any) -> None:
    if value != "refused":
        assert get(load_config(argv), name) == value
        return
    with pytest.raises(ConfigError, match="contradicts") as error:
        load_config(argv)
    assert error.value.origin == f"the argument --{error.value.key}"


def test_two_names_may_differ_where_one_file_or_argument_wins(tmp_path: Path) -> None:
    write(tmp_path / "base.toml", {"training.batch_size": 1})
    (tmp_path / "a.toml").write_text('base = "base.toml"\n[training]\nlocal_batch_size = 2')
    assert load_config([], str(tmp_path / "a.toml")).training.local_batch_size == 2
    assert load_config(["--training.batch_size=3"], str(tmp_path / "a.toml")).training.local_batch_size == 3
    both = write(tmp_path / "both.toml", {"training.local_batch_size": 1, "training.batch_size": 2})
    with pytest.raises(ConfigError, match=r"contradicts 1 \(.*both.toml, line 2\)") as error:
        load_config([], both)
    assert (error.value.key, error.value.value) == ("training.batch_size", 2)


def test_a_wrong_value_is_reported_under_the_name_that_was_written() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(["--training.batch_size=0"])
    assert (error.value.key, error.value.origin) == ("training.batch_size", "the argument --training.batch_size")


def test_hints_name_no_alias_and_nothing_that_is_refused() -> None:
    for argument in ("--training.batch_siz=1", "--fault_toleranse.enable", "--quantize.linear.mx.a=1"):
        with pytest.raises(ConfigError) as error:
            load_config([argument])
        message = str(error.value).replace(argument, "")
        for name in (" batch_size,", '"batch_size"', "quantize.linear.f", "fault_tolerance"):
            assert name not in message


@pytest.mark.parametrize(
    "text", ["[quantize.linear.float8]\nemulat = true", "[quantize.linear.fp8]\na = 1", "[quantize]\na = 1"]
)
def test_nested_sections_are_as_strict_as_others(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"a\.toml, line [12]: "):
        load_config([], str(tmp_path / "a.toml"))


def test_a_section_of_third_parties_keeps_its_own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "with_batch_size.py").write_text(
        "from dataclasses import dataclass, field\n@dataclass\nclass Training:\n    batch_size: int = 3\n"
        "@dataclass\nclass JobConfig:\n    training: Training = field(default_factory=Training)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    argv = ["--experimental.custom_args_module=with_batch_size", "--training.batch_size=5"]
    config: Any = load_config(argv)
    assert (config.training.batch_size, config.training.local_batch_size, config.notices) == (5, 8, [])


# ---- its files by their path, and command lines

PATH = "torchtitan/models/llama3/train_configs/llama3_8b.toml"


def test_a_path_of_torchtitans_finds_the_packaged_file_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(f'base = "{PATH}"')
    for argv, file in (([], PATH), ([f"--job.config_file=./{PATH}"], None), ([], "mine.toml"), ([], "llama3_8b.toml")):
        config = load_config(argv, file)
        assert (config.model.flavor, config.training.steps) == ("8B", 1000)
        assert len(config.notices) == 1
        assert "there is no such file" in config.notices[0]
        assert str(ROOT / "train_configs" / "llama3_8b.toml") in config.notices[0]
    assert load_config([], "llama3_8b").notices == []
    Path(PATH).parent.mkdir(parents=True)
    Path(PATH).write_text("[training]\nsteps = 7")
    config = load_config([], PATH)
    assert (config.training.steps, config.notices) == (7, [])
    with pytest.raises(ConfigError, match="there is no file"):
        load_config([], "torchtitan/models/llama3/train_configs/llama3_9b.toml")


# The command lines of torchao's tutorial on pre-training with float8, and of its benchmarks/float8/training over time.
LINES = """
--training.compile --model.converters="float8" --float8.recipe_name="rowwise"
--training.compile
--training.compile --model.converters="float8"
--training.steps=100 --training.batch_size=1 --training.compile --model.converters=float8 --float8.recipe_name=rowwise
--training.steps=100 --training.local-batch-size=1 --training.compile --model.converters=float8 \
 --float8.enable_fsdp_float8_all_gather --float8.precompute_float8_dynamic_scale_for_fsdp
--training.steps=100 --training.batch_size=1 --training.compile --model.converters=float8 \
 --float8.enable_fsdp_float8_all_gather --float8.precompute_float8_dynamic_scale_for_fsdp \
 --float8.force_recompute_fp8_weight_in_bwd
--training.steps=100 --training.local-batch-size=1 --compile.enable --model.converters=float8 \
 --float8.recipe_name=rowwise
--compile.enable --model.converters=quantize.linear.float8 --quantize.linear.float8.recipe_name rowwise
--compile.enable --model.converters="quantize.linear.float8" --quantize.linear.float8.enable_fsdp_float8_all_gather \
 --quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp
""".strip()


@pytest.mark.parametrize("line", LINES.splitlines())
def test_command_lines_of_torchtitan_and_torchao(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(shlex.split(line), f"./{PATH}")
    config.model.tokenizer_path = str(TOKENIZER)
    check_config(config, 8)
    assert config.training.compile
    assert config.model.converters == (["float8"] if "float8" in line else [])
    assert config.float8.recipe_name == ("rowwise" if "rowwise" in line else None)
    assert config.float8.enable_fsdp_float8_all_gather == ("all_gather" in line)
    assert config.training.local_batch_size == 1


@pytest.mark.slow
def test_a_tutorial_line_trains_and_torchaos_parser_reads_its_log(train: Any) -> None:
    """The parser's expression takes the step, the memory and the speed of each line, and nothing else in the log."""
    run = train(
        job__config_file=f"./{PATH}",
        compile__enable="true",
        compile__backend="eager",
        model__converters="float8",
        model__flavor="debugmodel",
        model__tokenizer_path=TOKENIZER,
        training__dataset="pystdlib",
        validation__freq=2,
        validation__enabled="true",
        validation__steps=1,
        lr_scheduler__warmup_steps=9,
    )
    assert run.status == 0, run.output
    assert run.output.count(" is called ") == 3
    assert f'"./{PATH}" (the argument --job.config_file): there is no such file' in run.output
    parsed = re.findall(r"step:.*?(\d+).*?memory:.*?([\d.]+)GiB.*?tps:.*?([\d,]+)", run.output)
    shown = [(str(row["step"]), f"{row['memory_gib']:.2f}", f"{round(row['tps']):,}") for row in run.rows()]
    assert parsed == shown
    assert len(parsed) == 3
    assert run.rows()[-1]["lr"] == pytest.approx(3e-4)  # the warm-up is as long as the run, not longer
    assert "is called" not in (run.folder / "config.toml").read_text()
    assert load_config([], str(run.folder / "config.toml")).notices == []


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["--checkpoint.initial_load_in_hf"], "checkpoint.initial_load_in_hf"),
        (["--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_path=."], "checkpoint.initial_load_in_hf"),
        (["--validation.enabled", "--validation.steps=-1"], "validation.steps"),
        (["--validation.enabled", "--validation.local_batch_size=1"], "validation.local_batch_size"),
        (["--validation.enabled", "--validation.seq_len=4096"], "validation.seq_len"),
        (["--validation.enabled", "--validation.seq_len=2048", "--validation.local_batch_size=8"], ""),
        (["--validation.enabled=false", "--validation.dataset=c4_validation", "--validation.steps=-1"], ""),
        (["--validation.dataset=c4_validation"], "validation.dataset"),
    ],
)
def test_keys_that_are_honoured_in_part(
    options: list[str], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(options)
    if not key:
        check_config(config, 1)
        return
    with pytest.raises(ConfigError) as error:
        check_config(config, 1)
    assert error.value.key == key
    if key.startswith("checkpoint"):
        (tmp_path / "config.json").touch()
        check_config(load_config([*options[:1], "--checkpoint.initial_load_path=."]), 1)
