"""Advice for a run that ran out of memory: all options that are not on yet and need less memory. For each, it estimates
what the option saves with the run's model and configuration (:mod:`titanlite.plan.estimate`).

``python -m titanlite.plan.advice FILE`` reads the file that :mod:`titanlite.training.out_of_memory` writes.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as NotInTime
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from titanlite.config import Degrees, JobConfig, global_batch_size, load_config, resolve_degrees
from titanlite.config.number_formats import formats_of, gathers_quantized
from titanlite.config.run_config import TOKENIZER
from titanlite.data import load_tokenizer
from titanlite.errors import ConfigError, counted
from titanlite.launch.shortage import Shortage
from titanlite.metrics.device import GIB
from titanlite.plan.devices import device_called
from titanlite.plan.estimate import Estimate, estimate
from titanlite.plan.lone_rank import START_METHOD
from titanlite.plan.predicted import reserved_peak

TIME_LIMIT = 180  # seconds for all estimates; the advice names those that are late
_CHUNKS = 8  # of the loss; what is left of the logits is then a small part of a step
_NOTICEABLE = 0.005  # fraction of the peak; options that save less are not shown


@dataclass(frozen=True)
class Knob:
    """A change of the configuration.

    Attributes:
        group: only one knob of a group can be on at a time.
        changes: new values by ``section.key``, in the order of the command line.
        world_size: the number of devices of the changed run.
    """

    group: str
    changes: dict[str, Any]
    world_size: int

    def apply(self, config: JobConfig) -> JobConfig:
        changed = copy.deepcopy(config)
        for name, value in self.changes.items():
            section, key = name.split(".")
            setattr(getattr(changed, section), key, value)
        return changed

    def shown(self, shortage: Shortage) -> str:
        """Return the change as command-line arguments."""
        ngpu = f"on {counted(self.world_size, 'device')}:" if self.world_size != shortage.world_size else ""
        options = (f"--{name}={_shown(value)}" for name, value in self.changes.items())
        return " ".join(filter(None, (ngpu, *options)))


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else ",".join(value) if isinstance(value, list) else str(value)


def knobs(config: JobConfig, shortage: Shortage) -> list[Knob]:
    """Return all knobs that are not on yet, even if they do not fit this model or save nothing."""
    degrees = resolve_degrees(config.parallelism, shortage.world_size)
    changes = [*_recomputation(config), *_precision(config, shortage), *_batch(config, degrees)]
    if config.parallelism.fsdp_reshard_after_forward != "always":
        changes.append(("reshard", {"parallelism.fsdp_reshard_after_forward": "always"}))
    if config.training.loss_chunks == 1:
        changes.append(("loss chunks", {"training.loss_chunks": _CHUNKS}))
    if config.parallelism.disable_loss_parallel:
        changes.append(("loss parallel", {"parallelism.disable_loss_parallel": False}))
    if config.optimizer.implementation == "foreach":
        changes.append(("optimizer", {"optimizer.implementation": "fused"}))
    if shortage.device == "cuda" and not (config.training.enable_cpu_offload or gathers_quantized(config)):
        changes.append(("offload", {"training.enable_cpu_offload": True}))
    if not config.training.compile:
        changes.append(("compile", {"training.compile": True}))
    same_mesh = [Knob(group, change, shortage.world_size) for group, change in changes]
    return [*same_mesh, *_other_meshes(config, degrees, shortage)]


_Changes = Iterator[tuple[str, dict[str, Any]]]


def _recomputation(config: JobConfig) -> _Changes:
    ac, key = config.activation_checkpoint, "activation_checkpoint"
    if ac.mode == "none" or (ac.mode == "selective" and ac.selective_ac_option != "op"):
        yield key, {f"{key}.mode": "selective", f"{key}.selective_ac_option": "op"}
    if ac.mode != "full":
        yield key, {f"{key}.mode": "full"}


def _precision(config: JobConfig, shortage: Shortage) -> _Changes:
    if config.training.mixed_precision_param == "float32":
        yield "precision", {"training.mixed_precision_param": "bfloat16"}
    for number_format in formats_of(config):
        if savings := number_format.memory_savings(config):
            yield "number format", savings
    if not formats_of(config):
        for name in shortage.native_formats:
            yield "number format", {"model.converters": [*config.model.converters, name]}


def _batch(config: JobConfig, degrees: Degrees) -> _Changes:
    """Yield smaller microbatches; the global batch size stays the same."""
    local, key = config.training.local_batch_size, "training.local_batch_size"
    if degrees.pipeline_parallel > 1:
        size, key = (
            config.parallelism.pipeline_parallel_microbatch_size,
            "parallelism.pipeline_parallel_microbatch_size",
        )
        if size > 1:
            yield "batch", {key: 1}
        return
    batch = {"training.global_batch_size": global_batch_size(config, degrees.data_parallel)}
    smaller = [size for size in range(1, local) if local % size == 0]
    for size in sorted({smaller[0], smaller[-1]} if smaller else ()):
        yield "batch", {"training.local_batch_size": size, **batch}


def _other_meshes(config: JobConfig, degrees: Degrees, shortage: Shortage) -> Iterator[Knob]:
    """Yield meshes with more shards of the model or of the sequence, on the same and on twice as many devices. On the
    CPU, only on the same: more processes would share the same memory."""
    world, replicas, shards = shortage.world_size, degrees.data_parallel_replicate, degrees.data_parallel_shard
    p = "parallelism."
    batch = {"training.global_batch_size": global_batch_size(config, degrees.data_parallel)}
    if replicas > 1:
        change = {f"{p}data_parallel_replicate_degree": 1, f"{p}data_parallel_shard_degree": replicas * shards}
        yield Knob("mesh", change, world)
    context = {f"{p}context_parallel_degree": 2 * degrees.context_parallel}
    if shards % 2 == 0:
        yield Knob("mesh", {**context, f"{p}data_parallel_shard_degree": shards // 2, **batch}, world)
    if shortage.device == "cuda":
        yield Knob("mesh", {**context, f"{p}data_parallel_shard_degree": shards, **batch}, 2 * world)
        local = config.training.local_batch_size
        more = {f"{p}data_parallel_shard_degree": 2 * shards, **batch}
        if batch["training.global_batch_size"] % (2 * degrees.data_parallel * local) == 0:
            yield Knob("mesh", more, 2 * world)
        elif local % 2 == 0:
            yield Knob("mesh", {**more, "training.local_batch_size": local // 2}, 2 * world)


@dataclass(frozen=True)
class Need:
    """The estimated peak memory of a configuration, and the part that could be in host memory instead, in bytes."""

    peak: int
    movable: int


def need(config: JobConfig, world_size: int, vocab_size: int) -> Need:
    """Estimate the largest peak of a rank. CPU offload, which is not modelled, is subtracted.

    Raises:
        ConfigError: the configuration is not possible.
    """
    modelled, offload = copy.deepcopy(config), config.training.enable_cpu_offload
    modelled.training.enable_cpu_offload = False
    result: Estimate = estimate(modelled, world_size, vocab_size)
    largest = max(result.ranks, key=lambda rank: rank.peak)
    return Need(largest.peak - largest.movable, 0) if offload else Need(largest.peak, largest.movable)


@dataclass
class Advice:
    """Estimated peaks in bytes.

    Attributes:
        now: the need of the unchanged configuration.
        alone: each knob that saves memory, with its peak; the best first.
        together: the best knobs that can be combined on the same devices, with their peak; None if there are not two.
        missing: knobs whose estimates were not ready in time.
    """

    now: Need
    alone: list[tuple[Knob, int]]
    together: tuple[Knob, int] | None
    missing: list[Knob]


class Anchor:
    """Turns estimates into what ``titanlite plan`` says the allocator reserves, on devices that it knows. A change that
    its memory model does not see, such as that of an optimizer's implementation, counts as the estimates do, in
    proportion; together with one that it sees, it counts as nothing.

    Attributes:
        now: the peak of the unchanged configuration, in bytes.
    """

    def __init__(self, config: JobConfig, shortage: Shortage, vocab_size: int, estimated: int) -> None:
        self._config, self._vocab_size, self._estimated = config, vocab_size, estimated
        known = device_called(shortage.device_name) is not None
        self._planned = reserved_peak(config, shortage.world_size, vocab_size) if known else None
        self.now = estimated if self._planned is None else self._planned

    def peak(self, knob: Knob, estimated: int) -> int:
        """Return the peak with a change, in bytes.

        Raises:
            ConfigError: the change is not possible.
        """
        if self._planned is None:
            return estimated
        planned = reserved_peak(knob.apply(self._config), knob.world_size, self._vocab_size)
        if planned is not None and planned != self._planned:
            return planned
        return round(estimated * self._planned / self._estimated)


def find_advice(config: JobConfig, shortage: Shortage, vocab_size: int, time_limit: float = TIME_LIMIT) -> Advice:
    """Estimate all knobs, in as many processes as there are processors.

    Raises:
        ConfigError, TimeoutError: there is no estimate of the unchanged configuration.
    """
    deadline = time.monotonic() + time_limit
    candidates = knobs(config, shortage)
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ProcessPoolExecutor(min(workers, len(candidates) + 1), multiprocessing.get_context(START_METHOD))

    def begin(knob: Knob) -> Future[Need]:
        return pool.submit(need, knob.apply(config), knob.world_size, vocab_size)

    def remaining() -> float:
        return max(0.0, deadline - time.monotonic())

    try:
        first, futures = begin(Knob("", {}, shortage.world_size)), [begin(knob) for knob in candidates]
        now = first.result(remaining())
        anchor = Anchor(config, shortage, vocab_size, now.peak)
        now = Need(anchor.now, now.movable)
        alone, missing = [], []
        for knob, future in zip(candidates, futures, strict=True):
            try:
                alone.append((knob, anchor.peak(knob, future.result(remaining()).peak)))
            except NotInTime:
                missing.append(knob)
            except ConfigError:
                pass  # the knob does not fit this model or its other options
        alone = sorted((pair for pair in alone if now.peak - pair[1] > _NOTICEABLE * now.peak), key=itemgetter(1))
        chosen = _together([knob for knob, _ in alone], shortage.world_size)
        together = None
        while len(chosen) > 1 and together is None:
            changes = {name: value for knob in chosen for name, value in knob.changes.items()}
            merged = Knob("", changes, shortage.world_size)
            try:
                together = merged, anchor.peak(merged, begin(merged).result(remaining()).peak)
            except ConfigError:
                chosen.pop()  # they cannot be combined: drop the knob that saves least
            except NotInTime:
                break
        return Advice(now, alone, together, missing)
    finally:
        for process in [*(pool._processes or {}).values()]:
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)


def _together(best_first: list[Knob], world_size: int) -> list[Knob]:
    """Return the best knob of each group, of those that need no more devices."""
    chosen: dict[str, Knob] = {}
    for knob in best_first:
        if knob.world_size == world_size:
            chosen.setdefault(knob.group, knob)
    return [*chosen.values()]


def describe(advice: Advice, shortage: Shortage) -> str:
    """Format the advice for printing."""
    now, room = advice.now.peak, shortage.room
    # The last allocation did not fit, so there was less room than the estimate without it.
    limit = None if room is None else min(room, now - shortage.requested)

    def row(peak: int, options: str) -> str:
        verdict = "" if limit is None else "enough  " if peak <= limit else "        "
        return f"    {peak / GIB:9.3f}  {(now - peak) / GIB:9.3f}  {verdict}{options}"

    available = "" if room is None else f", and there were about {room / GIB:.3f} GiB for tensors"
    lines = [f"titanlite: a step of this configuration holds an estimated {now / GIB:.3f} GiB at its peak{available}."]
    if room is not None and now <= room:
        lines.append(
            "What estimates leave out did not fit: fragmentation, what libraries allocate, what others on the device "
            "or machine have taken."
        )
    grows = "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")  # as the launcher sets it
    if shortage.unused >= max(shortage.requested, 1) and not grows:
        lines.append(
            f"{shortage.unused / GIB:.3f} GiB were reserved, but in pieces too small: with "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True they might have done."
        )
    if advice.alone:
        lines += ["What is not on yet, and takes less:", "    takes GiB  saves GiB"]
        lines += (row(peak, knob.shown(shortage)) for knob, peak in advice.alone)
    else:
        lines.append("No option that is not on yet takes less.")
    if advice.together is not None:
        knob, peak = advice.together
        lines.append(row(peak, f"together: {knob.shown(shortage)}"))
    if advice.missing:
        late = "; ".join(knob.shown(shortage) for knob in advice.missing)
        lines.append(f"Not estimated within {TIME_LIMIT} s: {late}")
    same_devices = [peak for knob, peak in advice.alone if knob.world_size == shortage.world_size]
    least = min([now, *same_devices, *([advice.together[1]] if advice.together else [])])
    if limit is not None and least > limit and not advice.missing:
        subject = "Even all that go together" if same_devices else "That"
        lines.append(
            f"{subject} would not have been enough on {shortage.world_size} of these devices: use more of them, a "
            "shorter training.seq_len, or a smaller model.flavor."
        )
    return "\n".join(lines)


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    shortage = Shortage(**json.loads(Path(sys.argv[1]).read_text()))
    print("titanlite: estimating what would have saved it ...", file=sys.stderr, flush=True)
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
            file.write(shortage.config)
            file.flush()
            config = load_config([], file.name)
        saved = Path(config.job.dump_folder).expanduser() / TOKENIZER
        tokenizer = config.model.tokenizer_path or (str(saved) if saved.is_dir() else "")
        advice = find_advice(config, shortage, load_tokenizer(tokenizer).vocab_size)
    except NotInTime:
        print("titanlite: there is no estimate of it: it takes too long", file=sys.stderr)
        return 1
    except Exception as e:  # any error: the run has already reported its end, and advice is optional
        print(f"titanlite: there is no estimate of it: {type(e).__name__}: {e}", file=sys.stderr)
        return 1
    print(describe(advice, shortage), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
