"""Write a folder that ``transformers`` can load: weights as safetensors, ``config.json`` and the tokenizer's files.

Only a few tensors are in memory at a time. The file format: the length of the header (8 bytes, little-endian), the
header (JSON: dtype, shape and offsets of each tensor), then the tensors, one after the other
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titanlite.checkpoint.folder import flush
from titanlite.checkpoint.hugging_face import CONFIG, DTYPES, INDEX, QUANTIZED_DTYPES, SINGLE, stored_shapes
from titanlite.checkpoint.state import listed
from titanlite.data.generation_config import GENERATION
from titanlite.data.tokenizer import Tokenizer
from titanlite.errors import ConfigError
from titanlite.models.weight_map import Place, Rows, Stack, WeightMap, tensors_of

Shapes = Mapping[str, Sequence[int]]

CARD = "README.md"
# The names of all files of an export.
_WRITTEN = re.compile(
    rf"{CONFIG}|{GENERATION}|{CARD}|{INDEX}|tokenizer(_config|_identity)?\.json|model(-\d+-of-\d+)?\.safetensors"
)
_FORMAT_NAMES = {dtype: name for name, dtype in (DTYPES | QUANTIZED_DTYPES).items()}
_BATCH = 1 << 28  # elements per call of get(), unless one tensor has more: 1 GiB in float32


def write_hugging_face(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Shapes,
    weights: WeightMap,
    get: Callable[[list[str]], Mapping[str, Tensor]],
    tokenizer: Tokenizer,
    *,
    dtype: torch.dtype = torch.bfloat16,
    in_float32: Collection[str] = (),
    quantized: QuantizedWeights | None = None,
    generation: Mapping[str, Any] | None = None,
    card: str | None = None,
    replace: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write the folder atomically: fill a temporary folder in the same parent, flush it to disk, then rename it.

    Args:
        config: the contents of ``config.json``; the dtype and the ids of BOS and EOS are added.
        shapes: parameter name in the model -> shape, for every parameter, in the order of writing.
        weights: where each parameter goes. Of tied parameters only the first is written.
        get: maps a list of parameter names, in order and all of one file, to their full tensors, of any dtype and
            device. Every parameter is requested once. The tensors of earlier calls may be freed.
        dtype: float16, bfloat16 or float32.
        in_float32: the parameters that are written in float32, whatever ``dtype``.
        quantized: the weights that are written in 8 bits with their scales; None: none.
        generation: the content of ``generation_config.json``; none or empty: that beside the
            tokenizer, else the ids of BOS and EOS.
        card: the content of ``README.md``; None: there is none.
        replace: a folder that is there, and holds only what this function writes, is replaced.
        max_shard_bytes: the largest size of the tensors of one file, unless a single tensor is larger.

    Raises:
        ConfigError: the folder exists and is not empty, or it cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    check_target(folder, replace)
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    # transformers 5 writes "dtype", and also reads "torch_dtype"; earlier versions read only "torch_dtype".
    texts = {CONFIG: {**config, **special, "torch_dtype": str(dtype).removeprefix("torch.")}}
    texts[GENERATION] = {**(generation or tokenizer.generation or {"_from_model_config": True, **special})}
    with _temporary_folder(folder) as partial:
        tokenizer.save(partial)
        for name, content in texts.items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if card is not None:
            (partial / CARD).write_text(card, encoding="utf-8")
        planned = units(shapes, weights)
        kept = {t for unit in planned if unit.parameters[0] in in_float32 for t in unit.tensors}
        dtypes = {t: torch.float32 if t in kept else dtype for unit in planned for t in unit.tensors}
        _write_weights(partial, planned, get, quantized or QuantizedWeights(), dtypes, max_shard_bytes)


def check_target(folder: Path, replace: bool) -> None:
    """Refuse a folder that is there, unless it is empty, or is to be replaced and holds only what
    :func:`write_hugging_face` writes.

    Raises:
        ConfigError: it is refused.
    """
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not replace:
        raise ConfigError(
            f"{folder}: is there and not empty; choose another folder, or delete it first (--force replaces an "
            "earlier export)"
        )
    if folder.is_symlink() or not folder.is_dir():
        raise ConfigError(f"{folder}: --force replaces a folder, and this is a link or a file; name the folder itself")
    others = sorted(path.name for path in folder.iterdir() if not _WRITTEN.fullmatch(path.name) or _is_folder(path))
    if others:
        raise ConfigError(
            f"{folder}: --force replaces the files of an export, and {listed('are none of them', others)}; choose "
            "another folder, or move them away"
        )


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


Entry = tuple[tuple[int, ...], torch.dtype]  # of a tensor in the files


@dataclass(frozen=True)
class QuantizedWeights:
    """Weights that are written in 8 bits with their scales.

    Attributes:
        entries: for each of them, by the name of its tensor, the names of the tensors it becomes, with what they are.
        encode: ``(the name of its tensor, the weight)`` -> these tensors, in that order.
    """

    entries: Mapping[str, Mapping[str, Entry]] = field(default_factory=dict)
    encode: Callable[[str, Tensor], Iterable[Tensor]] = lambda name, weight: ()

    def of(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Mapping[str, Entry]:
        """Return the tensors that are written of the tensor ``name``, which without quantization has this dtype."""
        return self.entries.get(name, {name: (shape, dtype)})

    def tensors(self, name: str, tensor: Tensor) -> Iterable[Tensor]:
        return self.encode(name, tensor) if name in self.entries else (tensor,)


@dataclass
class Unit:
    """Parameters that are read and written together: those that share a tensor in the files, or one that is several.

    Attributes:
        parameters: their names, in the order of their rows.
        tensors: the names and shapes of the tensors in the files.
        stacked: the parameter is a stack of the tensors.
    """

    parameters: list[str]
    tensors: dict[str, tuple[int, ...]]
    stacked: bool = False

    @property
    def elements(self) -> int:
        return sum(map(prod, self.tensors.values()))

    def split(self, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of the files, made of the parameters."""
        parts = [values[name] for name in self.parameters]
        if self.stacked:
            yield from zip(self.tensors, parts[0], strict=True)
        else:
            yield next(iter(self.tensors)), parts[0] if len(parts) == 1 else torch.cat(parts)


