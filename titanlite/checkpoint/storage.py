"""Read and write distributed checkpoints: every process handles its shards (``torch.distributed.checkpoint``, DCP).

A checkpoint is a folder of DCP's files (``__<rank>_<n>.distcp`` and ``.metadata``), ``checkpoint.json`` (:class:`Info`)
and ``SHA256SUMS``. All processes of a group must call a function that takes a group; if it fails, it fails on all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from titanlite.checkpoint.collectives import SaveError, from_rank_zero, message_of, on_all
from titanlite.checkpoint.diagnosis import why_no_weights
from titanlite.checkpoint.folder import (
    INFO,
    SUMS,
    DamagedCheckpoint,
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
from titanlite.checkpoint.hashing_file import HashingFile
from titanlite.checkpoint.metadata import METADATA, Chunk, SavedTensor, read_metadata
from titanlite.checkpoint.plan_cache import PlanCache
from titanlite.checkpoint.planner import FlatPlanner
from titanlite.checkpoint.quantized import as_plain, copy_any
from titanlite.checkpoint.state import State
from titanlite.checkpoint.tensor_writer import DeviceTensorWriter, HashingFileSystem, HostTensorWriter, NewFile
from titanlite.checkpoint.tensors import read_tensor
from titanlite.errors import ConfigError
from titanlite.quant.fsdp import shard_with_offset
from titanlite.untrusted.files import MOST_JSON, Untrusted, contained, is_of, json_object, open_file, read_bytes

_FORMAT = 1
_MODEL = {"name": str, "flavor": str, "args": dict}  # the keys of Info.model


@dataclass
class Info:
    """The values of a checkpoint that are not tensors; saved in ``checkpoint.json``.

    Attributes:
        step: the number of optimizer steps made.
        model: ``name``, ``flavor`` and ``args`` of the model.
        tokenizer_path: where the tokenizer came from; empty for the shipped one. A copy is in the folder.
        tokenizer: the identity of the tokenizer; empty if an earlier version saved the checkpoint.
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
    tokenizer: dict[str, str] = field(default_factory=dict)
    weights_only: bool = False
    world_size: int = 1
    seed: int = 0
    tokens_seen: int = 0
    buffers: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    step_guard: dict[str, Any] = field(default_factory=dict)


# ---- writing


