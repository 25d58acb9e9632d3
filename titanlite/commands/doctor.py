"""Examine this machine: what it is and has, how fast it computes in each number format, what to type.

The layers measured are those of a configuration, by default the debug model's: CONFIG is a TOML file, or the name of a
packaged one such as llama3_8b; options of the trainer may follow.
"""

from __future__ import annotations

import argparse
import os
import sys


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(
        prog="titanlite doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_argument("config", nargs="?", metavar="CONFIG")
    cli.add_argument("--json", action="store_true", help="print one JSON object, not tables")
    cli.add_argument("--seconds", type=float, help="for all measurements; default: 45")
    cli.add_argument("--processes", type=int, help="for the all-reduce; default: one for each GPU, or 2")
    cli.add_argument("--no-measure", action="store_true", help="facts only")
    return cli


def main(argv: list[str]) -> int:
    args, options = parser().parse_known_args(argv)
    from titanlite.config import packaged
    from titanlite.environment import CONFIG_FILE
    from titanlite.launch.command_line import read_config, report

    os.environ.setdefault(CONFIG_FILE, packaged.find("debug_model") or "")
    given = [*([f"--job.config_file={args.config}"] if args.config else []), *options]
    config = read_config(given)
    from titanlite.doctor.examine import SECONDS, examine
    from titanlite.doctor.report import describe
    from titanlite.errors import ConfigError

    if not args.json and not args.no_measure:
        print("titanlite: measuring, for less than a minute ...", file=sys.stderr, flush=True)
    try:
        examination = examine(config, given, args.seconds or SECONDS, args.processes, not args.no_measure)
    except ConfigError as e:
        return report(e, config)
    print(examination.json() if args.json else describe(examination, given))
    return 0
