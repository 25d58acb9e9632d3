"""Bad input to the real command: exit status 2, one message that says the value, the rule and the fix, no traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from titanlite.errors import ConfigError
from titanlite.launch.caches import unwritable_cache

CASES = {
    "negative degree": (
        {"parallelism__data_parallel_shard_degree": -2},
        ["parallelism.data_parallel_shard_degree = -2", "the argument", "at least 1, or -1"],
    ),
    "degrees": ({"parallelism__data_parallel_shard_degree": 3}, ["data_parallel_shard_degree 3", "= 3", "1 process:"]),
    "batch": (
        {"training__local_batch_size": 4, "training__global_batch_size": 6},
        ["training.global_batch_size = 6", "multiple", "4 x 1 = 4"],
    ),
    "toml": ({"job__config_file": "broken.toml"}, ["broken.toml, line 2", "not valid TOML"]),
    "empty data": (
        {"training__dataset": "text", "training__dataset_path": "empty.txt"},
        ["training.dataset_path", "empty.txt"],
    ),
    "compile backend": (
        {"training__compile": "true", "compile__backend": "inducter"},
        ['compile.backend = "inducter"', 'did you mean "inductor"'],
    ),
    "log rank": ({}, ["LOG_RANK=x", "rank numbers"]),
    "ngpu": ({}, ["NGPU=none", "at least 1"]),
    "too many processes": ({}, ["NGPU=9999999", "has room for"]),
    "model": ({"model__name": "lama3"}, ['model.name = "lama3"', 'did you mean "llama3"', "llama3, mistral"]),
    "flavor": ({"model__flavor": "9B"}, ['model.flavor = "9B"', "it has debugmodel, 20M, 100M, 1B, 3B, 8B, 70B, 405B"]),
    "converter": ({"model__converters": "fused_rmsnorn"}, ["model.converters", 'did you mean "fused_rmsnorm"']),
    "converter twice": ({"model__converters": "fused_rmsnorm,fused_rmsnorm"}, ["is listed twice"]),
    "optimizer": ({"optimizer__name": "AdamX"}, ['optimizer.name = "AdamX"', "known: Adam, AdamW"]),
    "decay": ({"lr_scheduler__decay_type": "cosin"}, ["lr_scheduler.decay_type", 'did you mean "cosine"']),
    "data source": ({"training__dataset": "c5"}, ['training.dataset = "c5"', "pystdlib"]),
    "hub set offline": ({"training__dataset": "c4"}, ["training.dataset", "pystdlib"]),
    "no data file": (
        {"training__dataset": "text", "training__dataset_path": "nowhere.txt"},
        ["training.dataset_path", "nowhere.txt"],
    ),
    "tokenizer": (
        {"model__tokenizer_path": "nowhere/tokenizer.model"},
        ["model.tokenizer_path", "titanlite tokenizer download"],
    ),
    "too large": ({"model__flavor": "405B"}, ['model.flavor = "405B"', "bytes each", "GiB"]),
    "no run folder": ({"job__dump_folder": ""}, ['job.dump_folder = ""', 'write "."']),
    "blank run folder": ({"job__dump_folder": " "}, ['job.dump_folder = " "', 'write "."']),
    "run folder": ({"job__dump_folder": "/proc/nowhere"}, ["job.dump_folder", "cannot be written"]),
    "custom import": ({"experimental__custom_import": "no.such"}, ['experimental.custom_import = "no.such"']),
    "not implemented": (
        {"optimizer__early_step_in_backward": "true"},
        ["optimizer.early_step_in_backward = true", "does not implement"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_message_and_status_2(train: Any, tmp_path: Path, name: str) -> None:
    options, parts = CASES[name]
    (tmp_path / "broken.toml").write_text("[training]\nsteps = = 3\n")
    (tmp_path / "empty.txt").touch()
    env = {"hub set offline": {"HF_HUB_OFFLINE": "1"}, "log rank": {"LOG_RANK": "x"}, "ngpu": {"NGPU": "none"}}
    env |= {"too many processes": {"NGPU": "9999999"}}
    run = train(env=env.get(name), **options)
    assert run.status == 2, run.output
    errors = run.output.split("titanlite: error: ")
    assert len(errors) == 2
    assert all(part in errors[1] for part in parts), errors[1]
    assert "Traceback" not in run.output
    assert not run.folder.exists()


@pytest.mark.parametrize(("variable", "ngpu"), [("TORCHINDUCTOR_CACHE_DIR", 1), ("TORCHINDUCTOR_CACHE_DIR", 2)])
def test_a_cache_that_cannot_be_written_is_named(train: Any, tmp_path: Path, variable: str, ngpu: int) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "cache"
    run = train(ngpu, env={variable: str(folder)}, training__compile="true", training__local_batch_size=2)
    assert run.status == 2, run.output
    assert run.output.count("titanlite: error:") == 1
    assert f"the cache folder {folder} cannot be written" in run.output
    assert variable in run.output
    assert "Traceback" not in run.output


@pytest.mark.parametrize(
    ("variable", "below"),
    [("HF_HOME", "datasets/x.lock"), ("HF_DATASETS_CACHE", ""), ("HF_HUB_CACHE", "a/b"), ("TRITON_CACHE_DIR", "k")],
)
def test_an_error_is_a_cache_s_if_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, below: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(variable, str(tmp_path / "file" / "cache"))
    broken = NotADirectoryError(20, "Not a directory", str(tmp_path / "file" / "cache" / below))
    wrapped = ConfigError("cannot be read; replace the damaged file")
    wrapped.__cause__ = broken
    for error in (broken, wrapped, NotADirectoryError(20, "Not a directory", str(tmp_path / "file"))):
        unwritable = unwritable_cache(error)
        assert variable in str(unwritable)
        assert str(tmp_path / "file" / "cache") in str(unwritable)
    assert unwritable_cache(FileNotFoundError(2, "no such file", str(tmp_path / "data.txt"))) is None
    assert unwritable_cache(ConfigError("something else")) is None
    monkeypatch.setenv(variable, str(tmp_path / "cache"))
    assert unwritable_cache(FileNotFoundError(2, "no such file", str(tmp_path / "cache" / "x"))) is None


def test_a_worker_s_bad_input_is_shown_once(train: Any) -> None:
    run = train(ngpu=2, training__dataset="c5")
    assert run.status == 2
    assert run.output.count("titanlite: error:") == 1
    assert "Traceback" not in run.output


def test_data_shorter_than_a_sequence(train: Any, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("to be or not to be\n")
    run = train(training__dataset="text", training__dataset_path=tmp_path / "short.txt", training__seq_len=512)
    assert run.status == 2
    assert "training.seq_len" in run.output
    assert "Traceback" not in run.output


@pytest.mark.slow
def test_a_corrupt_document_is_named_or_skipped(train: Any, tmp_path: Path) -> None:
    lines = ['{"text": "' + "good text " * 8 + '"}'] * 40
    lines[17] = '{"text": "broken'
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    options = {"training__dataset": "json", "training__dataset_path": tmp_path / "data.jsonl", "training__steps": 20}
    stopped = train(name="stopped", **options)
    assert stopped.status == 2
    assert "data.jsonl" in stopped.output
    assert "line 18" in stopped.output
    assert "data.on_corrupt" in stopped.output
    skipped = train(name="skipped", data__on_corrupt="skip", **options)
    assert skipped.status == 0, skipped.output
