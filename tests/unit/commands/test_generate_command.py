"""Loading a model from a folder, and ``titanlite generate`` as its users meet it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import torch.distributed as dist

from tests.support.runs import ROOT, environment, run_command
from tests.unit.models.test_llama3 import GQA, TIED, build
from titanlite.checkpoint.hugging_face import is_hugging_face
from titanlite.checkpoint.state import model_state
from titanlite.checkpoint.storage import Info, save
from titanlite.commands import generate as generate_command
from titanlite.config import load_config
from titanlite.config.parallelism import Degrees
from titanlite.config.schema import Comm
from titanlite.data import load_tokenizer
from titanlite.data.tokenizer import SHIPPED
from titanlite.distributed import runtime
from titanlite.distributed.mesh import Mesh, build_mesh
from titanlite.errors import ConfigError
from titanlite.inference.convert import convert
from titanlite.inference.load import describe, load_model, outline
from titanlite.models.layers import Decoder, DecoderArgs
from titanlite.models.llama3.spec import FLAVORS

ARGS = {"gqa": replace(GQA, vocab_size=2176), "tied": replace(TIED, vocab_size=2176)}
CPU = torch.device("cpu")


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    runtime.start_runtime(Comm())
    yield build_mesh(Degrees(1, 1, 1, 1, 1), "cpu")
    runtime.stop_runtime()


def write(folder: Path, args: DecoderArgs, /, *, scale: float = 1.0, **about: Any) -> Decoder:
    """A checkpoint of a model with random weights; those of the layers are multiplied by ``scale``."""
    model = build(args)
    for param in model.layers.parameters():
        param.data *= scale
    about = {"name": "llama3", "flavor": "debugmodel", "args": asdict(args), **about}
    alone = not dist.is_initialized()
    if alone:
        runtime.start_runtime(Comm())
    save(folder.parent, model_state([model]), Info(int(folder.name.removeprefix("step-")), about), None)
    if alone:
        runtime.stop_runtime()
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoint" / "step-3"
    write(folder, ARGS["gqa"])
    return folder


@pytest.mark.parametrize("name", ARGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_the_one_that_was_saved(tmp_path: Path, mesh: Mesh, name: str, dtype: torch.dtype) -> None:
    saved = write(tmp_path / "step-7", ARGS[name])
    model, tokenizer, max_seq_len = load_model(tmp_path / "step-7", dtype, mesh, CPU)
    assert isinstance(model, Decoder)
    assert model.args == saved.args
    for (key, value), (other, expected) in zip(model.named_parameters(), saved.named_parameters(), strict=True):
        assert key == other
        assert torch.equal(value, expected.to(dtype))
    assert torch.equal(model.rope, saved.rope)
    assert not model.training
    assert not any(param.requires_grad for param in model.parameters())
    assert (tokenizer.vocab_size, max_seq_len) == (2048, 64)


def test_damaged_weights_are_not_computed_with(tmp_path: Path, mesh: Mesh) -> None:
    write(tmp_path / "step-7", ARGS["gqa"])
    file = next((tmp_path / "step-7").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-9] + b"something")
    with pytest.raises(ConfigError, match=rf"step-7 is damaged: {file.name} is changed .*; restore the files"):
        load_model(tmp_path / "step-7", torch.float32, mesh, CPU)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (
            {"name": "gpt9"},
            r'step-1: model.name = "gpt9": there is no such model.*; one of your own comes with --custom',
        ),
        ({"args": {"dimm": 3}}, r"checkpoint.json: its model.args are not those of a llama3 .*dimm"),
        ({"args": {}}, r"its model.args are not those .*'dim'.*; it is of another version"),
    ],
)
def test_descriptions_that_cannot_be_used(tmp_path: Path, about: dict[str, Any], message: str) -> None:
    write(tmp_path / "step-1", ARGS["gqa"], **about)
    with pytest.raises(ConfigError, match=message):
        describe(tmp_path / "step-1")


@pytest.mark.parametrize(
    "sizes",
    [
        *({"partial_rotary_factor": 0.4}, {"sliding_window": 0}, {"n_heads": 0}, {"n_kv_heads": 3}, {"head_dim": 1}),
        *({"rope_theta": 0.0}, {"rope_scaling": {"factor": -1.0}}, {"n_layers": 1 << 60}),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_together(tmp_path: Path, sizes: dict[str, Any]) -> None:
    write(tmp_path / "step-1", ARGS["gqa"], args={**asdict(ARGS["gqa"]), **sizes})
    message = "layers, more than" if "n_layers" in sizes else "no model can be built of its sizes"
    with pytest.raises(ConfigError, match=message):
        outline(describe(tmp_path / "step-1"))
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path / "step-1", tmp_path / "converted", verify_sums=False, tokenizer_path=str(SHIPPED))


def test_a_damaged_description_is_not_believed(tmp_path: Path) -> None:
    write(tmp_path / "step-1", ARGS["gqa"])
    file = tmp_path / "step-1" / "checkpoint.json"
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"step-1 is damaged: checkpoint.json is changed"):
        describe(tmp_path / "step-1")
    file.unlink()
    with pytest.raises(ConfigError, match=r"step-1 is damaged: checkpoint.json is missing"):
        describe(tmp_path / "step-1")
    file.mkdir()
    with pytest.raises(ConfigError, match=r"checkpoint.json cannot be read.*s a directory"):
        describe(tmp_path / "step-1")


@pytest.mark.parametrize("path", ["a" * 256, "~nobody-of-this-name/x"])
def test_paths_that_no_system_has(path: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert generate_command.main(["--checkpoint", path, "--prompt", ""]) == 2
    assert "can be looked up" in capfd.readouterr().err


def test_folders_that_are_no_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{tmp_path} is no checkpoint: it has no checkpoint.json, and no"):
        describe(tmp_path)
    with pytest.raises(ConfigError, match=r"gone is no checkpoint: there is no such folder \(relative to /"):
        describe(tmp_path / "gone")
    for folder in (checkpoint.parent, checkpoint.parents[1]):
        with pytest.raises(ConfigError, match=rf"{folder} is no checkpoint: there are some in it.* {checkpoint}$"):
            describe(folder)


# ---- the commands


def run_by_torchrun(folder: Path, *given: str) -> subprocess.CompletedProcess[str]:
    """``titanlite`` with its arguments on two processes, run in ``folder``."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    return subprocess.run(
        [sys.executable, *torchrun, "-m", "titanlite.commands", *given],
        cwd=folder,
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_text_goes_to_stdout_with_a_cache_and_without(checkpoint: Path) -> None:
    given = ("generate", "--checkpoint", str(checkpoint), "--prompt", "import os", "--max_new_tokens", "20")
    given += ("--top_k", "50", "--top_p", "0.95", "--seed", "4")
    done = run_command(checkpoint, *given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("import os")
    assert len(load_tokenizer().encode(done.stdout)) > 15
    assert "float32 on cpu, 1 process: prefill 3 tokens, " in done.stderr
    assert "; decode 19 tokens, " in done.stderr
    assert done.stderr.count("tokens/s") == 2
    assert run_command(checkpoint, *given, "--no-cache").stdout == done.stdout


@pytest.mark.slow
def test_the_command_of_the_readme_writes_the_same_on_two_processes(tmp_path: Path) -> None:
    """With the script's defaults, and the shape of what ./run_train.sh trains."""
    (line,) = (line for line in (ROOT / "README.md").read_text().splitlines() if "titanlite generate" in line)
    _, *given = shlex.split(line)
    seq_len = load_config(["--job.config_file", str(ROOT / "train_configs" / "debug_model.toml")]).training.seq_len
    args = FLAVORS["debugmodel"].configured(load_tokenizer().vocab_size, seq_len)
    write(tmp_path / given[given.index("--checkpoint") + 1] / "checkpoint" / "step-10", args)
    done = run_command(tmp_path, *given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("import")
    assert "float32 on cpu, 1 process: prefill 2 tokens, " in done.stderr
    assert "; decode 253 tokens, " in done.stderr  # what 256 positions have room for
    parallel = run_by_torchrun(tmp_path, *given, "--max_new_tokens=32")
    begun = parallel.stdout.rstrip("\n\ufffd")  # it may end within a character
    assert len(begun) > 32, parallel.stderr
    assert done.stdout.startswith(begun)
    assert parallel.stderr.count("float32 on cpu, 2 processes: prefill") == 1


OWN = """
from dataclasses import replace
from titanlite.models.spec import get_model_spec, register_model
llama3 = get_model_spec("llama3")
register_model(replace(llama3, name="own", flavors={"small": llama3.flavor("debugmodel")}))
"""


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    """Of a flavor that its module has no longer."""
    (tmp_path / "mine.py").write_text(OWN)
    write(tmp_path / "step-1", ARGS["gqa"], name="own", flavor="large")
    text = run_command(tmp_path, "generate", "--checkpoint=step-1", "--prompt=import", "--custom_import=mine")
    assert text.stdout.startswith("import"), text.stderr
    done = run_command(tmp_path, "convert", "step-1", "converted", "--custom_import=mine")
    assert done.returncode == 0, done.stderr
    assert is_hugging_face(tmp_path / "converted")


def larger_tokenizer(folder: Path) -> Path:
    """With 2248 tokens."""
    backend = tokenizers.Tokenizer.from_file(str(SHIPPED))
    backend.add_tokens([f"another{i}" for i in range(200)])
    backend.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_another_tokenizer_than_the_run_had(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    larger = str(larger_tokenizer(tmp_path))
    options = ["--checkpoint", str(checkpoint), "--prompt", "another7"]
    assert generate_command.main([*options, "--tokenizer_path", larger]) == 2
    error = capfd.readouterr().err
    assert f'model.tokenizer_path = "{larger}": is another tokenizer' in error
    assert str(checkpoint) in error
    assert "they differ in added tokens" in error
    same = [*options, "--tokenizer_path", str(SHIPPED), "--temperature=0", "--max_new_tokens=5"]
    assert generate_command.main(same) == 0
    with_path = capfd.readouterr().out
    assert generate_command.main([*options, "--temperature=0", "--max_new_tokens=5"]) == 0
    assert capfd.readouterr().out == with_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "nowhere"], "titanlite generate: nowhere is no checkpoint: there is no such folder"),
        (["--temperature", "-1"], "titanlite generate: temperature = -1.0: must be 0"),
        (["--top_p", "2"], "titanlite generate: top_p = 2.0: must be more than 0"),
        (["--max_new_tokens", "1000"], "titanlite generate: max_new_tokens = 1000: with the prompt's 3 these"),
        (
            ["--tokenizer_path", "nowhere"],
            'titanlite generate: model.tokenizer_path = "nowhere": there is no such file',
        ),
        (
            ["--custom_import", "no.such"],
            'titanlite generate: --custom_import = "no.such" (the command line): there is no',
        ),
    ],
)
def test_bad_input_is_one_message(
    checkpoint: Path, capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    given = {"--checkpoint": str(checkpoint), "--prompt": "import os", options[0]: options[1]}
    assert generate_command.main([part for pair in given.items() for part in pair]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith(message)
    assert "Traceback" not in err
