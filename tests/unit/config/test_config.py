"""The configuration: precedence, spellings, the message for everything that is wrong, ``--help``, and ``check``."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.forks import ROOT
from titanlite.config import check_config, dump_toml, global_batch_size, load_config, packaged, resolve_degrees
from titanlite.config.options import Option, options_of
from titanlite.config.run_config import FIXED_NAMES, FOLDERS
from titanlite.config.schema import JobConfig, Parallelism
from titanlite.config.unsupported import UNSUPPORTED
from titanlite.errors import ConfigError

BY_NAME = {opt.name: opt for keys in options_of(JobConfig).values() for opt in keys.values()}
# Two say where the configuration comes from, and have their own tests. The last one takes any value.
SPECIAL = ("job.config_file", "experimental.custom_args_module", "parallelism.module_fqns_per_model_part")
ORDINARY = [opt for opt in BY_NAME.values() if opt.name not in SPECIAL]
LISTED = {name: opt for name, opt in BY_NAME.items() if name not in UNSUPPORTED}


def get(config: JobConfig, name: str) -> Any:
    return config.value(name)


def write(path: Path, values: dict[str, Any], base: str | None = None) -> str:
    tree: dict[str, Any] = {"base": base} if base else {}
    for name, value in values.items():
        section, _, key = name.rpartition(".")
        tree.setdefault(section, {})[key] = value
    path.write_text(tomli_w.dumps(tree), encoding="utf-8")
    return str(path)


def refusal(argv: list[str], file: str | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(argv, file)
    return str(error.value)


# ---- precedence


def values_of(opt: Option) -> st.SearchStrategy[Any]:
    """Any value that an option takes, and that both TOML and the command line can spell."""
    text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
    if opt.base is list:
        item = st.sampled_from(opt.choices) if opt.choices else text.map(str.strip).filter(lambda s: s and "," not in s)
        return st.lists(item, max_size=3)
    if opt.choices:
        return st.sampled_from(opt.choices)
    values: st.SearchStrategy[Any] = {
        bool: st.booleans(),
        int: st.integers(-1, 2**40) | st.integers(1, 100),
        float: st.floats(0, 1),
        str: st.sampled_from(["op", "1", "2", "12"]) if opt.rule else text.filter(lambda s: s.lower() != "none"),
    }[opt.base]
    return values.filter(opt.rule.holds) if opt.rule else values


def argument(opt: Option, value: Any) -> str:
    text = {bool: lambda: str(value).lower(), list: lambda: ",".join(value)}.get(opt.base, lambda: str(value))()
    return f"--{opt.name}={text}"


layers = st.lists(st.sampled_from([opt.name for opt in ORDINARY]), max_size=6, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: values_of(BY_NAME[name]) for name in names})
)


@given(base=layers, middle=layers, file=layers, arguments=layers)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_command_line_over_file_over_its_bases_over_defaults(
    base: dict[str, Any], middle: dict[str, Any], file: dict[str, Any], arguments: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "deeper").mkdir()
        write(folder / "base.toml", base)
        write(folder / "deeper" / "middle.toml", middle, base="../base.toml")
        path = write(folder / "file.toml", file, base="deeper/middle.toml")
        config = load_config([argument(BY_NAME[name], value) for name, value in arguments.items()], path)
    expected = {**base, **middle, **file, **arguments}
    for opt in ORDINARY:
        assert get(config, opt.name) == expected.get(opt.name, opt.default), opt.name
        assert (config.origin(opt.name) == "the default") == (opt.name not in expected), opt.name


def test_the_argument_names_the_file_before_the_environment(tmp_path: Path) -> None:
    default = write(tmp_path / "default.toml", {"training.steps": 1, "training.seq_len": 64})
    named = write(tmp_path / "named.toml", {"training.steps": 2})
    config = load_config([f"--job.config_file={named}"], default)
    assert (config.training.steps, config.training.seq_len) == (2, 2048)
    assert config.job.config_file == named


def test_origins_name_line_argument_or_default(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('# a comment\n[training]\nsteps = 3\n\n[ "model" ]\n  "flavor" = "1B"\n')
    config = load_config(["--optimizer.lr=1e-3"], str(path))
    assert config.origin("training.steps") == f"{path}, line 3"
    assert config.origin("model.flavor") == f"{path}, line 6"
    assert config.origin("optimizer.lr") == "the argument --optimizer.lr"
    assert config.origin("training.seq_len") == "the default"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.toml": 'base = "b.toml"'}, r"a\.toml, line 1: base = 'b\.toml': there is no file .*b\.toml"),
        ({"a.toml": 'base = "a.toml"'}, r"line 1: base = 'a\.toml': .* circle: .*a\.toml -> .*a\.toml$"),
        (
            {"a.toml": '\nbase = "sub/b.toml"', "sub/b.toml": 'base = "../a.toml"'},
            r"b\.toml, line 1: base = '\.\./a\.toml': .* circle: .*a\.toml -> .*b\.toml -> .*a\.toml$",
        ),
        ({"a.toml": "base = 3"}, r"a\.toml, line 1: base = 3: must be a string"),
        (
            {"a.toml": 'base = "b.toml"', "b.toml": "[training]\nstep = 1"},
            r"b\.toml, line 2: unknown key training\.step ",
        ),
    ],
)
def test_bases_that_are_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert re.search(message, refusal([], str(tmp_path / "a.toml")))


# ---- the effective configuration


def another(opt: Option) -> Any:
    """A value that is not the default."""
    if opt.base is list:
        return [opt.choices[-1]] if opt.choices else ["layers.0", 'a "quoted, one"']
    tries = (
        opt.choices or {bool: (True, False), int: (7, 8), float: (0.25, 0.5), str: ("op", 'é "x" \\ \n #')}[opt.base]
    )
    return next(v for v in reversed(tries) if v != opt.default and (opt.rule is None or opt.rule.holds(v)))


def test_effective_configuration_loads_to_an_equal_one(tmp_path: Path) -> None:
    free = [opt for opt in ORDINARY if len(opt.choices) != 1]
    assert len(free) > 100
    original = load_config([], write(tmp_path / "a.toml", {opt.name: another(opt) for opt in free}))
    for opt in free:
        assert get(original, opt.name) != opt.default, opt.name
    (tmp_path / "dumped.toml").write_text(dump_toml(original), encoding="utf-8")
    again = load_config([], str(tmp_path / "dumped.toml"))
    original.job.config_file = again.job.config_file
    assert again == original


def test_effective_configuration_stands_alone(tmp_path: Path) -> None:
    write(tmp_path / "base.toml", {"training.steps": 5})
    config = load_config([], write(tmp_path / "a.toml", {}, base="base.toml"))
    (tmp_path / "elsewhere").mkdir()
    dumped = tmp_path / "elsewhere" / "config.toml"
    dumped.write_text(dump_toml(config))
    assert load_config([], str(dumped)).training.steps == 5
    assert "base" not in dumped.read_text()
    assert "config_file" not in dumped.read_text()


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("optimizer.implementation", {"fused", "foreach", "for-loop"}),
        ("parallelism.fsdp_reshard_after_forward", {"default", "always", "never"}),
        ("parallelism.context_parallel_rotate_method", {"allgather", "alltoall"}),
        ("checkpoint.export_dtype", {"float32", "float16", "bfloat16"}),
        ("checkpoint.async_mode", {"disabled", "async", "async_with_pinned_mem"}),
        ("activation_checkpoint.mode", {"selective", "full", "none", "auto"}),
        ("training.mixed_precision_param", {"bfloat16", "float32"}),
        ("float8.recipe_name", {"tensorwise", "rowwise", "rowwise_with_gw_hp"}),
    ],
)
def test_choices(name: str, choices: set[str]) -> None:
    assert set(BY_NAME[name].choices) == choices
    for choice in choices:
        assert get(load_config([f"--{name}={choice}"]), name) == choice
    assert f'{name} = "unheard_of" (the argument --{name}): must be one of' in refusal([f"--{name}=unheard_of"])


@pytest.mark.parametrize(
    ("name", "hints"),
    [
        ("checkpoint.saves", []),
        ("profiling.enable", ['"enable_profiling"', '"enable_memory_snapshot"']),
        ("training.batch", ['"local_batch_size"', '"global_batch_size"']),
        ("training.step", ['"steps"']),
        ("training.warmup_steps", ['"lr_scheduler.warmup_steps"']),
        ("training.lr", ['"optimizer.lr"']),
        ("optimizer.steps", ['"training.steps"', '"validation.steps"']),
        ("checkpoint.path", ['"initial_load_path"']),
        ("job.folder", ['"dump_folder"']),
        ("training.enable_compile", ['"compile"']),
        ("float8.recipe", ['"recipe_name"']),
    ],
)
def test_the_hint_for_an_unknown_key_is_of_its_section_if_that_has_a_near_one(name: str, hints: list[str]) -> None:
    message = refusal([f"--{name}=1"]).partition(";")[0]
    assert re.findall(r'"[\w.]+"', message) == hints


NUMBERS = [opt for opt in ORDINARY if opt.base in (int, float) and opt.name not in UNSUPPORTED]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "-1e400", "-2", "9" * 30, "-" + "9" * 30, "9" * 5000])
@pytest.mark.parametrize("in_file", [True, False])
def test_absurd_numbers_are_refused_by_their_rule_or_can_be_held(tmp_path: Path, value: str, in_file: bool) -> None:
    for opt in NUMBERS:
        section, _, key = opt.name.rpartition(".")
        (tmp_path / "a.toml").write_text(f"[{section}]\n{key} = {value}\n")
        given: tuple[list[str], str | None] = (
            ([], str(tmp_path / "a.toml")) if in_file else ([f"--{opt.name}={value}"], None)
        )
        try:
            number = get(load_config(*given), opt.name)
        except ConfigError:
            assert opt.name in refusal(*given) or "digits" in refusal(*given)
            continue
        assert opt.base is float, (opt.name, number)
        assert math.isfinite(number) or "inf is no limit" in opt.rule.text, (opt.name, number)  # type: ignore[union-attr]
        assert float(value) == number, (opt.name, number)


def test_seeds_are_those_that_torch_takes() -> None:
    assert load_config([f"--training.seed={2**64 - 1}"]).training.seed == 2**64 - 1
    for seed in (2**64, 2**200, -1):
        assert "training.seed = " in refusal([f"--training.seed={seed}"])


@pytest.mark.parametrize("section_key", FOLDERS)
@pytest.mark.parametrize("name", [*FIXED_NAMES, "tokenizer/below", "./earlier", " "])
def test_folders_have_other_names_than_the_files_of_the_run_folder(section_key: tuple[str, str], name: str) -> None:
    key = ".".join(section_key)
    with pytest.raises(ConfigError) as caught:
        check_config(load_config([f"--{key}={name}"]), 1)
    assert (caught.value.key, caught.value.value) == (key, name)


@pytest.mark.parametrize(
    "value",
    [os.fsdecode(b"caf\xe9"), "with\0nothing", "a" * 256, "b/" * 3000, "~nobody-of-this-name/x", "loop/x"],
)
def test_paths_that_no_system_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    paths = [opt.name for opt in BY_NAME.values() if opt.is_path]
    assert {"job.dump_folder", "training.dataset_path", "model.tokenizer_path"} <= {*paths}
    for name in paths:
        assert f"{name} = " in refusal([f"--{name}={value}"])


@pytest.mark.parametrize("text", ["a = " + "[" * 5000, "a = " + "9" * 5000, '[job]\ndescription = "a\\u0000"', "\0"])
def test_files_that_toml_readers_stumble_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.toml").write_text(text)
    assert "a.toml" in refusal([], str(tmp_path / "a.toml"))


def test_the_nearest_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_run.toml").touch()
    assert 'did you mean "llama3_8b"?' in refusal([], "llama3_8")
    assert 'did you mean "my_run.toml"?' in refusal([], "my_rum.toml")
    assert "did you mean" not in refusal([], "something/else.toml")


def test_packaged_files_go_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their path below train_configs or its last part, with .toml or not, from a file too; a folder of that name,
    such as the run's, is not meant."""
    last_parts = [name.rpartition("/")[2] for name in packaged.names()]
    assert len({*last_parts}) == len(last_parts)
    monkeypatch.chdir(tmp_path)
    name = "phi_4_hellaswag_float8"
    Path(name).mkdir()
    Path("mine.toml").write_text(f'base = "finetune/{name}"')
    for named in (
        name,
        f"finetune/{name}",
        f"finetune/{name}.toml",
        f"./train_configs/finetune/{name}.toml",
        "mine.toml",
    ):
        config = load_config([], named)
        assert (config.model.name, config.model.converters, config.training.seq_len) == ("phi3", ["float8"], 4096)
        assert bool(config.notices) == (named.endswith(f"{name}.toml"))
    assert f'did you mean "finetune/{name}"?' in refusal([], "phi_4_hellaswag_flota8")


