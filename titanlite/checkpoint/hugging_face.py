"""Load weights from a folder of safetensors, as written by ``transformers``. Each rank reads only its own slices.

``config.json`` in the folder describes the model; the model family interprets it (``ModelSpec.hugging_face``).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from titanlite.errors import ConfigError
from titanlite.models.weight_map import Place, Rows, Stack, WeightMap, tensors_of

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The dtypes of weights, by their names in safetensors. Those of 8 bits have scales beside them.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZED_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8}
QUANTIZATION = "quantization_config"  # the key of config.json

_MAX_LISTED = 10


@dataclass(frozen=True)
class Stored:
    """The file, shape and dtype of one tensor on disk."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def is_hugging_face(folder: Path) -> bool:
    """Return True if ``folder`` holds ``config.json`` and safetensors files, as ``transformers`` reads them."""
    return (folder / CONFIG).is_file() and any(folder.glob("*.safetensors"))


class HuggingFaceFolder:
    """A folder of weights. The constructor reads the headers of the files, but no tensors.

    Attributes:
        config: the contents of ``config.json``.
        tensors: tensor name in the files -> file, shape and dtype.

    Raises:
        ConfigError: the folder has no weights, or a file is missing or damaged; the message names the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not is_hugging_face(folder):
            problem = f"it has no {CONFIG} beside *.safetensors" if folder.is_dir() else "there is no such folder"
            raise ConfigError(f"{folder}: not a folder of Hugging Face weights: {problem}; correct the path")
        self.config = read_json(folder / CONFIG)
        self.tensors = _find_tensors(folder, DTYPES | (QUANTIZED_DTYPES if self.config.get(QUANTIZATION) else {}))

    def check(self, shapes: Mapping[str, Sequence[int]], weights: WeightMap, ignored: str | None = None) -> None:
        """Compare the names and shapes of the tensors in the files with those of the model.

        Args:
            shapes: parameter name in the model -> shape. A part of the model is enough. If ranks have different parts,
                pass the shapes of the whole model, so that all ranks get the same result.
            weights: where every parameter of the whole model is in the files.
            ignored: a regular expression. Tensors in the files whose full name matches it are ignored.

        Raises:
            ConfigError: names are missing or unexpected, or shapes differ; the message lists the names.
        """
        expected = dict.fromkeys(tensor for place in weights.values() for tensor in tensors_of(place))
        extra = (name for name in self.tensors if name not in expected)
        problems = {
            "are not in its files": [name for name in expected if name not in self.tensors],
            "are in its files and not in the model": [n for n in extra if not ignored or not re.fullmatch(ignored, n)],
            "have another shape": [
                f"{tensor} {list(stored.shape)}, in the model {list(shape)}"
                for tensor, shape in stored_shapes(shapes, weights).items()
                if (stored := self.tensors.get(tensor)) and stored.shape != shape
            ],
        }
        lines = [_report(problem, tensors) for problem, tensors in problems.items() if tensors]
        if lines:
            raise ConfigError(
                f"{self.folder}: these are the weights of another model, flavor or vocabulary: {'; '.join(lines)}; "
                "choose the flavor that they belong to"
            )

    def load_into(self, state: Mapping[str, Tensor], weights: WeightMap, ignored: str | None = None) -> None:
        """Copy weights into the tensors of ``state`` in place, one tensor at a time, converted to their dtypes.

        Args:
            state: parameter name in the model -> tensor or DTensor; of a DTensor only the local shard is read. A
                pipeline stage passes only its own parameters. A tied parameter may appear under several names.
            weights, ignored: see :meth:`check`, which this method calls first.

        Raises:
            ConfigError: see :meth:`check`; or a file cannot be read. Then some tensors may already be filled.
        """
        unknown = [name for name in state if name not in weights]
        if unknown:
            raise ConfigError(f"{self.folder}: {_report('of the model have no name in Hugging Face files', unknown)}")
        self.check({name: tensor.shape for name, tensor in state.items()}, weights, ignored)
        with self._files() as files:
            for name, tensor in state.items():
                _copy_local_shard(tensor, weights[name], lambda t: files(self.tensors[t].file).get_slice(t))

    @contextmanager
    def opened(self) -> Iterator[Callable[[Place], Tensor]]:
        """Yield a function: place in the files -> the parameter, a view of its memory-mapped file unless it is put
        together from several tensors."""
        with self._files() as files:

            def whole(tensor: str) -> Tensor:
                return files(self.tensors[tensor].file).get_tensor(tensor)  # type: ignore[no-any-return]

            def get(place: Place) -> Tensor:
                if isinstance(place, Stack):
                    return torch.stack([whole(tensor) for tensor in place.tensors])
                return whole(place.tensor)[place.start : place.stop] if isinstance(place, Rows) else whole(place)

            yield get

    @contextmanager
    def _files(self) -> Iterator[Callable[[Path], Any]]:
        """Yield a function that opens a file once and keeps it open."""
        with ExitStack() as stack:
            yield functools.cache(lambda file: stack.enter_context(_opened(file)))


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ConfigError: the file cannot be read, or does not hold a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"{file}: cannot be read as JSON ({e}); repair it or download it again") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: holds no JSON object; repair it or download it again")
    return content


def _find_tensors(folder: Path, dtypes: Mapping[str, torch.dtype]) -> dict[str, Stored]:
    if (folder / SINGLE).is_file():
        return _headers([folder / SINGLE], dtypes)
    if not (folder / INDEX).is_file():
        return _headers(sorted(folder.glob("*.safetensors")), dtypes)
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{folder / INDEX}: has no weight_map; download it again")
    files = sorted(set(weight_map.values()))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"{folder}: {_report(f'of {len(files)} files that {INDEX} names are missing', missing)}; download them"
        )
    tensors = _headers([folder / name for name in files], dtypes)
    misplaced = [n for n, file in weight_map.items() if n not in tensors or tensors[n].file != folder / file]
    if misplaced:
        raise ConfigError(
            f"{folder}: {_report(f'are not in the file that {INDEX} names', misplaced)}; the files belong to different "
            "downloads: download all of them again"
        )
    return tensors


def _headers(files: Iterable[Path], dtypes: Mapping[str, torch.dtype]) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for file in files:
        with _opened(file) as source:
            for name in source.keys():  # noqa: SIM118 (it is not a dictionary)
                entry = source.get_slice(name)
                if entry.get_dtype() not in dtypes:
                    raise ConfigError(
                        f"{file}: {name} is of dtype {entry.get_dtype()}, and weights are read from "
                        f"{', '.join(dtypes)}; convert the folder to bfloat16 first"
                    )
                if name in tensors:
                    raise ConfigError(
                        f"{file}: {name} is in {tensors[name].file.name} too, and no {INDEX} says which counts; "
                        "delete the files that do not belong to the model"
                    )
                tensors[name] = Stored(file, tuple(entry.get_shape()), dtypes[entry.get_dtype()])
    return tensors


def _opened(file: Path) -> Any:
    """Open a safetensors file, as a context manager. Opening compares the header with the length of the file."""
    try:
        return safe_open(file, framework="pt")
    except OSError as e:
        raise ConfigError(f"{file}: cannot be read ({e}); correct the path or its permissions") from None
    except SafetensorError as e:
        with file.open("rb") as f:
            pointer = f.read(7) == b"version"
        problem = "a Git LFS pointer in place of the file" if pointer else f"damaged or cut short ({e})"
        raise ConfigError(f"{file}: {problem}; download it again") from None


def stored_shapes(shapes: Mapping[str, Sequence[int]], weights: WeightMap) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in the files that hold parameters of these ``shapes``."""
    stored: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        place = weights[name]
        if isinstance(place, Stack):
            stored |= dict.fromkeys(place.tensors, tuple(shape[1:]))
        elif isinstance(place, Rows):
            rows = max(p.stop for p in weights.values() if isinstance(p, Rows) and p.tensor == place.tensor)
            stored[place.tensor] = (rows, *shape[1:])
        else:
            stored[place] = tuple(shape)
    return stored


def _copy_local_shard(tensor: Tensor, place: Place, source: Callable[[str], Any]) -> None:
    """Fill ``tensor``, or the local shard of it, from the part of the files that holds it.

    Args:
        source: tensor name in the files -> what reads a slice of it.
    """
    data = tensor.detach()
    slices: tuple[slice, ...] = tuple(slice(0, size) for size in data.shape)
    if isinstance(data, DTensor):
        shape, offset = compute_local_shape_and_global_offset(data.shape, data.device_mesh, data.placements)
        data, slices = data.to_local(), tuple(slice(start, start + size) for start, size in zip(offset, shape))
        assert data.shape == tuple(shape), (data.shape, shape)
    if not data.numel():
        return
    if isinstance(place, Stack):
        for i, name in enumerate(place.tensors[slices[0]]):
            data[i].copy_(source(name)[slices[1:]])
    elif isinstance(place, Rows):
        there = (slice(place.start + slices[0].start, place.start + slices[0].stop), *slices[1:])
        data.copy_(source(place.tensor)[there])
    else:
        data.copy_(source(place)[slices])


def _report(predicate: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return f"{len(names)} {predicate}: {', '.join(names[:_MAX_LISTED])}{more}"
