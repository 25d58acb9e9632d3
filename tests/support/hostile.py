"""Checkpoints that somebody has changed, with checksums made to fit."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

EMBEDDING = "model.tok_embeddings.weight"


class Payload:
    """An object whose pickle makes the folder ``marker`` when somebody loads it as a pickle."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def reseal(folder: Path, also: str = "") -> None:
    """Write ``SHA256SUMS`` anew, for the files as they are; ``also`` is one more line."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "SHA256SUMS" and path.is_file())
    lines = "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names) + also
    (folder / "SHA256SUMS").write_text(
        f"{lines}# of the lines above: {hashlib.sha256(lines.encode()).hexdigest()}\n", "ascii", "surrogateescape"
    )


def edit_metadata(folder: Path, edit: Callable[[Any], Any]) -> None:
    """Change what ``.metadata`` says: ``edit`` gets DCP's own object, and may return another in its place."""
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    edited = edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata if edited is None else edited))
    if (folder / "SHA256SUMS").exists():
        reseal(folder)


def place_of(metadata: Any, name: str = EMBEDDING) -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == name)


def point_to(folder: Path, content: bytes, name: str = EMBEDDING) -> None:
    """Make ``.metadata`` say that ``content``, in a file of its own, is the tensor ``name``."""

    def edit(metadata: Any) -> None:
        place = place_of(metadata, name)
        place.relative_path, place.offset, place.length = "own.distcp", 0, len(content)

    (folder / "own.distcp").write_bytes(content)
    edit_metadata(folder, edit)


# ---- the ways in: each makes `marker` if its file is loaded by pickle, torch.load or DCP


def metadata_runs(folder: Path, marker: Path) -> None:
    edit_metadata(folder, lambda metadata: Payload(marker))


def metadata_hides(folder: Path, marker: Path) -> None:
    """The payload is in a field that nobody uses."""
    edit_metadata(folder, lambda metadata: setattr(metadata, "planner_data", Payload(marker)))


def other_metadata_runs(folder: Path, marker: Path) -> None:
    """``.metadata`` is damaged, and DCP would read that of the rank."""
    (folder / ".metadata").write_bytes(b"")
    (folder / "__0.metadata").write_bytes(pickle.dumps(Payload(marker)))
    reseal(folder)


def tensor_runs(folder: Path, marker: Path) -> None:
    saved = io.BytesIO()
    torch.save([Payload(marker), torch.zeros(1_000_000)], saved)  # no smaller than the tensor
    point_to(folder, saved.getvalue())


def bytes_run(folder: Path, marker: Path) -> None:
    """A tensor is an entry of bytes, which DCP loads with ``weights_only=False``."""
    saved = io.BytesIO()
    torch.save(Payload(marker), saved)
    (folder / "own.distcp").write_bytes(saved.getvalue())

    def edit(metadata: Any) -> None:
        metadata.state_dict_metadata[EMBEDDING] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(EMBEDDING)] = _StorageInfo("own.distcp", 0, len(saved.getvalue()))

    edit_metadata(folder, edit)


WAYS_IN: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "metadata": (metadata_runs, ".metadata asks for 'posix.mkdir'"),
    "hidden": (metadata_hides, ".metadata asks for 'posix.mkdir'"),
    "rank": (other_metadata_runs, ".metadata: cannot be read"),
    "tensor": (tensor_runs, "own.distcp asks for 'posix.mkdir'"),
    "bytes": (bytes_run, "tok_embeddings.weight"),
}
