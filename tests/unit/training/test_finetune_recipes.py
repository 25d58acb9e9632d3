"""The recipes of fine-tuning: each runs on a small folder of its architecture, has the values that the documents state,
and refuses what it cannot be used with."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.docs import prose_of, tables_in
from tests.support.forks import ROOT
from tests.support.published import CONFIGS, save_bytes_tokenizer, save_small, small_config
from tests.support.runs import Run, arguments, environment, forked_run
from titanlite.checkpoint.folder import INFO
from titanlite.config import check_config, load_config, packaged
from titanlite.config.options import options_of
from titanlite.config.schema import JobConfig
from titanlite.errors import ConfigError, shown
from titanlite.models.spec import get_model_spec, model_spec_of
from titanlite.training.model_shape import choose_shape

RECIPES = [f"{name}_hellaswag{suffix}" for name in CONFIGS for suffix in ("", "_float8")]
SIZES_AND_DEVICE = {
    "training.seq_len": 96,
    "training.global_batch_size": 2,
    "training.steps": 3,
    "training.compile": "false",  # it takes longer than the run
    "metrics.enable_tensorboard": "false",
    "validation.held_out_percent": 20,
}
FLAVORS = {
    "llama3_1_8b": ("llama", "3.1-8B"),
    "mistral_7b": ("mistral", "7B-v0.1"),
    "mistral_nemo": ("mistral", "Nemo-2407"),
    "qwen2_5_7b": ("qwen2", "7B"),
    "phi_4": ("phi3", "phi-4"),
}


def model_of(recipe: str) -> str:
    return recipe.removesuffix("_float8").removesuffix("_hellaswag")


def start(recipe: str, place: Path, ngpu: int = 1, **options: Any) -> Run:
    """``NGPU=... CONFIG_FILE=... ./run_train.sh`` with a copy of the data, smaller."""
    data, rng = place / "hellaswag.jsonl", random.Random(0)
    if not data.exists():
        pairs = [(rng.randrange(100), rng.randrange(100)) for _ in range(120)]
        lines = (
            {"ctx": f"{x} plus {y} is", "endings": [str(x + y + k) for k in range(4)], "label": 0} for x, y in pairs
        )
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = packaged.find(recipe)
    given = {"training.dataset_path": data, **{key.replace("__", "."): value for key, value in options.items()}}
    argv = arguments(place / "run", given, SIZES_AND_DEVICE)
    env = environment(CONFIG_FILE=str(ROOT / str(file)), NGPU=str(ngpu))
    return forked_run(argv, env, place, place / "run", ngpu)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The recipes that run on a small folder: those in bfloat16 are slow, unless ``--tiny`` asks for all."""
    if metafunc.function is test_each_runs_on_a_small_folder_of_its_architecture:
        slow = [] if metafunc.config.getoption("tiny") else [pytest.mark.slow]
        recipes = [pytest.param(name, marks=[] if name.endswith("float8") else slow) for name in RECIPES]
        metafunc.parametrize("recipe", recipes)


def test_each_runs_on_a_small_folder_of_its_architecture(recipe: str, tmp_path: Path) -> None:
    """The header says what was taken from the folder."""
    folder = save_small(model_of(recipe), tmp_path / "theirs")
    run = start(recipe, tmp_path, checkpoint__initial_load_path=folder)
    assert run.status == 0, run.output
    assert len(run.losses()) == 3
    spec, args = model_spec_of(small_config(model_of(recipe)))
    assert f"{spec.name} as in {folder}/config.json" in run.output
    stated = next(line for line in run.output.splitlines() if line.startswith("    shape "))
    for name in ("dim", "n_kv_heads", "head_dim", "rope_theta", "rope_scaling", "qkv_bias", "sliding_window"):
        value = getattr(args, name)
        assert (f" {name} = {shown(value)}" in stated) == bool(value)
    assert f"{folder}/tokenizer.json, 258 tokens" in run.output
    assert f"(of the weights in {folder})" in run.output
    assert f"{folder}, Hugging Face weights" in run.output
    assert ("14 of 15 linear layers" in run.output) == recipe.endswith("_float8")
    assert (run.folder / "checkpoint" / "step-3").is_dir()


def test_a_run_goes_on_and_another_begins_with_it(tmp_path: Path) -> None:
    """Without the folder of weights: the run folder has a copy of the shape, and the tokenizer."""
    folder = save_small("phi_4", tmp_path / "theirs")
    first = start("phi_4_hellaswag", tmp_path, checkpoint__initial_load_path=folder)
    assert first.status == 0, first.output
    shutil.rmtree(folder)
    again = start("phi_4_hellaswag", tmp_path, training__steps=4)
    assert "resuming from step 3" in again.output
    for weights in (first.folder, first.folder / "checkpoint", first.folder / "checkpoint" / "step-4"):
        other = start("phi_4_hellaswag", tmp_path, checkpoint__initial_load_path=weights, job__dump_folder="other")
        assert other.status == 0, other.output
        assert f"{first.folder}/checkpoint/step-4, its weights alone" in other.output
        shutil.rmtree(tmp_path / "other")


