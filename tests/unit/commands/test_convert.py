"""``titanlite convert`` and runs that begin with Hugging Face weights, as users meet them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import Run, checkpoints, run_trainer
from tests.unit.commands.test_generate_command import larger_tokenizer
from titanlite.checkpoint.storage import load, saved_shapes, verify
from titanlite.commands import convert
from titanlite.inference.load import describe
from titanlite.models.layers import Decoder, rope_table


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = run_trainer(tmp_path_factory.mktemp("trained"), **checkpoints(3), training__mixed_precision_param="float32")
    assert run.status == 0, run.output
    return run


@pytest.fixture(scope="module")
def step(trained: Run) -> Path:
    return trained.folder / "checkpoint" / "step-3"


@pytest.fixture(scope="module")
def exported(step: Path) -> Path:
    target = step.parents[2] / "exported"
    assert convert.main([str(step), str(target), "--dtype=float32"]) == 0
    return target


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = {n: torch.empty(shape) for n, shape in saved_shapes(folder).items() if n.startswith("model.")}
    load(folder, state)
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def test_transformers_computes_the_same(step: Path, exported: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    ours = Decoder(describe(step).args)
    ours.load_state_dict(weights(step))
    ours.rope.copy_(
        rope_table(ours.args.max_seq_len, ours.args.head_size, ours.args.rope_theta, ours.args.rope_scaling)
    )
    ids = torch.arange(32)[None] * 7
    torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=1e-5, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert tokenizer.decode(tokenizer("import os")["input_ids"], skip_special_tokens=True) == "import os"


def test_back_and_forth_changes_nothing(step: Path, exported: Path, tmp_path: Path) -> None:
    assert convert.main([str(exported), str(tmp_path / "back")]) == 0
    back = tmp_path / "back" / "step-0"
    verify(back)
    assert describe(back).args == describe(step).args
    assert json.loads((back / "checkpoint.json").read_text())["model"]["flavor"] == "debugmodel"
    before, after = weights(step), weights(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert convert.main([str(back), str(tmp_path / "half")]) == 0  # bfloat16, by default
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))


@pytest.mark.parametrize("way", [{}, {"ngpu": 2, "training__local_batch_size": 2}], ids=["1", "FSDP 2"])
@pytest.mark.slow
def test_a_run_begins_with_their_weights(exported: Path, step: Path, tmp_path: Path, way: dict[str, Any]) -> None:
    common = {"training__mixed_precision_param": "float32", **way}
    runs = [
        run_trainer(tmp_path, name=source.name, checkpoint__initial_load_path=source, **common)
        for source in (step, exported)
    ]
    assert [run.status for run in runs] == [0, 0], runs[1].output
    assert "Hugging Face weights" in runs[1].output
    assert runs[0].losses() == runs[1].losses()
    assert runs[0].losses() != run_trainer(tmp_path, name="seed", **common).losses()


def test_bad_input_is_one_message(
    step: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    larger = str(larger_tokenizer(tmp_path))
    does_not_fit = tmp_path / "does_not_fit"
    shutil.copytree(exported, does_not_fit)
    shutil.copy(larger, does_not_fit)
    (does_not_fit / "tokenizer_identity.json").unlink()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "best").symlink_to(step)
    (tmp_path / "empty").mkdir()
    for arguments, message in {
        (str(tmp_path / "empty"), "x"): "is no checkpoint: it has no checkpoint.json",
        (str(tmp_path / "outer"), "x"): f"name one: {tmp_path / 'outer' / 'best'}",
        (str(step), str(exported)): "is there and not empty",
        (str(step), "x", "--tokenizer_path", larger): f'model.tokenizer_path = "{larger}": is another tokenizer',
        (str(exported), "x", "--tokenizer_path", larger): f'model.tokenizer_path = "{larger}": is another tokenizer',
        (str(does_not_fit), "x"): "the tokenizer has 2248 tokens, more than the 2048 of the model's",
        (str(exported), "x", "--dtype=bfloat16"): "--dtype=bfloat16: a checkpoint keeps the dtypes of",
        (str(exported), "x", "--no-verify"): f"--no-verify: {exported} is no checkpoint and has no checksums",
        (str(step), "x", "--custom_import=no.such"): '--custom_import = "no.such" (the command line): there is no',
    }.items():
        assert convert.main(list(arguments)) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint__initial_load_model_weights_only": "false"}, "has weights alone"),
        (
            {"model__flavor": "short"},
            "another model than model.flavor: num_hidden_layers is 6 there and 2 here",
        ),
    ],
)
def test_weights_that_do_not_fit(exported: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    (tmp_path / "own.py").write_text(
        "from dataclasses import replace\n"
        "from titanlite.models.llama3.spec import FLAVORS\n"
        'FLAVORS["short"] = replace(FLAVORS["debugmodel"], n_layers=2)\n'
    )
    run = run_trainer(tmp_path, checkpoint__initial_load_path=exported, experimental__custom_import="own", **options)
    assert run.status == 2, run.output
    assert message in run.output
    assert "Traceback" not in run.output
