"""Reading weights from a folder of safetensors, as ``transformers`` writes them: each rank reads its own slices alone.

``config.json`` beside them says which model it is; only the model family understands it (``ModelSpec.hugging_face``).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
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

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Safetensors' names of the dtypes that hold weights by themselves; numbers of 8 bits or fewer come with scales.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_SHOWN = 10


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def is_hugging_face(folder: Path) -> bool:
    """Whether this is a folder of weights that ``transformers`` would read."""
    return (folder / CONFIG).is_file() and any(folder.glob("*.safetensors"))


class HuggingFaceFolder:
    """A folder of weights, opened: the headers of its files are read, and none of its tensors.

    Attributes:
        config: what ``config.json`` holds.
        tensors: where each tensor is, by its name in the files.

    Raises:
        ConfigError: the folder has no weights, or a file is missing or damaged; the file is named.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not is_hugging_face(folder):
            what = f"it has no {CONFIG} beside *.safetensors" if folder.is_dir() else "there is no such folder"
            raise ConfigError(f"{folder}: not a folder of Hugging Face weights: {what}; correct the path")
        self.config = read_json(folder / CONFIG)
        self.tensors = _find_tensors(folder)

    def check(self, shapes: Mapping[str, Sequence[int]], names: Mapping[str, str], ignored: str | None = None) -> None:
        """Refuse a folder that holds other tensors than ``names`` says, or other shapes.

        Args:
            shapes: by our name. Those of a part of the model are enough; where ranks have different parts, pass the
                whole model's, so that all ranks come to the same result.
            names: our name of every parameter of the whole model -> theirs.
            ignored: a regular expression; tensors of theirs whose whole name matches are left alone.

        Raises:
            ConfigError: with the names that are missing, unexpected, or of another shape.
        """
        wanted = dict.fromkeys(names.values())
        spare = (name for name in self.tensors if name not in wanted)
        problems = {
            "are not in its files": [name for name in wanted if name not in self.tensors],
            "are in its files and not in the model": [n for n in spare if not ignored or not re.fullmatch(ignored, n)],
            "have another shape": [
                f"{names[ours]} {list(stored.shape)}, in the model {list(shape)}"
                for ours, shape in shapes.items()
                if (stored := self.tensors.get(names[ours])) and stored.shape != tuple(shape)
            ],
        }
        found = [_listed(what, those) for what, those in problems.items() if those]
        if found:
            raise ConfigError(
                f"{self.folder}: these are the weights of another model, flavor or vocabulary: {'; '.join(found)}; "
                "choose the flavor that they belong to"
            )

    def load_into(self, state: Mapping[str, Tensor], names: Mapping[str, str], ignored: str | None = None) -> None:
        """Fill ``state`` in place, tensor by tensor, converted to its dtype.

        Args:
            state: our name -> a plain tensor or a DTensor, whose local part alone is read; all parameters or, in a part
                of a pipeline, some. A tied parameter may be there under several names.
            names, ignored: as in :meth:`check`, which is called first.

        Raises:
            ConfigError: see :meth:`check`; or a file cannot be read. ``state`` may then be filled in part.
        """
        unknown = [name for name in state if name not in names]
        if unknown:
            raise ConfigError(f"{self.folder}: {_listed('of the model have no name in Hugging Face files', unknown)}")
        self.check({name: tensor.shape for name, tensor in state.items()}, names, ignored)
        by_file: dict[Path, list[str]] = defaultdict(list)
        for ours in state:
            by_file[self.tensors[names[ours]].file].append(ours)
        for file, those in by_file.items():
            with _opened(file) as source:
                for ours in those:
                    _copy_own_part(state[ours], source.get_slice(names[ours]))

    @contextmanager
    def opened(self) -> Iterator[Callable[[str], Tensor]]:
        """What returns a tensor by its name in the files, as a view of its file, as long as all are open."""
        with ExitStack() as stack:
            files = {file: stack.enter_context(_opened(file)) for file in {t.file for t in self.tensors.values()}}
            yield lambda name: files[self.tensors[name].file].get_tensor(name)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"{file}: cannot be read as JSON ({e}); repair it or download it again") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: holds no JSON object; repair it or download it again")
    return content


def _find_tensors(folder: Path) -> dict[str, Stored]:
    if (folder / SINGLE).is_file():
        return _headers([folder / SINGLE])
    if not (folder / INDEX).is_file():
        return _headers(sorted(folder.glob("*.safetensors")))
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{folder / INDEX}: has no weight_map; download it again")
    files = sorted(set(weight_map.values()))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"{folder}: {_listed(f'of {len(files)} files that {INDEX} names are missing', missing)}; download them"
        )
    tensors = _headers([folder / name for name in files])
    astray = [n for n, file in weight_map.items() if n not in tensors or tensors[n].file != folder / file]
    if astray:
        raise ConfigError(
            f"{folder}: {_listed(f'are not in the file that {INDEX} names', astray)}; the files belong to different "
            "downloads: download all of them again"
        )
    return tensors


def _headers(files: Iterable[Path]) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for file in files:
        with _opened(file) as source:
            for name in source.keys():  # noqa: SIM118 (it is no dictionary)
                entry = source.get_slice(name)
                if entry.get_dtype() not in DTYPES:
                    raise ConfigError(
                        f"{file}: {name} is of dtype {entry.get_dtype()}, and weights are read from "
                        f"{', '.join(DTYPES)}; convert the folder to bfloat16 first"
                    )
                if name in tensors:
                    raise ConfigError(
                        f"{file}: {name} is in {tensors[name].file.name} too, and no {INDEX} says which counts; "
                        "delete the files that do not belong to the model"
                    )
                tensors[name] = Stored(file, tuple(entry.get_shape()), DTYPES[entry.get_dtype()])
    return tensors


def _opened(file: Path) -> Any:
    """The file as a context manager; opening compares its header with its length."""
    try:
        return safe_open(file, framework="pt")
    except OSError as e:
        raise ConfigError(f"{file}: cannot be read ({e}); correct the path or its permissions") from None
    except SafetensorError as e:
        with file.open("rb") as f:
            pointer = f.read(7) == b"version"
        what = "a Git LFS pointer in place of the file" if pointer else f"damaged or cut short ({e})"
        raise ConfigError(f"{file}: {what}; download it again") from None


def _copy_own_part(tensor: Tensor, source: Any) -> None:
    data = tensor.detach()
    own: tuple[slice, ...] = tuple(slice(0, size) for size in data.shape)
    if isinstance(data, DTensor):
        shape, offset = compute_local_shape_and_global_offset(data.shape, data.device_mesh, data.placements)
        data, own = data.to_local(), tuple(slice(start, start + size) for start, size in zip(offset, shape))
        assert data.shape == tuple(shape), (data.shape, shape)
    if data.numel():
        data.copy_(source[own])


def _listed(what: str, those: Sequence[str]) -> str:
    more = f" and {len(those) - _SHOWN} more" if len(those) > _SHOWN else ""
    return f"{len(those)} {what}: {', '.join(those[:_SHOWN])}{more}"
