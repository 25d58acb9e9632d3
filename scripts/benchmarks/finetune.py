"""Measure fine-tuning: a model of 20M parameters that is pre-trained and then fine-tuned here, in bf16 and in float8.

    OMP_NUM_THREADS=1 python scripts/benchmarks/finetune.py --output docs/benchmarks/finetune.json

instruction_set.py makes the data from the standard library of this Python. The trainer pre-trains the flavor 20M on
text without the held-out functions. From that checkpoint it fine-tunes on the instructions in bf16, in float8, and, as
a control, in bf16 on the same questions with shuffled answers, each with every seed. Of each model are computed the
loss of the held-out answers (with EOS, as in training), and the accuracy of `titanlite evaluate --tasks` in choices
between four endings, where chance is 25%. The status is 1 if a line of what is to hold does not.

The folder of --work keeps what is done: the same command goes on after an interruption. Other options go to the
trainer, for all runs.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import instruction_set
import results
from loss_parity import paired_difference

from titanlite.config.data_sections import Data
from titanlite.data.encode_instruct import InstructEncoder
from titanlite.inference.evaluate import evaluate
from titanlite.inference.load import opened
from titanlite.inference.score import Scored, Scorer

FLOAT8 = ["--model.converters=float8", "--float8.recipe_name=rowwise", "--float8.filter_fqns=output"]
# By name: the trainer's options, and whether the answers are shuffled.
CONFIGS: dict[str, tuple[list[str], bool]] = {"bf16": ([], False), "rowwise": (FLOAT8, False), "shuffled": ([], True)}
PRETRAINED = "pretrained"
CHANCE = 1 / instruction_set.ENDINGS
LEAST_PCT = 15.0  # by which fine-tuning is to lower the loss of held-out answers


def train(folder: Path, steps: int, lr: float, options: Sequence[str]) -> list[float]:
    """Train into ``folder``, or go on there; return the loss of every step."""
    given = ["--model.name=llama", "--model.flavor=20M", "--metrics.log_freq=1", "--metrics.enable_tensorboard=false"]
    given += ["--training.local_batch_size=4", "--lr_scheduler.warmup_steps=10", "--sample.enable=false"]
    given += [f"--training.steps={steps}", f"--optimizer.lr={lr}", "--checkpoint.enable_checkpoint"]
    config_file = harness.ROOT / "train_configs" / "debug_model.toml"
    where = [f"--job.config_file={config_file}", f"--job.dump_folder={folder}"]
    child = harness.run([sys.executable, "-m", "titanlite.train", *where, *given, *options], None)
    if child.status != 0:
        raise RuntimeError(f"{folder}: {child.why()}")
    return [row["loss"] for row in harness.metrics_of(folder)]


def answer_loss(checkpoint: Path, data: Path) -> float:
    """The mean loss of the answers in ``data``, as ``training.dataset = "instruct"`` scores them, in nats per token."""
    lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    with opened(str(checkpoint), "float32") as (loaded, _, process):
        encoder = InstructEncoder(loaded.tokenizer, Data())
        groups = []
        for tokens, scored in map(encoder.encode, lines):
            assert scored is not None
            groups.append((Scored(tokens, int(scored.argmax())),))
        scorer = Scorer(loaded.model, loaded.tokenizer.vocab_size, process)
        total = sum(score for window in scorer.scores(groups) for (score,) in window)
    return -total / sum(len(group[0].tokens) - group[0].first for group in groups)


class Work:
    """The folder of --work: the data, the pre-trained model, and ``measured.json`` with what each model has shown."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self._file = folder, folder / "measured.json"
        self.measured: dict[str, dict[str, Any]] = {}
        if self._file.exists():
            content = json.loads(self._file.read_text(encoding="utf-8"))
            if content["settings"] != settings:
                raise ValueError(f"{folder} is of runs with {content['settings']}, and these would be with {settings}")
            self.measured = content["measured"]
        self._settings = settings
        folder.mkdir(parents=True, exist_ok=True)
        self._save()

    def measure(self, name: str, run: Path, losses: list[float]) -> None:
        """Evaluate the model of a run, and keep the numbers."""
        choices = evaluate(str(run), tasks=str(self.folder / "choices.jsonl")).choices
        assert choices is not None
        row = {"answer_loss": answer_loss(run, self.folder / "held_out.jsonl"), **choices.values()}
        right = [[int(by_sum), int(by_bytes)] for by_sum, by_bytes in choices.right]
        self.measured[name] = {**row, "truncated": choices.truncated, "losses": losses, "right": right}
        self._save()
        shown = [f"{key} {value:.4g}" for key, value in row.items() if value is not None]
        print(f"{name}: {', '.join(shown)}", flush=True)

    def _save(self) -> None:
        unfinished = self._file.with_suffix(".unfinished")
        content = {"settings": self._settings, "measured": self.measured}
        unfinished.write_text(json.dumps(content), encoding="utf-8")
        unfinished.replace(self._file)


