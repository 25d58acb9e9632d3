"""Turn a checkpoint into a Hugging Face folder, or the other way round.

SOURCE is a checkpoint of titanlite, the folder of one step: TARGET becomes a folder that transformers loads. Or SOURCE
is a folder with config.json and *.safetensors: TARGET becomes a folder of checkpoints, with the weights as its step-0.
Tensors go through memory one after the other.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("source", type=Path, metavar="SOURCE")
    made.add_argument("target", type=Path, metavar="TARGET")
    made.add_argument("--dtype", choices=["bfloat16", "float16", "float32"],
        help="of the weights in a Hugging Face folder; default: bfloat16. A checkpoint keeps the source's")  # fmt: skip
    made.add_argument("--tokenizer_path", metavar="PATH", help="default: what the checkpoint was trained with")
    made.add_argument("--custom_import", metavar="MODULE", help="a Python module to import first, which may register "
        "the model")  # fmt: skip
    made.add_argument("--no-verify", action="store_true", help="do not compare the checkpoint's checksums first")
    return made


def to_hugging_face(args: argparse.Namespace) -> str:
    import torch

    from titanlite.checkpoint.hugging_face_export import write_hugging_face
    from titanlite.checkpoint.storage import load, saved_shapes, verify
    from titanlite.errors import ConfigError
    from titanlite.load_model import describe, tokenizer_of

    folder, found = args.source, describe(args.source)
    family = found.spec.hugging_face
    if family is None:
        raise ConfigError(f'the model family "{found.spec.name}" has no form in transformers: nothing to convert to')
    tokenizer = tokenizer_of(found, args.tokenizer_path)
    if not args.no_verify:
        verify(folder)
    names = family.names(found.args)
    saved = saved_shapes(folder)
    lacking = [name for name in names if f"model.{name}" not in saved]
    if lacking:
        raise ConfigError(f"{folder} lacks {len(lacking)} weights of its own model, such as {lacking[0]}")

    def get(wanted: list[str]) -> dict[str, torch.Tensor]:
        state = {f"model.{name}": torch.empty(saved[f"model.{name}"]) for name in wanted}
        load(folder, state)
        return {name.removeprefix("model."): tensor for name, tensor in state.items()}

    write_hugging_face(
        args.target,
        family.to_config(found.args),
        {name: saved[f"model.{name}"] for name in names},
        names,
        get,
        tokenizer,
        dtype=getattr(torch, args.dtype or "bfloat16"),
    )
    return f"{folder} -> {args.target}: transformers.AutoModelForCausalLM.from_pretrained({str(args.target)!r})"


def to_checkpoint(args: argparse.Namespace) -> str:
    from titanlite.checkpoint import Info
    from titanlite.checkpoint.hugging_face import HuggingFaceFolder
    from titanlite.checkpoint.storage import SaveError, save
    from titanlite.config.schema import Comm
    from titanlite.distributed import runtime
    from titanlite.errors import ConfigError
    from titanlite.load_model import describe, tokenizer_of

    if args.dtype is not None:
        raise ConfigError(f"--dtype={args.dtype}: a checkpoint keeps the dtypes of {args.source}; leave it out")
    if args.no_verify:
        raise ConfigError(f"--no-verify: {args.source} is no checkpoint and has no checksums; leave it out")
    source, found = HuggingFaceFolder(args.source), describe(args.source)
    tokenizer_of(found, args.tokenizer_path)
    family = found.spec.hugging_face
    assert family is not None
    names = family.names(found.args)
    source.check({}, names, family.ignored)
    with source.opened() as get:
        state = {f"model.{ours}": get(theirs) for ours, theirs in names.items()}  # as views of the files
        shape: dict[str, Any] = json.loads(json.dumps(asdict(found.args)))
        model = {"name": found.spec.name, "flavor": found.flavor, "args": shape}
        tokenizer = str(args.source.absolute()) if args.tokenizer_path is None else args.tokenizer_path
        runtime.start_runtime(Comm())
        try:
            done = save(args.target, state, Info(0, model, tokenizer_path=tokenizer, weights_only=True), None)
        except SaveError as e:
            raise ConfigError(f"{args.target}: cannot be written: {e}; choose another folder, or make room") from e
        finally:
            runtime.stop_runtime()
    return f"{args.source} -> {done}: --checkpoint.initial_load_path={done}"


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from titanlite.checkpoint.hugging_face import is_hugging_face
    from titanlite.config import import_module
    from titanlite.errors import ConfigError

    try:
        if args.custom_import:
            import_module(args.custom_import, "--custom_import", "the command line")
        print(to_checkpoint(args) if is_hugging_face(args.source) else to_hugging_face(args))
    except ConfigError as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
