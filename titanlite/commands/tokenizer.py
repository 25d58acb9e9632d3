"""``titanlite tokenizer train`` and ``titanlite tokenizer download``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# The options of training, in the messages of what it shares with this command -> those of this command.
_OPTIONS = {
    "training.dataset_path": "--path",
    "training.dataset": "--source",
    "data.text_field": "--text_field",
    "data.on_corrupt": "--on_corrupt",
}


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(prog="titanlite tokenizer", description="Train a tokenizer, or download one.")
    verbs = cli.add_subparsers(dest="verb", required=True)
    text = "Train a byte-level BPE tokenizer; the same corpus always gives the same one."
    train = verbs.add_parser("train", help=text, description=f"{text} Without a source: the one that titanlite ships.")
    train.add_argument("--output", type=Path, required=True, metavar="PATH", help="a folder, which gets tokenizer.json "
        "and tokenizer_config.json; or a file, if the name ends in .json")  # fmt: skip
    train.add_argument("--force", action="store_true", help="replace files that are there")
    train.add_argument("--source", default="pystdlib", metavar="NAME", help="as training.dataset; default: pystdlib")
    train.add_argument("--path", help="as training.dataset_path: a file, a folder, or a glob")
    train.add_argument("--text_field", default="text", metavar="NAME", help="as data.text_field; default: text")
    train.add_argument("--on_corrupt", default="stop", metavar="ACTION", help="as data.on_corrupt; default: stop")
    train.add_argument("--max-bytes", type=int, default=1_000_000_000, metavar="N", help="read so much text at most; "
        "default: 1,000,000,000")  # fmt: skip
    train.add_argument("--vocab-size", type=int, default=2048, help="special tokens included; a multiple of 128")
    train.add_argument("--custom_import", metavar="MODULE", help="a Python module to import first, which may register "
        "the source")  # fmt: skip
    text = "Download a model's tokenizer from the Hugging Face hub."
    download = verbs.add_parser("download", help=text, description=text)
    download.add_argument("--repo_id", required=True, help="such as meta-llama/Llama-3.1-8B")
    download.add_argument("--hf_token", default=os.environ.get("HF_TOKEN"), help="default: the variable HF_TOKEN")
    download.add_argument("--local_dir", default="./assets/tokenizer", help="where to put the files")
    download.add_argument("--tokenizer_path", default="original", help="the repository's folder of tokenizer.model")
    download.add_argument("--force", action="store_true", help="replace files that are there")
    return cli


def train(args: argparse.Namespace) -> str:
    from titanlite.config import import_module
    from titanlite.data import build_source
    from titanlite.data.train_tokenizer import Corpus, files_to_write, write
    from titanlite.data.train_tokenizer import train as train_tokenizer

    files = files_to_write(args.output, args.force)
    if args.custom_import:
        import_module(args.custom_import, "--custom_import", "the command line")
    source = build_source(args.source, path=args.path, text_field=args.text_field, on_corrupt=args.on_corrupt, seed=0)
    corpus = Corpus(source, args.max_bytes)
    tokenizer = train_tokenizer(corpus, args.vocab_size)
    write(tokenizer, files)
    cut = f"; there is more text than --max-bytes {corpus.limit:,}, which was left out" if corpus.is_cut else ""
    return f"{args.output}: {tokenizer.vocab_size} tokens, from {corpus.nbytes:,} bytes of text{cut}"


def download(args: argparse.Namespace) -> str:
    from titanlite.data.download_tokenizer import download as download_tokenizer

    files = download_tokenizer(args.repo_id, args.hf_token, args.local_dir, args.tokenizer_path, args.force)
    return "\n".join([*files, f'use it with: --model.tokenizer_path="{args.local_dir}"'])


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    from titanlite.errors import ConfigError, TrainingError

    try:
        print(train(args) if args.verb == "train" else download(args))
    except (ConfigError, TrainingError) as error:
        message = str(error)
        for key, option in _OPTIONS.items():
            message = message.replace(key, option)
        print(f"titanlite tokenizer {args.verb}: {message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0