def test_every_option_has_help() -> None:
    assert not [opt.name for opt in LISTED.values() if len(opt.help) < 10]


# ---- spellings


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--training.compile"], "training.compile", True),
        (["--training.compile=true"], "training.compile", True),
        (["--training.compile=True"], "training.compile", True),
        (["--training.compile=1"], "training.compile", True),
        (["--training.compile", "true"], "training.compile", True),
        (["--metrics.enable_tensorboard=false"], "metrics.enable_tensorboard", False),
        (["--metrics.enable_tensorboard=0"], "metrics.enable_tensorboard", False),
        (["--metrics.enable_tensorboard", "False"], "metrics.enable_tensorboard", False),
        (["--metrics.no-enable_tensorboard"], "metrics.enable_tensorboard", False),
        (["--metrics.no-enable-tensorboard"], "metrics.enable_tensorboard", False),
        (["--metrics.no_enable_tensorboard"], "metrics.enable_tensorboard", False),
        (["--compile.dynamic"], "compile.dynamic", True),
        (["--compile.dynamic=none"], "compile.dynamic", None),
        (["--training.compile", "--training.no-compile"], "training.compile", False),
        (["--training.no-compile", "--training.compile"], "training.compile", True),
        (["--training.steps=1", "--training.steps=2"], "training.steps", 2),
        (["--training.steps", "5"], "training.steps", 5),
        (["--training.seq-len=64"], "training.seq_len", 64),
        (["--lr-scheduler.warmup-steps", "3"], "lr_scheduler.warmup_steps", 3),
        (["--job.dump-folder=a-b=c"], "job.dump_folder", "a-b=c"),
        (["--job.description="], "job.description", ""),
        (["--parallelism.data_parallel_shard_degree", "-1"], "parallelism.data_parallel_shard_degree", -1),
        (["--optimizer.lr=1e-3"], "optimizer.lr", 1e-3),
        (["--optimizer.lr=1"], "optimizer.lr", 1.0),
        (["--training.max_norm=inf"], "training.max_norm", math.inf),
        (["--training.seed=none"], "training.seed", None),
        (["--lr_scheduler.decay_ratio=0.5", "--lr_scheduler.decay_ratio=none"], "lr_scheduler.decay_ratio", None),
        (["--model.converters=float8"], "model.converters", ["float8"]),
        (["--model.converters=float8, fused_rmsnorm,"], "model.converters", ["float8", "fused_rmsnorm"]),
        (["--mx.filter_fqns="], "mx.filter_fqns", []),
        (["--compile.components=loss,model"], "compile.components", ["loss", "model"]),
    ],
)
def test_arguments(argv: list[str], name: str, value: Any) -> None:
    got = get(load_config(argv), name)
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("toml", "name", "value"),
    [
        ("[checkpoint]\nlast_save_model_weights_only = true", "checkpoint.last_save_model_weights_only", True),
        ('[profiling]\nsave_traces_folder = "profile_trace"', "profiling.save_traces_folder", "profile_trace"),
        (
            "[activation_checkpoint]\nselective_ac_option = '2'  # 'int' = ac every N",
            "activation_checkpoint.selective_ac_option",
            "2",
        ),
        ("[activation_checkpoint]\nselective_ac_option = 'op'", "activation_checkpoint.selective_ac_option", "op"),
        ('[model]\nconverters = "float8,fused_rmsnorm"', "model.converters", ["float8", "fused_rmsnorm"]),
        ("[model]\nconverters = []", "model.converters", []),
        ("[optimizer]\nlr = 1", "optimizer.lr", 1.0),
        ("training.steps = 3", "training.steps", 3),
        ("training = {steps = 3}", "training.steps", 3),
        ("[training]\nmax_norm = inf", "training.max_norm", math.inf),
    ],
)
def test_toml_spellings(tmp_path: Path, toml: str, name: str, value: Any) -> None:
    (tmp_path / "a.toml").write_text(toml)
    got = get(load_config([], str(tmp_path / "a.toml")), name)
    assert (got, type(got)) == (value, type(value))


