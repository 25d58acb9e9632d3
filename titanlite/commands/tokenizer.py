"""``titanlite tokenizer train`` and ``titanlite tokenizer download``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(prog="titanlite tokenizer", description="Train a tokenizer, or download one.")
    verbs = cli.add_subparsers(dest="verb", required=True)
    text = "Train a byte-level BPE tokenizer; the same corpus always gives the same file."
    train = verbs.add_parser("train", help=text, description=f"{text} Without options: the one that titanlite ships.")
    train.add_argument("--source", choices=["pystdlib", "text"], default="pystdlib")
    train.add_argument("--path", help="with --source text: a folder of .txt files, a file, or a glob")
    train.add_argument("--vocab-size", type=int, default=2048, help="special tokens included; a multiple of 128")
    train.add_argument("--output", type=Path, help="the file; default: the shipped one's place")
    text = "Download a model's tokenizer from the Hugging Face hub."
    download = verbs.add_parser("download", help=text, description=text)
    download.add_argument("--repo_id", required=True, help="such as meta-llama/Llama-3.1-8B")
    download.add_argument("--hf_token", default=os.environ.get("HF_TOKEN"), help="default: the variable HF_TOKEN")
    download.add_argument("--local_dir", default="./assets/tokenizer", help="where to put the files")
    download.add_argument("--tokenizer_path", default="original", help="the repository's folder of tokenizer.model")
    return cli


def train(args: argparse.Namespace) -> str:
    from titanlite.data import build_source
    from titanlite.data.tokenizer import SHIPPED
    from titanlite.data.train_tokenizer import train as train_tokenizer

    backend = train_tokenizer(build_source(args.source, path=args.path, seed=0), args.vocab_size)
    output: Path = args.output or SHIPPED
    output.parent.mkdir(parents=True, exist_ok=True)
    backend.save(str(output), pretty=False)
    return f"{output}: {backend.get_vocab_size()} tokens"


def download(args: argparse.Namespace) -> str:
    from titanlite.data.download_tokenizer import download as download_tokenizer

    files = download_tokenizer(args.repo_id, args.hf_token, args.local_dir, args.tokenizer_path)
    return "\n".join([*files, f'use it with: --model.tokenizer_path="{args.local_dir}"'])


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    from titanlite.errors import ConfigError

    try:
        print(train(args) if args.verb == "train" else download(args))
    except ConfigError as error:
        print(f"titanlite tokenizer {args.verb}: {error}", file=sys.stderr)
        return 2
    return 0
