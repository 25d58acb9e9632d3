"""Load weights from a folder of safetensors, as written by ``transformers``. Each rank reads only its own slices.

``config.json`` in the folder describes the model; the model family interprets it (``ModelSpec.hugging_face``).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from titanlite.checkpoint.diagnosis import why_no_weights
from titanlite.checkpoint.state import listed, refuse_another_model
from titanlite.errors import ConfigError
from titanlite.models.weight_map import Place, Rows, Stack, WeightMap, tensors_of
from titanlite.quant.fsdp import shard_with_offset
from titanlite.untrusted.files import contained, open_file, read_json

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The dtypes of weights, by their names in safetensors. Those of 8 bits have scales beside them.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZED_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8}
QUANTIZATION = "quantization_config"  # the key of config.json

_COMPARED = 1 << 24  # elements of two tensors that are compared at a time


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
            raise ConfigError(f"{folder}: not a folder of Hugging Face weights: {why_no_weights(folder)}")
        self.config = read_json(contained(folder, CONFIG))
        dtypes = DTYPES | (QUANTIZED_DTYPES if self.config.get(QUANTIZATION) else {})
        self.tensors, self._absent = _find_tensors(folder, dtypes)

    def check(
        self,
        shapes: Mapping[str, Sequence[int]],
        weights: WeightMap,
        ignored: str | None = None,
        copies: Mapping[str, str] | None = None,
    ) -> None:
        """Compare the names and shapes of the tensors in the files with those of the model.

        Args:
            shapes: parameter name in the model -> shape. A part of the model is enough. If ranks have different parts,
                pass the shapes of the whole model, so that all ranks get the same result.
            weights: where every parameter of the whole model is in the files.
            ignored: a regular expression. Tensors in the files whose full name matches it are ignored.
            copies: tensors that the files may hold twice: the name of the copy -> the tensor that it must equal.

        Raises:
            ConfigError: names are missing or unexpected, shapes differ, or a copy does; the message lists the names.
        """
        copies = copies or {}
        absent = [name for name in self._absent if name not in copies]
        if absent:
            raise _disagree(self.folder, absent)
        model: dict[str, tuple[int, ...] | None] = {t: None for place in weights.values() for t in tensors_of(place)}
        model |= stored_shapes(shapes, weights)
        saved = {
            name: stored.shape
            for name, stored in self.tensors.items()
            if name in model or not (name in copies or (ignored and re.fullmatch(ignored, name)))
        }
        refuse_another_model(self.folder, saved, model)
        for name, original in copies.items():
            if name in self.tensors and not self._equal(name, original):
                raise ConfigError(
                    f"{self.folder}: {CONFIG} says that {name} and {original} are the same weights, and the files hold "
                    'different ones; set "tie_word_embeddings" as the model was trained, or repair the files'
                )

    def _equal(self, name: str, other: str) -> bool:
        """Compare two tensors of the files, some rows at a time."""
        shape = self.tensors[name].shape
        if shape != self.tensors[other].shape or not prod(shape):
            return False
        rows = max(1, _COMPARED // prod(shape[1:]))
        with self._files() as files:
            one, two = (files(self.tensors[n].file).get_slice(n) for n in (name, other))
            return all(
                torch.equal(one[i : i + rows].double(), two[i : i + rows].double()) for i in range(0, shape[0], rows)
            )

    def load_into(
        self,
        state: Mapping[str, Tensor],
        weights: WeightMap,
        ignored: str | None = None,
        copies: Mapping[str, str] | None = None,
    ) -> None:
        """Copy weights into the tensors of ``state`` in place, one tensor at a time, converted to their dtypes.

        Args:
            state: parameter name in the model -> tensor or DTensor; of a DTensor only the local shard is read. A
                pipeline stage passes only its own parameters. A tied parameter may appear under several names.
            weights, ignored, copies: see :meth:`check`, which this method calls first.

        Raises:
            ConfigError: see :meth:`check`; or a file cannot be read. Then some tensors may already be filled.
        """
        unknown = [name for name in state if name not in weights]
        if unknown:
            raise ConfigError(f"{self.folder}: {listed('of the model have no name in Hugging Face files', unknown)}")
        self.check({name: tensor.shape for name, tensor in state.items()}, weights, ignored, copies)
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


def _find_tensors(folder: Path, dtypes: Mapping[str, torch.dtype]) -> tuple[dict[str, Stored], list[str]]:
    """Return the tensors of the files, and the names in the index that no file has."""
    if (folder / SINGLE).is_file():
        return _headers([contained(folder, SINGLE)], dtypes), []
    if not (folder / INDEX).is_file():
        return _headers([contained(folder, path.name) for path in sorted(folder.glob("*.safetensors"))], dtypes), []
    weight_map = read_json(contained(folder, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise ConfigError(f"{folder / INDEX}: has no weight_map of names; download it again")
    files = {name: contained(folder, name) for name in sorted(set(weight_map.values()))}
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing:
        raise ConfigError(
            f"{folder}: {listed(f'of {len(files)} files that {INDEX} names are missing', missing)}; download them"
        )
    tensors = _headers(files.values(), dtypes)
    misplaced = [name for name, file in weight_map.items() if name in tensors and tensors[name].file != files[file]]
    if misplaced:
        raise _disagree(folder, misplaced)
    return tensors, [name for name in weight_map if name not in tensors]


def _disagree(folder: Path, names: list[str]) -> ConfigError:
    return ConfigError(
        f"{folder}: {listed(f'are not in the file that {INDEX} names', names)}; the files belong to different "
        "downloads: download all of them again"
    )


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
        open_file(file).close()
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
    data, offset = shard_with_offset(tensor)
    slices = tuple(slice(start, start + size) for start, size in zip(offset, data.shape))
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
