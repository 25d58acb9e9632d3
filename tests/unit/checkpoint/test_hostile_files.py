"""No file that a user is given runs code: every reader of files, and every way in, with an honest file beside it."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import load
from torch.distributed.checkpoint.api import CheckpointException

from tests.support.forks import ROOT
from tests.support.hostile import EMBEDDING, WAYS_IN, Payload, edit_metadata, reseal
from tests.support.runs import Run, checkpoints, run_trainer
from tests.unit.commands.test_generate_command import ARGS, write
from titanlite.checkpoint.folder import clear_leftovers
from titanlite.checkpoint.hugging_face import HuggingFaceFolder
from titanlite.commands import convert, generate
from titanlite.errors import ConfigError

# ---- what the code calls


def calls(tree: ast.AST) -> list[str]:
    """The calls in a file that could run code of another file, as they are written."""
    risky_calls = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            runs = re.fullmatch(
                r"((c?[Pp]ickle|dill|marshal|joblib|shelve)\.(load|loads|Unpickler|open)"
                r"|eval|exec|os\.(system|popen)|subprocess\.get(status)?output|yaml\.(load|unsafe_load))",
                name,
            )
            loads = name in ("torch.load", "torch.jit.load", "torch.package.PackageImporter", "torch.export.load")
            if (
                runs
                or (loads and given.get("weights_only") != "True")
                or given.get("shell") == "True"
                or given.get("allow_pickle", "False") != "False"
                or given.get("trust_remote_code", "False") != "False"
                or (name.split(".")[-1] in ("DefaultLoadPlanner", "FileSystemReader", "load_state_dict_from_keys"))
            ):
                risky_calls.append(ast.unparse(node))
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            module = getattr(node, "module", None) or ""
            risky_calls += [
                f"{module}.{name}"
                for name in names
                if f"{module}.{name}" in ("pickle.load", "pickle.loads", "torch.load", "os.system")
                or (module.startswith("torch.distributed.checkpoint") and "load" in module)
            ]
    return risky_calls


def test_the_product_has_no_call_that_runs_a_file() -> None:
    files = [path for room in ("titanlite", "models") for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 50
    assert {str(path): bad for path in files if (bad := calls(ast.parse(path.read_text())))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(f)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "numpy.load(f, allow_pickle=True)",
        "FileSystemReader(folder)",
        "from pickle import loads",
        "from torch.distributed.checkpoint.state_dict_loader import load",
    ],
)
def test_the_search_finds_such_a_call(line: str) -> None:
    assert calls(ast.parse(line))


# ---- what readers do


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest") / "step-1"
    write(folder, ARGS["gqa"])
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = run_trainer(tmp_path_factory.mktemp("finished"), **checkpoints(1), training__steps=1)
    assert run.status == 0, run.output
    return run


def generated(folder: Path, out: Path) -> int:
    return generate.main(["--checkpoint", str(folder), "--prompt", "x", "--max_new_tokens", "1"])


def converted(folder: Path, out: Path) -> int:
    return convert.main([str(folder), str(out)])


@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize("read", [generated, converted])
def test_a_checkpoint_runs_nothing(
    honest: Path, tmp_path: Path, read: Callable[[Path, Path], int], way: str, capfd: pytest.CaptureFixture[str]
) -> None:
    change, message = WAYS_IN[way]
    folder, marker = tmp_path / "step-1", tmp_path / "marker"
    shutil.copytree(honest, folder)
    assert read(folder, tmp_path / "honest") == 0
    change(folder, marker)
    capfd.readouterr()
    assert read(folder, tmp_path / "out") == 2
    error = capfd.readouterr().err
    assert message in error
    assert str(folder) in error
    assert "Traceback" not in error
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "way", [pytest.param(w, marks=[pytest.mark.slow] * (w in ("rank", "hidden"))) for w in WAYS_IN]
)
@pytest.mark.parametrize("start", ["resumed", "initial"])
def test_the_trainer_runs_nothing(finished: Run, tmp_path: Path, way: str, start: str) -> None:
    change, message = WAYS_IN[way]
    marker, source = tmp_path / "marker", tmp_path / "run"
    shutil.copytree(finished.folder, source)
    change(source / "checkpoint" / "step-1", marker)
    options: dict[str, Any] = {**checkpoints(1), "training__steps": 2}
    if start == "initial":
        options["checkpoint__initial_load_path"] = source / "checkpoint" / "step-1"
    run = run_trainer(tmp_path, name="run" if start == "resumed" else "other", **options)
    assert run.status == 2, run.output
    assert message in run.output
    assert "Traceback" not in run.output
    assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        (lambda info: info["data"].clear(), 2, "of another form"),
        (lambda info: info["data"].update(identity=3), 2, "of another form"),
        (lambda info: info["data"].update(shards={s: [0, 0, 0, -1] for s in "0123"}), 2, "negative or too large"),
        (lambda info: info["data"].update(shards={s: [0, 0, 0, 1 << 61] for s in "0123"}), 2, "continues at token"),
        (lambda info: info["step_guard"].clear(), 2, "of another form"),
        (lambda info: info["step_guard"].update(losses=[1.0] * 1000), 2, "of another form"),
        (lambda info: info["model"]["args"].update(dim="wide"), 2, "of another model"),
        (lambda info: info.update(step=1 << 62), 0, "nothing to do"),
    ],
)
@pytest.mark.slow
def test_a_run_does_not_continue_from_values_of_another_form(
    finished: Run, tmp_path: Path, change: Callable[[dict[str, Any]], Any], status: int, message: str
) -> None:
    shutil.copytree(finished.folder, tmp_path / "run")
    file = tmp_path / "run" / "checkpoint" / "step-1" / "checkpoint.json"
    info = json.loads(file.read_text())
    change(info)
    file.write_text(json.dumps(info))
    reseal(file.parent)
    run = run_trainer(tmp_path, timeout=100, **checkpoints(1), training__steps=2)
    assert run.status == status, run.output
    assert message in run.output
    assert "Traceback" not in run.output


@pytest.mark.parametrize("way", ["metadata", "bytes"])
def test_dcp_itself_runs_these_files(honest: Path, tmp_path: Path, way: str) -> None:
    folder, marker = tmp_path / "step-1", tmp_path / "marker"
    shutil.copytree(honest, folder)
    WAYS_IN[way][0](folder, marker)
    with pytest.warns(UserWarning, match="torch.distributed is disabled"), suppress(CheckpointException):
        load({EMBEDDING: None}, checkpoint_id=folder, no_dist=True)
    assert marker.exists()


# ---- files of Hugging Face


@pytest.fixture(scope="module")
def exported(honest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert convert.main([str(honest), str(folder)]) == 0
    return folder


@pytest.mark.parametrize("read", [generated, converted])
def test_a_hugging_face_folder_runs_nothing(
    exported: Path, tmp_path: Path, read: Callable[[Path, Path], int], capfd: pytest.CaptureFixture[str]
) -> None:
    folder, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(exported, folder)
    torch.save(Payload(marker), folder / "pytorch_model.bin")
    (folder / "modeling_own.py").write_text(f"import os; os.mkdir({str(marker)!r})\n")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"auto_map": {"AutoModelForCausalLM": "modeling_own.A"},', 1))
    assert read(folder, tmp_path / "out") == 0
    (folder / "model.safetensors").unlink()
    capfd.readouterr()
    assert read(folder, tmp_path / "out2") == 2
    assert "pytorch_model.bin, which can run code" in capfd.readouterr().err
    assert not marker.exists()


# ---- links, pipes and devices


@pytest.mark.parametrize("kind", ["link out", "device", "pipe"])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "checkpoint.json", "SHA256SUMS"])
def test_only_files_of_the_folder_are_read(
    honest: Path, tmp_path: Path, name: str, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "step-1"
    shutil.copytree(honest, folder)
    replace(folder / name, kind)
    for read in (generated, converted):
        assert read(folder, tmp_path / "out") == 2
        error = capfd.readouterr().err
        assert name in error
        assert re.search("outside of|a pipe", error), error
    (folder / name).unlink()
    (folder / f"{name}.real").write_bytes((honest / name).read_bytes())
    (folder / name).symlink_to(f"{name}.real")
    assert generated(folder, tmp_path / "out") == 0  # a link within the folder is fine


def replace(file: Path, kind: str) -> None:
    content = file.read_bytes()
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        other = file.parents[1] / "elsewhere"
        other.write_bytes(content)
        file.symlink_to(other)


@pytest.mark.parametrize("kind", ["link out", "device", "pipe"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json", "chat_template.jinja"])
def test_only_files_of_a_hugging_face_folder_are_read(
    exported: Path, tmp_path: Path, name: str, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    (folder / name).touch()
    replace(folder / name, kind)
    assert converted(folder, tmp_path / "out") == 2
    assert str(folder if name == "config.json" else folder / name) in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_index_names_only_files_of_its_folder(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", tmp_path / "b.safetensors")
    tensors = HuggingFaceFolder(folder).tensors
    index = folder / "model.safetensors.index.json"
    for name, fits in {
        "a.safetensors": True,
        "../b.safetensors": False,
        str(tmp_path / "b.safetensors"): False,
        "x/../../b.safetensors": False,
        "a.safetensors\\u0000": False,
        "\\ud800": False,
        "": False,
        ".": False,
    }.items():
        text = ",".join(f'"{tensor}": "{name}"' for tensor in tensors)
        index.write_text(f'{{"weight_map": {{{text}}}}}')
        if fits:
            assert HuggingFaceFolder(folder).tensors == tensors
        else:
            with pytest.raises(ConfigError, match=r"is not in that folder|is not JSON"):
                HuggingFaceFolder(folder)


def test_the_links_of_the_hubs_cache_are_followed(exported: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--somebody--model"
    blobs, folder = repository / "blobs", repository / "snapshots" / "0123abc"
    folder.mkdir(parents=True)
    shutil.copytree(exported, blobs)
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(f"../../blobs/{file.name}")
    assert HuggingFaceFolder(folder).tensors.keys() == HuggingFaceFolder(exported).tensors.keys()
    (tmp_path / "link").symlink_to(folder)  # the user's own link to the folder
    assert HuggingFaceFolder(tmp_path / "link").tensors
    other = tmp_path / "models--somebody--other" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(exported / "model.safetensors", other)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(other / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model.safetensors: is a link to .*, outside of .*models--somebody--model;"):
        HuggingFaceFolder(folder)


def test_metadata_is_dcps_own(honest: Path, tmp_path: Path) -> None:
    """DCP's own tools still read what is saved: ``.metadata`` stays theirs."""
    shutil.copytree(honest, tmp_path / "step-1")
    edit_metadata(tmp_path / "step-1", lambda metadata: None)
    assert generated(tmp_path / "step-1", tmp_path) == 0