# ---- what is wrong, and the message


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (
            ["--training.step=3"],
            ["argument --training.step=3", "unknown key training.step", '"steps"', "has dataset, "],
        ),
        (["--training.seq-length=3"], ["argument --training.seq-length=3", '"seq_len"']),
        (["--optimizer.seq_len=3"], ["unknown key optimizer.seq_len", '"training.seq_len"']),
        (["--trainin.steps=3"], ["argument --trainin.steps=3", "unknown section [trainin]", '"training"', "job, prof"]),
        (["--steps=3"], ["argument --steps=3", "--section.key", "--training.steps"]),
        (["--seq-len=3"], ["--training.seq_len"]),
        (["--training.no-steps"], ["argument --training.no-steps", "unknown key", '"steps"']),
        (["--training.no-compil"], ["argument --training.no-compil", "unknown key"]),
        (
            ["--training.steps=abc"],
            ['training.steps = "abc"', "argument --training.steps", "a whole number, at least 1"],
        ),
        (["--training.steps=1.5"], ['training.steps = "1.5"', "a whole number"]),
        (["--training.steps=true"], ['training.steps = "true"', "a whole number"]),
        (["--training.steps=0"], ["training.steps = 0", "at least 1"]),
        (["--training.steps=none"], ['training.steps = "none"', "a whole number"]),
        (["--training.steps"], ["--training.steps", "expected one argument"]),
        (["--job.config_file"], ["--job.config_file", "expected one argument"]),
        (["--experimental.custom_args_module"], ["custom_args_module", "expected one argument"]),
        (["--training.seed=-1"], ["training.seed = -1", "0 or more"]),
        (["--training.compile=maybe"], ['training.compile = "maybe"', "argument --training.compile", "true or false"]),
        (["--training.no-compile=true"], ["--training.no-compile", "true"]),
        (["--optimizer.lr=fast"], ['optimizer.lr = "fast"', "a number, more than 0"]),
        (["--optimizer.lr=0"], ["optimizer.lr = 0.0", "more than 0"]),
        (["--optimizer.lr=nan"], ["optimizer.lr = nan", "more than 0"]),
        (["--optimizer.beta1=1"], ["optimizer.beta1 = 1.0", "at least 0 and below 1"]),
        (["--lr_scheduler.lr_min=1.5"], ["lr_scheduler.lr_min = 1.5", "between 0 and 1"]),
        (["--parallelism.tensor_parallel_degree=-2"], ["tensor_parallel_degree = -2", "at least 1"]),
        (["--parallelism.data_parallel_shard_degree=0"], ["data_parallel_shard_degree = 0", "or -1 to infer it"]),
        (["--activation_checkpoint.mode=some"], ['mode = "some"', 'one of "none", "full", "selective"']),
        (["--activation_checkpoint.selective_ac_option=0"], ['selective_ac_option = "0"', '"op", or a whole number']),
        (["--compile.components=model,optimizer"], ["compile.components", 'each one of "model", "loss"']),
        (["--float8.recipe_name=row"], ['float8.recipe_name = "row"', '"rowwise"']),
        (["train"], ["unrecognized arguments: train"]),
        (["--training.steps=3", "-q"], ["unrecognized arguments: -q"]),
        (
            ["--job.config_file=gone.toml"],
            ['job.config_file = "gone.toml"', "argument --job.config_file", "no file gone"],
        ),
        (["--job.config-file=gone.toml"], ["argument --job.config_file", "no file gone.toml"]),
    ],
)
def test_bad_arguments(argv: list[str], parts: list[str]) -> None:
    message = refusal(argv)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("toml", "line", "parts"),
    [
        ("[training]\n\nstep = 3", 3, ["unknown key training.step", '"steps"', "[training] has dataset"]),
        ("[trainning]\nsteps = 3", 1, ["unknown section [trainning]", '"training"', "the sections are job, "]),
        ("\n[a.b]\nc = 1", None, ["unknown section [a]"]),
        ("[optimizer]\nsteps = 3", 2, ["unknown key optimizer.steps", '"training.steps"']),
        ("[training.extra]\na = 3", 1, ["unknown key training.extra"]),
        ("steps = 3", 1, ["steps stands outside of any section", "[training]"]),
        ("wrong = 3", 1, ["wrong stands outside of any section"]),
        ("training = 3", 1, ["training is a section", "[training]"]),
        ("[[training]]\nsteps = 3", 1, ["training is a section", "[training]"]),
        ("[training]\nsteps = true", 2, ["training.steps = true", "a whole number, at least 1"]),
        ("[training]\nsteps = 3.0", 2, ["training.steps = 3.0", "a whole number"]),
        ('[training]\nsteps = "3"', 2, ['training.steps = "3"', "a whole number"]),
        ("[training]\nsteps = [3]", 2, ["training.steps = [3]", "a whole number"]),
        ("[training]\nsteps = 2024-01-01", 2, ["training.steps = 2024-01-01", "a whole number"]),
        ("[training]\nsteps = 0", 2, ["training.steps = 0", "at least 1"]),
        ("[training]\ncompile = 1", 2, ["training.compile = 1", "true or false"]),
        ('[training]\ncompile = "true"', 2, ['training.compile = "true"', "true or false"]),
        ("[optimizer]\nlr = true", 2, ["optimizer.lr = true", "a number, more than 0"]),
        ('[optimizer]\nlr = "1e-3"', 2, ['optimizer.lr = "1e-3"', "a number"]),
        ("[optimizer]\nlr = -1", 2, ["optimizer.lr = -1", "more than 0"]),
        ("[optimizer]\nlr = nan", 2, ["optimizer.lr = nan", "more than 0"]),
        ("[model]\nflavor = 8", 2, ["model.flavor = 8", "a string"]),
        ("[model]\nflavor = true", 2, ["model.flavor = true", "a string"]),
        ('[model]\nconverters = ["float8", 1]', 2, ["model.converters", "a list of strings"]),
        ("[model]\nconverters = 1", 2, ["model.converters = 1", "a list of strings"]),
        ("[model]\nconverters = {a = 1}", 2, ["model.converters", "a list of strings"]),
        ('[compile]\ncomponents = ["all"]', 2, ["compile.components", 'each one of "model", "loss"']),
        ('[activation_checkpoint]\nmode = "All"', 2, ['mode = "All"', 'one of "none", "full", "selective"']),
        ("[activation_checkpoint]\nselective_ac_option = 2", 2, ["selective_ac_option = 2", "a string"]),
        ('[job]\nconfig_file = "other.toml"', 2, ['base = "other.toml"', "job.config_file"]),
        ("[training]\nsteps 3", 2, ["not valid TOML"]),
        ("[training]\nsteps = 3\nsteps = 4", 3, ["not valid TOML"]),
        ('[model]\nflavor = "8B', 2, ["not valid TOML"]),
    ],
)
def test_bad_toml(tmp_path: Path, toml: str, line: int | None, parts: list[str]) -> None:
    path = tmp_path / "a.toml"
    path.write_text(toml)
    message = refusal([], str(path))
    assert str(path) in message
    if line is not None:
        assert re.search(rf"a\.toml, line {line}\b", message), message
    for part in parts:
        assert part in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    message = refusal([], str(tmp_path / "gone.toml"))
    assert "CONFIG_FILE" in message
    assert f"there is no file {tmp_path / 'gone.toml'}" in message
    (tmp_path / "latin.toml").write_bytes('[job]\ndescription = "café"'.encode("latin-1"))
    assert re.search(r"latin\.toml cannot be read: .*utf-8", refusal([], str(tmp_path / "latin.toml")))
    assert re.search(r"cannot be read: .*directory", refusal([], str(tmp_path)))


