"""What a run is called, if nobody says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from titanlite.config import load_config
from titanlite.config.job_name import distinguishing_options, job_name
from titanlite.config.run_config import run_config_of
from titanlite.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "mine"),
        (
            ["--model.converters=float8,fused_rmsnorm", "--float8.recipe_name=rowwise"],
            "mine-float8+fused_rmsnorm-rowwise",
        ),
        (["--optimizer.lr=1e-3", "--training.steps=50"], "mine-lr=0.001-steps=50"),
        (["--training.compile", "--checkpoint.verify=false"], "mine-compile"),
        (["--training.no-compile"], "mine-no_compile"),
        (["--validation.enable", "--validation.steps=2"], "mine"),
        (["--activation_checkpoint.mode=none"], "mine-mode=none"),
        (["--training.dataset_path=/my data/notes"], "mine-notes"),
        (["--checkpoint.initial_load_path=/a/b"], "mine-b"),
        (["--checkpoint.initial_load_path=runs/bf16/model/step-200"], "mine-bf16"),
        (["--checkpoint.initial_load_path=checkpoint/step-200"], "mine-step-200"),
        (["--job.dump_folder=x", "--metrics.log_freq=1"], "mine"),
        (["--job.name=my own", "--training.steps=50"], "my own"),
        (["--optimizer.name=" + "x" * 300], "mine-" + "x" * 95),
        (["--sample.prompt=a/b", "--training.dataset=../x/y"], "mine-.._x_y"),
    ],
)
def test_the_name_says_what_distinguishes_the_run(arguments: list[str], name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[training]\nseq_len = 64\n")
    assert job_name(load_config(arguments, str(tmp_path / "mine.toml"))) == name


def test_without_a_file_it_is_the_model() -> None:
    assert job_name(load_config(["--training.steps=3"])) == "llama3_debugmodel-steps=3"


def test_a_run_that_goes_on_keeps_its_name_and_another_one_adds_to_it(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('run_folder = "."\n\n[job]\nname = "mine"\n')
    config = load_config(["--training.steps=50"], str(tmp_path / "config.toml"))
    assert job_name(config, "mine") == "mine"
    assert job_name(config) == "mine-steps=50"
    (tmp_path / "config.toml").write_text(f'run_folder = "."\n\n[job]\nname = "{"x" * 100}"\n')
    assert job_name(load_config(["--training.steps=50"], str(tmp_path / "config.toml"))) == "x" * 91 + "-steps=50"


LR, FLOAT8 = "[optimizer]\nlr = 1e-3\n", '[model]\nconverters = ["float8"]\n'
ROWWISE = f'{FLOAT8}[float8]\nrecipe_name = "rowwise"\n'


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (["", LR, f"{FLOAT8}{LR}", FLOAT8, ""], ["my", "my-lr=0.001", "my-float8-lr=0.001", "my-float8", "my"]),
        ([FLOAT8, ""], ["my", "my-no_converters"]),
        ([ROWWISE, FLOAT8], ["my", "my-recipe_name=default"]),
        (['[training]\ndataset_path = "/a/x.txt"\n', '[training]\ndataset_path = "/b/x.txt"\n'], ["my", "my-x.txt"]),
        # The third is edited from the first as the second was, but for the folder.
        ([f'[training]\ndataset_path = "/{f}/x.txt"\n' for f in "abc"], ["my", "my-x.txt", "my-x.txt-2"]),
    ],
)
def test_runs_of_an_edited_file_are_told_apart(texts: list[str], names: list[str], tmp_path: Path) -> None:
    """Their names say what the edits changed, since an earlier run has the name of the file alone."""
    file, runs = tmp_path / "my.toml", list[dict[str, Any]]()
    for text in texts:
        file.write_text(text)
        config = load_config([f"--job.dump_folder={tmp_path}"], str(file))
        config.job.name = job_name(config, earlier=runs)
        config.training.seed = len(runs)  # a run has chosen one
        config.float8.kernels_chosen = f"triton: took {len(runs)} ms"
        runs.append(run_config_of(config, tmp_path))
    assert [run["job"]["name"] for run in runs] == names


@pytest.mark.parametrize("name", ["", "a/b", "..", ".x", " x", "a\nb", "x" * 201, "a\\b"])
def test_a_name_is_that_of_a_folder(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config([f"--job.name={name}"])
    assert error.value.key == "job.name"


def test_distinguishing_options() -> None:
    options = distinguishing_options(load_config(["--optimizer.beta1=0.8", "--job.dump_folder=x"]))
    assert options["optimizer.beta1"] == 0.8
    assert options["optimizer.lr"] == 8e-4  # though it is the default
    assert "job.dump_folder" not in options
    assert "optimizer.beta2" not in options


def test_a_choice_is_told_apart_by_what_was_chosen() -> None:
    config = load_config([])
    config.float8.kernels_chosen = "triton: took 1.5 ms with titanlite's, 1.6 with the compiler's"
    assert distinguishing_options(config)["float8.kernels_chosen"] == "triton"
