"""``--quantize`` of titanlite generate and convert: in memory, in files, and as transformers reads these."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.unit.commands.test_generate_command import write
from titanlite.commands import convert, generate
from titanlite.config import Degrees
from titanlite.distributed.mesh import Mesh, build_mesh
from titanlite.errors import ConfigError
from titanlite.float8.inference import Float8InferenceLinear
from titanlite.inference.convert import convert as convert_folder
from titanlite.inference.load import load_model
from titanlite.models.layers import DecoderArgs
from titanlite.quant.inference import QuantInferenceLinear

NAMES = ["float8_dynamic", "float8_static", "float8_weight_only", "int8_dynamic"]
IN_MEMORY = ["int8_weight_only", "mxfp8_dynamic"]  # no reader knows them
each = pytest.mark.parametrize("name", NAMES)
ARGS = DecoderArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, vocab_size=2048, max_seq_len=64)
IDS = torch.randint(2048, (2, 48), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield build_mesh(Degrees(1, 1, 1, 1, 1), "cpu")
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, mesh: Mesh) -> Path:
    """Of a model whose blocks count: initial weights would let the embedding pass nearly as it is."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint" / "step-3"
    write(folder, ARGS, scale=2.0)
    return folder


@pytest.fixture(scope="module")
def folders(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint as a folder of each kind, with float32 for what is not quantized."""
    target = tmp_path_factory.mktemp("quantized")
    for name in NAMES:
        assert convert.main([str(checkpoint), str(target / name), f"--quantize={name}", "--dtype=float32"]) == 0
    return {name: target / name for name in NAMES}


def logits(folder: Path, mesh: Mesh, quantize: str | None = None) -> Tensor:
    with torch.no_grad():
        out: Tensor = load_model(folder, torch.float32, mesh, CPU, quantize=quantize).model(IDS)
    return out


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@each
def test_in_memory_and_in_files(checkpoint: Path, folders: dict[str, Path], mesh: Mesh, name: str) -> None:
    exact, quantized = logits(checkpoint, mesh), logits(checkpoint, mesh, name)
    assert difference(logits(folders[name], mesh), quantized) < 1e-3
    assert 5e-4 < difference(quantized, exact) < 0.05


@pytest.mark.parametrize("name", IN_MEMORY)
def test_what_no_reader_knows_is_for_memory_alone(checkpoint: Path, tmp_path: Path, mesh: Mesh, name: str) -> None:
    assert 3e-4 < difference(logits(checkpoint, mesh, name), logits(checkpoint, mesh)) < 0.06
    with pytest.raises(ConfigError, match=f"--quantize={name}: no format of files"):
        convert_folder(checkpoint, tmp_path / "out", quantize=name)
    assert not (tmp_path / "out").exists()


@each
def test_what_is_written(folders: dict[str, Path], mesh: Mesh, name: str) -> None:
    model = load_model(folders[name], torch.float32, mesh, CPU).model
    layers = {n for n, m in model.named_modules() if isinstance(m, Float8InferenceLinear | QuantInferenceLinear)}
    assert len(layers) == 7 * ARGS.n_layers
    assert "output" not in layers
    config = json.loads((folders[name] / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    inputs = config["config_groups"]["group_0"]["input_activations"]
    expected = {"float8_dynamic": True, "float8_static": False, "int8_dynamic": True}
    assert (None if inputs is None else inputs["dynamic"]) == expected.get(name)


@each
def test_transformers_computes_the_same(folders: dict[str, Path], mesh: Mesh, name: str) -> None:
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    with torch.no_grad():
        assert difference(theirs(IDS).logits, logits(folders[name], mesh)) < 2e-3


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q_proj.weight_scale", lambda scale: torch.ones(3), "must be torch.float32"),
        ("q_proj.weight_scale", lambda scale: scale.to(torch.int8), "must be torch.float32"),
        ("q_proj.weight_scale", lambda scale: -scale, "not above 0"),
        ("q_proj.weight_scale", lambda scale: scale * float("nan"), "not above 0"),
        ("q_proj.weight_scale", lambda scale: None, "must be torch.float32"),
        ("q_proj.weight", lambda weight: weight.view(torch.int8), "must be torch.float8_e4m3fn"),
        ("q_proj.weight", lambda weight: weight.bfloat16(), "must be torch.float8_e4m3fn"),
        ("q_proj.input_scale", lambda scale: torch.ones(1), "belongs to no quantized layer"),
        ("norm.weight_scale", lambda scale: torch.ones(1), "belongs to no quantized layer"),
        ("q_proj.weight_scale", lambda scale: scale.bfloat16(), None),
    ],
)
def test_files_that_are_not_as_their_config_says(
    folders: dict[str, Path], tmp_path: Path, mesh: Mesh, name: str, change: Callable[[Any], Any], message: str | None
) -> None:
    shutil.copytree(folders["float8_dynamic"], tmp_path / "model")
    file, name = tmp_path / "model" / "model.safetensors", f"model.layers.0.self_attn.{name}"
    tensors = load_file(file)
    changed = {**tensors, name: change(tensors.get(name))}
    save_file({key: tensor for key, tensor in changed.items() if tensor is not None}, file)
    if message is None:
        load_model(tmp_path / "model", torch.float32, mesh, CPU)
    else:
        with pytest.raises(ConfigError, match=rf"{tmp_path / 'model'}: .*q_proj.*{message}|norm.*{message}"):
            load_model(tmp_path / "model", torch.float32, mesh, CPU)


def test_texts_to_calibrate_with(checkpoint: Path, tmp_path: Path, mesh: Mesh) -> None:
    """Another text gives other scales of inputs, and nothing else."""
    (tmp_path / "text.txt").write_text("the same word " * 200)
    state = [
        load_model(checkpoint, torch.float32, mesh, CPU, quantize="float8_static", calibration=text).model.state_dict()
        for text in (None, str(tmp_path / "text.txt"))
    ]
    changed = {name for name, tensor in state[0].items() if not torch.equal(tensor, state[1][name])}
    assert changed
    assert all(name.endswith("input_scale") for name in changed)


def test_generate_writes_with_it(checkpoint: Path, folders: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt=import", "--max_new_tokens=3", "--temperature=0"]
    if dist.is_initialized():
        dist.destroy_process_group()  # the command has its own; this test is the last of the file that needs one
    assert generate.main([f"--checkpoint={checkpoint}", "--quantize=float8_dynamic", *options]) == 0
    captured = capfd.readouterr()
    assert captured.out.startswith("import")
    assert "float8_dynamic, float32 on" in captured.err
    assert generate.main([f"--checkpoint={folders['float8_dynamic']}", *options]) == 0
    assert capfd.readouterr().out == captured.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quantize=float8"], 'there is no such way to quantize (did you mean "float8_static"?)'),
        (["--quantize=float8_dynamic", "--calibration=text"], "has no effect, as no scale is static"),
        (["--calibration=text"], "has no effect without --quantize"),
        (["--quantize=float8_static", "--calibration=nowhere"], "--calibration=nowhere: cannot be read as UTF-8"),
        (["--quantize=float8_static", "--calibration=/dev/zero"], "a pipe, a socket or a device"),
    ],
)
def test_bad_input_is_one_message(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert convert.main([str(checkpoint), str(tmp_path / "out"), *options]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_model(folders: dict[str, Path], checkpoint: Path, tmp_path: Path) -> None:
    """What lacks a tensor, or has one too many, or of another shape, is refused with --quantize as it is without."""
    plain = tmp_path / "plain"
    assert convert.main([str(checkpoint), str(plain), "--dtype=float32"]) == 0
    tensors = load_file(plain / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    changes: dict[str, dict[str, Tensor]] = {
        "is in its files and not": {**tensors, f"{name}.bias": torch.zeros(64)},
        "is not in its files": {key: tensor for key, tensor in tensors.items() if key != f"{name}.weight"},
        "has another shape": {**tensors, f"{name}.weight": torch.zeros(32, 64)},
    }
    for message, changed in changes.items():
        save_file(changed, plain / "model.safetensors")
        with pytest.raises(ConfigError, match=message):
            convert_folder(plain, tmp_path / "out", quantize="float8_dynamic")


def test_layers_that_the_units_do_not_take(tmp_path: Path) -> None:
    write(tmp_path / "step-3", replace(ARGS, dim=72))
    with pytest.raises(ConfigError, match=r"layers.0.attention.wq \(72 -> 72\): features are not multiples of 16"):
        convert_folder(tmp_path / "step-3", tmp_path / "out", quantize="float8_dynamic")
    assert convert_folder(tmp_path / "step-3", tmp_path / "out", quantize="float8_weight_only")


def test_quantized_weights_are_for_inference(folders: dict[str, Path], tmp_path: Path) -> None:
    source = folders["float8_dynamic"]
    for quantize, message in ((None, "its weights are quantized"), ("float8_static", "are quantized already")):
        with pytest.raises(ConfigError, match=message):
            convert_folder(source, tmp_path / "out", quantize=quantize)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="titanlite reads compressed-tensors as titanlite convert --quantize writes"):
        load_model(tmp_path / "other", torch.float32, None, CPU)  # type: ignore[arg-type]
