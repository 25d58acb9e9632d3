"""torchtitan's TOML files of June 2025 load unchanged, and are refused only for what the machine lacks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tomli

from tests.support.runs import ROOT
from titanlite.config import check_config, load_config
from titanlite.errors import ConfigError

FOLDER = ROOT / "tests" / "data" / "torchtitan_2025_06"
FILES = sorted(FOLDER.glob("*.toml"))
TOKENIZER = ROOT / "titanlite" / "data" / "assets" / "tokenizer.json"


def test_the_four_files_are_there() -> None:
    assert [path.stem for path in FILES] == ["debug_model", "llama3_405b", "llama3_70b", "llama3_8b"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_value_arrives(path: Path) -> None:
    config = load_config([], str(path))
    for section, keys in tomli.loads(path.read_text()).items():
        for key, value in keys.items():
            assert getattr(getattr(config, section), key) == value, f"{section}.{key}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_missing_tokenizer_is_refused_first(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config([], str(path))
    with pytest.raises(ConfigError) as error:
        check_config(config, 8)
    message = str(error.value)
    assert message.startswith(f'model.tokenizer_path = "{config.model.tokenizer_path}" ({path}, line ')
    assert "titanlite tokenizer download" in message


def test_debug_model_needs_nothing_but_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config([], str(next(path for path in FILES if path.stem == "debug_model")))
    tokenizer = Path(config.model.tokenizer_path)
    tokenizer.parent.mkdir(parents=True)
    tokenizer.touch()
    check_config(config, 1)


def test_the_405b_file_asks_for_all_that_it_says() -> None:
    config = load_config([], str(next(path for path in FILES if path.stem == "llama3_405b")))
    assert config.model.converters == ["float8"]
    assert config.float8.enable_fsdp_float8_all_gather
    assert config.float8.precompute_float8_dynamic_scale_for_fsdp
    assert config.training.compile
    assert (config.parallelism.tensor_parallel_degree, config.parallelism.enable_async_tensor_parallel) == (8, True)
    assert config.activation_checkpoint.mode == "full"


def test_the_debug_file_trains_once_its_files_are_there(train: Any, tmp_path: Path) -> None:
    (tmp_path / "sample.jsonl").write_text(
        "".join(json.dumps({"text": f"document {i} " * 20}) + "\n" for i in range(99))
    )
    run = train(
        job__config_file=FOLDER / "debug_model.toml",
        model__tokenizer_path=TOKENIZER,
        training__dataset_path=tmp_path / "sample.jsonl",
        timeout=200,
    )
    assert run.status == 0, run.output
    assert "c4_test" in run.output
    assert len(run.rows()) == 3


def test_the_8b_file_is_refused_for_what_the_machine_lacks(train: Any, tmp_path: Path) -> None:
    needed = 16 * 8_030_261_248
    if os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >= needed:
        pytest.skip("this machine has the memory")
    (tmp_path / "sample.jsonl").write_text(json.dumps({"text": "document " * 9000}) + "\n")
    run = train(
        job__config_file=FOLDER / "llama3_8b.toml",
        model__tokenizer_path=TOKENIZER,
        training__dataset_path=tmp_path / "sample.jsonl",
        env={"CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.status == 2
    assert f"need at least {needed / 2**30:.1f} GiB" in run.output
