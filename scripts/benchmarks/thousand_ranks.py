"""What grows with the number of ranks, simulated.

    python scripts/benchmarks/thousand_ranks.py counts --out docs/benchmarks/thousand_ranks.json
    python scripts/benchmarks/thousand_ranks.py plans --out docs/benchmarks/thousand_ranks_plans.json
    python scripts/benchmarks/thousand_ranks.py opening --out docs/benchmarks/thousand_ranks_opening.json
    python scripts/benchmarks/thousand_ranks.py seconds --out docs/benchmarks/thousand_ranks_seconds.json
    python scripts/benchmarks/thousand_ranks.py corpus --out docs/benchmarks/thousand_ranks_corpus.json
    python scripts/benchmarks/thousand_ranks.py weights --out docs/benchmarks/thousand_ranks_weights.json

- counts: bytes that the plans of so many ranks, made as objects, send to rank 0 and back: at a first save, as at each
  save without kept plans, and at a later one; the bytes of names that a rank receives when a checkpoint is opened; the
  open files of real gloo processes, and the limit that the launcher sets for more.
- plans: the seconds in which rank 0 plans a first save and a later one, and in which DCP's own planner plans the first.
  DCP's takes minutes at 4,096 ranks.
- opening: the seconds and the memory in which rank 0 reads the metadata of a checkpoint, and in which DCP's own reader
  does; the bytes that each other rank gets of it; the seconds in which a rank then chooses its chunks. The last case is
  near a real model.
- seconds: one agreement over gloo, of real processes, as each step had one and a step with a log line or a save has.
- corpus: in which time four processes open a corpus of JSON lines: without an index, with one, and after one of its
  files has changed.
- weights: bytes of a folder of safetensors that each of some gloo processes copies into its shards, and bytes that the
  disk delivers to all of them. The system's cache holds none of the files before. The disk must be a real one.

Counts depend on no other load of the machine. Seconds need an idle one: those of the corpus about three minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch._C._distributed_c10d import FileStore
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from titanlite.checkpoint.hugging_face import HuggingFaceFolder
from titanlite.checkpoint.metadata import METADATA, read_metadata
from titanlite.checkpoint.plan_cache import PlanCache
from titanlite.checkpoint.planner import FlatPlanner
from titanlite.config.parallelism import Degrees
from titanlite.config.schema import Comm
from titanlite.data import build_source
from titanlite.data.sources import RandomAccessSource
from titanlite.distributed.mesh import build_mesh
from titanlite.distributed.runtime import start_runtime, stop_runtime
from titanlite.environment import CACHE_DIR
from titanlite.launch.limits import descriptors_needed
from titanlite.models.llama3.spec import FLAVORS
from titanlite.models.spec import get_model_spec

RANKS = (64, 256, 1024, 4096)
REAL = (1024, 300)  # ranks and tensors
PROCESSES = (2, 4, 8)
PROCESSES_OF_CORPUS = 4
FILES = 8  # of the corpus
COLUMNS = 14336  # of a tensor of a plan
WEIGHT_FILES, WEIGHT_SHAPE = 4, (2048, 1024)
HASH_BYTES = 32
Result = dict[str, Any]


def counts(args: argparse.Namespace) -> list[Result]:
    rows: list[Result] = []
    for ranks in args.ranks:
        first, later, _ = _saves(ranks, args.tensors)
        rows.append({"part": "plan", "ranks": ranks, "tensors": args.tensors, "first": first, "later": later})
    size = _bytes_of_names()
    for ranks in args.ranks:
        row = {"gathered_bytes": ranks * size, "with_hashes_bytes": ranks * HASH_BYTES + size}
        rows.append({"part": "names of 8B", "ranks": ranks, **row})
    for count in PROCESSES:
        rows.append({"part": "open files", "processes": count, "open": max(in_processes(count, _open_files))})
    for ranks in args.ranks:
        rows.append({"part": "limit of open files", "ranks": ranks, "limit": descriptors_needed(ranks)})
    return rows


def seconds(args: argparse.Namespace) -> list[Result]:
    rows: list[Result] = []
    for count in (*PROCESSES, 16, 24):
        took = statistics.median(in_processes(count, _agreement_seconds))
        rows.append({"part": "agreement", "processes": count, "agreement_s": round(took, 6)})
    return rows


def plans(args: argparse.Namespace) -> list[Result]:
    gc.disable()  # as during training
    rows: list[Result] = []
    for ranks in args.ranks:
        *_, (first, later) = _saves(ranks, args.tensors)
        row = {"first_s": first, "later_s": later, "dcp_s": _seconds_of_dcp(ranks, args.tensors)}
        row = {key: round(took, 6) for key, took in row.items()}
        rows.append({"part": "plan", "ranks": ranks, "tensors": args.tensors, **row})
    return rows


def _saves(ranks: int, tensors: int) -> tuple[dict[str, int], dict[str, int], tuple[float, float]]:
    """Plan two saves of the same tensors, as rank 0 does. Return what is sent in each, and the seconds of each."""
    cache = PlanCache(f"{ranks} ranks")
    plans = [_plan_of(rank, ranks, tensors) for rank in range(ranks)]
    unchanged = [SavePlan([], usable=False)] * ranks
    sent: list[dict[str, int]] = []
    took: list[float] = []
    for gathered in (plans, unchanged):
        planner = cache.planner()
        assert isinstance(planner, DefaultSavePlanner)
        begin = time.perf_counter()
        scattered, metadata = planner.create_global_plan(gathered)
        took.append(time.perf_counter() - begin)
        sent.append(
            {
                "gathered_bytes": sum(len(pickle.dumps(p)) for p in gathered),
                "scattered_bytes": sum(len(pickle.dumps(p)) for p in scattered),
                "metadata_bytes": len(pickle.dumps(metadata)),
            }
        )
    cache.clear()
    return sent[0], sent[1], (took[0], took[1])


def _seconds_of_dcp(ranks: int, tensors: int) -> float:
    """Return the seconds in which DCP's own planner plans the first save."""
    plans = [_plan_of(rank, ranks, tensors) for rank in range(ranks)]
    begin = time.perf_counter()
    DefaultSavePlanner(flatten_state_dict=False).create_global_plan(plans)
    return time.perf_counter() - begin