def save(
    root: Path,
    state: State,
    info: Info,
    group: dist.ProcessGroup | None,
    files: Mapping[str, str] | None = None,
    plans: PlanCache | None = None,
    new_file: NewFile = HashingFile,
) -> Path:
    """Write the checkpoint ``root/step-N``, where N is ``info.step``, atomically; return its folder.

    Args:
        files: the names and contents of text files that belong to it, such as those of the tokenizer.
        plans: the plans of earlier saves of the run, the same series on all processes.
        new_file: creates a file for tensors, by its path.

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
        texts = {**(files or {}), INFO: json.dumps({"format": _FORMAT, **asdict(info)}, indent=1)}
        commit(partial, final, {**sums, **{name: write_file(partial / name, text) for name, text in texts.items()}})

    is_first = dist.get_rank() == 0
    try:
        on_all(group, begin if is_first else _nothing)
        sums = _write_tensors(partial, as_plain(state), group, plans, new_file)
        on_all(group, (lambda: end(sums)) if is_first else _nothing)
    except SaveError:
        if plans is not None:
            plans.clear()
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)  # frees the space: the disk may be full
        raise
    return final


def _nothing() -> None:
    pass


def _write_tensors(
    folder: Path, state: State, group: dist.ProcessGroup | None, plans: PlanCache | None, new_file: NewFile
) -> dict[str, str]:
    """Write the tensors; return file name -> SHA-256 for the files of all processes."""
    files = HashingFileSystem(new_file)
    on_host = all(tensor.device.type == "cpu" for tensor in state.values())
    writer = HostTensorWriter(folder, files) if on_host else DeviceTensorWriter(folder, files)
    planner = FlatPlanner() if plans is None else plans.planner()
    try:
        save_tensors(state, storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as e:
        raise SaveError(
            "; ".join(f"rank {rank}: {message_of(failure[0])}" for rank, failure in sorted(e.failures.items()))
        ) from e
    sums: dict[str, str] = {}
    for rank_sums in on_all(group, lambda: files.sums):
        sums |= rank_sums
    return sums


# ---- reading


def read_info(folder: Path) -> Info:
    """Read and verify ``checkpoint.json`` of the checkpoint ``folder``.

    Raises:
        ConfigError: the folder is not a checkpoint, or its format version is unknown.
        DamagedCheckpoint: ``checkpoint.json`` or ``SHA256SUMS`` is missing or changed.
    """
    try:
        text = read_bytes(contained(folder, INFO), MOST_JSON)
        # Always verified, whatever checkpoint.verify says: a changed file could pass for another version or values.
        if hashlib.sha256(text).hexdigest() != read_sums(folder).get(INFO):
            raise DamagedCheckpoint(folder, [f"{INFO} is changed"])
        content = json_object(text, folder / INFO)
        if content.pop("format", None) != _FORMAT:
            raise ConfigError(f"{folder} was written by another version of titanlite: its format is not {_FORMAT}")
        return _info(content, folder / INFO)
    except (FileNotFoundError, NotADirectoryError):
        if (folder / SUMS).exists():
            raise DamagedCheckpoint(folder, [f"{INFO} is missing"]) from None
        raise ConfigError(f"{folder} is no checkpoint of titanlite: {why_no_weights(folder)}") from None
    except Untrusted as e:
        raise DamagedCheckpoint(folder, [str(e)]) from None


def _info(content: Mapping[str, Any], file: Path) -> Info:
    """Return the :class:`Info` of what a JSON file holds; raise :class:`Untrusted` if it has another thing."""
    kinds = get_type_hints(Info)
    required = {f.name for f in fields(Info) if f.default is MISSING and f.default_factory is MISSING}
    strange = sorted({*(content.keys() - kinds.keys()), *(required - content.keys())})
    strange += [name for name, value in content.items() if name in kinds and not is_of(value, kinds[name])]
    if not strange and not all(is_of(content["model"].get(key), kind) for key, kind in _MODEL.items()):
        strange = ["model"]
    if strange:
        raise Untrusted(file, f"{', '.join(strange)[:200]}: missing, unknown, or of another type")
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
        if METADATA not in sums:
            raise DamagedCheckpoint(folder, [f"{METADATA} is not in {SUMS}"])
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
    return {name: saved.shape for name, saved in read_metadata(folder).items()}


def load(
    folder: Path,
    state: Mapping[str, Tensor],
    group: dist.ProcessGroup | None = None,
    saved: Mapping[str, SavedTensor] | None = None,
) -> None:
    """Copy the saved tensors into the tensors of the same names in ``state``, with any sharding; dtypes are converted.
    Also works in a single process where ``torch.distributed`` is not initialized.

    Args:
        saved: the result of :func:`read_metadata`; None: read it.

    Raises:
        DamagedCheckpoint: a file is missing, or cannot be read.
    """
    if not dist.is_initialized():
        copy_into(state, read_metadata(folder) if saved is None else saved, folder)
        return
    tensors = from_rank_zero(group, lambda: read_metadata(folder)) if saved is None else saved
    on_all(group, lambda: copy_into(state, tensors, folder), lambda problems: DamagedCheckpoint(folder, problems))


def copy_into(state: Mapping[str, Tensor], saved: Mapping[str, SavedTensor], folder: Path) -> None:
    """Copy the parts that this process holds of the tensors of ``state``, which are in ``saved`` by the same names. The
    files are read one after the other, each from its beginning to its end. Of names that share one tensor, as tied
    weights do, all are read and compared. Weights are quantized and dequantized as they have to be.

    Raises:
        DamagedCheckpoint: a file is missing, or cannot be read, or weights that the model ties differ.
    """
    copy_any(state, saved, lambda plain, sources: _copy_plain(plain, sources, folder))


def _copy_plain(state: Mapping[str, Tensor], saved: Mapping[str, SavedTensor], folder: Path) -> None:
    names: dict[int, str] = {}
    first_name = {
        name: names.setdefault(shard_with_offset(t)[0].data_ptr() or id(t), name) for name, t in state.items()
    }
    for target, part, _ in _parts({name: state[name] for name in names.values()}, saved, folder):
        target.copy_(part)
    tied = {name: tensor for name, tensor in state.items() if first_name[name] != name}
    for target, part, name in _parts(tied, saved, folder):
        if not torch.equal(target, part.to(target)):
            raise DamagedCheckpoint(
                folder, [f"{name} and {first_name[name]} are one weight in the model, and differ in the checkpoint"]
            )


def _parts(
    state: Mapping[str, Tensor], saved: Mapping[str, SavedTensor], folder: Path
) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Yield views of the local tensors of ``state``, what the files hold for each of them, and its name."""
    requests = [
        (chunk, name, offset, sizes)
        for name, tensor in state.items()
        for chunk, offset, sizes in _chunks_of(folder, name, tensor, saved)
    ]
    requests.sort(key=lambda request: (request[0].file, request[0].start))
    try:
        for file, parts in groupby(requests, key=lambda request: request[0].file):
            with open_file(contained(folder, file)) as stream:
                for chunk, name, offset, sizes in parts:
                    target, begin = shard_with_offset(state[name])
                    place = tuple(slice(o - b, o - b + n) for o, b, n in zip(offset, begin, sizes))
                    inner = [o - c for o, c in zip(offset, chunk.offset)]
                    part = read_tensor(stream, chunk.start, chunk.length, chunk.shape, inner, sizes)
                    yield target[place], part, name
    except (Untrusted, OSError) as e:
        raise DamagedCheckpoint(folder, [str(e)]) from None


def _chunks_of(
    folder: Path, name: str, tensor: Tensor, saved: Mapping[str, SavedTensor]
) -> Iterator[tuple[Chunk, list[int], list[int]]]:
    """Return the saved chunks that share elements with the local part of ``tensor``; see :meth:`Chunks.within`."""
    if name not in saved:
        raise DamagedCheckpoint(folder, [f"{name} is not among its tensors"])
    if saved[name].shape != tensor.shape:
        raise DamagedCheckpoint(folder, [f"{name} has the shape {tuple(saved[name].shape)}, not {tuple(tensor.shape)}"])
    local, begin = shard_with_offset(tensor)
    return saved[name].chunks.within(begin, local.shape)


__all__ = ["INFO", "SUMS", "Info", "load", "read_info", "save", "saved_shapes", "verify"]
