"""Weights & Biases, offline: what a real run has written is read back from its file."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from titanlite.config import check_config
from titanlite.config.schema import JobConfig, Metrics
from titanlite.errors import ConfigError
from titanlite.metrics.tensorboard import TAGS
from titanlite.metrics.wandb_sink import WandbSink

RATES = {"trained": "1e-3", "diverged": "1e38"}

wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")


def records(file: Path) -> Iterator[bytes]:
    """The records of a ``.wandb`` file, which has the form of LevelDB's log after seven bytes of its own: blocks of 32
    KiB; pieces of a checksum, a length and a kind (1 whole, 2 first, 3 middle, 4 last)."""
    data, block = file.read_bytes(), 1 << 15
    assert data.startswith(b":W&B")
    place, kept = 7, b""
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        kept += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield kept
            kept = b""


def read_back(folder: Path) -> tuple[dict[int, dict[str, Any]], dict[str, Any], str, str]:
    """The values of each step, the configuration, the project and the name of the one run in ``folder``."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    rows: dict[int, dict[str, Any]] = {}
    config: dict[str, Any] = {}
    project = name = ""
    for data in records(file):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.HasField("history"):
            values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            rows[values.pop("_step")] = {key: value for key, value in values.items() if not key.startswith("_")}
        elif record.HasField("run"):
            project, name = record.run.project, record.run.display_name
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return rows, config, project, name


@pytest.mark.slow
def test_the_offline_store_has_the_values_of_metrics_jsonl(train: Any, tmp_path: Path) -> None:
    env = {"WANDB_MODE": "offline", "WANDB_PROJECT": "tiny", "HOME": str(tmp_path)}
    options = {"metrics__enable_wandb": "true", "validation__enable": "true", "validation__interval": 2}
    run = train(env=env, job__name="a_name", validation__steps=1, **options)
    assert run.status == 0, run.output
    assert "wandb: offline, in " in run.output
    rows, config, project, name = read_back(run.folder)
    assert (project, name) == ("tiny", "a_name")
    assert config["training"]["seq_len"] == 32
    logged = run.rows()
    assert [*rows] == [row["step"] for row in logged] == [1, 2, 3]
    for row in logged:
        expected = {tag: row[key] for key, tag in TAGS.items() if row.get(key) is not None}
        assert all(math.isfinite(value) for value in expected.values())
        stored_row = rows[row["step"]]
        assert {tag: value for tag, value in stored_row.items() if not tag.startswith("validation")} == {
            **expected,
            "tokens_seen": row["tokens_seen"],
        }
    validations = [json.loads(line) for line in (run.folder / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in validations] == [2, 3]
    for row in validations:
        assert rows[row["step"]]["validation_metrics/loss"] == row["loss"]
        assert rows[row["step"]]["validation_metrics/bits_per_byte"] == row["bits_per_byte"]


def exit_code(folder: Path) -> int:
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    ends = [record for data in records(file) if (record := wandb_internal_pb2.Record.FromString(data)).HasField("exit")]
    return ends[-1].exit.exit_code


@pytest.mark.slow
def test_a_run_that_fails_is_stored_as_one(train: Any, tmp_path: Path) -> None:
    env = {"WANDB_MODE": "offline", "HOME": str(tmp_path)}
    runs = [train(env=env, name=name, metrics__enable_wandb="true", optimizer__lr=lr) for name, lr in RATES.items()]
    assert [run.status for run in runs] == [0, 1], runs[1].output
    assert [exit_code(run.folder) for run in runs] == [0, 1]


def test_the_group_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key, value in {"WANDB_MODE": "offline", "WANDB_RUN_GROUP": "sweep", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(key, value)
    sink = WandbSink(tmp_path, "a_name", 0, {})
    assert sink._run.group == "sweep"
    sink.close()


def test_without_a_key_it_does_not_ask(train: Any, tmp_path: Path) -> None:
    """Nor is a run that was in the folder set aside."""
    env = {"WANDB_MODE": "online", "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    run = train(env=env, metrics__enable_wandb="true")
    assert run.status == 2, run.output
    assert "there is no API key; run wandb login, or set WANDB_MODE=offline" in run.output
    assert not run.folder.exists()


def test_it_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = JobConfig(metrics=Metrics(enable_wandb=True))
    check_config(config, 1)
    folder = ModuleSpec("wandb", None, is_package=True)  # such as ./wandb, where runs lie
    for spec in (None, folder):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, spec=spec: spec)
        with pytest.raises(ConfigError, match="pip install wandb") as refused:
            check_config(config, 1)
        assert refused.value.key == "metrics.enable_wandb"
