"""The model card and ``generation_config.json`` of an exported folder, and what ``--force`` replaces."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

pytest.importorskip("transformers")

import transformers

from tests.support.families import their_model
from tests.support.runs import ROOT, Run, checkpoints, run_trainer
from titanlite import __version__
from titanlite.commands import convert
from titanlite.config.run_config import read_run_config
from titanlite.data import load_tokenizer
from titanlite.inference.model_card import code

GENERATION = {"bos_token_id": 2046, "eos_token_id": [2047, 7], "temperature": 0.6, "do_sample": True}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the Hub's cache."""
    folder = tmp_path_factory.mktemp("hub") / "models--some-owner--Tiny-1.0" / "snapshots" / "0123abc"
    their_model("llama", vocab_size=2176, max_position_embeddings=64).save_pretrained(folder)
    load_tokenizer().save(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


@pytest.fixture(scope="module")
def run(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    notes = tmp_path_factory.mktemp("data") / "notes"
    notes.mkdir()
    for page in (ROOT / "docs").glob("*.md"):
        shutil.copy(page, notes / f"{page.stem}.txt")
    run = run_trainer(
        tmp_path_factory.mktemp("run"),
        training__dataset="text",
        training__dataset_path=notes,
        **checkpoints(1),
        checkpoint__initial_load_path=published,
        model__name="llama",
        model__flavor="hf",
        training__seq_len=64,
        validation__enable="true",
        validation__interval=1,
        validation__steps=1,
        validation__held_out_percent=30,
        model__converters="float8",
        float8__recipe_name="rowwise",
        float8__emulate="true",
        job__description="a </b> `recipe`",
        metrics__log_freq=1,
        training__steps=2,
    )
    assert run.status == 0, run.output
    return run


def card_of(source: Path, target: Path, *options: str) -> tuple[dict[str, Any], str]:
    """The front matter and the text."""
    assert convert.main([str(source), str(target), *options]) == 0
    empty, front, text = (target / "README.md").read_text().split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(front), text


@pytest.mark.parametrize("step", [1, 2])
def test_the_card_says_how_a_run_made_the_weights(run: Run, tmp_path: Path, step: int) -> None:
    front, text = card_of(run.folder / "checkpoint" / f"step-{step}", tmp_path / "my-model")
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["titanlite", "llama"],
        "base_model": "some-owner/Tiny-1.0",
    }
    facts = dict(line[2:].split(": ", 1) for line in text.splitlines() if line.startswith("- "))
    rows, validation = ([json.loads(line) for line in (run.folder / f).read_text().splitlines()] for f in
        ("metrics.jsonl", "validation.jsonl"))  # fmt: skip
    (row,) = (r for r in rows if r["step"] == step)
    (checked,) = (r for r in validation if r["step"] == step)
    assert facts.pop("model").startswith("`llama`, ")
    batch = read_run_config(run.folder)["training"].get("global_batch_size", -1)
    assert batch <= 0  # not stated, so not said
    assert facts == {
        "dtype": "bfloat16",
        "optimizer steps": str(step),
        "tokens seen": f"{row['tokens_seen']:,}",
        "recipe": "`` a </b> `recipe` ``",
        "began with": "`some-owner/Tiny-1.0`",
        "data": "`text`, `notes`",
        "converters": "`float8, recipe rowwise`",
        "optimizer": "`AdamW`",
        "tokens of a sequence": "64",
        f"training, step {step}": f"loss {row['loss']:.4f}",
        f"validation, step {step}": f"loss {checked['loss']:.4f}, bits per byte {checked['bits_per_byte']:.4f}",
    }
    assert f"titanlite {__version__}" in text
    assert str(run.folder) not in text
    (code_block,) = re.findall("```python\n(.*?)```", text, flags=re.DOTALL)
    assert "from_pretrained('my-model', dtype=\"auto\")" in code_block


def test_the_code_of_the_card_loads_the_model(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, text = card_of(run.folder, tmp_path / "my-model", "--dtype=float16")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(re.findall("```python\n(.*?)```", text, flags=re.DOTALL)[0], names)
    assert str(names["model"].dtype) == "torch.float16"
    loaded = transformers.GenerationConfig.from_pretrained("my-model")
    assert {key: getattr(loaded, key) for key in GENERATION} == GENERATION
    assert names["model"].generation_config.eos_token_id == [2047, 7]


def test_generation_config_goes_there_and_back(published: Path, tmp_path: Path) -> None:
    assert convert.main([str(published), str(tmp_path / "back")]) == 0
    front, text = card_of(tmp_path / "back" / "step-0", tmp_path / "there")
    assert json.loads((tmp_path / "there" / "generation_config.json").read_text()) == GENERATION
    assert "base_model" not in front
    assert "steps" not in text
    assert "loss" not in text
    front, text = card_of(published, tmp_path / "quantized", "--quantize=float8_dynamic")
    assert front["base_model"] == "some-owner/Tiny-1.0"
    assert "- converted from: `some-owner/Tiny-1.0`" in text
    assert "`float8_dynamic`" in text
    assert json.loads((tmp_path / "quantized" / "generation_config.json").read_text()) == GENERATION


HOSTILE = [
    "a\n---\nlicense: mit\n---\n# b",
    "x: y\n- z # {}[]&*!|>'\"%@`",
    "```\n<script>alert(1)</script>\n```",
    "[a](http://b) <img src=x> ![c](d) **e** ``` ` `` ",
    "hub:a/b\nlicense: mit",
    "\u2028\u0085\ufeff\x1b]52;c;aGk=\x07\ud800",
    "`" * 50,
    "n" * 5000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_configuration_is_shown_as_it_is(run: Run, tmp_path: Path, text: str) -> None:
    import tomli_w

    folder = tmp_path / "run"
    (folder / "checkpoint").mkdir(parents=True)
    shutil.copytree(run.folder / "checkpoint" / "step-2", folder / "checkpoint" / "step-2")
    named = text.encode("utf-8", "replace").decode()
    sections: dict[str, Any] = {
        "job": {"description": named},
        "checkpoint": {"folder": "checkpoint", "initial_load_path": named},
        "training": {"dataset": named, "dataset_path": named, "seq_len": -3, "global_batch_size": "x"},
        "model": {"converters": [named, 3]},
        "optimizer": {"name": 1.5},
    }
    (folder / "config.toml").write_text(tomli_w.dumps(sections))
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3.0}\nnot JSON\n[]\n{"step": 2, "loss": "x"}\n{"step": 3, "loss": 1.0}\n{"step": -1}\n'
    )
    front, card = card_of(folder / "checkpoint" / "step-2", tmp_path / "out")
    assert front.keys() <= {"library_name", "pipeline_tag", "tags"}
    body = card.splitlines()
    assert sum(line.startswith("#") for line in body) == 3  # what was made of it, and its use
    assert not any(line.startswith(("---", "<", "!", ">")) for line in body)
    assert len([line for line in body if line.startswith("```")]) == 2
    for line in body:
        if line.startswith("- ") and "`" in line:
            assert not re.search("[<\\[]", re.sub(r"(`+)( ?).*?(?<!`)\1(?!`)", "", line)), line
    assert all(c.isprintable() or c == "\n" for c in card)
    assert "loss" not in card.replace("Last losses", "")


def test_code_spans() -> None:
    for text, span in {"a": "`a`", "a`b": "`` a`b ``", "a\nb": r"`a\nb`", "``": "``` `` ```"}.items():
        assert code(text) == span


def test_a_link_in_the_run_is_not_followed_out_of_it(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    (folder / "metrics.jsonl").rename(tmp_path / "metrics.jsonl")
    (folder / "metrics.jsonl").symlink_to(tmp_path / "metrics.jsonl")
    _, text = card_of(folder, tmp_path / "out")
    assert "- training, step" not in text
    assert "- validation, step" in text


# ---- what is in the target


def test_what_is_there_is_not_overwritten(published: Path, run: Run, tmp_path: Path, capsys: Any) -> None:
    source, target = str(run.folder), tmp_path / "out"
    target.mkdir()
    (target / "README.md").write_text("mine")
    assert convert.main([source, str(target)]) == 2
    assert "is there and not empty" in capsys.readouterr().err
    assert (target / "README.md").read_text() == "mine"
    assert convert.main([source, str(target), "--force", "--dtype=float32"]) == 0
    assert "titanlite" in (target / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    first = (target / "model.safetensors").read_bytes()

    (target / "notes.txt").write_text("mine")
    (target / "inner").mkdir()
    assert convert.main([source, str(target), "--force"]) == 2
    assert "2 are none of them: inner, notes.txt" in capsys.readouterr().err
    (target / "inner").rmdir()
    (target / "notes.txt").unlink()

    (tmp_path / "linked.txt").write_text("mine")
    (target / "README.md").unlink()
    (target / "README.md").symlink_to(tmp_path / "linked.txt")
    (tmp_path / "link").symlink_to(target)
    assert convert.main([source, str(tmp_path / "link"), "--force"]) == 2
    assert "this is a link or a file" in capsys.readouterr().err
    assert convert.main([source, str(target), "--force"]) == 0
    assert (tmp_path / "linked.txt").read_text() == "mine"
    assert not (target / "README.md").is_symlink()
    assert (target / "model.safetensors").read_bytes() != first

    assert convert.main([str(target), str(target), "--force", "--quantize=float8_dynamic"]) == 2
    assert "is what is to be converted" in capsys.readouterr().err
    assert convert.main([str(published), str(tmp_path / "back"), "--force"]) == 2
    assert "--force" in capsys.readouterr().err
