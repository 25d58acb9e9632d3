"""Read and write distributed checkpoints: every process handles its shards (``torch.distributed.checkpoint``, DCP).

A checkpoint is a folder of DCP's files (``__<rank>_<n>.distcp`` and ``.metadata``), ``checkpoint.json`` (:class:`Info`)
and ``SHA256SUMS``. All processes of a group must call a function that takes a group; if it fails, it fails on all.
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
    INFO,
    SUMS,
    DamagedCheckpoint,
    HashingFile,
    commit,
    is_checkpoint,
    make_folder,
    partial_folder,
    problems_of,
    read_sums,
    set_stray_aside,
    step_folder,
    write_file,
)
from titanlite.checkpoint.state import State
from titanlite.errors import ConfigError

_FORMAT = 1
_COPY_AHEAD = 10_000_000  # bytes
T = TypeVar("T")


@dataclass
class Info:
    """The values of a checkpoint that are not tensors; saved in ``checkpoint.json``.

    Attributes:
        step: the number of optimizer steps made.
        model: ``name``, ``flavor`` and ``args`` of the model.
        tokenizer_path: the configured path; empty for the shipped tokenizer.
        weights_only: True if the checkpoint has no optimizer and random states.
        world_size: the number of processes that saved the checkpoint.
        seed: the seed of the run.
        tokens_seen: training tokens, summed over all devices.
        buffers: the names of the model's tensors that are buffers, not parameters.
        data: the position of the data loader.
        step_guard: the state of the step guard, on which its next verdicts depend.
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
    """A checkpoint could not be written. Raised on all processes."""


# ---- collective calls


def on_all(group: dist.ProcessGroup | None, function: Callable[[], T]) -> list[T]:
    """Call ``function`` on every process; return all results, ordered by rank.

    Raises:
        SaveError: on all processes, if ``function`` raised on any of them.
    """
    try:
        result: tuple[T | None, str] = (function(), "")
    except Exception as e:  # any exception: the other processes must not wait for this one
        result = (None, f"rank {dist.get_rank()}: {_message(e)}")
    results: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(results, result, group=group)
    errors = [error for _, error in results if error]
    if errors:
        raise SaveError("; ".join(errors))
    return [value for value, _ in results]


def from_rank_zero(group: dist.ProcessGroup | None, function: Callable[[], T]) -> T:
    """Call ``function`` on rank 0; return its result on every process.

    Raises:
        ConfigError: on every process, if ``function`` raised ConfigError or OSError.
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
    """DCP's file system, which also computes the SHA-256 of each file during writing."""

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
    """Write the checkpoint ``root/step-N``, where N is ``info.step``, atomically; return its folder.

    Raises:
        SaveError: writing failed on any process. Then no new checkpoint exists.
    """
    partial, final = partial_folder(root, info.step), step_folder(root, info.step)

    def begin() -> None:
        if is_checkpoint(final):
            raise FileExistsError(f"{final} exists")
        if final.exists() or final.is_symlink():
            set_stray_aside(final)
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
            shutil.rmtree(partial, ignore_errors=True)  # frees the space: the disk may be full
        raise
    return final


def _nothing() -> None:
    pass


def _write_tensors(folder: Path, state: State, group: dist.ProcessGroup | None) -> dict[str, str]:
    """Write the tensors; return file name -> SHA-256 for the files of all processes."""
    # By default the writer copies tensors ahead, to overlap with writing, and for that waits for the training stream.
    # Copy ahead only if there are tensors on a GPU.
    on_device = any(tensor.device.type != "cpu" for tensor in state.values())
    writer = FileSystemWriter(folder, sync_files=True, per_thread_copy_ahead=_COPY_AHEAD if on_device else 0)
    writer.fs = files = _HashingFileSystem()
    planner = DefaultSavePlanner(flatten_state_dict=False)
    try:
        # CRC-32 adds nothing to SHA-256, and PyTorch holds the interpreter lock while it computes a CRC-32.
        with config.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
            save_tensors(state, storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as e:
        raise SaveError(
            "; ".join(f"rank {rank}: {_message(failure[0])}" for rank, failure in sorted(e.failures.items()))
        ) from e
    sums: dict[str, str] = {}
    for rank_sums in on_all(group, lambda: files.sums):
        sums |= rank_sums
    return sums


def _message(error: BaseException) -> str:
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


# ---- reading


def read_info(folder: Path) -> Info:
    """Read and verify ``checkpoint.json`` of the checkpoint ``folder``.

    Raises:
        ConfigError: the folder is not a checkpoint, or its format version is unknown.
        DamagedCheckpoint: ``checkpoint.json`` or ``SHA256SUMS`` is missing or changed.
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
    # Always verified, whatever checkpoint.verify says: a changed file could pass for another version or other values.
    if hashlib.sha256(text).hexdigest() != read_sums(folder).get(INFO):
        raise DamagedCheckpoint(folder, [f"{INFO} is changed"])
    content = json.loads(text)
    if content.pop("format") != _FORMAT:
        raise ConfigError(f"{folder} was written by another version of titanlite: its format is not {_FORMAT}")
    return Info(**content)


def verify(folder: Path, group: dist.ProcessGroup | None = None) -> int:
    """Read all files of a checkpoint, shared out among the processes, and compare their checksums.

    Returns:
        The total size in bytes.

    Raises:
        DamagedCheckpoint: on all processes; ``problems`` lists every missing, changed or unreadable file.
    """

    def sums_and_sizes() -> tuple[dict[str, str], dict[str, int]]:
        sums = read_sums(folder)
        return sums, {name: (folder / name).stat().st_size if (folder / name).is_file() else 0 for name in sums}

    if not dist.is_initialized():
        sums, sizes = sums_and_sizes()
        problems = problems_of(folder, sums, sums)
    else:
        sums, sizes = from_rank_zero(group, sums_and_sizes)
        # Files in order of size, largest first; each rank takes every n-th.
        names = sorted(sums, key=lambda name: (-sizes[name], name))[dist.get_rank() :: dist.get_world_size(group)]
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, problems_of(folder, sums, names), group=group)
        problems = sorted(problem for rank_problems in gathered for problem in rank_problems)
    if problems:
        raise DamagedCheckpoint(folder, problems)
    return sum(sizes.values())


def saved_shapes(folder: Path) -> dict[str, torch.Size]:
    """Return tensor name -> shape for the tensors of a checkpoint."""
    entries = _metadata(folder).state_dict_metadata
    return {name: entry.size for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def _metadata(folder: Path) -> Metadata:
    try:
        return FileSystemReader(folder).read_metadata()
    except FileNotFoundError:
        raise DamagedCheckpoint(folder, [".metadata is missing"]) from None
    except Exception as e:  # unpickling can raise any exception
        raise DamagedCheckpoint(folder, [f".metadata cannot be read ({type(e).__name__}: {e})"]) from None


def load(folder: Path, state: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Copy the saved tensors into the tensors of the same names in ``state``, with any sharding; dtypes are converted.
    Also works in a single process where ``torch.distributed`` is not initialized.

    Raises:
        DamagedCheckpoint: a file is missing, or cannot be read.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load_tensors(
                dict(state),
                storage_reader=FileSystemReader(folder),
                planner=planner,
                process_group=group,
                no_dist=not dist.is_initialized(),
            )
        except CheckpointException as e:
            problems = [f"rank {rank}: {_message(failure[0])}" for rank, failure in sorted(e.failures.items())]
            raise DamagedCheckpoint(folder, problems) from e


__all__ = ["INFO", "SUMS", "Info", "SaveError", "load", "read_info", "save", "saved_shapes", "verify"]
