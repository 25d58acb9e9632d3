"""Write a folder that ``transformers`` can load: weights as safetensors, ``config.json`` and the tokenizer's files.

Only a few tensors are in memory at a time. The file format: the length of the header (8 bytes, little-endian), the
header (JSON: dtype, shape and offsets of each tensor), then the tensors, one after the other
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titanlite.checkpoint.hugging_face import CONFIG, DTYPES, INDEX, SINGLE
from titanlite.data.tokenizer import Tokenizer
from titanlite.errors import ConfigError

Shapes = Mapping[str, Sequence[int]]

_FORMAT_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BATCH = 1 << 28  # elements per call of get(), unless one tensor has more: 1 GiB in float32


def write_hugging_face(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Shapes,
    names: Mapping[str, str],
    get: Callable[[list[str]], Mapping[str, Tensor]],
    tokenizer: Tokenizer,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write the folder atomically: fill a temporary folder in the same parent, flush it to disk, then rename it.

    Args:
        config: the contents of ``config.json``; the dtype and the ids of BOS and EOS are added.
        shapes: parameter name in the model -> shape, for every parameter, in the order of writing.
        names: parameter name in the model -> name in the files. Of tied parameters only the first is written.
        get: maps a list of parameter names, in order and all of one file, to their full tensors, of any dtype and
            device. Every parameter is requested once. The tensors of earlier calls may be freed.
        dtype: float16, bfloat16 or float32.
        max_shard_bytes: the largest size of the tensors of one file, unless a single tensor is larger.

    Raises:
        ConfigError: the folder exists and is not empty, or it cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is there and not empty; choose another folder, or delete it first")
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    # transformers 5 writes "dtype", and also reads "torch_dtype"; earlier versions read only "torch_dtype".
    texts = {CONFIG: {**config, **special, "torch_dtype": str(dtype).removeprefix("torch.")}}
    texts["generation_config.json"] = {"_from_model_config": True, **special}
    with _temporary_folder(folder) as partial:
        for name, content in texts.items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(partial)
        _write_weights(partial, shapes, names, get, dtype, max_shard_bytes)


def plan_shards(shapes: Shapes, itemsize: int, max_shard_bytes: int) -> list[list[str]]:
    """Return the parameter names of each file, in order. A file takes as many as fit, and at least one."""
    return _group(list(shapes), lambda name: prod(shapes[name]) * itemsize, max_shard_bytes)


def _group(names: list[str], size: Callable[[str], int], limit: int) -> list[list[str]]:
    groups: list[list[str]] = []
    filled = 0
    for name in names:
        if not groups or filled + size(name) > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size(name)
    return groups


def _write_weights(
    folder: Path,
    shapes: Shapes,
    names: Mapping[str, str],
    get: Callable[[list[str]], Mapping[str, Tensor]],
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    first: dict[str, str] = {}
    for name in shapes:
        first.setdefault(names[name], name)
    shapes = {name: shapes[name] for name in first.values()}
    shards = plan_shards(shapes, dtype.itemsize, max_shard_bytes)
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [SINGLE]
    else:
        weight_map = {names[name]: file for file, shard in zip(files, shards) for name in shard}
        total = sum(prod(shape) for shape in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file, shard in zip(files, shards):
        with (folder / file).open("wb") as out:
            out.write(_header({names[name]: shapes[name] for name in shard}, dtype))
            for batch in _group(shard, lambda name: prod(shapes[name]), _BATCH):
                tensors = get(batch)
                for name in batch:
                    out.write(_bytes(name, tensors[name], shapes[name], dtype))
                del tensors  # free them before the next batch is read


def _header(shapes: Shapes, dtype: torch.dtype) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _FORMAT_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors in a memory-mapped file
    return len(text).to_bytes(8, "little") + text


def _bytes(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> memoryview:
    assert tensor.shape == tuple(shape), (name, tensor.shape, shape)
    data = tensor.detach().to("cpu", dtype).contiguous()
    if dtype is torch.float16 and data.isinf().any():
        raise ConfigError(f"float16: {name} has values beyond its largest, 65504; write bfloat16 or float32")
    return data.flatten().view(torch.uint8).numpy().data


@contextlib.contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """Create a temporary folder. Rename it to ``folder`` on success, delete it on failure."""
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():
        raise ConfigError(
            f"{partial}: another process is writing {folder}, or one that was killed has left this; wait for it, or "
            "delete it"
        )
    try:
        partial.mkdir(parents=True)
    except OSError as e:
        raise _cannot_write(folder, e) from None
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            _flush(path)
        partial.rename(folder)
        _flush(folder.parent)
    except BaseException as e:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(e, OSError):
            raise _cannot_write(folder, e) from e
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{folder}: cannot be written ({error}); choose another folder")
