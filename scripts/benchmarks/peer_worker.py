"""One case of peers.py, in a process of its own: ``peer_worker.py SYSTEM RESULT OPTION...`` trains SYSTEM (titanlite or
torchtitan) with options of titanlite's command, and writes what it measured to the file RESULT.

Both systems get the same token ids, made beforehand: skewed, so that there is something to learn, and in page-locked
memory. Of titanlite a step is all of ``Trainer.train_step``: its schedule, its watch on bad steps, its counters.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titanlite.config import JobConfig, import_module, load_config
from titanlite.data import Batch
from titanlite.metrics.device import GIB, device_name, peak_flops, peak_memory
from titanlite.metrics.flops import flops_per_token
from titanlite.models.spec import get_model_spec

COMPARED = 5  # first steps, which warm up, and whose losses and norms are kept: later ones drift apart by rounding
Step = Callable[[], tuple[Tensor, Tensor]]  # the loss and the gradients' norm, on the device


class Batches(Iterator[Batch]):
    """The same few batches, over and over; each [1, batch, seq_len]."""

    def __init__(self, config: JobConfig, vocab_size: int, pin: bool, different: int = 8) -> None:
        shape = (different, config.training.local_batch_size, config.training.seq_len + 1)
        generator = torch.Generator().manual_seed(0)
        # Small ids are frequent, as in a tokenizer that was trained on text.
        ids = (torch.rand(shape, generator=generator, dtype=torch.float64) ** 4 * vocab_size).long()
        inputs, labels = ids[..., :-1].contiguous(), ids[..., 1:].contiguous()
        if pin:
            inputs, labels = inputs.pin_memory(), labels.pin_memory()
        self._batches = [Batch(inputs[i : i + 1], labels[i : i + 1]) for i in range(different)]
        self._given = 0

    def __next__(self) -> Batch:
        self._given += 1
        return self._batches[(self._given - 1) % len(self._batches)]


def titanlite_step(config: JobConfig) -> tuple[Step, int]:
    from titanlite.train import Trainer
    from titanlite.training.step_guard import StepRecord

    trainer = Trainer(config)
    pin = trainer.runtime.device.type == "cuda"
    trainer.loader = Batches(config, trainer.model_args.vocab_size, pin)  # type: ignore[assignment]
    norm = StepRecord._fields.index("grad_norm")

    def step() -> tuple[Tensor, Tensor]:
        trainer.step += 1
        loss, record, _ = trainer.train_step()
        return loss, record[norm]

    return step, trainer.flops_per_token


def torchtitan_step(config: JobConfig) -> tuple[Step, int]:
    from peer_torchtitan import build

    import_module(config.experimental.custom_import, "experimental.custom_import", "peers.py")
    spec = get_model_spec(config.model.name)
    args = spec.configure(spec.flavor(config.model.flavor), 1, config.training.seq_len)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peer = build(config, args, device)
    batches = Batches(config, args.vocab_size, pin=device.type == "cuda")

    def step() -> tuple[Tensor, Tensor]:
        batch = next(batches)
        return peer(batch.inputs[0], batch.labels[0])

    with torch.device("meta"):
        size = spec.build(args).size()  # type: ignore[operator]
    return step, flops_per_token(size, config.training.seq_len)


def timed(step: Step, warmup: int, count: int) -> tuple[list[float], list[tuple[Tensor, Tensor]]]:
    """Seconds of each of ``count`` steps after ``warmup`` others, and what the first ones returned. Nothing waits for
    the device in between."""
    cuda = torch.cuda.is_available()
    first = [step() for _ in range(warmup)]
    marks: list[Any] = []

    def mark() -> None:
        if cuda:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    mark()
    for _ in range(count):
        step()
        mark()
    if cuda:
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)], first
    return [b - a for a, b in itertools.pairwise(marks)], first


def main() -> int:
    system, result, *options = sys.argv[1:]
    config = load_config(options, None)
    begin = time.perf_counter()
    step, flops = {"titanlite": titanlite_step, "torchtitan": torchtitan_step}[system](config)
    built = time.perf_counter()
    seconds, first = timed(step, COMPARED, config.training.steps - COMPARED)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tps = config.training.local_batch_size * config.training.seq_len / statistics.median(seconds)
    peak = peak_flops(device_name(device))
    measured = {
        "tps": tps,
        "mfu_pct": None if peak is None else 100 * tps * flops / peak,
        "step_time_s": statistics.median(seconds),
        "peak_memory_gib": peak_memory(device).active / GIB,
        "losses": [float(loss) for loss, _ in first],
        "grad_norms": [float(norm) for _, norm in first],
        "step_times_s": seconds,
        "build_s": built - begin,
        "all_s": time.perf_counter() - begin,
    }
    Path(result).write_text(json.dumps(measured), encoding="utf-8")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
