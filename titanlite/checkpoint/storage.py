"""Reading and writing checkpoints together: every process its part, through ``torch.distributed.checkpoint`` (DCP).

A checkpoint is a folder of DCP's files (``__<rank>_<n>.distcp`` and ``.metadata``), ``checkpoint.json`` (:class:`Info`)
and ``SHA256SUMS``. All functions that take a group are called by all its processes, and fail on all of them alike.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.utils.serialization import config

from titanlite.checkpoint.folder import (
    SUMS,
    DamagedCheckpoint,
    HashingFile,
    commit,
    make_folder,
    partial_folder,
    problems_of,
    read_sums,
    step_folder,
    write_file,
)
from titanlite.checkpoint.state import State
from titanlite.errors import ConfigError

INFO = "checkpoint.json"
_FORMAT = 1
_COPY_AHEAD = 10_000_000  # bytes
T = TypeVar("T")


@dataclass
class Info:
    """What is not tensors: plain values, in ``checkpoint.json``.

    Attributes:
        step: optimizer steps made.
        model: its ``name``, ``flavor`` and ``args``.
        tokenizer_path: as configured; empty for the shipped one.
        weights_only: there are no optimizer and random states.
        world_size: processes that saved it.
        seed: of the run.
        tokens_seen: of all devices.
        buffers: the names of tensors of the model that are no parameters.
        data: the position of the data loader.
        step_guard: what the coming verdicts on steps depend on.
    """

    step: int
    model: dict[str, Any]
    tokenizer_path: str = ""
    weights_only: bool = False
    world_size: int = 1
    seed: int = 0
    tokens_seen: int = 0
    buffers: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    step_guard: dict[str, Any] = field(default_factory=dict)


class SaveError(Exception):
    """A checkpoint could not be written; on all processes."""


# ---- together


def on_all(group: dist.ProcessGroup | None, function: Callable[[], T]) -> list[T]:
    """Call ``function`` on every process; returns what each returned, by rank.

    Raises:
        SaveError: on all, if it raised on any.
    """
    try:
        result: tuple[T | None, str] = (function(), "")
    except Exception as e:  # whatever it is, the others must not wait for this process
        result = (None, f"rank {dist.get_rank()}: {_words(e)}")
    results: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(results, result, group=group)
    errors = [error for _, error in results if error]
    if errors:
        raise SaveError("; ".join(errors))
    return [value for value, _ in results]


def from_rank_zero(group: dist.ProcessGroup | None, function: Callable[[], T]) -> T:
    """Call ``function`` on rank 0; returns what it returned on every process.

    Raises:
        ConfigError: on every process, if it raised that, or met what the operating system refuses.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except ConfigError as e:
            outcome[1] = e
        except OSError as e:
            outcome[1] = ConfigError(
                f"the checkpoints cannot be read: {e}; make them readable, or choose another folder"
            )
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


# ---- writing


class _HashingFileSystem(FileSystem):
    """DCP's own, with the SHA-256 of each file made as it is written."""

    def __init__(self) -> None:
        self.sums: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[IO[bytes]]:  # type: ignore[override]
        file = HashingFile(path)
        try:
            yield file  # type: ignore[misc]
        finally:
            file.close()
        self.sums[Path(path).name] = file.digest

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


def save(root: Path, state: State, info: Info, group: dist.ProcessGroup | None) -> Path:
    """Write the checkpoint ``root/step-N`` of ``info.step``; returns its folder. Complete, or not there.

    Raises:
        SaveError: what the operating system refused, on any process. There is nothing new then.
    """
    partial, final = partial_folder(root, info.step), step_folder(root, info.step)

    def begin() -> None:
        if final.exists():
            raise FileExistsError(f"{final} exists")
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(root)
        partial.mkdir()

    def end(sums: Mapping[str, str]) -> None:
        text = json.dumps({"format": _FORMAT, **asdict(info)}, indent=1)
        commit(partial, final, {**sums, INFO: write_file(partial / INFO, text)})

    is_first = dist.get_rank() == 0
    try:
        on_all(group, begin if is_first else _nothing)
        sums = _write_tensors(partial, state, group)
        on_all(group, (lambda: end(sums)) if is_first else _nothing)
    except SaveError:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)  # the disk may be full
        raise
    return final


def _nothing() -> None:
    pass