# ---- what a recipe cannot be used with


def refused(run: Run, key: str, *words: str) -> None:
    assert run.status == 2, run.output
    assert "Traceback" not in run.output
    (message,) = (line for line in run.output.splitlines() if line.startswith("titanlite: error: "))
    assert message.startswith(f"titanlite: error: {key} = ")
    assert [word for word in words if word not in message] == []


def test_no_folder(tmp_path: Path) -> None:
    run = start("qwen2_5_7b_hellaswag", tmp_path)
    refused(run, "model.flavor", "qwen2_5_7b_hellaswag.toml, line", "--checkpoint.initial_load_path=FOLDER")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("Qwen/Qwen2.5-7B", "hf download Qwen/Qwen2.5-7B"),
        ("bare", "it has config.json, and no *.safetensors"),
        ("started", "is a checkpoint of another flavor"),
    ],
)
def test_a_folder_that_has_no_hugging_face_weights(path: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").touch()
    (tmp_path / "started" / "checkpoint" / "step-1").mkdir(parents=True)
    (tmp_path / "started" / "checkpoint" / "step-1" / INFO).touch()
    with pytest.raises(ConfigError, match=re.escape(words)) as error:
        choose_shape(load_config([f"--checkpoint.initial_load_path={tmp_path / path if '/' not in path else path}"],
                                 packaged.find("qwen2_5_7b_hellaswag")))  # fmt: skip
    assert error.value.key == "checkpoint.initial_load_path"


def test_a_folder_of_another_family(tmp_path: Path) -> None:
    folder = save_small("mistral_7b", tmp_path / "theirs")
    run = start("llama3_1_8b_hellaswag", tmp_path, checkpoint__initial_load_path=folder)
    refused(run, "checkpoint.initial_load_path", '"mistral": must be "llama"', "llama3_1_8b_hellaswag.toml, line")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_more_tokens_than_the_embedding(tmp_path: Path) -> None:
    folder = save_small("phi_4", tmp_path / "theirs")
    save_bytes_tokenizer(folder, extra=100)
    run = start("phi_4_hellaswag", tmp_path, checkpoint__initial_load_path=folder)
    refused(run, "model.tokenizer_path", f'{folder}/tokenizer.json" (of the weights in', "358 tokens", "320")
    (folder / "tokenizer.json").unlink()
    run = start("phi_4_hellaswag", tmp_path, checkpoint__initial_load_path=folder)
    refused(run, "model.tokenizer_path", f"{folder} has weights and no tokenizer")


@pytest.mark.parametrize(("recipe", "ngpu"), [("llama3_1_8b_hellaswag", 6), ("mistral_7b_hellaswag_float8", 16)])
def test_a_number_of_processes_that_does_not_divide_the_batch(recipe: str, ngpu: int) -> None:
    config = load_config([], packaged.find(recipe))
    with pytest.raises(ConfigError, match=f"1 x {ngpu} = {ngpu}") as error:
        check_config(config, ngpu)
    assert error.value.key == "training.global_batch_size"
    check_config(config, 4)


# ---- values


def documented(recipe: str) -> dict[str, str]:
    """The values of a recipe in the tables of docs/finetune.md, by key."""
    columns = [f"`{model_of(recipe)}`", *(["all five"] if recipe.endswith("_float8") else [])]
    rows = [row for table in tables_in(prose_of(ROOT / "docs" / "finetune.md")) for row in table if "key" in row]
    values = {row["key"].strip("`"): row[column] for row in rows for column in columns if column in row}
    assert len(values) > 30
    return values


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_documents_state_every_value(recipe: str) -> None:
    config = load_config([], packaged.find(recipe))
    check_config(config, 8)
    options = {option.name: option for keys in options_of(JobConfig).values() for option in keys.values()}
    stated = documented(recipe)
    assert {key: config.value(key) for key in stated} == {key: options[key].parse(v, "") for key, v in stated.items()}
    apart = {"job.dump_folder", "job.description", "model.name", "model.flavor"}
    assert config.origins.keys() - apart <= stated.keys()
    assert (config.model.name, config.model.flavor) == (FLAVORS[model_of(recipe)][0], "hf")
    assert config.job.dump_folder == f"./outputs/{recipe}"  # else a run in float8 would continue one in bfloat16


@pytest.mark.parametrize("name", CONFIGS)
def test_the_published_config_is_the_flavor(name: str, tmp_path: Path) -> None:
    """So that the memory which is predicted with the flavor is that of a run from the published folder."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    family, flavor = FLAVORS[name]
    shape = choose_shape(load_config([f"--model.hf_config={tmp_path}"], packaged.find(f"{name}_hellaswag")))
    assert (shape.spec.name, shape.flavor) == (family, get_model_spec(family).flavor(flavor))
