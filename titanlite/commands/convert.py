"""Turn a checkpoint into a Hugging Face folder, or the other way round.

SOURCE is a checkpoint of titanlite, the folder of one step, or of a run, whose latest is taken: TARGET becomes a folder
that transformers loads. Or SOURCE is a folder with config.json and *.safetensors: TARGET becomes a folder of
checkpoints, with the weights as its step-0.
Tensors go through memory one after the other.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(
        prog="titanlite convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_argument("source", type=Path, metavar="SOURCE")
    cli.add_argument("target", type=Path, metavar="TARGET")
    cli.add_argument("--dtype", choices=["bfloat16", "float16", "float32"],
        help="of the weights in a Hugging Face folder; default: bfloat16. A checkpoint keeps the source's")  # fmt: skip
    cli.add_argument("--quantize", metavar="SCHEME", help="float8_dynamic, float8_weight_only, float8_static or "
        "int8_dynamic: "
        "write the linear layers, but for the output projection, in 8 bits, as vLLM and transformers read "
        "them (compressed-tensors)")  # fmt: skip
    cli.add_argument("--calibration", metavar="FILE", help="with float8_static, a text like those to come; default: "
        "Python's standard library")  # fmt: skip
    cli.add_argument("--tokenizer_path", metavar="PATH", help="default: that of the folder; another one is refused")
    cli.add_argument("--custom_import", metavar="MODULE", help="a Python module to import first, which may register "
        "the model")  # fmt: skip
    cli.add_argument("--force", action="store_true", help="replace a Hugging Face folder that convert has written, "
        "with its README.md; default: refuse a folder that is not empty")  # fmt: skip
    cli.add_argument("--no-verify", action="store_true", help="do not compare the checkpoint's checksums first")
    return cli


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    from titanlite.config import import_module
    from titanlite.errors import ConfigError
    from titanlite.inference.convert import convert

    try:
        if args.custom_import:
            import_module(args.custom_import, "--custom_import", "the command line")
        done = convert(
            args.source,
            args.target,
            args.dtype,
            args.tokenizer_path,
            quantize=args.quantize,
            calibration=args.calibration,
            verify_sums=not args.no_verify,
            replace=args.force,
        )
        print(done)
    except ConfigError as error:
        print(f"titanlite convert: {error}", file=sys.stderr)
        return 2
    return 0