def _write_tensors(folder: Path, state: State, group: dist.ProcessGroup | None) -> dict[str, str]:
    """Returns the SHA-256 of all processes' files by name."""
    # By default it copies ahead, to overlap with writing, and waits for training's stream for that: here only where
    # there is something to copy.
    on_device = any(tensor.device.type != "cpu" for tensor in state.values())
    writer = FileSystemWriter(folder, sync_files=True, per_thread_copy_ahead=_COPY_AHEAD if on_device else 0)
    writer.fs = files = _HashingFileSystem()
    planner = DefaultSavePlanner(flatten_state_dict=False)
    try:
        # There is a SHA-256 of the same bytes; and PyTorch holds Python's lock while it computes a CRC-32.
        with config.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
            save_tensors(state, storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as e:
        raise SaveError(
            "; ".join(f"rank {rank}: {_words(failure[0])}" for rank, failure in sorted(e.failures.items()))
        ) from e
    sums: dict[str, str] = {}
    for own in on_all(group, lambda: files.sums):
        sums |= own
    return sums


def _words(error: BaseException) -> str:
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


# ---- reading


def read_info(folder: Path) -> Info:
    """What is not tensors of the checkpoint ``folder``.

    Raises:
        ConfigError: it is no checkpoint, or of a version that this one does not know.
        DamagedCheckpoint: it is one, and this file is not what was written, or the checksums are not.
    """
    try:
        text = (folder / INFO).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if (folder / SUMS).exists():
            raise DamagedCheckpoint(folder, [f"{INFO} is missing"]) from None
        raise ConfigError(
            f"{folder} is no checkpoint of titanlite: it has no {INFO}; a checkpoint is a folder such as "
            "outputs/checkpoint/step-100"
        ) from None
    # Whatever else is verified: a change here could be mistaken for another version, or for other values.
    if hashlib.sha256(text).hexdigest() != read_sums(folder).get(INFO):
        raise DamagedCheckpoint(folder, [f"{INFO} is changed"])
    content = json.loads(text)
    if content.pop("format") != _FORMAT:
        raise ConfigError(f"{folder} was written by another version of titanlite: its format is not {_FORMAT}")
    return Info(**content)


def verify(folder: Path, group: dist.ProcessGroup | None = None) -> int:
    """Read all files of a checkpoint, each process its share, and compare their checksums; returns their bytes.

    Raises:
        DamagedCheckpoint: on all processes; with every file that is not what was written.
    """

    def listed() -> tuple[dict[str, str], dict[str, int]]:
        sums = read_sums(folder)
        return sums, {name: (folder / name).stat().st_size if (folder / name).is_file() else 0 for name in sums}

    if not dist.is_initialized():
        sums, sizes = listed()
        problems = problems_of(folder, sums, sums)
    else:
        sums, sizes = from_rank_zero(group, listed)
        # The largest first, dealt in turn.
        own = sorted(sums, key=lambda name: (-sizes[name], name))[dist.get_rank() :: dist.get_world_size(group)]
        found: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, problems_of(folder, sums, own), group=group)
        problems = sorted(problem for part in found for problem in part)
    if problems:
        raise DamagedCheckpoint(folder, problems)
    return sum(sizes.values())


def saved_shapes(folder: Path) -> dict[str, torch.Size]:
    """The tensors of a checkpoint, by name."""
    entries = _metadata(folder).state_dict_metadata
    return {name: entry.size for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def _metadata(folder: Path) -> Metadata:
    try:
        return FileSystemReader(folder).read_metadata()
    except FileNotFoundError:
        raise DamagedCheckpoint(folder, [".metadata is missing"]) from None
    except Exception as e:  # whatever unpickling raises
        raise DamagedCheckpoint(folder, [f".metadata cannot be read ({type(e).__name__}: {e})"]) from None


def load(folder: Path, state: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Fill the tensors of ``state``, sharded in any way, from those of the same names; other dtypes are converted. In a
    program without processes that know each other, alone.

    Raises:
        DamagedCheckpoint: a file is missing, or cannot be read.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    alone = not dist.is_initialized()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load_tensors(
                dict(state),
                storage_reader=FileSystemReader(folder),
                planner=planner,
                process_group=group,
                no_dist=alone,
            )
        except CheckpointException as e:
            problems = [f"rank {rank}: {_words(failure[0])}" for rank, failure in sorted(e.failures.items())]
            raise DamagedCheckpoint(folder, problems) from e


__all__ = ["INFO", "SUMS", "Info", "SaveError", "load", "read_info", "save", "saved_shapes", "verify"]
