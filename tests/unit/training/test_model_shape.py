"""The shape of a run's model: from a flavor, from keys of [model.args], or from a folder's config.json."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import checkpoints, run_trainer
from titanlite.checkpoint.folder import INFO
from titanlite.checkpoint.reader import _changes
from titanlite.config import load_config
from titanlite.errors import ConfigError
from titanlite.inference.convert import convert
from titanlite.models.layers import YarnScaling
from titanlite.models.spec import get_model_spec
from titanlite.training.model_shape import ModelShape, choose_shape

DEBUG = get_model_spec("llama3").flavor("debugmodel")
QWEN = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 96,
    "vocab_size": 2048,
    "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}


def chosen(*argv: str, file: Path | None = None) -> ModelShape:
    return choose_shape(load_config(argv, str(file) if file else None))


def refused(*argv: str, file: Path | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as refusal:
        chosen(*argv, file=file)
    return refusal.value


def toml(folder: Path, text: str) -> Path:
    (folder / "mine.toml").write_text(text)
    return folder / "mine.toml"


def folder_of(path: Path, **changed: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**QWEN, **changed}))
    return path


# ---- sizes


@pytest.mark.parametrize(
    "text",
    [
        "[model.args]\ndim = 768\nn_layers = 12\nn_heads = 12\nn_kv_heads = 4\ntie_embeddings = true\n",
        "[model]\nargs = {dim = 768, n_layers = 12, n_heads = 12, n_kv_heads = 4, tie_embeddings = true}\n",
        '[model]\nname = "llama3"\nargs.dim = 768\nargs.n_layers = 12\nargs.n_heads = 12\nargs.n_kv_heads = 4\n'
        "args.tie_embeddings = true\n",
    ],
)
def test_sizes_from_a_file(tmp_path: Path, text: str) -> None:
    args = chosen(file=toml(tmp_path, text)).flavor
    assert (args.dim, args.n_layers, args.n_heads, args.n_kv_heads, args.tie_embeddings) == (768, 12, 12, 4, True)
    assert (args.ffn_dim, args.vocab_size) == (DEBUG.ffn_dim, 0)


def test_sizes_from_the_command_line_win_over_a_file_and_its_base(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('[model]\nname = "phi3"\n[model.args]\ndim = 64\nn_layers = 3\n')
    file = toml(tmp_path, 'base = "base.toml"\n[model.args]\nn_layers = 4\nn_heads = 2\n')
    shape = chosen("--model.args.n_heads=4", "--model.args.sliding-window=16", "--model.name=mistral", file=file)
    args = shape.flavor
    assert (args.dim, args.n_layers, args.n_heads, args.sliding_window) == (64, 4, 4, 16)
    assert shape.about == "mistral debugmodel, dim = 64, n_layers = 4, n_heads = 4, sliding_window = 16"


def test_a_window_is_switched_off_by_zero() -> None:
    assert chosen("--model.name=mistral", "--model.args.sliding_window=0").flavor.sliding_window is None


@pytest.mark.parametrize(
    ("argv", "key", "words"),
    [
        (["--model.args.n_heads=3"], "model.args.n_heads", "dim must be a multiple of n_heads = 3"),
        (["--model.args.n_kv_heads=3"], "model.args.n_kv_heads", "must divide n_heads = 16"),
        (["--model.args.n_heads=8"], "model.args.n_heads", "n_kv_heads = 16 must divide n_heads = 8"),
        (["--model.args.head_dim=7"], "model.args.head_dim", "must be even"),
        (["--model.args.sliding_window=8"], "model.args.sliding_window", "config.json of llama3"),
        (["--model.args.partial_rotary_factor=0.5", "--model.name=qwen2"], "model.args.partial_rotary_factor", "qwen2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_their_key(argv: list[str], key: str, words: str) -> None:
    error = refused(*argv)
    assert error.key == key
    assert words in str(error)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--model.args.dim=0", "from 1 to 16777216"),
        ("--model.args.dim=1e3", "a whole number"),
        ("--model.args.n_layers=10001", "from 1 to 10000"),
        ("--model.args.dimm=8", 'did you mean "dim"'),
        ("--model.arg.dim=8", "unknown key model.arg.dim"),
        ("--model.args=8", "unknown key model.args"),
    ],
)
def test_values_and_names_are_checked(argument: str, words: str) -> None:
    assert words in str(refused(argument))


def test_a_file_names_its_line(tmp_path: Path) -> None:
    file = toml(tmp_path, "[model.args]\nn_layers = 2\nn_kv_heads = 3\n")
    error = load_config([], str(file))
    assert error.origin("model.args.n_kv_heads") == f"{file}, line 3"
    assert "line 2" in str(refused(file=toml(tmp_path, '[model.args]\ndim = "x"\n')))
    assert "must be written [model.args]" in str(refused(file=toml(tmp_path, "[model]\nargs = 3\n")))


# ---- the shape of a folder


def test_the_shape_of_a_config_json(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "theirs")
    for path in (folder, folder / "config.json"):
        for flavor in ([], ["--model.flavor=hf"]):
            config = load_config([f"--model.hf_config={path}", *flavor])
            shape = choose_shape(config)
            assert (config.model.name, config.model.flavor, config.model.hf_config) == ("qwen3", "hf", str(folder))
            assert (shape.flavor.dim, shape.flavor.head_dim, shape.flavor.qk_norm) == (64, 32, True)
            assert shape.flavor.rope_scaling == YarnScaling(4.0, 16)
            assert choose_shape(config).flavor == shape.flavor  # what config.toml then says is the same
    assert chosen(f"--model.hf_config={folder}", "--model.args.n_layers=1").flavor.n_layers == 1


@pytest.mark.parametrize(
    ("argv", "changed", "key", "words"),
    [
        (["--model.flavor=8B"], {}, "model.hf_config", 'model.flavor = "8B" (the argument --model.flavor)'),
        (["--model.flavor=debugmodel"], {}, "model.hf_config", "leave one of them out"),
        (["--model.name=llama"], {}, "model.hf_config", 'model_type = "qwen3": must be "llama"'),
        (
            [],
            {"model_type": "gemma3"},
            "model.hf_config",
            "deepseek_v3, llama, mistral, mixtral, phi3, qwen2, qwen3, qwen3_moe",
        ),
        ([], {"attention_bias": True}, "model.hf_config", "attention_bias = True: must be False"),
        ([], {"hidden_size": "64"}, "model.hf_config", 'hidden_size = "64"'),
    ],
)
def test_folders_that_contradict_or_are_not_computed(
    tmp_path: Path, argv: list[str], changed: dict[str, Any], key: str, words: str
) -> None:
    error = refused(f"--model.hf_config={folder_of(tmp_path / 'theirs', **changed)}", *argv)
    assert error.key == key
    assert words in str(error)


def test_a_shape_needs_a_folder(tmp_path: Path) -> None:
    assert refused("--model.flavor=hf").key == "model.flavor"
    assert "there is no config.json" in str(refused(f"--model.hf_config={tmp_path}"))


def test_a_copy_takes_the_place_of_a_folder_only_in_a_run_that_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In another run a wrong name would silently be the shape of the run before."""
    (tmp_path / "run" / "checkpoint" / "step-3").mkdir(parents=True)
    copy = folder_of(tmp_path / "run" / "hf_config")
    argv = [f"--job.dump_folder={tmp_path / 'run'}", f"--model.hf_config={tmp_path / 'gone'}"]
    assert refused(*argv).key == refused(*argv, "--checkpoint.enable_checkpoint").key == "model.hf_config"
    (tmp_path / "run" / "checkpoint" / "step-3" / INFO).touch()
    assert chosen(*argv, "--checkpoint.enable_checkpoint").flavor.dim == 64
    said = f'model.hf_config = "{tmp_path / "gone"}": there is no such folder; the copy in {copy} is used'
    assert caplog.messages == [said]
    assert refused(*argv).key == "model.hf_config"