@pytest.mark.parametrize("arguments", [["--training.step=3"], ["--training.steps=x"], ["--job.config_file=gone.toml"]])
def test_bad_input_ends_the_program_with_status_2_and_one_message(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "titanlite.train", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"titanlite: error: .*\n", done.stderr)


# ---- options of third parties

CUSTOM_ARGS = '''
from dataclasses import dataclass, field

@dataclass
class Training:
    bonus: int = 3
    """A key that joins an old section."""

@dataclass
class Novel:
    words: list[str] = field(default_factory=list)
    """A key of a new section."""
    amount: float | None = None
    """Another."""

@dataclass
class JobConfig:
    training: Training = field(default_factory=Training)
    novel: Novel = field(default_factory=Novel)
'''


# What follows is a field of a section [training] that joins ours.
TRAINING_OF_THEIRS = """amount: int = 3
@dataclass
class JobConfig:
    training: Training = field(default_factory=lambda: Training())
@dataclass
class Training:
    """


@pytest.fixture
def custom_args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"custom_args_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(CUSTOM_ARGS)
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.mark.parametrize("source", ["argument", "hyphens", "file", "base", "file by argument"])
def test_custom_args_module(custom_args: str, tmp_path: Path, source: str) -> None:
    named = {"experimental.custom_args_module": custom_args}
    added = ["--training.bonus=4", "--training.steps=5", "--novel.words=a,b", "--novel.amount=2"]
    file = None
    if source == "argument":
        added.append(f"--experimental.custom_args_module={custom_args}")
    elif source == "hyphens":
        added += ["--experimental.custom-args-module", custom_args]
    elif source == "file by argument":
        added.append(f"--job.config-file={write(tmp_path / 'a.toml', named)}")
    elif source == "base":
        write(tmp_path / "base.toml", named)
        file = write(tmp_path / "a.toml", {"novel.amount": 1.0}, base="base.toml")
    else:
        file = write(tmp_path / "a.toml", {**named, "novel.amount": 1.0})
    config: Any = load_config(added, file)
    assert isinstance(config, JobConfig)
    assert (config.training.bonus, config.training.steps, config.training.seq_len) == (4, 5, 2048)
    assert (config.novel.words, config.novel.amount) == (["a", "b"], 2.0)
    (tmp_path / "dumped.toml").write_text(dump_toml(config))
    again = load_config([], str(tmp_path / "dumped.toml"))
    again.job.config_file = config.job.config_file
    assert dataclasses.asdict(again) == dataclasses.asdict(config)