def run_all(work: Work, args: argparse.Namespace, options: list[str]) -> None:
    """Make the data, pre-train, fine-tune and evaluate: whatever of it is not done."""
    made = instruction_set.make(args.parts, args.train, args.held_out)
    instruction_set.write(made, work.folder, args.forms, args.seeds)
    pretrained = work.folder / PRETRAINED
    if PRETRAINED not in work.measured:
        data = ["--training.dataset=json", f"--training.dataset_path={work.folder / 'pretrain.jsonl'}"]
        keep = ["--checkpoint.interval=100", "--checkpoint.keep_latest_k=2"]
        losses = train(pretrained, args.pretrain_steps, args.pretrain_lr, [*data, *keep, *options])
        work.measure(PRETRAINED, pretrained, losses)
    # Seed by seed, so that what an interruption leaves has all configurations.
    for seed in range(1, args.seeds + 1):
        for config, (of_config, is_shuffled) in CONFIGS.items():
            if (name := f"{config} {seed}") in work.measured:
                continue
            data_file = work.folder / (f"shuffled-{seed}.jsonl" if is_shuffled else "train.jsonl")
            data = ["--training.dataset=instruct", f"--training.dataset_path={data_file}", f"--training.seed={seed}"]
            begin = f"--checkpoint.initial_load_path={pretrained / 'checkpoint'}"
            run = work.folder / name.replace(" ", "-")
            shutil.rmtree(run, ignore_errors=True)  # what an interruption left
            given = [*data, begin, "--checkpoint.last_save_model_weights_only", *of_config, *options]
            work.measure(name, run, train(run, args.steps, args.lr, given))
            shutil.rmtree(run)
            results.save("finetune", rows_of(work.measured), args, options=options, python=sys.version.split()[0])