def test_a_checkpoint_has_the_shape_that_its_run_has_kept(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint" / "step-3").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint" / "step-3" / INFO).touch()
    folder_of(tmp_path / "run" / "hf_config")
    for part in ("run", "run/checkpoint", "run/checkpoint/step-3"):
        start = f"--checkpoint.initial_load_path={tmp_path / part}"
        assert chosen(start).flavor.dim == chosen(start, "--model.flavor=hf").flavor.dim == 64
        assert chosen(start, "--model.flavor=debugmodel").flavor.dim == 256
    (tmp_path / "run" / "hf_config" / "config.json").unlink()
    assert chosen(start).flavor.dim == 256
    assert refused(start, "--model.flavor=hf").key == "checkpoint.initial_load_path"


@pytest.mark.slow
def test_published_weights_say_the_shape_of_a_run_that_goes_on_without_them(tmp_path: Path) -> None:
    """Trained, converted, trained from the folder without a flavor; then continued where the folder is gone."""
    one = run_trainer(tmp_path, name="one", **checkpoints(3), model__name="qwen3", model__args__n_layers=1)
    assert one.status == 0, one.output
    theirs = tmp_path / "theirs"
    convert(one.folder / "checkpoint" / "step-3", theirs, "float32")
    start = {"checkpoint__initial_load_path": str(theirs), **checkpoints(3)}
    two = run_trainer(tmp_path, name="two", **start)
    assert two.status == 0, two.output
    assert f"qwen3 as in {theirs}" in two.output
    assert two.rows()[0]["loss"] < one.rows()[0]["loss"]
    wrong = run_trainer(tmp_path, name="three", **start, model__flavor="debugmodel")
    assert wrong.status == 2
    assert "config.json: " in wrong.output
    shutil.rmtree(theirs)
    for steps, options in ((4, {"job__config_file": str(two.folder / "config.toml")}), (5, start)):
        again = run_trainer(tmp_path, name="two", training__steps=steps, **options)
        assert again.status == 0, again.output
        assert f"resuming from step {steps - 1}" in again.output
        assert "model.hf_config:" not in again.output


# ---- what counts as the same model


@pytest.mark.slow
def test_families_that_build_one_network_continue_each_others_runs(tmp_path: Path) -> None:
    small = {"model__args__n_layers": 1, "model__args__dim": 64, **checkpoints(2)}
    statuses = []
    for steps, name in ((2, "llama3"), (3, "llama"), (4, "qwen3")):
        run = run_trainer(tmp_path, model__name=name, training__steps=steps, **small)
        statuses.append(run.status)
    assert statuses == [0, 0, 2], run.output
    assert "qk_norm was False, is True" in run.output


def test_options_that_an_earlier_version_did_not_save_are_off() -> None:
    current = {"name": "llama3", "flavor": "8B", "args": asdict(get_model_spec("llama3").flavor("8B"))}
    new = ("qkv_bias", "qk_norm", "sliding_window", "partial_rotary_factor")
    saved = {**current, "args": {name: value for name, value in current["args"].items() if name not in new}}
    assert _changes(saved, current) == []
    assert _changes({**saved, "name": "llama"}, current) == []
    windowed = {**current, "args": {**current["args"], "sliding_window": 8}}
    assert _changes(saved, windowed) == [("sliding_window", None, 8)]
    assert [key for key, *_ in _changes({**saved, "name": "not registered"}, current)] == ["name"]
