"""Compute the loss of text under a trained model, and its accuracy in choices between endings.

The numbers go to stdout, everything else to stderr. On several processes, each with the whole model and a share of the
work: torchrun --nproc-per-node=2 -m titanlite.commands evaluate --checkpoint outputs --data notes.txt
"""

from __future__ import annotations

import argparse
import os
import sys

from titanlite.commands.generate import model_options, text_alone


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(
        prog="titanlite evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = cli.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="a run, the folder of one step, or a Hugging Face folder")
    add("--data", metavar="FILE|SOURCE", help="the text to compute the loss of: a file, folder or glob of text, JSON "
        "lines or parquet, or a data source such as pystdlib")  # fmt: skip
    add("--text_field", default="text", metavar="NAME", help="the field of a record that holds the text; default: text")
    add("--max_documents", type=int, metavar="N", help="read only the first N documents; default: all")
    add("--tasks", metavar="TASK|FILE", help="hellaswag, or JSON lines of context, endings and label")
    add("--task_data", metavar="FILE", help="a copy of hellaswag's validation split; default: that on the hub")
    add("--max_examples", type=int, metavar="N", help="read only the first N examples of the task; default: all")
    add("--seq_len", type=int, metavar="N", help="the most tokens that the model reads at a time; default: the "
        "positions that it has")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object, not a table")
    model_options(cli)
    return cli


def main(argv: list[str]) -> int:
    args = vars(parser().parse_args(argv))
    as_json, custom_import = args.pop("json"), args.pop("custom_import")
    from titanlite.config import import_module
    from titanlite.errors import ConfigError, TrainingError
    from titanlite.inference.evaluate import evaluate

    first = os.environ.get("RANK", "0") == "0"
    with text_alone() as stdout:
        try:
            if custom_import:
                import_module(custom_import, "--custom_import", "the command line")
            evaluation = evaluate(**args)
        except (ConfigError, TrainingError) as error:
            if first:
                print(f"titanlite evaluate: {error}", file=sys.stderr)
            return 2 if isinstance(error, ConfigError) else 1
        if first:
            for note in evaluation.notes:
                print(note, file=sys.stderr)
            print(evaluation.json() if as_json else evaluation.table(), file=stdout)
    return 0