def opening(args: argparse.Namespace) -> list[Result]:
    rows: list[Result] = []
    for ranks, tensors in [*((ranks, args.tensors) for ranks in args.ranks), REAL]:
        with tempfile.TemporaryDirectory() as folder:
            _write_metadata(Path(folder), ranks, tensors)
            row = {"part": "opening", "ranks": ranks, "tensors": tensors, "chunks": ranks * tensors}
            row["metadata_bytes"] = Path(folder, METADATA).stat().st_size
            for read in (_open_metadata, _open_by_dcp):
                (measured,) = in_processes(1, read, folder)
                row |= measured
            rows.append(row)
    return rows


def _write_metadata(folder: Path, ranks: int, tensors: int) -> None:
    """Write the metadata of a first save as rank 0 does, and files of the sizes that it states."""
    plans = [pickle.loads(pickle.dumps(_plan_of(rank, ranks, tensors))) for rank in range(ranks)]  # they were gathered
    planned, metadata = FlatPlanner().create_global_plan(plans)
    size = 4 * COLUMNS
    metadata.storage_data = {}
    for rank, plan in enumerate(planned):
        file = folder / f"__{rank}_0.distcp"
        with file.open("wb") as stream:
            stream.truncate(len(plan.items) * size)
        places = {item.index: _StorageInfo(file.name, i * size, size) for i, item in enumerate(plan.items)}
        metadata.storage_data |= pickle.loads(pickle.dumps(places))  # they too
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


