"""Hugging Face folders as they come: heads that are tied and saved too, what is missing, and headers that lie."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.runs import run_trainer
from tests.unit.checkpoint.test_hugging_face import GQA, TIED, export
from titanlite.checkpoint.hugging_face import HuggingFaceFolder
from titanlite.commands import convert, generate
from titanlite.distributed.init import WeightInit
from titanlite.errors import ConfigError
from titanlite.models.layers import Decoder, DecoderArgs
from titanlite.models.llama3.spec import HUGGING_FACE

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def exported(folder: Path, args: DecoderArgs, **options: Any) -> Path:
    model = Decoder(args)
    model.init_weights(WeightInit(model, 0))
    export(model, folder, dtype=torch.float32, **options)
    return folder


def with_head(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, HEAD: change(tensors[EMBEDDING].clone())}, folder / "model.safetensors")


def first_wrong(weight: torch.Tensor) -> torch.Tensor:
    weight[-1, -1] += 1e-3
    return weight


# ---- tied weights


def readers(folder: Path, out: Path) -> list[int]:
    return [
        generate.main(["--checkpoint", str(folder), "--prompt", "x", "--max_new_tokens", "1"]),
        convert.main([str(folder), str(out)]),
    ]


def test_a_tied_head_that_is_saved_too_is_read_if_it_is_the_same(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from titanlite.checkpoint import hugging_face

    monkeypatch.setattr(hugging_face, "_COMPARED", 1 << 12)  # several comparisons
    folder = exported(tmp_path / "model", TIED)
    assert readers(folder, tmp_path / "without") == [0, 0]
    with_head(folder, lambda weight: weight)
    assert readers(folder, tmp_path / "same") == [0, 0]
    for change in (first_wrong, lambda weight: weight[:-1], lambda weight: weight * float("nan")):
        with_head(folder, change)
        capfd.readouterr()
        assert readers(folder, tmp_path / "other") == [2, 2]
        error = capfd.readouterr().err
        assert error.count(f"{HEAD} and {EMBEDDING} are the same weights, and the files hold different ones") == 2
    assert not (tmp_path / "other").exists()


def test_an_index_may_name_a_tied_head_that_no_file_has(tmp_path: Path) -> None:
    for args, loads in ((TIED, True), (GQA, False)):
        folder = exported(tmp_path / f"model {loads}", args, max_shard_bytes=100_000)
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"][HEAD] = content["weight_map"][EMBEDDING]
        index.write_text(json.dumps(content))
        assert readers(folder, tmp_path / f"out {loads}") == ([0, 0] if loads else [2, 2])


def test_the_trainer_compares_them_too(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from dataclasses import replace\n"
        "from titanlite.models.llama3.spec import FLAVORS\n"
        'FLAVORS["tied"] = replace(FLAVORS["debugmodel"], n_layers=1, tie_embeddings=True)\n'
    )
    args = DecoderArgs(
        dim=256, n_layers=1, n_heads=16, n_kv_heads=16, ffn_dim=768, vocab_size=2048, tie_embeddings=True
    )
    folder = exported(tmp_path / "model", args)
    options = {"experimental__custom_import": "own", "model__flavor": "tied", "checkpoint__initial_load_path": folder}
    for change, status in ((lambda weight: weight, 0), (first_wrong, 2)):
        with_head(folder, change)
        run = run_trainer(tmp_path, ngpu=2, training__local_batch_size=2, **options)
        assert run.status == status, run.output
        assert ("hold different ones" in run.output) == bool(status)


# ---- what is missing


def put(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["config.json", "pytorch_model.bin"], "its weights are in pytorch_model.bin, which can run code"),
        (["config.json", "consolidated.00.pth"], "its weights are in consolidated.00.pth, which can run code"),
        (["model-Q4_K_M.gguf"], "its weights are GGUF (model-Q4_K_M.gguf)"),
        (["config.json", "tokenizer.json"], "the weights are missing"),
        (["model.safetensors"], "no config.json that says which model"),
        (["adapter_config.json", "adapter_model.safetensors"], "it holds an adapter"),
        (["snapshots/abc/config.json"], "it is a repository of the Hub's cache; name a folder in"),
        (["step-3/checkpoint.json", "step-12/checkpoint.json"], "step-12 is damaged: SHA256SUMS is missing"),
        (["a/step-3/checkpoint.json", "b/step-12/checkpoint.json"], "so name one"),
        (["notes.txt"], "it has no checkpoint.json, and no config.json beside *.safetensors"),
        ([], "there is no such folder"),
    ],
)
def test_what_a_path_without_weights_is(
    tmp_path: Path, names: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = put(tmp_path / "given", *names)
    assert readers(folder, tmp_path / "out") == [2, 2]
    assert capfd.readouterr().err.count(message) == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["config.json", "pytorch_model.bin"], "its weights are in pytorch_model.bin, which can run code"),
        ([], "there is no such folder"),
    ],
)
def test_the_trainer_says_what_a_path_is(tmp_path: Path, names: list[str], message: str) -> None:
    run = run_trainer(tmp_path, checkpoint__initial_load_path=put(tmp_path / "given", *names))
    assert run.status == 2
    assert f'checkpoint.initial_load_path = "{tmp_path / "given"}"' in run.output
    assert message in run.output


def test_a_name_of_the_hub_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert readers(Path("meta-llama/Llama-3.2-1B"), tmp_path / "out") == [2, 2]
    assert "hf download meta-llama/Llama-3.2-1B --local-dir" in capfd.readouterr().err


# ---- sizes and headers


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers"),
        ({"num_hidden_layers": 9_000}, "9000 layers, more than there are tensors"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"hidden_size": 1e30}, "hidden_size"),
        ({"vocab_size": 1 << 24}, "have another shape: model.embed_tokens.weight"),
        ({"vocab_size": 1 << 25}, "vocab_size"),
        ({"max_position_embeddings": 1 << 60}, "max_position_embeddings"),
        ({"max_position_embeddings": -1}, "max_position_embeddings"),
        ({"max_position_embeddings": 1 << 24}, "GiB for 16,777,216 positions"),
        *(
            ({"quantization_config": value}, "quantization_config = ")
            for value in ([1], "x" * 10**6, {"quant_method": 3})
        ),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": [1]}},
            "quantization_config = ",
        ),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": float("inf")}}, "factor"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"model_type": ["llama"]}, "model_type"),
    ],
)
def test_sizes_that_are_not_believed(
    tmp_path: Path, values: dict[str, Any], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = exported(tmp_path / "model", GQA)
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config.get("rope_theta", 10000.0)
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    assert readers(folder, tmp_path / "out") == [2, 2]
    error = capfd.readouterr().err
    assert error.count(message) >= 2, error
    assert len(error) < 10_000
    assert "Traceback" not in error


def rewritten(content: bytes, edit: Callable[[dict[str, Any]], Any]) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edited = edit(header)
    text = (json.dumps(header) if edited is None else edited).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def end(header: dict[str, Any]) -> int:
    return max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: struct.pack("<Q", 1 << 62) + content[8:],
        lambda content: struct.pack("<Q", 99_000_000) + content[8:],
        lambda content: struct.pack("<Q", 0) + content[8:],
        lambda content: rewritten(content, lambda h: h[EMBEDDING].update(shape=[1 << 40, 1 << 40])),
        lambda content: rewritten(content, lambda h: h[EMBEDDING].update(data_offsets=[0, 1 << 50])),
        lambda content: rewritten(content, lambda h: h[EMBEDDING].update(data_offsets=h[HEAD]["data_offsets"])),
        lambda content: rewritten(content, lambda h: h[EMBEDDING].update(data_offsets=[-4, 0])),
        lambda content: rewritten(content, lambda h: h[EMBEDDING].update(dtype="F77")),
        lambda content: rewritten(content, lambda h: h[EMBEDDING].update(dtype="F8_E4M3")),
        lambda content: rewritten(content, lambda h: h[EMBEDDING].update(shape="no")),
        lambda content: rewritten(content, lambda h: h.update(x=h[EMBEDDING])),
        lambda content: rewritten(content, lambda h: "[" * 100_000),
        lambda content: rewritten(content, lambda h: "{}"),
        lambda content: content[:-1],
        lambda content: content[:100],
        lambda content: b"",
    ],
)
def test_headers_that_claim_what_is_not_there(
    tmp_path: Path, edit: Callable[[bytes], bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = exported(tmp_path / "model", GQA)
    file = folder / "model.safetensors"
    file.write_bytes(edit(file.read_bytes()))
    assert readers(folder, tmp_path / "out") == [2, 2]
    error = capfd.readouterr().err
    assert str(folder) in error
    assert "Traceback" not in error


def test_a_flavor_that_does_not_fit_is_named_in_the_words_of_config_json() -> None:
    config = HUGGING_FACE.to_config(GQA)
    other = DecoderArgs(**{**GQA.__dict__, "dim": 128, "ffn_dim": 256})
    with pytest.raises(ConfigError, match=r"hidden_size is 64 there and 128 here; intermediate_size is 96 there"):
        HUGGING_FACE.check(other, config)


def test_a_part_of_the_index_may_lie_in_a_subfolder(tmp_path: Path) -> None:
    folder = exported(tmp_path / "model", GQA)
    tensors = HuggingFaceFolder(folder).tensors
    (folder / "part").mkdir()
    (folder / "model.safetensors").rename(folder / "part" / "1.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "part/1.safetensors")})
    )
    put(folder, "x.safetensors")  # the index says what counts
    assert HuggingFaceFolder(folder).tensors.keys() == tensors.keys()


def test_a_vocabulary_larger_than_that_of_every_flavor_is_read(tmp_path: Path) -> None:
    args = DecoderArgs(dim=16, n_layers=1, n_heads=2, n_kv_heads=2, ffn_dim=16, vocab_size=130_000, max_seq_len=64)
    assert readers(exported(tmp_path / "model", args), tmp_path / "out") == [0, 0]
