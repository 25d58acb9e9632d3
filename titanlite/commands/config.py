"""Print the JSON schema of the TOML files, the reference of all options, or the options that differ between two files.

A and B are TOML files, packaged names such as llama3_8b, or run folders. The options in effect are compared: with those
of the files that they build on, and the defaults.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(
        prog="titanlite config", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked = cli.add_mutually_exclusive_group(required=True)
    asked.add_argument("--schema", action="store_true", help="print the JSON schema, with which editors complete and "
        "check keys")  # fmt: skip
    asked.add_argument("--reference", action="store_true", help="print every option, as Markdown")
    asked.add_argument("--diff", nargs=2, metavar=("A", "B"), help="print the options that differ")
    return cli


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    from titanlite.config.difference import differing_options
    from titanlite.config.json_schema import dump_schema, json_schema
    from titanlite.config.reference import option_reference
    from titanlite.errors import ConfigError, printable, shown

    if args.schema:
        print(dump_schema(json_schema()), end="")
        return 0
    if args.reference:
        print(option_reference(), end="")
        return 0
    try:
        differing = differing_options(*map(_file, args.diff))
    except ConfigError as error:
        print(f"titanlite config: {error}", file=sys.stderr)
        return 2
    for name, (first, second) in differing.items():
        print(printable(f"{name}: {shown(first)} -> {shown(second)}"))
    if not differing:
        print("titanlite config: no option differs", file=sys.stderr)
    return 0


def _file(name: str) -> str:
    """Return ``name``, or the configuration in it if it is a run folder.

    Raises:
        ConfigError: it is another folder, or nothing.
    """
    from titanlite.config import packaged
    from titanlite.config.run_config import CONFIG
    from titanlite.errors import ConfigError
    from titanlite.registry import nearest

    file = Path(name, CONFIG)
    if file.is_file():
        return str(file)
    known = packaged.find(name) or (name.endswith(".toml") and packaged.find(Path(name).stem))
    if known or Path(name).expanduser().is_file():
        return name
    if Path(name).is_dir():
        raise ConfigError(f"{name}: a folder without {CONFIG}; name a run folder, a TOML file, or a packaged name")
    raise ConfigError(
        f"{name}: there is no such file or run folder, and none of this name comes with titanlite"
        f"{nearest(name, packaged.names())}"
    )
