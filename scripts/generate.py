"""Let a trained model continue a text.

The text goes to stdout, everything else to stderr. On several processes, with tensor parallelism over all of them:
torchrun --nproc-per-node=2 scripts/generate.py --checkpoint outputs/checkpoint/step-1000 --prompt "import"
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="the folder of one step")
    add("--prompt", required=True, metavar="TEXT", help='what to continue; "" begins a document')
    add("--max_new_tokens", type=int, metavar="N", help="default: what the model has positions for, at most "
        "256")  # fmt: skip
    add("--temperature", type=float, default=0.8, help="0 takes the most likely token; default: 0.8")
    add("--top_k", type=int, default=0, metavar="K", help="draw from the K most likely tokens alone; default: 0, off")
    add("--top_p", type=float, default=1.0, metavar="P", help="draw from the fewest tokens that have together the "
        "probability P; default: 1, off")  # fmt: skip
    add("--seed", type=int, default=0, help="the same seed, the same text; default: 0")
    add("--dtype", choices=["bfloat16", "float32"], default="float32", help="of the weights; default: "
        "float32. bfloat16 takes half the memory, and its coarser rounding can make another text of another number of "
        "processes, and of --no-cache")  # fmt: skip
    add("--tokenizer_path", metavar="PATH", help="default: what the checkpoint was trained with")
    add("--custom_import", metavar="MODULE", help="a Python module to import first, which may register the model")
    add("--no-cache", action="store_true", help="compute all tokens again for each one: slow, for comparison")
    return made


def generate(args: argparse.Namespace) -> str:
    """The prompt and its continuation."""
    import torch

    from titanlite import generation
    from titanlite.config import import_module
    from titanlite.config.parallelism import Degrees
    from titanlite.config.schema import Comm
    from titanlite.distributed import runtime
    from titanlite.distributed.mesh import build_mesh
    from titanlite.load_model import load_model

    if args.custom_import:
        import_module(args.custom_import, "--custom_import", "the command line")
    sampling = generation.Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    here = runtime.start_runtime(Comm())
    try:
        mesh = build_mesh(Degrees(1, 1, 1, tensor_parallel=here.world_size, pipeline_parallel=1), here.device.type)
        dtype = getattr(torch, args.dtype)
        loaded = load_model(args.checkpoint, dtype, mesh, here.device, tokenizer_path=args.tokenizer_path)
        tokenizer = loaded.tokenizer
        decoder = generation.Decoder(
            loaded.model,
            here.device,
            loaded.max_seq_len,
            tokenizer.vocab_size,
            tp=mesh.tp,
            group=here.control if here.world_size > 1 else None,
        )
        prompt = tokenizer.encode(args.prompt)
        done = generation.generate(
            decoder,
            [tokenizer.bos_id, *prompt],
            args.max_new_tokens,
            sampling,
            {tokenizer.eos_id},
            cached=not args.no_cache,
        )
        if here.rank == 0:
            print(f"{args.dtype} on {here.device}, {here.world_size} processes: {done.speed()}", file=sys.stderr)
        return tokenizer.decode([*prompt, *done.ids])
    finally:
        runtime.stop_runtime()


@contextmanager
def text_alone() -> Iterator[TextIO]:
    """The process's stdout for the text, while what libraries print there, as gloo does, goes to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(kept), "w", encoding="utf-8") as stdout:
            yield stdout
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from titanlite.errors import ConfigError, TrainingError

    first = os.environ.get("RANK", "0") == "0"
    with text_alone() as stdout:
        try:
            text = generate(args)
        except (ConfigError, TrainingError) as error:
            if first:
                print(f"generate.py: {error}", file=sys.stderr)
            return 2 if isinstance(error, ConfigError) else 1
        if first:
            print(text, file=stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