def _open_metadata(folder: str) -> Result:
    """Read the metadata, and choose the chunks of one rank. The process has done nothing else."""
    saved, took, peak = _with_peak(lambda: read_metadata(Path(folder)))
    begin = time.perf_counter()
    chosen = [next(tensor.chunks.within((1, 0), (1, COLUMNS))) for tensor in saved.values()]
    chosen_s = time.perf_counter() - begin
    if {chunk.file for chunk, _, _ in chosen} != {"__1_0.distcp"}:
        raise SystemExit("a rank did not find its chunks")
    return {"read_s": took, "peak_bytes": peak, "sent_bytes": len(pickle.dumps(saved)), "chosen_s": round(chosen_s, 6)}


def _open_by_dcp(folder: str) -> Result:
    _, took, peak = _with_peak(FileSystemReader(folder).read_metadata)
    return {"dcp_s": took, "dcp_peak_bytes": peak}


def _with_peak(read: Callable[[], Any]) -> tuple[Any, float, int]:
    """Return what ``read`` returns, its seconds, and the bytes of memory that it took at most."""
    gc.disable()  # as during training
    before, begin = _peak_of_memory(), time.perf_counter()
    result = read()
    took = time.perf_counter() - begin
    return result, round(took, 4), _peak_of_memory() - before


def _peak_of_memory() -> int:
    return int(Path("/proc/self/status").read_text().partition("\nVmHWM:")[2].split()[0]) * 1024


def _plan_of(rank: int, ranks: int, tensors: int) -> SavePlan:
    """Make the plan of a rank that has a row of each tensor. All have more columns than rows, as ``w2`` has."""
    items, properties = [], TensorProperties(torch.float32)
    for i in range(tensors):
        offset, sizes = torch.Size((rank, 0)), torch.Size((1, COLUMNS))
        chunk = ChunkStorageMetadata(offset, sizes)
        data = TensorWriteData(chunk, properties, torch.Size((ranks, COLUMNS)))
        index = MetadataIndex(f"optimizer.layers.{i}.feed_forward.w1.weight.exp_avg", offset)
        items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
    return SavePlan(items)


def _bytes_of_names() -> int:
    """Return the size of the names and shapes of 8B, as they are sent."""
    spec = get_model_spec("llama3")
    with torch.device("meta"):
        model = spec.build(spec.configure(FLAVORS["8B"], 128256, 8192))
    return len(pickle.dumps({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}))


def _open_files() -> int:
    """Return the number of this process, with the groups of a run that shards the model over all."""
    runtime = start_runtime(Comm())
    mesh = build_mesh(Degrees(1, runtime.world_size, 1, 1, 1), "cpu")
    checkpoints = dist.new_group(backend="gloo")
    for group in (None, runtime.control, checkpoints, mesh.fsdp.get_group(), mesh.stage.get_group()):
        dist.all_reduce(torch.zeros(1), group=group)
    dist.barrier()
    count = len(os.listdir("/proc/self/fd"))
    dist.barrier()
    stop_runtime()
    return count


def _agreement_seconds() -> float:
    runtime = start_runtime(Comm())
    times = []
    for _ in range(50):
        begin = time.perf_counter()
        runtime.agree_max(0, 0)
        times.append(time.perf_counter() - begin)
    dist.barrier()
    stop_runtime()
    return statistics.median(times)


def corpus(args: argparse.Namespace) -> list[Result]:
    if args.folder is not None:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        os.environ[CACHE_DIR] = f"{folder}/cache"
        data = Path(folder, "corpus")
        data.mkdir()
        line = json.dumps({"text": "word " * 200}) + "\n"
        of_file = int(args.gigabytes * 1e9 / FILES) // len(line)
        for i in range(FILES):
            with (data / f"{i}.jsonl").open("w") as file:
                for begin in range(0, of_file, 1000):
                    file.write(line * min(1000, of_file - begin))
        rows, expected = [], of_file * FILES
        for start in ("first", "second", "after a change"):
            if start == "after a change":
                with (data / "0.jsonl").open("a") as file:
                    file.write(line)
                expected += 1
            opened = in_processes(PROCESSES_OF_CORPUS, _open_corpus, str(data))
            if {count for _, count in opened} != {expected}:
                raise SystemExit(f"{start} start: {opened} documents, of {expected}")
            size = sum(file.stat().st_size for file in data.iterdir())
            slowest = max(took for took, _ in opened)
            rows.append(
                {"start": start, "processes": len(opened), "bytes": size, "documents": expected, "slowest_s": slowest}
            )
        return rows


