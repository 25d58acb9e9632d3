"""``titanlite SUBCOMMAND ...``, or ``titanlite --section.key=value ...``, which trains."""

from __future__ import annotations

import importlib
import sys

from titanlite import __version__
from titanlite.registry import nearest

SUBCOMMANDS = {
    "train": "train a model; also the meaning of options without a subcommand",
    "generate": "let a trained model continue a text",
    "convert": "turn a checkpoint into a Hugging Face folder, or the other way round",
    "tokenizer": "train a tokenizer, or download one",
}


def usage() -> str:
    width = max(map(len, SUBCOMMANDS))
    lines = (f"    titanlite {name:<{width}}  {text}" for name, text in SUBCOMMANDS.items())
    return "\n".join(["usage:", *lines, "", "titanlite SUBCOMMAND --help says more of each; titanlite --version."])


def main() -> int:
    """Run the subcommand that the arguments name, and return the exit status."""
    argv = sys.argv[1:]
    if argv[:1] in (["--help"], ["-h"], ["help"]):
        print(usage())
        return 0
    if argv == ["--version"]:
        print(f"titanlite {__version__}")
        return 0
    name, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("train", argv)
    if name not in SUBCOMMANDS:
        print(
            f"titanlite: error: {name}: there is no such subcommand{nearest(name, SUBCOMMANDS)}\n{usage()}",
            file=sys.stderr,
        )
        return 2
    status: int = importlib.import_module(f"titanlite.commands.{name}").main(rest)
    return status


if __name__ == "__main__":
    sys.exit(main())
