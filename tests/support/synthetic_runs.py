"""Run folders whose answer is known: a loss curve, a common effect of each batch, noise of an AR(1) process, and a true
difference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray

Array = NDArray[np.float64]

OPTIONS = {
    "training": {"dataset": "pystdlib", "seq_len": 256, "steps": 1000, "seed": 0},
    "optimizer": {"lr": 3e-3},
}


def ar1(random: np.random.Generator, pairs: int, steps: int, rho: float) -> Array:
    """AR(1) noise of variance 1, (pairs, steps)."""
    noise = random.standard_normal((pairs, steps))
    for step in range(1, steps):
        noise[:, step] = rho * noise[:, step - 1] + sqrt(1 - rho * rho) * noise[:, step]
    return noise


def loss_pairs(
    random: np.random.Generator, pairs: int, steps: int, rho: float, percent: float, white: float = 0.0
) -> tuple[Array, Array, float]:
    """The losses of pairs of runs, (pairs, steps) each, and the true difference of the second to the first.

    Both follow one curve and meet the same batches, which are harder or easier by 0.05 for both. Each has its own
    AR(1) noise of 0.02, and independent noise of ``white`` times that. The second is above the first by ``percent`` of
    the loss at the end.
    """
    curve = 2.5 + 6 * np.arange(1, steps + 1) ** -0.4
    batches = 0.05 * random.standard_normal((pairs, steps))
    noises = [
        0.02 * (ar1(random, pairs, steps, rho) + white * random.standard_normal((pairs, steps))) for _ in range(2)
    ]
    truth = percent / 100 * curve[-1]
    return curve + batches + noises[0], curve + batches + noises[1] + truth, float(truth)


def losses(percent: float, steps: int = 600, rho: float = 0.5, seed: int = 0) -> tuple[Array, Array]:
    """One pair of :func:`loss_pairs`."""
    first, second, _ = loss_pairs(np.random.default_rng(seed), 1, steps, rho, percent)
    return first[0], second[0]


def write_run(
    folder: Path,
    losses: Array,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    log_freq: int = 1,
    tokens_per_step: int = 1024,
    tokenizer: str = "a" * 64,
    validation: Array | None = None,
    validation_tokens: int = 4096,
    content: str | None = "c" * 32,
    validation_content: str = "v" * 32,
    num_shards: int = 1,
) -> Path:
    """A run folder with the losses (rows,) of each ``log_freq``-th step; ``options`` are added to OPTIONS.

    ``content`` is the digest of the files of the data; None: the folder is of a titanlite that did not write it.
    """
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for number, loss in enumerate(losses, 1):
            step = number * log_freq
            row = {
                "step": step,
                "loss": float(loss),
                "max_loss": float(loss) + 0.1,
                "grad_norm": 1.0,
                "lr": 1e-3,
                "tps": 1000.0 + number % 7,
                "tflops": 1.5,
                "mfu": None,
                "memory_gib": 2.0,
                "memory_pct": 10.0,
                "step_time_s": 0.5,
                "data_loading_s": 0.001,
                "tokens_seen": tokens_per_step * step,
                "reserved_gib": None,
                "skipped_steps": 0,
            }
            file.write(json.dumps(row) + "\n")
    if validation is not None:
        rows = (
            {"step": 10 * (i + 1), "loss": float(v), "bits_per_byte": float(v) / 3, "tokens": validation_tokens}
            for i, v in enumerate(validation)
        )
        (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {
        name: dict(OPTIONS.get(name, {})) | dict((options or {}).get(name, {})) for name in {*OPTIONS, *(options or {})}
    }
    (folder / "config.toml").write_text(f'run_folder = "."\n{tomli_w.dumps(sections)}')
    if content is not None:
        step = {
            "seed": 0,
            "num_shards": num_shards,
            "global_batch_size": tokens_per_step // 256,
            "seq_len": 256,
            "vocab_size": 9,
        }
        identity = {"dataset": "pystdlib", "content": content, "documents": 3, **step}
        identities = {"training": identity, "validation": identity | {"content": validation_content}}
        (folder / "data_identity.json").write_text(json.dumps(identities))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer_identity.json").write_text(json.dumps({"sha256": tokenizer, "tokenizers": "x"}))
    return folder
