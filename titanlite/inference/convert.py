"""Convert a checkpoint to a Hugging Face folder, or back. Tensors go through memory one after the other."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from titanlite.checkpoint import Info
from titanlite.checkpoint.hugging_face import HuggingFaceFolder, is_hugging_face
from titanlite.checkpoint.hugging_face_export import write_hugging_face
from titanlite.checkpoint.storage import SaveError, load, save, saved_shapes, verify
from titanlite.config.schema import Comm
from titanlite.distributed import runtime
from titanlite.errors import ConfigError
from titanlite.inference.load import describe, tokenizer_of


def convert(
    source: Path, target: Path, dtype: str | None = None, tokenizer_path: str | None = None, *, verify_sums: bool = True
) -> str:
    """Convert ``source``, a checkpoint or a Hugging Face folder, to the other format, in ``target``. Return a message
    with the result and its use.

    Args:
        dtype: the torch dtype, by name, of the weights in a Hugging Face folder; None: bfloat16. A checkpoint keeps the
            dtypes of the source.
        tokenizer_path: the tokenizer; None: the one that the weights were trained with.
        verify_sums: verify the checksums of a checkpoint first.

    Raises:
        ConfigError: the source cannot be converted or read, or the target cannot be written.
    """
    if not is_hugging_face(source):
        return to_hugging_face(source, target, dtype or "bfloat16", tokenizer_path, verify_sums)
    if dtype is not None:
        raise ConfigError(f"--dtype={dtype}: a checkpoint keeps the dtypes of {source}; leave it out")
    if not verify_sums:
        raise ConfigError(f"--no-verify: {source} is no checkpoint and has no checksums; leave it out")
    return to_checkpoint(source, target, tokenizer_path)


def to_hugging_face(folder: Path, target: Path, dtype: str, tokenizer_path: str | None, verify_sums: bool) -> str:
    description = describe(folder)
    spec, family = description.spec, description.spec.hugging_face
    if family is None:
        raise ConfigError(f'the model family "{spec.name}" has no form in transformers: nothing to convert to')
    tokenizer = tokenizer_of(description, tokenizer_path)
    if verify_sums:
        verify(folder)
    weights = family.weights(description.args)
    saved = saved_shapes(folder)
    lacking = [name for name in weights if f"model.{name}" not in saved]
    if lacking:
        raise ConfigError(f"{folder} lacks {len(lacking)} weights of its own model, such as {lacking[0]}")

    def get(requested: list[str]) -> dict[str, torch.Tensor]:
        state = {f"model.{name}": torch.empty(saved[f"model.{name}"]) for name in requested}
        load(folder, state)
        return {name.removeprefix("model."): tensor for name, tensor in state.items()}

    write_hugging_face(
        target,
        family.to_config(description.args),
        {name: saved[f"model.{name}"] for name in weights},
        weights,
        get,
        tokenizer,
        dtype=getattr(torch, dtype),
    )
    return f"{folder} -> {target}: transformers.AutoModelForCausalLM.from_pretrained({str(target)!r})"


def to_checkpoint(folder: Path, target: Path, tokenizer_path: str | None) -> str:
    source, description = HuggingFaceFolder(folder), describe(folder)
    tokenizer_of(description, tokenizer_path)
    family = description.spec.hugging_face
    assert family is not None
    weights = family.weights(description.args)
    source.check({}, weights, family.ignored)
    with source.opened() as get:
        state = {f"model.{name}": get(place) for name, place in weights.items()}  # as views of the files
        shape: dict[str, Any] = json.loads(json.dumps(asdict(description.args)))
        model = {"name": description.spec.name, "flavor": description.flavor, "args": shape}
        tokenizer = str(folder.absolute()) if tokenizer_path is None else tokenizer_path
        runtime.start_runtime(Comm())
        try:
            checkpoint = save(target, state, Info(0, model, tokenizer_path=tokenizer, weights_only=True), None)
        except SaveError as e:
            raise ConfigError(f"{target}: cannot be written: {e}; choose another folder, or make room") from e
        finally:
            runtime.stop_runtime()
    return f"{folder} -> {checkpoint}: --checkpoint.initial_load_path={checkpoint}"