def against(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """The mean difference over the same examples, and its standard error."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def rows_of(measured: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for the pre-trained model, and one for each configuration over its seeds."""
    before = measured[PRETRAINED]
    rows = []
    for config in (PRETRAINED, *CONFIGS):
        models = [model for name, model in measured.items() if name.split()[0] == config]
        if not models:
            continue
        row: dict[str, Any] = {"system": "titanlite", "config": config, "steps": len(models[0]["losses"])}
        row |= {"examples": before["examples"], "truncated": before["truncated"], "chance": CHANCE}
        row["answer_loss"] = [model["answer_loss"] for model in models]
        row["mean_answer_loss"] = statistics.mean(row["answer_loss"])
        if config != PRETRAINED and len(models) > 1:
            mean, half = paired_difference(row["answer_loss"], [before["answer_loss"]] * len(models))
            row |= {"reduction_pct": -mean, "reduction_interval_95_pct": [-mean - half, -mean + half]}
        for column, key in enumerate(("accuracy", "accuracy_norm")):
            # Of each example the mean over the seeds: examples are the sample.
            right = [statistics.mean(model["right"][i][column] for model in models) for i in range(before["examples"])]
            row[key], row[f"{key}_stderr"] = against(right, [0.0] * len(right))
            row[f"{key}_by_seed"] = [model[key] for model in models]
            if config != PRETRAINED:
                gain, error = against(right, [example[column] for example in before["right"]])
                row |= {f"{key}_gain": gain, f"{key}_gain_stderr": error}
        row["losses"] = [model["losses"] for model in models]
        rows.append(row)
    return rows


def claims(rows: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """Return each claim, and whether it holds."""
    by_config = {row["config"]: row for row in rows}
    held = {}
    for config in ("bf16", "rowwise"):
        row = by_config[config]
        low, _ = row["reduction_interval_95_pct"]
        held[f"{config}: the loss of held-out answers falls by {LEAST_PCT:.0f}% or more"] = (
            row["reduction_pct"] >= LEAST_PCT and low > 0
        )
        for key in ("accuracy", "accuracy_norm"):
            held[f"{config}: {key} is above chance by two standard errors"] = (
                row[key] - CHANCE > 2 * row[f"{key}_stderr"]
            )
            held[f"{config}: {key} is above the pre-trained model's by two standard errors"] = (
                row[f"{key}_gain"] > 2 * row[f"{key}_gain_stderr"]
            )
    control = by_config["shuffled"]
    held[f"shuffled answers: the loss falls by less than {LEAST_PCT:.0f}%"] = (
        max(control["reduction_pct"], control["reduction_interval_95_pct"][1]) < LEAST_PCT
    )
    return held


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The loss of held-out answers, a point for each seed, and the accuracy with two standard errors."""
    pyplot = harness.pyplot()
    if pyplot is None:
        return
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4))
    names = [row["config"] for row in rows]
    left.bar(names, [row["mean_answer_loss"] for row in rows], color="lightsteelblue")
    for row in rows:
        left.plot([row["config"]] * len(row["answer_loss"]), row["answer_loss"], "k.", markersize=5)
    left.set_ylabel("loss of held-out answers (nats per token)")
    errors = [200 * row["accuracy_stderr"] for row in rows]
    right.bar(names, [100 * row["accuracy"] for row in rows], yerr=errors, capsize=4, color="lightsteelblue")
    right.axhline(100 * CHANCE, color="black", linestyle="--", linewidth=1, label="chance")
    right.set_ylabel("right choices (%), two standard errors")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--work", type=Path, default=Path("outputs/finetune_benchmark"), help="the folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this number, from 2 to 10")
    parser.add_argument("--parts", type=int, default=6, help="parts of the library: the answers that there are")
    parser.add_argument("--train", type=int, default=120, help="questions of each part to train on")
    parser.add_argument("--held-out", type=int, default=40, help="held-out questions of each part")
    parser.add_argument("--forms", type=int, default=32, help="shuffled copies of the questions in pre-training")
    parser.add_argument("--pretrain-steps", type=int, default=400)
    parser.add_argument("--pretrain-lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=60, help="steps of fine-tuning")
    parser.add_argument("--lr", type=float, default=5e-4, help="the learning rate of fine-tuning")
    args, options = parser.parse_known_args()
    args.work = args.work.resolve()
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "work")} | {"options": options}
    try:
        work = Work(args.work, settings)
    except ValueError as e:
        parser.error(f"--work: {e}; name another folder")
    run_all(work, args, options)
    rows = rows_of(work.measured)
    results.save("finetune", rows, args, options=options, python=sys.version.split()[0])
    if args.out:
        draw(rows, args.out.with_suffix(".png"))
    shown = ("config", "mean_answer_loss", "reduction_pct", "accuracy", "accuracy_stderr", "accuracy_gain")
    print(harness.show(rows, shown))
    held = claims(rows)
    for claim, holds in held.items():
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}")
    return int(not all(held.values()))


if __name__ == "__main__":
    sys.exit(main())