def test_custom_args_are_checked_and_shown_like_ours(custom_args: str, capsys: pytest.CaptureFixture[str]) -> None:
    named = f"--experimental.custom_args_module={custom_args}"
    assert '(did you mean "bonus"?)' in refusal([named, "--training.bonuss=1"])
    assert 'training.bonus = "x" (the argument --training.bonus): must be a whole number' in refusal(
        [named, "--training.bonus=x"]
    )
    assert "unknown section [novel]" in refusal(["--novel.amount=1"])
    with pytest.raises(SystemExit, match="0"):
        load_config([named, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "A key that joins an old section. Default: 3." in shown
    assert "A key of a new section. Default: (empty)." in shown
    assert "Optimizer steps. Must be at least 1. Default: 10000." in shown


@pytest.mark.parametrize("module", ["no_such_module_here", "./a_path.py", "titanlite.no_such_module"])
def test_custom_args_module_that_is_not_there(tmp_path: Path, module: str) -> None:
    message = refusal([f"--experimental.custom_args_module={module}"])
    assert f'experimental.custom_args_module = "{module}" (the argument' in message
    assert "there is no such module" in message
    (tmp_path / "a.toml").write_text(f'[experimental]\n\ncustom_args_module = "{module}"')
    assert f"{tmp_path / 'a.toml'}, line 3" in refusal([], str(tmp_path / "a.toml"))


def test_custom_args_module_without_a_job_config_or_with_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "must define a dataclass JobConfig" in refusal(["--experimental.custom_args_module=this"])
    (tmp_path / "imports_what_is_not_there.py").write_text("import surely_not_installed")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        load_config(["--experimental.custom_args_module=imports_what_is_not_there"])


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("amounts: list[int] = field(default_factory=list)", "novel.amounts is list"),
        ("amount: int | str = 3", "novel.amount is int | str"),
        ("amount: Literal[1, 2] = 1", "novel.amount is typing.Literal"),
        ("amounts: dict[str, int] = field(default_factory=dict)", "novel.amounts is dict"),
        ("amount: int", "novel.amount has no default"),
        ("amount: Nothing = 1", "'Nothing' is not defined"),
        ('amount: int = "three"', 'novel.amount = "three" (the default in'),
        ("amount: int = 3\n@dataclass\nclass JobConfig:\n    steps: int = 1", "steps must be a section"),
        (f"{TRAINING_OF_THEIRS}steps: str = 'many'", "training.steps is there already, as <class 'int'>"),
        (f"{TRAINING_OF_THEIRS}steps: int = 0", "training.steps = 0 (the default in"),
    ],
)
def test_options_of_third_parties_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, words: str
) -> None:
    name = f"custom_{tmp_path.name.replace('-', '_')}"
    head = "from __future__ import annotations\nfrom typing import Literal\nfrom dataclasses import dataclass, field\n"
    tail = "\n@dataclass\nclass JobConfig:\n    novel: Novel\n" if "JobConfig" not in field else ""
    (tmp_path / f"{name}.py").write_text(f"{head}@dataclass\nclass Novel:\n    {field}{tail}")
    monkeypatch.syspath_prepend(tmp_path)
    assert words in refusal([f"--experimental.custom_args_module={name}"])


