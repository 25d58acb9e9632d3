"""The cost of a checkpoint to training: saves that training waits for, against saves in the background.

    python scripts/benchmarks/checkpoint_save.py --output docs/benchmarks/checkpoint_save.json

Blocks of steps of one trainer alternate: without a save, with one that it waits for, with one in the background, which
ends within its block, and with another process that copies, hashes and writes as many bytes. The delay is the block's
time less that of the block without in the same round. Part of it is that trainer and save share memory and processors:
the thread that trains takes more processor time for the same steps. The last kind shows what that alone costs, where no
code of the save runs in the trainer's process. The rest of a delay is time in which the thread waits. What a save holds
up is timed, too: the call, and what the optimizer waits for the copy. The figures are medians over the rounds.
Options of the trainer may follow.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import results
from loops import quiet_trainer

from titanlite.checkpoint import CheckpointManager
from titanlite.checkpoint.state import local_bytes, model_state, optimizer_state
from titanlite.models.layers import DecoderArgs
from titanlite.models.llama3.spec import FLAVORS
from titanlite.train import Trainer

# Tensors of 1 to 11 MB: what a save costs beyond its bytes, it costs for each tensor.
FLAVORS["bench"] = DecoderArgs(dim=1024, n_layers=6, n_heads=16, n_kv_heads=8, ffn_dim=2816, vocab_size=0)
KINDS = ("none", "waited for", "background", "another process")
WRITING = """
import hashlib, os, sys
size, place = int(sys.argv[1]), sys.argv[2]
random = os.urandom(1 << 20)  # memory that was never written is one page of zeros, which a cache holds
state = memoryview(random * (size // len(random) + 1))[:size]
copied = memoryview(bytearray(state))
for _ in sys.stdin:
    copied[:] = state
    digest = hashlib.sha256()
    with open(place, "wb", buffering=0) as file:
        for begin in range(0, size, 1 << 18):
            part = copied[begin : begin + (1 << 18)]
            digest.update(part)
            file.write(part)
        os.fsync(file.fileno())
    os.remove(place)
"""


class TimedCheckpoints(CheckpointManager):
    """Adds up the seconds that training waits for saves, and for their copies before an update."""

    held = 0.0

    def before_update(self) -> None:
        self.hold(super().before_update)

    def hold(self, call: Callable[[], None]) -> None:
        start = time.perf_counter()
        call()
        self.held += time.perf_counter() - start


class Bench:
    """One trainer with a state of ``size`` bytes, and a process that copies, hashes and writes as many when told to."""

    def __init__(self, trainer: Trainer, steps: int) -> None:
        self.trainer, self.steps = trainer, steps
        given, root = trainer.config, trainer.checkpoints.root
        trainer.checkpoints.close()
        timeout = given.comm.init_timeout_seconds
        self.checkpoints = TimedCheckpoints(given.checkpoint, root, trainer.runtime.device, timeout)
        trainer.checkpoints = self.checkpoints
        for kind in ("none", "waited for", "background"):  # moments, and the buffers of the copy, are made once
            self.block(kind)
        self.size = local_bytes(
            model_state(trainer.model_parts) | optimizer_state(trainer.optimizer, trainer.model_parts)
        )
        command = [sys.executable, "-c", WRITING, str(self.size), str(root.parent / "written")]
        self.other = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        self.block("another process")

    def block(self, kind: str) -> tuple[float, float, float]:
        """Seconds of the steps, the first of them followed by a save; for how long that held them up; and how much of
        the seconds the thread that trains was not on a processor."""
        harness.synchronize()
        start, started, self.checkpoints.held = time.perf_counter(), time.thread_time(), 0.0
        for i in range(self.steps):
            self.trainer.advance()
            if i == 0 and kind in ("waited for", "background"):
                self.checkpoints.hold(lambda: self.trainer._save(ends=kind == "waited for"))
            elif i == 0 and kind != "none":
                print(file=self.other.stdin, flush=True)
        harness.synchronize()
        took = time.perf_counter() - start
        idle = took - (time.thread_time() - started)
        waited = time.perf_counter()
        self.trainer.checkpoints.wait()
        if time.perf_counter() - waited > 0.01:
            raise SystemExit("the save in the background took longer than its block: raise --block")
        return took, self.checkpoints.held, idle

    def close(self) -> None:
        self.other.communicate()


def outputs() -> Path:
    """On the disk that checkpoints are written to, where nothing lies in the way."""
    folder = harness.ROOT / "outputs"
    folder.mkdir(exist_ok=True)
    return folder


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=27)
    parser.add_argument("--block", type=int, default=8, help="steps in a block")
    args, options = parser.parse_known_args()
    given = ["--model.flavor=bench", "--training.seq_len=64", "--training.local_batch_size=1"]
    given += ["--checkpoint.enable_checkpoint", "--checkpoint.async_mode=async_with_pinned_mem"]
    given += ["--checkpoint.interval=1000000", "--checkpoint.keep_latest_k=1", *options]
    with quiet_trainer(given, outputs()) as trainer:
        bench = Bench(trainer, args.block)
        times: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in KINDS}
        for i in range(args.rounds):
            for kind in KINDS[i % len(KINDS) :] + KINDS[: i % len(KINDS)]:
                times[kind].append(bench.block(kind))
        bench.close()
    rows: list[dict[str, Any]] = []
    for kind in KINDS[1:]:
        pairs = [*zip(times[kind], times["none"], strict=True)]
        row = {
            "delay_s": statistics.median(block[0] - none[0] for block, none in pairs),
            "wait_s": statistics.median(block[2] - none[2] for block, none in pairs),
            "held_s": statistics.median(held for _, held, _ in times[kind]),
        }
        rows.append({"system": "titanlite", "config": kind, **row, "bytes": bench.size})
    for row in rows:
        row["delay_pct"] = 100 * row["delay_s"] / rows[0]["delay_s"]
        row["wait_pct"] = 100 * row["wait_s"] / rows[0]["delay_s"]
        row["held_pct"] = 100 * row["held_s"] / rows[0]["held_s"]
        print(
            f"{row['config']}: training is delayed by {row['delay_s'] * 1e3:.0f} ms "
            f"({row['delay_pct']:.1f}% of a save that it waits for), "
            f"{row['wait_s'] * 1e3:.0f} ms ({row['wait_pct']:.1f}%) "
            f"of it in waits; a save holds it up for {row['held_s'] * 1e3:.1f} ms ({row['held_pct']:.1f}%); "
            f"{bench.size / 1e6:.0f} MB"
        )
    step = statistics.median(t for t, *_ in times["none"]) / args.block
    results.save("checkpoint_save", [{**row, "step_s": step, "block": args.block} for row in rows], args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
