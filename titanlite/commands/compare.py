"""Compare runs: their curves, what differs in their configurations, and which loss is lower.

RUN is a run folder, a folder with runs in it, or the console's log of a run of titanlite or torchtitan. A run folder
alone is compared with the earlier runs in it. Other runs are compared with the first one, at equal steps and at equal
tokens; a difference is called one if its 95% interval excludes zero.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(
        prog="titanlite compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = cli.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN")
    add("--baseline", metavar="RUN", help="the run that others are compared with: its path or its name; default: the "
        "first")  # fmt: skip
    add("--html", type=Path, metavar="FILE", help="write a page that opens without a network: .html")
    add("--picture", type=Path, metavar="FILE", help="write the curves as a picture: .png or .svg")
    add("--json", action="store_true", help="print one JSON object, not tables")
    return cli


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    from titanlite.errors import ConfigError

    try:
        compare_runs(args)
    except ConfigError as error:
        print(f"titanlite compare: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the text has ended
        return 1
    return 0


def compare_runs(args: argparse.Namespace) -> None:
    """Compare as the arguments say, and write the files that they name.

    Raises:
        ConfigError: see :func:`titanlite.compare.comparison.compare`; a file cannot be written.
    """
    from rich.console import Console

    from titanlite.compare.comparison import compare
    from titanlite.compare.page import check_page, write_page
    from titanlite.compare.picture import check_picture, write_picture
    from titanlite.compare.text import print_comparison

    for file, check in ((args.html, check_page), (args.picture, check_picture)):
        if file:
            check(file)
    comparison = compare(args.runs, args.baseline)
    if args.json:
        print(comparison.json())
    else:
        print_comparison(comparison, Console(highlight=False))
    for file, write in ((args.html, write_page), (args.picture, write_picture)):
        if file:
            write(comparison, file)
            print(f"{file} is written", file=sys.stderr)
