"""Let a trained model continue a text, several of a file, or answer in a conversation.

The text goes to stdout, everything else to stderr. On several processes, with tensor parallelism over all of them:
torchrun --nproc-per-node=2 -m titanlite.commands generate --checkpoint outputs/checkpoint/step-1000 --prompt "import"
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(
        prog="titanlite generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = cli.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="a run, one step of it, or a Hugging Face folder")
    given = cli.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", metavar="TEXT", help='what to continue; "" begins a document')
    given.add_argument("--prompts", metavar="FILE", help="a prompt on each line, or JSON lines with prompt or messages")
    given.add_argument("--chat", action="store_true", help="a conversation in the terminal, or with a message on each "
        "line of stdin; Ctrl-C stops an answer, Ctrl-D ends")  # fmt: skip
    add("--system", metavar="TEXT", help="with --chat, the system message")
    add("--stop", action="append", default=[], metavar="TEXT", help="end a text before this string; can be repeated")
    add("--json", action="store_true", help="print a JSON object for each prompt, on a line")
    add("--batch_size", type=int, metavar="N", help="with --prompts, how many are computed together; default: 8")
    add("--max_new_tokens", type=int, metavar="N", help="default: what the model has positions for, at most "
        "256")  # fmt: skip
    add("--temperature", type=float, default=0.8, help="0 takes the most likely token; default: 0.8")
    add("--top_k", type=int, default=0, metavar="K", help="draw from the K most likely tokens alone; default: 0, off")
    add("--top_p", type=float, default=1.0, metavar="P", help="draw from the fewest tokens that have together the "
        "probability P; default: 1, off")  # fmt: skip
    add("--seed", type=int, default=0, help="the same seed, the same text; default: 0")
    model_options(cli)
    add("--no-cache", action="store_true", help="compute all tokens again for each one: slow, for comparison")
    return cli


def model_options(cli: argparse.ArgumentParser) -> None:
    """Add the options that say how the model is loaded."""
    add = cli.add_argument
    add("--dtype", choices=["bfloat16", "float32"], default="float32", help="of the weights; default: "
        "float32. bfloat16 takes half the memory, and rounds more coarsely")  # fmt: skip
    add("--quantize", metavar="SCHEME", help="float8_dynamic, float8_weight_only, float8_static, int8_dynamic, "
        "int8_weight_only or mxfp8_dynamic: the linear layers, "
        "but for the output projection; default: as in the checkpoint")  # fmt: skip
    add("--calibration", metavar="FILE", help="with float8_static, a text like those to come; default: Python's "
        "standard library")  # fmt: skip
    add("--tokenizer_path", metavar="PATH", help="default: that of the folder; another one is refused")
    add("--custom_import", metavar="MODULE", help="a Python module to import first, which may register the model")


@contextmanager
def text_alone() -> Iterator[TextIO]:
    """Yield stdout for the text. Meanwhile, the stdout output of libraries, such as gloo, goes to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(kept), "w", encoding="utf-8") as stdout:
            yield stdout
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    from titanlite.config import import_module
    from titanlite.errors import ConfigError, TrainingError

    first = os.environ.get("RANK", "0") == "0"
    try:
        with text_alone() as stdout:
            if args.custom_import:
                import_module(args.custom_import, "--custom_import", "the command line")
            write(args, stdout, first)
    except (ConfigError, TrainingError) as error:
        if first:
            print(f"titanlite generate: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the text has ended
        return 1
    return 0


def write(args: argparse.Namespace, stdout: TextIO, first: bool) -> None:
    """Write the text to ``stdout``, on the ``first`` process alone.

    Raises:
        ConfigError, TrainingError: see :func:`titanlite.inference.text.continue_texts`.
    """
    from titanlite.errors import ConfigError, counted
    from titanlite.inference.chat_session import chat
    from titanlite.inference.prompts import Given, read_prompts
    from titanlite.inference.sampling import Sampling
    from titanlite.inference.text import BATCH_SIZE, continue_texts

    for key, value, useless, needs in (
        ("--system", args.system, not args.chat, "without --chat"),
        ("--json", args.json or None, args.chat, "with --chat"),
        ("--batch_size", args.batch_size, args.prompts is None, "without --prompts"),
    ):
        if value is not None and useless:
            raise ConfigError(f"has no effect {needs}; leave it out", key=key, value=value)
    options: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens,
        "sampling": Sampling(args.temperature, args.top_k, args.top_p, args.seed),
        "dtype": args.dtype,
        "tokenizer_path": args.tokenizer_path,
        "stop": args.stop,
        "quantize": args.quantize,
        "calibration": args.calibration,
        "cached": not args.no_cache,
    }
    if args.chat:
        chat(args.checkpoint, stdout, system=args.system, **options)
        return
    givens, blank = ([Given({"prompt": args.prompt})], 0) if args.prompts is None else read_prompts(args.prompts)
    if blank and first:
        print(f"{args.prompts}: {counted(blank, 'blank line')} left out", file=sys.stderr)
    batch_size = BATCH_SIZE if args.batch_size is None else args.batch_size
    end = "\n" if args.json or args.prompts is None else "\n\n"
    for task in continue_texts(args.checkpoint, givens, batch_size=batch_size, **options):
        if first:
            print(task.json() if args.json else task.text(), end=end, file=stdout, flush=True)
