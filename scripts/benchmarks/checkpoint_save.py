"""What a checkpoint costs training: saves that training waits for, against saves in the background.

    python scripts/benchmarks/checkpoint_save.py --output docs/benchmarks/checkpoint_save.json

Blocks of steps of one trainer alternate: without a save, with one that it waits for, with one in the background, which
ends within its block. The delay of a save is its block's time less that of the block without in the same round; the
figures are medians over the rounds. Options of the trainer may follow.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import results
import torch

from titanlite.checkpoint.state import local_bytes, model_state, optimizer_state
from titanlite.config import load_config
from titanlite.distributed.runtime import stop_runtime
from titanlite.train import Trainer

ROOT = Path(__file__).parents[2]
HOW = ("none", "waited for", "background")


def block(trainer: Trainer, steps: int, how: str) -> tuple[float, float]:
    """Seconds of ``steps`` steps, the first of them followed by a save; and how long that call alone took."""
    synchronize()
    start, call = time.perf_counter(), 0.0
    for i in range(steps):
        trainer.advance()
        if i == 0 and how != "none":
            before = time.perf_counter()
            trainer._save(ends=how == "waited for")
            call = time.perf_counter() - before
    synchronize()
    took = time.perf_counter() - start
    waited = time.perf_counter()
    trainer.checkpoints.wait()
    if time.perf_counter() - waited > 0.01:
        raise SystemExit("the save in the background took longer than its block: raise --block")
    return took, call


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--block", type=int, default=12, help="steps in a block")
    parser.add_argument("--output", type=Path, help="write the results here (docs/benchmarks/checkpoint_save.json)")
    args, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory(dir=".") as folder, open(os.path.join(folder, "log"), "w") as log:
        given = ["--checkpoint.enable_checkpoint", "--checkpoint.async_mode=async_with_pinned_mem"]
        given += ["--checkpoint.interval=1000000", "--checkpoint.keep_latest_k=1", "--training.steps=1000000"]
        given += [f"--job.dump_folder={folder}/run", *options]
        trainer = Trainer(load_config(given, str(ROOT / "train_configs" / "debug_model.toml")))
        for handler in logging.getLogger().handlers:
            assert isinstance(handler, logging.StreamHandler)
            handler.setStream(log)
        for how in HOW:  # warm-up: the buffers of the copy are made once
            block(trainer, args.block, how)
        times: dict[str, list[tuple[float, float]]] = {how: [] for how in HOW}
        for i in range(args.rounds):
            for how in HOW[i % 3 :] + HOW[: i % 3]:
                times[how].append(block(trainer, args.block, how))
        state = model_state(trainer.model_parts) | optimizer_state(trainer.optimizer, trainer.model_parts)
        size = local_bytes(state)
        trainer.close()
        stop_runtime()
    rows: list[dict[str, Any]] = []
    for how in HOW[1:]:
        delay = statistics.median(t - none for (t, _), (none, _) in zip(times[how], times["none"], strict=True))
        call = statistics.median(call for _, call in times[how])
        rows.append({"system": "titanlite", "config": how, "delay_s": delay, "call_s": call, "bytes": size})
    for row in rows:
        row["delay_pct_of_waited_for"] = 100 * row["delay_s"] / rows[0]["delay_s"]
        print(
            f"{row['config']}: training is delayed by {row['delay_s'] * 1e3:.0f} ms "
            f"({row['delay_pct_of_waited_for']:.1f}% of a save that it waits for), the call takes "
            f"{row['call_s'] * 1e3:.1f} ms, {size / 1e6:.0f} MB"
        )
    step = statistics.median(t for t, _ in times["none"]) / args.block
    if args.output:
        results.write("checkpoint_save", [{**row, "step_s": step, "block": args.block} for row in rows], args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
