"""``titanlite SUBCOMMAND ...``, or ``titanlite --section.key=value ...``, which trains."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys

from titanlite import __version__
from titanlite.config import packaged
from titanlite.registry import nearest

SUBCOMMANDS = {
    "train": "train a model; also the meaning of options without a subcommand",
    "generate": "let a trained model continue a text",
    "compare": "compare runs: their curves, their configurations, and which loss is lower",
    "config": "print the JSON schema of the TOML files, or what differs between two",
    "evaluate": "compute the loss of text, and the accuracy in a task, of a trained model",
    "plan": "predict the fastest layout for devices that need not be there: time, memory, days, cost",
    "doctor": "examine this machine: what it has, how fast each number format is, what to type",
    "convert": "turn a checkpoint into a Hugging Face folder, or the other way round",
    "tokenizer": "train a tokenizer, or download one",
}


def usage() -> str:
    width = max(map(len, SUBCOMMANDS))
    lines = (f"    titanlite {name:<{width}}  {text}" for name, text in SUBCOMMANDS.items())
    return "\n".join(["usage:", *lines, "", "titanlite SUBCOMMAND --help lists its options; titanlite --version."])


def _hint(name: str) -> str:
    """Return a hint for an unknown subcommand, which may be a configuration."""
    if name.endswith(".toml") or packaged.find(name):
        return f' (did you mean "titanlite train {name}"?)'
    return nearest(name, SUBCOMMANDS) or nearest(name, packaged.names()).replace('"', '"titanlite train ', 1)


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
        print(f"titanlite: error: {name}: there is no such subcommand{_hint(name)}\n{usage()}", file=sys.stderr)
        return 2
    subcommand = importlib.import_module(f"titanlite.commands.{name}")
    status: int
    if name == "train":  # its processes write themselves, and it has a status of its own for each way to end
        status = subcommand.main(rest)
        return status
    try:
        status = subcommand.main(rest)
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read the text, such as head, has ended
        _drop_output()
        status = 1
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _drop_output()
        print(f"titanlite {name}: {e.filename or 'the output'} cannot be written: {e.strerror}", file=sys.stderr)
        status = 1
    return status


def _drop_output() -> None:
    """Write nowhere what is left of the output: else Python complains once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
