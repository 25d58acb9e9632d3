"""Files with random changes: each is read as it is, or refused with one message; no traceback, no hang, no leftovers.

The seeds are fixed. The marks say how many of them a run tries.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.support.hostile import reseal
from tests.support.runs import Run, checkpoints, run_trainer
from tests.unit.commands.test_generate_command import ARGS, write
from titanlite.commands import convert, generate
from titanlite.config import check_config, load_config
from titanlite.config.packaged import find
from titanlite.data import load_tokenizer
from titanlite.errors import ConfigError

SECONDS = 60
VALUES = [
    "-1",
    "0",
    "1e400",
    "nan",
    "true",
    '"x"',
    "[]",
    "[1, [2]]",
    "{a = 1}",
    "9" * 30,
    '""',
    "1979-05-27",
    '"\\u0000"',
]


@contextmanager
def no_hang() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise AssertionError(f"it had not ended after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---- changes


def flip(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 3, 20))):
        if changed:
            changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content) + 1)]


def repeat(content: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(content) + 1)
    return content[:start] + content[start : start + 200] * 2 + content[start + 200 :]


def change_json(content: bytes, chance: random.Random) -> bytes:
    """Drop a field, or give it another type or size, at any depth."""
    try:
        holder: Any = json.loads(content)
    except ValueError:
        return flip(content, chance)
    top = holder
    while isinstance(holder, (dict, list)) and holder:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = chance.choice(keys)
        if isinstance(holder[key], (dict, list)) and holder[key] and chance.random() < 0.7:
            holder = holder[key]
            continue
        if chance.random() < 0.3:
            del holder[key]
        else:
            holder[key] = chance.choice([None, -1, 0, 1 << 70, 1.5, float("inf"), "x", [], {}, True, [[[1]]], "../x"])
        break
    return json.dumps(top).encode()


def change_a_file(folder: Path, chance: random.Random) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != "SHA256SUMS")
    file = chance.choice(files)
    if chance.random() < 0.05:
        file.unlink()
        return
    ways: list[Callable[[bytes, random.Random], bytes]] = [flip, cut, repeat]
    if file.suffix == ".json":
        ways += [change_json] * 6
    file.write_bytes(chance.choice(ways)(file.read_bytes(), chance))


# ---- folders of weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("weights")
    write(root / "step-1", ARGS["gqa"])
    assert convert.main([str(root / "step-1"), str(root / "model")]) == 0
    return {"checkpoint": root / "step-1", "hugging_face": root / "model"}


SLOW, LONG = pytest.mark.slow, pytest.mark.long
FOLDERS = [*range(4), *(pytest.param(part, marks=SLOW) for part in range(4, 10)),
           *(pytest.param(part, marks=LONG) for part in range(10, 40))]  # fmt: skip


@pytest.mark.parametrize("part", FOLDERS)
@pytest.mark.parametrize("kind", ["checkpoint", "hugging_face"])
def test_folders_of_weights(
    weights: dict[str, Path], tmp_path: Path, kind: str, part: int, capfd: pytest.CaptureFixture[str]
) -> None:
    for seed in range(part * 5, part * 5 + 5):
        chance = random.Random(f"{kind} {seed}")
        folder, out = tmp_path / f"{seed}", tmp_path / f"out {seed}"
        shutil.copytree(weights[kind], folder)
        change_a_file(folder, chance)
        sealed = kind == "checkpoint" and chance.random() < 0.8
        if sealed:
            reseal(folder)
        for argv, main in (
            (["--checkpoint", str(folder), "--prompt", "x", "--max_new_tokens", "1"], generate.main),
            ([str(folder), str(out)], convert.main),
        ):
            with no_hang():
                status = main(argv)
            error = capfd.readouterr().err
            assert status in (0, 1, 2), (seed, status)
            assert "Traceback" not in error, (seed, error)
            assert (f"titanlite {main.__module__.rpartition('.')[2]}: " in error) == (status != 0), (seed, error)
            assert sealed or kind != "checkpoint" or status == 2 or unchanged(folder, weights[kind]), seed
            assert out.exists() == (main is convert.main and status == 0), seed
            assert not list(tmp_path.glob(".*")), seed


def unchanged(folder: Path, before: Path) -> bool:
    return all((folder / path.name).read_bytes() == path.read_bytes() for path in before.iterdir())


# ---- configurations


def change_toml(text: str, chance: random.Random) -> str:
    lines = text.splitlines()
    at = chance.randrange(len(lines))
    key, equals, _ = lines[at].partition("=")
    way = chance.randrange(6)
    if way == 0:
        return flip(text.encode(), chance).decode("utf-8", "surrogateescape")
    if way == 1:
        del lines[at]
    elif way == 2:
        lines.insert(at, chance.choice(lines))
    elif way == 3 and equals:
        lines[at] = f"{key}x = 1"
    elif equals:
        lines[at] = f"{key}= {chance.choice(VALUES)}"
    else:
        lines[at] = lines[at].replace("[", "[x.", 1)
    return "\n".join(lines)


@pytest.mark.parametrize("part", range(10))
def test_configurations(tmp_path: Path, part: int) -> None:
    path = find("debug_model")
    assert path is not None
    text = Path(path).read_text()
    for seed in range(part * 30, part * 30 + 30):
        chance = random.Random(f"toml {seed}")
        file = tmp_path / "own.toml"
        file.write_bytes(change_toml(text, chance).encode("utf-8", "surrogateescape"))
        options = [change_option(chance) for _ in range(chance.choice((0, 0, 1, 2)))]
        with no_hang(), suppress(ConfigError):
            check_config(load_config([f"--job.config_file={file}", *options]), 1)


def change_option(chance: random.Random) -> str:
    keys = ["training.steps", "optimizer.lr", "model.converters", "data.text_field", "float8.filter_fqns", "x.y", "job"]
    name = f"--{chance.choice(keys)}"
    return chance.choice([name, f"{name}=", f"{name}={chance.choice(VALUES)}", f"{name}=\udc80", name[1:], f"{name}=="])


# ---- whole runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = run_trainer(tmp_path_factory.mktemp("finished"), **checkpoints(1), training__steps=1)
    assert run.status == 0, run.output
    return run.folder


def assert_one_message(run: Run, folders: list[Path]) -> None:
    assert run.status in (0, 1, 2), run.output
    assert "Traceback" not in run.output, run.output
    assert run.output.count("titanlite: error:") == (run.status != 0), run.output
    empty = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.stat().st_size]
    assert [path.name for path in empty if path.name != ".lock"] == []


@pytest.mark.parametrize("seed", [pytest.param(0, marks=SLOW), *(pytest.param(n, marks=LONG) for n in range(1, 40))])
def test_runs_that_continue(finished: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(f"run {seed}")
    shutil.copytree(finished, tmp_path / "run")
    change_a_file(tmp_path / "run" / "checkpoint" / "step-1", chance)
    if chance.random() < 0.8:
        reseal(tmp_path / "run" / "checkpoint" / "step-1")
    run = run_trainer(tmp_path, timeout=120, **checkpoints(1), training__steps=2)
    assert_one_message(run, [])


@pytest.mark.parametrize("seed", [pytest.param(0, marks=SLOW), *(pytest.param(n, marks=LONG) for n in range(1, 60))])
def test_data_and_tokenizers(tmp_path: Path, seed: int) -> None:
    chance = random.Random(f"data {seed}")
    kind = chance.choice(("text", "json", "parquet"))
    texts = [f"{number} {json.dumps({'name': number})} import os\n" * 40 for number in range(200)]
    file = tmp_path / "data" / {"text": "a.txt", "json": "a.jsonl", "parquet": "a.parquet"}[kind]
    file.parent.mkdir()
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file)
    else:
        file.write_text("".join(texts) if kind == "text" else "".join(f"{json.dumps({'text': t})}\n" for t in texts))
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    load_tokenizer().save(tokenizer)
    change_a_file(chance.choice((file.parent, tokenizer)), chance)
    options = {"training__dataset": kind, "training__dataset_path": file.parent, "model__tokenizer_path": tokenizer}
    run = run_trainer(tmp_path, timeout=120, **options, training__steps=2)
    assert_one_message(run, [tmp_path / "run"] if run.status else [])
