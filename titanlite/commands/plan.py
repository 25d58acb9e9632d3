"""Predict which layout of a training run is fastest on devices that need not be there, and what it needs.

CONFIG is a TOML file, or the name of a packaged one such as llama3_8b; options of the trainer may follow.
--model=llama3:70B
takes that model instead, with 8192 tokens per sequence, compiled.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(
        prog="titanlite plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = cli.add_argument
    add("config", nargs="?", metavar="CONFIG")
    add("--model", metavar="FAMILY:FLAVOR", help="a model in place of a file's")
    add("--device", default="h100", help="its name, by default h100; a wrong one lists all. Or a TOML file")
    add("--devices", type=int, default=8, help="how many; default: 8")
    add("--tokens", help="to train on, such as 2T; default: those of training.steps")
    add("--price", type=float, help="of an hour of a device, for the cost")
    add("--top", type=int, default=10, help="layouts to show; default: 10")
    add("--fixed", action="store_true", help="predict the configured layout alone")
    add("--explain", type=int, metavar="N", help="show where the time and the memory of layout N go")
    add("--write", type=Path, metavar="FILE", help="write layout 1, or that of --explain, as a TOML file")
    add("--json", action="store_true", help="print one JSON object, not a table")
    return cli


def main(argv: list[str]) -> int:
    args, options = parser().parse_known_args(argv)
    from titanlite.config import packaged
    from titanlite.environment import CONFIG_FILE
    from titanlite.launch.command_line import read_config, report

    given = [*([f"--job.config_file={args.config}"] if args.config else []), *options]
    if args.model:
        family, _, flavor = args.model.partition(":")
        given = [
            f"--model.name={family}",
            f"--model.flavor={flavor}",
            "--training.seq_len=8192",
            "--training.compile",
            *given,
        ]
    else:
        os.environ.setdefault(CONFIG_FILE, packaged.find("debug_model") or "")
    config = read_config(given)
    from titanlite.errors import ConfigError
    from titanlite.plan import request
    from titanlite.plan.report import describe, dump, explain

    try:
        plan = request.plan_for(config, args.device, args.devices, fixed=args.fixed, top=args.top)
        tokens = request.tokens_of(config, plan, args.tokens)
        print(dump(plan, tokens, args.price) if args.json else describe(plan, tokens, args.price))
        number = args.explain or 1
        if args.explain:
            request.chosen(plan, number)
            print(explain(plan, number), file=sys.stderr if args.json else sys.stdout)
        if args.write:
            request.write(config, request.chosen(plan, number), args.write)
            print(f"{args.write} is written", file=sys.stderr)
    except ConfigError as e:
        return report(e, config)
    return 0