def test_an_export_follows_no_link(honest: Path, exported: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "hf").symlink_to(outside)
    (tmp_path / ".other.partial").symlink_to(outside)
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / ".partial-step-0").symlink_to(outside)
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "step-0").symlink_to(outside)
    assert convert.main([str(honest), str(tmp_path / "hf")]) == 2
    assert convert.main([str(honest), str(tmp_path / "other")]) == 2
    assert convert.main([str(exported), str(tmp_path / "steps")]) == 2
    assert convert.main([str(exported), str(tmp_path / "done")]) == 0  # what is no checkpoint is renamed, not followed
    assert (tmp_path / "done" / "stray-step-0").is_symlink()
    assert list(outside.iterdir()) == []


def test_leftovers_that_are_links_are_removed_alone(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / ".partial-step-3").symlink_to(outside)
    assert clear_leftovers(tmp_path / "root") == [".partial-step-3"]
    assert outside.is_dir()
    assert list((tmp_path / "root").iterdir()) == []


def test_a_step_that_is_a_link_out_is_not_the_latest(finished: Run, tmp_path: Path) -> None:
    root = tmp_path / "theirs"
    root.mkdir()
    (root / "step-9").symlink_to(finished.folder / "checkpoint" / "step-1")
    run = run_trainer(tmp_path, checkpoint__initial_load_path=root)
    assert run.status == 2
    assert f"{root / 'step-9'}: is a link to" in run.output
