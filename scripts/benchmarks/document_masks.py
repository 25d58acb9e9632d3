"""What document masks cost on the CPU: the trainer's step with them against the step without, in turn, in one process.

    python scripts/benchmarks/document_masks.py --output docs/benchmarks/document_masks.json

The data are Python's source files, whole or cut into short documents (``--characters``), packed as a stream, so that
both see the same tokens. Blocks of steps alternate; the ratio is the median over pairs of neighbouring blocks, below 1
where masks are faster. They can be: each document is computed alone, and attends to fewer tokens.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks

import harness
import results
import torch
from loops import quiet_trainer

OPTIONS = ["--model.flavor=20M", "--training.local_batch_size=2", "--activation_checkpoint.mode=none"]


def documents_per_sequence(inputs: torch.Tensor, bos: int) -> float:
    """Return the mean number of documents that a row of ``inputs``, [..., seq_len], has a part of."""
    starts = (inputs == bos).flatten(0, -2)
    starts[:, 0] = True  # a row may begin inside a document
    return float(starts.sum(-1).float().mean())


def write_short(path: Path, characters: int, total: int = 8_000_000) -> None:
    """Write JSON lines: Python's source files, cut into documents of so many characters."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "".join(file.read_text(errors="replace") for file in files)[:total]
    parts = (text[at : at + characters] for at in range(0, len(text), characters))
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))


def measure(seq_len: int, compiled: bool, characters: int, pairs: int, block: int) -> dict[str, Any]:
    """The step with and without masks, with documents of so many ``characters``, or of whole files if it is 0."""
    with tempfile.TemporaryDirectory() as folder:
        data: list[str] = []
        if characters:
            write_short(path := Path(folder) / "short.jsonl", characters)
            data = ["--training.dataset=json", f"--training.dataset_path={path}"]
        return measure_on(data, seq_len, compiled, pairs, block)


def measure_on(data: list[str], seq_len: int, compiled: bool, pairs: int, block: int) -> dict[str, Any]:
    options = [*OPTIONS, *data, f"--training.seq_len={seq_len}", f"--training.compile={str(compiled).lower()}"]
    with quiet_trainer([*options, "--data.document_mask"]) as masked, quiet_trainer(options) as plain:
        batches = [next(plain.loader).inputs for _ in range(16)]
        assert plain.tokenizer.bos_id is not None
        documents = documents_per_sequence(torch.stack(batches), plain.tokenizer.bos_id)
        seconds = harness.time_in_pairs(masked.advance, plain.advance, pairs, block)
    shape = {"model": "20M", "seq_len": seq_len, "batch": 2, "compile": compiled}
    ratio = statistics.median(ours / theirs for ours, theirs in seconds)
    mode = "compiled" if compiled else "eager"
    print(f"{seq_len} tokens, {documents:.1f} documents, {mode}: {ratio:.2f} of the time without masks", flush=True)
    return {
        "system": "titanlite",
        "config": "bf16",
        **shape,
        "documents_per_sequence": documents,
        "step_ms": statistics.median(ours for ours, _ in seconds) * 1e3,
        "step_ms_without": statistics.median(theirs for _, theirs in seconds) * 1e3,
        "ratio": ratio,
    }


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--seq_len", type=harness.numbers, default=[512, 2048], help="of the sequences")
    parser.add_argument(
        "--characters", type=int, nargs="+", default=[0, 600, 150], help="of a document; 0: whole files"
    )
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--block", type=int, default=2, help="steps of a block")
    args = parser.parse_args()
    cases = itertools.product(args.seq_len, args.characters, (False, True))
    rows = [measure(seq_len, compiled, size, args.pairs, args.block) for seq_len, size, compiled in cases]
    results.save("document_masks", rows, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
