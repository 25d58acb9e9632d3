"""What the trainer adds to a step: its whole loop against a bare one, in turn, in one process.

    python scripts/benchmarks/trainer_overhead.py --output docs/benchmarks/trainer_overhead.json

The trainer's step is all of it: data, schedule, logging to the console, metrics.jsonl and TensorBoard, the watch on the
loss, garbage collection, the agreement to stop. The bare loop has the same model, wrapped by FSDP2 in the same way, and
one batch that it reuses: forward, loss, backward, clip, optimizer, nothing else. Blocks of steps alternate; the ratio
is the median over pairs of neighbouring blocks.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import results
import torch
from torch import nn

from titanlite.config import load_config
from titanlite.data import Batch
from titanlite.distributed.init import WeightInit
from titanlite.distributed.parallelize import parallelize
from titanlite.distributed.runtime import stop_runtime
from titanlite.optim import build_optimizer, cross_entropy_loss
from titanlite.train import Trainer

ROOT = Path(__file__).parents[2]


def bare_step(trainer: Trainer, batch: Batch) -> Callable[[], None]:
    """A training loop's step, and no more, on a second copy of the trainer's model."""
    config, device = trainer.config, trainer.runtime.device
    args = trainer.spec.configure(trainer.flavor, trainer.tokenizer.vocab_size, config.training.seq_len)
    with torch.device("meta"):
        model = trainer.spec.build(args)
    parallelize(model, trainer.spec.layout, trainer.mesh, config)
    model.to_empty(device=device)
    model.init_weights(WeightInit(model, trainer.seed))  # type: ignore[operator]
    optimizer = build_optimizer(model.parameters(), copy.deepcopy(config.optimizer))
    inputs, labels = batch.inputs[0].to(device), batch.labels[0].to(device)

    def step() -> None:
        (cross_entropy_loss(model(inputs), labels) / labels.numel()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.training.max_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(step: Callable[[], object], count: int) -> float:
    """Seconds per step over ``count`` steps."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15, help="pairs of blocks")
    parser.add_argument("--block", type=int, default=10, help="steps in a block; a multiple of the log's 10")
    parser.add_argument("--output", type=Path, help="write the results here (docs/benchmarks/trainer_overhead.json)")
    args, options = parser.parse_known_args()
    # The log goes where a user's does not slow the loop either: to a file.
    with tempfile.TemporaryDirectory() as folder, open(os.path.join(folder, "log"), "w") as log:
        given = [f"--job.dump_folder={folder}/run", "--training.steps=1000000", *options]
        trainer = Trainer(load_config(given, str(ROOT / "train_configs" / "debug_model.toml")))
        for handler in logging.getLogger().handlers:
            assert isinstance(handler, logging.StreamHandler)
            handler.setStream(log)
        bare = bare_step(trainer, next(trainer.loader))
        timed(trainer.advance, args.block), timed(bare, args.block)  # warm-up
        pairs = []
        for i in range(args.pairs):
            order = [trainer.advance, bare] if i % 2 == 0 else [bare, trainer.advance]
            seconds = {step: timed(step, args.block) for step in order}
            pairs.append((seconds[trainer.advance], seconds[bare]))
        config = trainer.config
        trainer.close()
        stop_runtime()
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"trainer {ours * 1e3:.1f} ms, bare loop {theirs * 1e3:.1f} ms per step; median ratio {ratio:.4f}")
    if args.output:
        shape = {
            "config": "bf16",
            "batch": config.training.local_batch_size,
            "seq_len": config.training.seq_len,
            "compile": config.training.compile,
        }
        tokens = config.training.local_batch_size * config.training.seq_len
        rows = [
            {"system": "titanlite", **shape, "tps": tokens / ours, "step_ms": ours * 1e3, "ratio_to_bare_loop": ratio},
            {"system": "bare loop", **shape, "tps": tokens / theirs, "step_ms": theirs * 1e3},
        ]
        results.write("trainer_overhead", rows, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
