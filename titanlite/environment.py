"""The environment variables that titanlite reads or sets, beside torchrun's own; and what is installed."""

import importlib.util
import os
import sys
import zlib

NGPU = "NGPU"  # processes on this machine
NNODES = "NNODES"  # machines; on each a launcher with the same NNODES, NGPU, RDZV_ENDPOINT and arguments
RDZV_ENDPOINT = "RDZV_ENDPOINT"  # where the launchers of several machines meet: host:port, on one of them
RDZV_ID = "RDZV_ID"  # tells this run from others that meet there
COMM_MODE = "COMM_MODE"  # fake: estimate what NGPU devices would need, without them
CONFIG_FILE = "CONFIG_FILE"  # the TOML file, where --job.config_file does not name one
COMMAND = "TITANLITE_COMMAND"  # how the user started this, for messages
CACHE_DIR = "TITANLITE_CACHE_DIR"  # what is kept between runs; by default titanlite in XDG_CACHE_HOME or ~/.cache
LOG_RANK = "LOG_RANK"  # the ranks that log to the console, separated by commas

SAID = "TITANLITE_SAID"  # numbers of the messages that this process or its launcher has shown

# Set by the launcher for its workers: a folder through which it asks them to stop, and they tell it their errors.
LAUNCH_DIR = "TITANLITE_LAUNCH_DIR"
LAUNCHER_PID = "TITANLITE_LAUNCHER_PID"


def say_once(text: str) -> None:
    """Print a message to stderr, once in a run: not again in the processes that this one starts, and from rank 0."""
    number = str(zlib.crc32(text.encode("utf-8", "surrogateescape")))
    said = os.environ.get(SAID, "").split(",")
    if number not in said and os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
        os.environ[SAID] = ",".join([*filter(None, said), number])


def is_installed(package: str) -> bool:
    """Return whether a package can be imported. A folder of that name without Python files is none: wandb leaves its
    runs in ``./wandb``, which Python would import."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None
