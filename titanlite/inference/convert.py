"""Convert a checkpoint to a Hugging Face folder, or back. Tensors go through memory one after the other; only
calibration, for static scales, loads the whole model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titanlite.checkpoint import Info
from titanlite.checkpoint.collectives import SaveError
from titanlite.checkpoint.folder import latest_checkpoint
from titanlite.checkpoint.hugging_face import QUANTIZATION, is_hugging_face
from titanlite.checkpoint.hugging_face_export import check_target, write_hugging_face
from titanlite.checkpoint.metadata import SavedTensor
from titanlite.checkpoint.storage import load, save, verify
from titanlite.config.parallelism import Degrees
from titanlite.config.schema import Comm
from titanlite.converters import Quantizer
from titanlite.data import Tokenizer
from titanlite.distributed import runtime
from titanlite.distributed.mesh import build_mesh
from titanlite.errors import ConfigError
from titanlite.inference.load import (
    ModelDescription,
    describe,
    generation_of,
    load_model,
    outline,
    quantizer_for,
    tokenizer_of,
)
from titanlite.inference.model_card import model_card
from titanlite.inference.quantize import calibrated, linear_layers, quantization_config, quantized_weights
from titanlite.models.weight_map import WeightMap, buffers_of


def convert(
    source: Path,
    target: Path,
    dtype: str | None = None,
    tokenizer_path: str | None = None,
    *,
    quantize: str | None = None,
    calibration: str | None = None,
    verify_sums: bool = True,
    replace: bool = False,
) -> str:
    """Convert ``source``, a checkpoint or a Hugging Face folder, to the other format, in ``target``. Return a message
    with the result and its use. With ``quantize`` the target is a Hugging Face folder in any case. Of a run folder, or
    a folder of checkpoints, the latest is converted.

    Args:
        dtype: the torch dtype, by name, of the weights in a Hugging Face folder; None: bfloat16. A checkpoint keeps the
            dtypes of the source.
        tokenizer_path: the tokenizer, where the source has none; None: the one of the source.
        quantize, calibration: see :func:`titanlite.inference.load.load_model`.
        verify_sums: verify the checksums of a checkpoint first.
        replace: replace a Hugging Face folder that an earlier conversion has written.

    Raises:
        ConfigError: the source cannot be converted or read, or the target cannot be written.
    """
    source = latest_checkpoint(source)
    from_hugging_face = is_hugging_face(source)
    if from_hugging_face and not verify_sums:
        raise ConfigError(f"--no-verify: {source} is no checkpoint and has no checksums; leave it out")
    if quantize is None and calibration is not None:
        raise ConfigError(f"--calibration={calibration}: has no effect without --quantize; leave it out")
    if not from_hugging_face or quantize is not None:
        return to_hugging_face(
            source,
            target,
            dtype or "bfloat16",
            tokenizer_path,
            verify_sums,
            quantize=quantize,
            calibration=calibration,
            replace=replace,
        )
    if replace:
        raise ConfigError(f"--force: {target} becomes a folder of checkpoints, which is not replaced; leave it out")
    if dtype is not None:
        raise ConfigError(f"--dtype={dtype}: a checkpoint keeps the dtypes of {source}; leave it out")
    return to_checkpoint(source, target, tokenizer_path)


def to_hugging_face(
    folder: Path,
    target: Path,
    dtype: str,
    tokenizer_path: str | None,
    verify_sums: bool,
    *,
    quantize: str | None = None,
    calibration: str | None = None,
    replace: bool = False,
) -> str:
    """Write ``target``; see :func:`convert`."""
    if target.exists() and target.samefile(folder):
        raise ConfigError(f"{target}: is what is to be converted; choose another folder")
    check_target(Path(os.path.abspath(target)), replace)  # before the work, too
    description = describe(folder)
    spec, family = description.spec, description.spec.hugging_face
    if family is None:
        raise ConfigError(f'the model family "{spec.name}" has no form in transformers: nothing to convert to')
    tokenizer = tokenizer_of(description, tokenizer_path).tokenizer
    quantizer = None if quantize is None else quantizer_for(quantize, description)
    if quantizer is not None and quantizer.file_format is None:
        raise ConfigError(
            f"--quantize={quantize}: no format of files that vLLM or transformers reads has such weights; write the "
            "model as it is, and give the option to titanlite generate or evaluate, or take another"
        )
    if verify_sums and description.files is None:
        verify(folder)
    model, saved = outline(description)  # checks the sizes
    weights = family.weights(description.args)
    config = family.to_config(description.args)
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters(remove_duplicate=False)}
    buffers = {name: tuple(buffer.shape) for name, buffer in buffers_of(model, weights).items()}
    with _weights_of(description, saved, weights) as get:
        quantized = None
        if quantizer is not None:
            layers = linear_layers(model, spec.layout.output)
            record = None
            if quantizer.calibrate or calibration:
                record = _calibrated(quantizer, folder, tokenizer, tokenizer_path, calibration)
            quantized = quantized_weights(quantizer, layers, weights, record)
            config[QUANTIZATION] = quantization_config(quantizer, ["lm_head"])
        parameters = sum(param.numel() for param in model.parameters())
        write_hugging_face(
            target,
            config,
            shapes | buffers,
            weights,
            get,
            tokenizer,
            dtype=getattr(torch, dtype),
            in_float32=buffers,
            quantized=quantized,
            generation=generation_of(folder, tokenizer),
            card=model_card(
                Path(os.path.abspath(target)).name, description, parameters, getattr(torch, dtype), quantize
            ),
            replace=replace,
        )
    return f"{folder} -> {target}: transformers.AutoModelForCausalLM.from_pretrained({str(target)!r})"


Get = Callable[[list[str]], dict[str, Tensor]]


@contextmanager
def _weights_of(description: ModelDescription, saved: Mapping[str, SavedTensor], weights: WeightMap) -> Iterator[Get]:
    """Yield a function that reads the parameters in a folder: names -> parameters."""
    if description.files is not None:
        with description.files.opened() as opened:
            yield lambda names: {name: opened(weights[name]) for name in names}
        return

    def get(requested: list[str]) -> dict[str, Tensor]:
        state = {f"model.{name}": torch.empty(saved[f"model.{name}"].shape) for name in requested}
        load(description.weights.folder, state, saved=saved)
        return {name.removeprefix("model."): tensor for name, tensor in state.items()}

    yield get


def _calibrated(
    quantizer: Quantizer, folder: Path, tokenizer: Tokenizer, tokenizer_path: str | None, calibration: str | None
) -> Mapping[str, Tensor] | None:
    """Run texts through the model, in float32 on one process; see :func:`calibrated`."""
    process = runtime.start_runtime(Comm())
    try:
        mesh = build_mesh(Degrees(1, 1, 1, 1, 1), process.device.type)
        loaded = load_model(folder, torch.float32, mesh, process.device, tokenizer_path=tokenizer_path)
        return calibrated(quantizer, loaded.model, tokenizer, loaded.max_seq_len, calibration)
    finally:
        runtime.stop_runtime()


def to_checkpoint(folder: Path, target: Path, tokenizer_path: str | None) -> str:
    description = describe(folder)
    if description.quantizer is not None:
        raise ConfigError(f"{folder}: its weights are quantized, and a run continues from weights in high precision")
    tokenizer, tokenizer_source, _ = tokenizer_of(description, tokenizer_path)
    family, files = description.spec.hugging_face, description.files
    assert family is not None
    assert files is not None
    model, _ = outline(description)  # checks the sizes
    weights = family.weights(description.args)
    buffers = [f"model.{name}" for name in sorted(buffers_of(model, weights))]
    with files.opened() as get:
        state = {f"model.{name}": get(place) for name, place in weights.items()}  # as views of the files
        shape: dict[str, Any] = json.loads(json.dumps(asdict(description.args)))
        info = Info(
            0,
            {"name": description.spec.name, "flavor": description.flavor, "args": shape},
            tokenizer_path=tokenizer_source,
            tokenizer=tokenizer.identity,
            weights_only=True,
            buffers=buffers,
        )
        runtime.start_runtime(Comm())
        try:
            checkpoint = save(target, state, info, None, tokenizer.files())
        except SaveError as e:
            raise ConfigError(f"{target}: cannot be written: {e}; choose another folder, or make room") from e
        finally:
            runtime.stop_runtime()
    return f"{folder} -> {checkpoint}: --checkpoint.initial_load_path={checkpoint}"
