"""The compiled code of one Llama 3 8B block, counted for a GPU that is not there.

    python scripts/benchmarks/compiled_block.py --output docs/benchmarks/compiled_block.json

Forward and backward of a block are compiled as for a GPU (:mod:`absent_gpu`), and for each case these are counted:

- ``recompilations``: graphs that a second step compiles.
- ``launches``: kernels, those of libraries included.
- ``mb``: megabytes that all kernels but matmuls and attention read and write. What a program reads again, such as a row
  in a second pass, counts again; what several programs read counts once. ``once_mb``: without the second passes.
- ``sectors_mb``: ``mb`` in whole sectors of 32 bytes, the smallest transfer of the hardware: more where neighbours in
  memory are written by different programs.
- ``matmuls_mb``: of matmuls and attention, each operand once.
- ``kept_mib``: what forward keeps for backward, without the parameters.

Where the compiler would time several tiles of a kernel on the device, the tile that moves least is counted. Nothing is
timed: these are counts. torchao's layers are in the same block, torchtitan's bf16 block is its own; both are compiled
with PyTorch's defaults. AMD's GPUs are left out: a build of PyTorch without HIP generates no code for them. It needs a
C++ compiler, and no GPU.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import results
from absent_gpu import device

LIMIT = 900  # seconds of one case
COLUMNS = ("launches", "once_mb", "mb", "sectors_mb", "matmuls_mb", "kept_mib")


def cases(args: Any) -> list[dict[str, Any]]:
    made = []
    for architecture, tokens, ac, config in itertools.product(args.architectures, args.tokens, args.ac, args.configs):
        case = {"architecture": architecture, "tokens": tokens, "ac": ac, "config": config}
        kernels = args.kernels if config != "bf16" else ["inductor"]
        if "titanlite" in args.systems:
            made += [
                {**case, "system": "titanlite", "kernels": choice, "fusion": fusion}
                for choice, fusion in itertools.product(kernels, args.fusion)
            ]
        peer = "torchao" if config != "bf16" else "torchtitan"  # whose bf16 layer torchao's users have
        if peer in args.systems and results.version(peer) and (peer == "torchao" or ac == "none"):
            made.append({**case, "system": peer, "kernels": "inductor", "fusion": "compiler"})
    return made


def count(case: dict[str, Any], env: dict[str, str]) -> dict[str, Any]:
    options = [f"--{key}={value}" for key, value in case.items()]
    child = harness.run([sys.executable, "-m", "absent_gpu.block", *options], LIMIT, env)
    if child.status != 0:
        return {**case, "failed": child.why()}
    row: dict[str, Any] = json.loads(child.output.splitlines()[-1])
    return row


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--configs", type=harness.words, default=list(harness.CONFIGS))
    parser.add_argument("--systems", type=harness.words, default=["titanlite", "torchao", "torchtitan"])
    parser.add_argument("--ac", type=harness.words, default=["none", "op"])
    parser.add_argument("--kernels", type=harness.words, default=["inductor", "triton"])
    parser.add_argument("--fusion", type=harness.words, default=["block"], help="block: titanlite's rules; compiler")
    parser.add_argument("--tokens", type=harness.numbers, default=[8192])
    parser.add_argument("--architectures", type=harness.words, default=["sm_90"], help=", ".join(device.ARCHITECTURES))
    parser.add_argument("--list", action="store_true", help="print the kernels of each case, with MB read and written")
    args = parser.parse_args()
    harness.check_known(
        parser,
        args,
        configs=harness.CONFIGS,
        ac=("none", "op", "full"),
        kernels=("inductor", "triton"),
        fusion=("block", "compiler"),
        systems=("titanlite", "torchao", "torchtitan"),
        architectures=device.ARCHITECTURES,
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        env = device.environment(Path(folder))
        for case in cases(args):
            row = count(case, env)
            for name, *numbers in row.pop("list", []) if args.list else []:
                print(*(f"{number:8.1f}" for number in numbers), name)
            row.pop("list", None)
            rows.append(row)
            print(harness.show([row], ("system", "config", "ac", "kernels", "fusion", *COLUMNS)), flush=True)
    harness.report(
        rows, ("architecture", "tokens", "ac", "system", "config", "kernels", "fusion"), COLUMNS, harness.Budget(None)
    )
    results.save(
        "compiled_block", rows, args, "cpu", **{peer: results.version(peer) for peer in ("torchao", "torchtitan")}
    )


if __name__ == "__main__":
    main()
