"""The time that the trainer adds to a step: its whole loop against a bare one, in turn, in one process.

    python scripts/benchmarks/trainer_overhead.py --output docs/benchmarks/trainer_overhead.json

The trainer's step is all of it: data, schedule, logging to the console, metrics.jsonl and TensorBoard, the watch on the
loss, garbage collection, the agreement to stop. The bare loop has the same model, wrapped by FSDP2 in the same way, and
one batch that it reuses: forward, loss, backward, clip, optimizer, nothing else. Blocks of steps alternate; the ratio
is the median over pairs of neighbouring blocks.
"""

from __future__ import annotations

import sys

import harness
import results
import torch
from loops import BareLoop, quiet_trainer, rows_of
from torch import Tensor

from titanlite.distributed.init import WeightInit
from titanlite.distributed.parallelize import parallelize
from titanlite.optim import cross_entropy_loss
from titanlite.train import Trainer


def bare_loop(trainer: Trainer) -> BareLoop:
    """On a second copy of the trainer's model, and its first batch."""
    config, device = trainer.config, trainer.runtime.device
    args = trainer.model_args
    with torch.device("meta"):
        model = trainer.spec.build(args)
    parallelize(model, trainer.spec.layout, trainer.mesh, config)
    model.to_empty(device=device)
    model.init_weights(WeightInit(model, trainer.seed))  # type: ignore[operator]

    def mean_loss(inputs: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy_loss(model(inputs), labels) / labels.numel()

    batch = next(trainer.loader)
    return BareLoop(model, mean_loss, [(batch.inputs[0].to(device), batch.labels[0].to(device))], trainer, foreach=True)


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--pairs", type=int, default=15, help="pairs of blocks")
    parser.add_argument("--block", type=int, default=10, help="steps in a block; a multiple of the log's 10")
    args, options = parser.parse_known_args()
    with quiet_trainer(options) as trainer:
        pairs = harness.time_in_pairs(trainer.advance, bare_loop(trainer).advance, args.pairs, args.block)
    rows = rows_of(pairs, trainer, "bf16", "bare loop")
    times = "trainer {:.1f} ms, bare loop {:.1f} ms per step".format(*(row["step_ms"] for row in rows))
    print(f"{times}; median ratio {rows[0]['ratio_to_bare_loop']:.4f}")
    results.save("trainer_overhead", rows, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