def _open_corpus(folder: str) -> tuple[float, int]:
    begin = time.perf_counter()
    source = build_source("json", path=folder, seed=0)
    seconds = round(time.perf_counter() - begin, 4)
    assert isinstance(source, RandomAccessSource)
    return seconds, source.num_documents


def weights(args: argparse.Namespace) -> list[Result]:
    rows: list[Result] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for i in range(WEIGHT_FILES):
            tensors = {name: torch.ones(WEIGHT_SHAPE) for name in _names_of_file(i)}
            save_file(tensors, f"{folder}/{i}.safetensors")
        Path(folder, "config.json").write_text("{}")
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        for shards in ("rows", "columns"):
            for count in (1, *PROCESSES):
                _leave_the_cache(Path(folder))
                read = in_processes(count, _load_weights, folder, shards == "columns")
                row = {"part": "weights", "shards": shards, "processes": count, "bytes": size}
                rows.append({**row, "copied": [copied for copied, _ in read], "of_disk": sum(disk for _, disk in read)})
    return rows


def _names_of_file(number: int) -> list[str]:
    return [f"layers.{number}.{i}" for i in range(4)]


def _leave_the_cache(folder: Path) -> None:
    """Let the system forget what it holds of the files."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _load_weights(folder: str, columns: bool) -> tuple[int, int]:
    """Return the bytes that this process has copied into its shards, and those that the disk delivered for it."""
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    names = [name for i in range(WEIGHT_FILES) for name in _names_of_file(i)]
    placement = Shard(1 if columns else 0)
    state = {name: distribute_tensor(torch.zeros(WEIGHT_SHAPE), mesh, [placement]) for name in names}
    before = _bytes_of_disk()
    HuggingFaceFolder(Path(folder)).load_into(state, {name: name for name in names})
    delivered = _bytes_of_disk() - before
    local = [tensor.to_local() for tensor in state.values()]
    if not all(bool((tensor == 1).all()) for tensor in local):
        raise SystemExit("not all weights were loaded")
    dist.barrier()
    return sum(tensor.numel() * tensor.element_size() for tensor in local), delivered


def _bytes_of_disk() -> int:
    return int(Path("/proc/self/io").read_text().partition("\nread_bytes: ")[2].split()[0])


def in_processes(count: int, function: Callable[..., Any], *given: Any) -> list[Any]:
    """Return what ``function`` returns in each of ``count`` processes that can make a process group."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(count) as pool:
        calls = [(function, rank, count, folder, given) for rank in range(count)]
        return pool.starmap(_rank, calls, chunksize=1)


def _rank(function: Callable[..., Any], rank: int, count: int, folder: str, given: tuple[Any, ...]) -> Any:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    store = FileStore(f"{folder}/store", count)
    store.add("arrived", 1)
    while store.add("arrived", 0) < count:  # else a process that is early would do the work of a late one
        time.sleep(0.001)
    if function is not _open_corpus:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    return function(*given)


PARTS = {"counts": counts, "plans": plans, "opening": opening, "seconds": seconds, "corpus": corpus, "weights": weights}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--tensors", type=int, default=48, help="sharded tensors of a plan")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the corpus")
    parser.add_argument("--folder", type=Path, default=None, help="where the corpus is written")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    rows = PARTS[args.part](args)
    for row in rows:
        print(json.dumps(row))
    results.save("thousand_ranks" if args.part == "counts" else f"thousand_ranks_{args.part}", rows, args, kind="cpu")


if __name__ == "__main__":
    main()
