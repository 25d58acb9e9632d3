"""The trainer's step on the CPU against a plain PyTorch loop over transformers' Llama, in turn, in one process.

    python scripts/benchmarks/cpu_step.py --output docs/benchmarks/cpu_step.json

Both have the same shape (the debug model's), weights, batches, AdamW (fused), learning rates and clipping. The
trainer's step is all of it: data, schedule, logging (once a block), metrics.jsonl, TensorBoard, the watch on the loss.
The loop has its batches beforehand, and no more than forward, loss, backward, clip and optimizer; bf16 is autocast over
float32 weights there, and compiled it is one graph of model and loss. Blocks of steps alternate; the ratio is the
median over pairs of neighbouring blocks, below 1 where titanlite is faster. The losses of the first steps are compared
before anything is timed. Options of the trainer may follow.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks

import harness
import results
import torch
import torch.nn.functional as F
import transformers
from loops import BareLoop, quiet_trainer, rows_of
from torch import Tensor, nn

from titanlite.data import Batch
from titanlite.train import Trainer

DTYPES = {"bf16": "bfloat16", "float32": "float32"}
# Of the losses, relative. Roundings differ: in bf16 the loop's residual stream, norms and rotary embedding are in other
# precisions than ours.
TOLERANCES = {"bf16": 5e-3, "float32": 1e-5}


class PlainLoop(BareLoop):
    """Training as one writes it over ``transformers``, from the weights and batches that ``trainer`` begins with.

    Attributes:
        fullgraph: compiled, model and loss are one graph.
        weights: their dtype.
    """

    fullgraph = True
    weights = "float32"

    def __init__(self, trainer: Trainer, batches: list[Batch], autocast: bool) -> None:
        self.trainer, self.step, self.autocast = trainer, 0, autocast
        self.mean_loss: Callable[[Tensor, Tensor], Tensor] = self.loss
        if trainer.config.training.compile:
            self.mean_loss = torch.compile(self.loss, fullgraph=self.fullgraph)
        pairs = [(batch.inputs[0], batch.labels[0]) for batch in batches]
        super().__init__(self.same_model(trainer), self.cast_loss, pairs, trainer)

    def same_model(self, trainer: Trainer) -> nn.Module:
        return same_model(trainer)

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        logits = self.model(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(0, 1))

    def cast_loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.mean_loss(inputs, labels)

    def set_learning_rate(self) -> None:
        self.step += 1
        self.trainer.schedule.apply(self.optimizer, self.step)


def same_model(trainer: Trainer) -> nn.Module:
    """``transformers``' model of the trainer's shape, with its weights."""
    (ours,), hugging_face = trainer.model_parts, trainer.spec.hugging_face
    assert hugging_face is not None
    config = transformers.LlamaConfig(**hugging_face.to_config(trainer.model_args))
    config._attn_implementation = "sdpa"
    model: nn.Module = transformers.LlamaForCausalLM(config)
    places = hugging_face.weights(trainer.model_args)
    weights = {str(places[name]): param.full_tensor() for name, param in ours.named_parameters()}  # type: ignore[attr-defined]
    model.load_state_dict(weights)
    return model.train()


def first_batches(trainer: Trainer, count: int) -> list[Batch]:
    """Those that the trainer will take, too."""
    state = trainer.loader.state_dict()
    batches = [next(trainer.loader) for _ in range(count)]
    trainer.loader.load_state_dict(state)
    return batches


def compare(trainer: Trainer, plain: PlainLoop, steps: int, tolerance: float) -> dict[str, Any]:
    """Take the first steps of both, which warms up, too.

    Raises:
        SystemExit: a loss differs by more than ``tolerance``: they do not train the same model.
    """
    losses = []
    for _ in range(steps):
        trainer.advance()
        assert trainer.loss_watch.latest is not None
        losses.append((trainer.loss_watch.latest.loss, plain.advance().item()))
    difference = max(abs(ours - theirs) / theirs for ours, theirs in losses)
    if not difference <= tolerance:
        raise SystemExit(f"the losses of the first steps differ by {difference:.1e}, more than {tolerance}: {losses}")
    return {"first_loss": losses[0], "loss_difference": difference}


def run_case(
    precision: str, compiled: bool, args: argparse.Namespace, options: list[str], loop: type[PlainLoop]
) -> list[dict[str, Any]]:
    """The result of both systems in one precision, eager or compiled."""
    given = [f"--metrics.log_freq={args.block}", f"--training.mixed_precision_param={DTYPES[precision]}"]
    with quiet_trainer([*given, f"--training.compile={compiled}".lower(), *options]) as trainer:
        plain = loop(trainer, first_batches(trainer, args.batches), autocast=precision == "bf16")
        same = compare(trainer, plain, min(3, args.batches), TOLERANCES[precision])
        pairs = harness.time_in_pairs(trainer.advance, plain.advance, args.pairs, args.block)
    ratios = [ours / theirs for ours, theirs in pairs]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    rows = rows_of(pairs, trainer, precision, "transformers")
    for row, loss in zip(rows, same["first_loss"], strict=True):
        row |= {"first_loss": loss, "transformers": transformers.__version__}
    rows[1]["weights"] = loop.weights
    rows[0] |= {"ratio_quartiles": [low, high], "loss_difference": same["loss_difference"]}
    return rows


def main(
    name: str = "cpu_step",
    doc: str | None = __doc__,
    loops: Sequence[type[PlainLoop]] = (PlainLoop,),
    precisions: Sequence[str] = tuple(DTYPES),
    model: Sequence[str] = (),
) -> int:
    """Measure against each of ``loops``, print and write the result ``name``. ``model`` are options of the trainer
    before those of the user."""
    parser = harness.parser(doc)
    parser.add_argument("--pairs", type=int, default=15, help="pairs of blocks")
    parser.add_argument("--block", type=int, default=3, help="steps in a block")
    parser.add_argument("--batches", type=int, default=50, help="batches that the plain loop goes round in")
    parser.add_argument("--precision", choices=DTYPES, nargs="+", default=[*precisions])
    parser.add_argument("--mode", choices=("eager", "compile"), nargs="+", default=["eager", "compile"])
    args, options = parser.parse_known_args()
    rows: list[dict[str, Any]] = []
    for mode in args.mode:
        for precision, loop in product(args.precision, loops):
            ours, theirs = run_case(precision, mode == "compile", args, [*model, *options], loop)
            low, high = ours["ratio_quartiles"]
            print(
                f"{precision:8} {mode:8} titanlite {ours['step_ms']:6.1f} ms, transformers {theirs['step_ms']:6.1f} ms "
                f"per step (its weights in {loop.weights}); median ratio {ours['ratio_to_transformers']:.3f} "
                f"({low:.3f} to {high:.3f}), first losses {ours['first_loss']:.5f} and {theirs['first_loss']:.5f}",
                flush=True,
            )
            rows += [ours, theirs]
    results.save(name, rows, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