def units(shapes: Shapes, weights: WeightMap) -> list[Unit]:
    """Return the units of parameters of these ``shapes``, in their order; of tied parameters only the first."""
    stored = stored_shapes(shapes, weights)
    by_tensor: dict[str, Unit] = {}
    places: set[Place] = set()
    for name in shapes:
        place = weights[name]
        if place in places:
            continue
        places.add(place)
        tensors = tensors_of(place)
        if tensors[0] in by_tensor:
            by_tensor[tensors[0]].parameters.append(name)
        else:
            by_tensor[tensors[0]] = Unit([name], {t: stored[t] for t in tensors}, isinstance(place, Stack))
    for unit in by_tensor.values():
        unit.parameters.sort(key=lambda name: _first_row(weights[name]))
    return list(by_tensor.values())


def _first_row(place: Place) -> int:
    return place.start if isinstance(place, Rows) else 0


def group(planned: Sequence[Unit], itemsize: int, limit: int) -> list[list[Unit]]:
    """Return the units in groups, in order. A group takes as many as fit into ``limit`` bytes, and at least one."""
    groups: list[list[Unit]] = []
    filled = 0
    for unit in planned:
        size = unit.elements * itemsize
        if not groups or filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(unit)
        filled += size
    return groups


def _write_weights(
    folder: Path,
    planned: list[Unit],
    get: Callable[[list[str]], Mapping[str, Tensor]],
    quantized: QuantizedWeights,
    dtypes: Mapping[str, torch.dtype],
    max_shard_bytes: int,
) -> None:
    def entries(unit: Unit) -> dict[str, Entry]:
        return {
            name: entry
            for tensor, shape in unit.tensors.items()
            for name, entry in quantized.of(tensor, shape, dtypes[tensor]).items()
        }

    itemsize = min((dtype.itemsize for dtype in dtypes.values()), default=1)
    shards = group(planned, itemsize, max_shard_bytes)
    headers = [{name: entry for unit in shard for name, entry in entries(unit).items()} for shard in shards]
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [SINGLE]
    else:
        weight_map = {tensor: file for file, header in zip(files, headers) for tensor in header}
        total = sum(_nbytes(entry) for header in headers for entry in header.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file, header, shard in zip(files, headers, shards):
        with (folder / file).open("wb") as out:
            out.write(_header(header))
            for batch in group(shard, 1, _BATCH):
                values = get([name for unit in batch for name in unit.parameters])
                for unit in batch:
                    for name, tensor in unit.split(values):
                        parts = quantized.tensors(name, tensor)
                        for part, entry in zip(parts, quantized.of(name, unit.tensors[name], dtypes[name]).values()):
                            out.write(_bytes(name, part, *entry))
                del values, tensor, parts, part  # free them before the next batch is read


def _nbytes(entry: Entry) -> int:
    shape, dtype = entry
    return prod(shape) * dtype.itemsize


def _header(entries: Mapping[str, Entry]) -> bytes:
    written: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in entries.items():
        start, end = end, end + _nbytes((shape, dtype))
        written[name] = {"dtype": _FORMAT_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(written, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors in a memory-mapped file
    return len(text).to_bytes(8, "little") + text


def _bytes(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> memoryview:
    assert tensor.shape == shape, (name, tensor.shape, shape)
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
            flush(path)
        _put_in_place(partial, folder)
    except BaseException as e:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(e, OSError):
            raise _cannot_write(folder, e) from e
        raise


def _put_in_place(partial: Path, folder: Path) -> None:
    """Rename ``partial`` to ``folder``; what is there goes first to another name, and is deleted at the end."""
    before = folder.with_name(f".{folder.name}.replaced")
    is_there = folder.is_dir() and any(folder.iterdir())
    if is_there:
        folder.rename(before)
    try:
        partial.rename(folder)
    except OSError:
        if is_there:
            before.rename(folder)
        raise
    flush(folder.parent)
    if is_there:
        shutil.rmtree(before)


def _cannot_write(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{folder}: cannot be written ({error}); choose another folder")