def test_a_key_of_both_has_our_rule_and_their_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchtitan's example of a module sets another default for training.steps."""
    name = f"custom_{tmp_path.name.replace('-', '_')}"
    head = "from dataclasses import dataclass, field\n@dataclass\nclass Novel:\n    "
    lines = f"from __future__ import annotations\n{head}{TRAINING_OF_THEIRS}steps: int = 500\n    mine: int = 1\n"
    (tmp_path / f"{name}.py").write_text(lines)
    monkeypatch.syspath_prepend(tmp_path)
    named = f"--experimental.custom_args_module={name}"
    config: Any = load_config([named, "--training.mine=2"])
    assert (config.training.steps, config.training.mine, config.training.seq_len) == (500, 2, 2048)
    assert "must be a whole number, at least 1" in refusal([named, "--training.steps=0"])


# ---- --help


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which importing torch fails."""
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch.py").write_text("raise SystemError('torch was imported')")
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def run_without_torch(env: dict[str, str], *command: str) -> tuple[subprocess.CompletedProcess[str], float]:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command], env=env, cwd=ROOT, capture_output=True, text=True)
    return done, time.perf_counter() - start


@pytest.mark.alone
@pytest.mark.parametrize("command", ["", "train", "generate", "convert", "tokenizer", "tokenizer download"])
def test_help_answers_at_once_without_torch(without_torch: dict[str, str], command: str) -> None:
    assert "torch was imported" in run_without_torch(without_torch, "-c", "import torch")[0].stderr
    tries = [run_without_torch(without_torch, "-m", "titanlite.commands", *command.split(), "--help") for _ in range(3)]
    for done, _ in tries:
        assert (done.returncode, done.stderr) == (0, "")
    assert min(seconds for _, seconds in tries) <= 1.0


def test_help_lists_every_option_that_is_not_refused_with_its_text_and_default(without_torch: dict[str, str]) -> None:
    shown = run_without_torch(without_torch, "-m", "titanlite.commands", "train", "--help")[0].stdout
    blocks = {block.split()[0]: "".join(block.split()) for block in re.split(r"\n +--", shown)[1:]}
    assert blocks.keys() == LISTED.keys()
    for opt in LISTED.values():
        default = ",".join(opt.default) if opt.base is list else str(opt.default)
        default = default.lower() if opt.base is bool and opt.default is not None else default
        default = "unset" if opt.default is None else default or "(empty)"
        for text in (opt.help, f"Default: {default}.", *opt.choices):
            assert "".join(text.split()) in blocks[opt.name], opt.name
    sections = re.findall(r"^\[([\w.]+)\]:$", shown, re.MULTILINE)
    assert sections == list(dict.fromkeys(opt.section for opt in LISTED.values()))


# ---- check


def test_the_missing_tokenizer_is_refused_first(tmp_path: Path) -> None:
    config = load_config(
        [
            f"--model.tokenizer_path={tmp_path}/none.json",
            "--parallelism.tensor_parallel_degree=3",
            "--training.global_batch_size=3",
            "--optimizer.early_step_in_backward",
        ]
    )
    with pytest.raises(ConfigError) as error:
        check_config(config, 8)
    for part in (
        f'model.tokenizer_path = "{tmp_path}/none.json"',
        "the argument --model.tokenizer_path",
        "no such file",
        "titanlite tokenizer download",
    ):
        assert part in str(error.value)


DEGREES = {
    "data_parallel_replicate_degree": 2,
    "data_parallel_shard_degree": 3,
    "context_parallel_degree": 1,
    "tensor_parallel_degree": 2,
    "pipeline_parallel_degree": 5,
}


@given(st.tuples(*[st.integers(1, 6)] * 5), st.booleans())
def test_degrees_multiply_to_the_processes(sizes: tuple[int, ...], infer: bool) -> None:
    replicate, shard, context, tensor, pipeline = sizes
    given = dict(zip(DEGREES, sizes))
    if infer:
        given["data_parallel_shard_degree"] = -1
    degrees = resolve_degrees(Parallelism(**given), replicate * shard * context * tensor * pipeline)
    assert tuple(degrees) == (*sizes, 1)
    assert degrees.data_parallel == replicate * shard


@pytest.mark.parametrize("processes", [59, 61, 1, 120])
def test_degrees_that_do_not_multiply_to_the_processes(processes: int) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_degrees(Parallelism(**DEGREES), processes)
    there_are = "there is 1 process" if processes == 1 else f"there are {processes} processes"
    assert f"= 60, but {there_are}: set NGPU=60" in str(error.value)
    for name, degree in DEGREES.items():
        assert f"{name} {degree}" in str(error.value)


def test_degrees_that_leave_nothing_to_infer() -> None:
    with pytest.raises(ConfigError, match=r"multiply to 3, which does not divide the 8 processes \(NGPU=8\)"):
        resolve_degrees(Parallelism(tensor_parallel_degree=3), 8)
    with pytest.raises(ConfigError, match="multiply to 16, which does not divide the 8 processes"):
        resolve_degrees(Parallelism(pipeline_parallel_degree=16), 8)


@pytest.mark.parametrize(
    ("local", "data_parallel", "wanted", "result"),
    [(4, 2, -1, 8), (4, 2, 8, 8), (4, 2, 24, 24), (4, 2, 12, "8"), (4, 2, 3, "8"), (3, 5, 31, "30")],
)
def test_global_batch_size(local: int, data_parallel: int, wanted: int, result: int | str) -> None:
    config = load_config([f"--training.local_batch_size={local}", f"--training.global_batch_size={wanted}"])
    if isinstance(result, int):
        assert global_batch_size(config, data_parallel) == result
        return
    with pytest.raises(ConfigError) as error:
        check_config(config, data_parallel)
    for part in (
        f"training.global_batch_size = {wanted} (the argument --training.global_batch_size)",
        f"= {local} x {data_parallel} = {local * data_parallel}, for example {result}",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_implemented_is_refused_and_its_inert_value_is_not(name: str) -> None:
    opt, instead = BY_NAME[name], UNSUPPORTED[name]
    text = argument(opt, opt.default).partition("=")[2]
    enabled = ["--validation.enable"] if opt.section == "validation" else []
    check_config(load_config([f"--{name}={text}", *enabled]), 2)
    asked = {int: "3", float: "0.5", list: "a,b", bool: str(not opt.default)}.get(opt.base, "another")
    with pytest.raises(ConfigError) as error:
        check_config(load_config([f"--{name}={asked}", *enabled]), 2)
    assert (error.value.key, error.value.origin) == (name, f"the argument --{name}")
    for part in ("does not implement it", instead):
        assert part in error.value.why


def test_a_nested_list_of_torchtitans_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[parallelism]\nmodule_fqns_per_model_part = [['tok_embeddings'], ['layers.0']]")
    with pytest.raises(ConfigError, match="pipeline_parallel_split_points") as error:
        check_config(load_config([], str(tmp_path / "a.toml")), 1)
    assert error.value.key == "parallelism.module_fqns_per_model_part"


def test_informative_keys_are_accepted() -> None:
    check_config(
        load_config(["--job.description=x", "--job.use_for_integration_test", "--job.print_args"]),
        1,
    )
