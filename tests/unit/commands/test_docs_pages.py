"""The commands of the other pages, run as they are typed but for fewer steps: of those that can run on one machine
without GPUs, an account or a network. tests/unit/benchmarks/test_docs.py checks the options of all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.support.docs import PAGES as DOCUMENTS
from tests.support.docs import blocks_of, text_of, typed_on
from tests.support.installs import User, user_of_clone
from tests.support.published import CONFIGS, save_small
from tests.support.runs import ROOT

pytestmark = [pytest.mark.long, pytest.mark.alone, pytest.mark.timeout(3600)]

# Parts of commands that need more than is here.
NEEDS_MORE = {
    "the hub": ["fineweb_edu", "hub:", "dataset=hellaswag", "tasks hellaswag", "tokenizer download"],
    "several machines": ["NNODES=2", "sbatch", "--nnodes=2"],
    "minutes, for what the estimates for 8 and 512 devices show": ["NGPU=2048"],
    "a GPU": ["enable_memory_snapshot", "gpu_suite.sh"],
    "a run of days, or of somebody else": ["100M", "/runs/theirs/"],
    "these tests": ["scripts/test.sh"],
}
LEFT_OUT = re.compile("|".join(re.escape(part) for parts in NEEDS_MORE.values() for part in parts))
TRAINS = re.compile(r"(\./run_train\.sh|titanlite train \S+)")
ESTIMATES = re.compile("COMM_MODE=fake|--memory_estimation.enabled")
PUBLISHED = re.compile("llama3_8b|llama3_70b|_hellaswag")  # too large for this machine, and its tokenizer is not here

# What the reader has done before, as the page says.
RUN = "./run_train.sh --job.dump_folder="
BEFORE = {
    "checkpoint.md": [f"{RUN}other --checkpoint.enable_checkpoint && mv other moved"],
    "compare.md": [
        f"{RUN}{folder} > torchtitan.log 2>&1" for folder in ("runs/float8", "runs/bf16", "outputs", "outputs")
    ],
    "evaluate.md": [f"{RUN}outputs --checkpoint.enable_checkpoint"],
    "generate-and-convert.md": [f"{RUN}outputs --checkpoint.enable_checkpoint"],
}
# Three steps show as much as the number on the page; a profile takes more.
STEPS = {"profiling.md": 12}
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name != "tutorial.md" and typed_on(page)]

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "vocab_size": 2048,
}


def runs_here(command: str) -> bool:
    too_large = TRAINS.search(command) and PUBLISHED.search(command) and not ESTIMATES.search(command)
    return not too_large and not LEFT_OUT.search(command)


def shortened(command: str, steps: int) -> str:
    """Return the command for ``steps`` steps and few documents; the steps that it names are ``steps``, too."""
    command = re.sub(r"--max_documents=\d+", "--max_documents=5", command)
    command = re.sub(r"(training\.steps|interval|load_step|profile_freq)=\d+", rf"\1={steps}", command)
    command = re.sub(r"step-\d+", f"step-{steps}", command)
    return command if "--training.steps=" in command else TRAINS.sub(rf"\1 --training.steps={steps}", command)


def write_lines(file: Path, records: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def user(tmp_path: Path) -> User:
    """A clone, and the files that the pages speak of as those of the reader."""
    user = user_of_clone(tmp_path, NO_COLOR="1")
    clone, home = user.folder, tmp_path / "home"
    lines = [line for page in DOCUMENTS for line in text_of(page).splitlines() if line.strip()]
    for file in ("home/notes/notes.txt", "clone/my-texts/text.txt", "clone/notes.txt", "clone/src/code.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("\n".join(lines))
    write_parquet(home / "corpus", lines)
    write_lines(clone / "docs.jsonl", ({"content": line} for line in lines))
    write_lines(clone / "test.jsonl", ({"body": line} for line in lines[:50]))
    sums = [(f"{n} + 1 =", str(n + 1), str(n)) for n in range(40)]
    write_lines(
        clone / "questions.jsonl",
        ({"prompt": q, "answer": f" {a}", "context": q, "endings": [a, wrong], "label": 0} for q, a, wrong in sums),
    )
    (clone / "messages.txt").write_text("Hello.\n")
    for name in ("my.toml", "my_torchtitan.toml"):
        (clone / name).write_text('base = "debug_model"\n')
    (clone / "my_module.py").write_text(blocks_of(ROOT / "docs" / "extending.md")[1].code)
    for folder in ("Llama-3.2-1B", "Llama-3.2-1B-Instruct", "Llama-3-8B"):
        save_longer("llama3_1_8b", home / folder)
    save_longer("mistral_7b", home / "Mistral-7B-v0.3")
    for folder, config in (("phi-4", CONFIGS["phi_4"]), ("Qwen3-0.6B", QWEN3)):
        (home / folder).mkdir()
        (home / folder / "config.json").write_text(json.dumps(config))
    return user


def write_parquet(folder: Path, lines: list[str]) -> None:
    from pyarrow import parquet, table

    folder.mkdir()
    parquet.write_table(table({"text": lines}), folder / "part.parquet")


def save_longer(name: str, folder: Path) -> None:
    """A small folder that takes sequences as long as those of the pages."""
    file = save_small(name, folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 8192}))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page(page: Path, user: User) -> None:
    steps = STEPS.get(page.name, 3)
    for command in BEFORE.get(page.name, []):
        user.types(shortened(command, steps))
    for command in dict.fromkeys(filter(runs_here, typed_on(page))):
        user.types(shortened(command, steps))


def test_most_commands_run_here() -> None:
    """And what is said to need more is there: a part of a command that is gone would leave out nothing, unseen."""
    commands = [command for page in PAGES for command in typed_on(page)]
    assert len([*filter(runs_here, commands)]) > 80
    parts = [part for parts in NEEDS_MORE.values() for part in parts]
    assert [part for part in parts if not any(part in command for command in commands)] == []
