"""The effective configuration as TOML, and ``config.toml`` of a run folder, which refers to the folder that it lies in.

``config.toml`` has no ``job.dump_folder``. It has the line ``run_folder = "."`` before its sections: the run folder is
the one of this file, wherever that is moved, and relative paths in the file are relative to it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli

from titanlite.config.options import options_of
from titanlite.config.schema import JobConfig
from titanlite.config.value_rules import is_inner
from titanlite.errors import ConfigError

CONFIG = "config.toml"
METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
TOKENIZER = "tokenizer"
DATA_IDENTITY = "data_identity.json"  # which text the run reads, for training and for validation
CHANGES = "changes.jsonl"  # which options were others in earlier steps of a run that went on
SAMPLE = "sample.json"
MODEL = "model"  # the weights after the last step of a run without checkpoints
HF_CONFIG = "hf_config"
WANDB = "wandb"  # the runs of Weights & Biases; the package itself chooses the name
EARLIER = "earlier"
HUB = "hub:"  # begins the name of a data set of the Hugging Face hub, where a path can stand too
LOCK = ".lock"
RUN_FOLDER = "run_folder"  # the key in config.toml
_MOST_BYTES = 1 << 20  # of a configuration
_MOST_RUNS = 50  # that are read
_MADE_HERE = ".made-here"
# The files and folders of a run folder whose names no option chooses.
FIXED_NAMES = (
    *(CONFIG, METRICS, VALIDATION, CHANGES, TOKENIZER, DATA_IDENTITY, SAMPLE, MODEL, HF_CONFIG, WANDB, EARLIER, LOCK),
    _MADE_HERE,
)
# The options that choose the names of others.
FOLDERS = (
    ("checkpoint", "folder"),
    ("metrics", "save_tb_folder"),
    ("profiling", "save_traces_folder"),
    ("profiling", "save_memory_snapshot_folder"),
)
_HEADER = "# The effective configuration of this run; it loads again as CONFIG_FILE"


def dump_toml(config: JobConfig) -> str:
    """Return the configuration as TOML that can be loaded again; unset options are omitted."""
    import tomli_w

    return f"{_HEADER}.\n\n{tomli_w.dumps(_sections(config))}"


def write_run_config(config: JobConfig, folder: Path) -> None:
    """Write ``config.toml`` of a run folder; it is there as a whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    import tomli_w

    text = (
        f"{_HEADER}, also where its folder is moved to.\n"
        f"# Relative paths are relative to this file.\n\n{tomli_w.dumps(run_config_of(config, folder))}"
    )
    partial = folder / f".{CONFIG}.partial"
    partial.write_bytes(text.encode())
    partial.rename(folder / CONFIG)


def run_config_of(config: JobConfig, folder: Path) -> dict[str, Any]:
    """Return the content of ``config.toml`` in ``folder``."""
    sections = _sections(config)
    del sections["job"]["dump_folder"]
    for section, options in options_of(type(config)).items():  # type: ignore[arg-type]
        for key in options.keys() & sections.get(section, {}).keys():
            if options[key].is_path:
                sections[section][key] = _movable(sections[section][key], folder)
    return {RUN_FOLDER: ".", **sections}


def _sections(config: JobConfig) -> dict[str, dict[str, Any]]:
    sections = {section: _set_keys(keys) for section, keys in dataclasses.asdict(config).items()}
    # The file is complete, so it must not refer to the file that it was loaded from.
    sections["job"].pop("config_file", None)
    return sections


def _set_keys(section: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a section that are not unset, without sections in it that have none."""
    inner = {key: _set_keys(value) if isinstance(value, dict) else value for key, value in section.items()}
    return {key: value for key, value in inner.items() if value is not None and value != {}}


def _movable(value: str, folder: Path) -> str:
    """Return the path so that it is right from everywhere: relative to ``folder`` if it is inside, else absolute. A
    data set of the hub is no path, and stays as it is."""
    if not value or value.startswith(HUB):
        return value
    path, root = Path(value).expanduser().absolute(), folder.absolute()
    for inner, outer in ((path, root), (Path(os.path.realpath(path)), Path(os.path.realpath(root)))):
        if inner.is_relative_to(outer) and ".." not in inner.parts:
            return str(inner.relative_to(outer))
    try:
        str(path).encode()
    except UnicodeEncodeError:  # the current folder's name is no UTF-8, which TOML cannot hold
        return os.path.relpath(path, root)
    return str(path)


def read_run_config(folder: Path) -> dict[str, Any]:
    """Return the sections of ``config.toml`` in a run folder, unchecked; nothing if it is not there or no TOML."""
    file = folder / CONFIG
    try:
        if not file.is_file() or file.stat().st_size > _MOST_BYTES:  # a pipe would block, a device has no end
            return {}
        tree = tomli.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {section: keys for section, keys in tree.items() if isinstance(keys, dict)}


def read_earlier_runs(folder: Path) -> list[dict[str, Any]]:
    """Return the configurations of the latest runs that were set aside in a run folder."""
    aside = sorted((folder / EARLIER).glob(f"*/{CONFIG}"))[-_MOST_RUNS:]
    return [tree for tree in (read_run_config(file.parent) for file in aside) if tree]


def section_in(tree: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    """Return a section of :func:`read_run_config`, or one in another ("outer.inner"); empty if there is none."""
    table: Any = tree
    for name in section.split("."):
        table = table.get(name) if isinstance(table, Mapping) else None
    return table if isinstance(table, Mapping) else {}


def inner_folder(tree: Mapping[str, Any], section: str, key: str) -> str:
    """Return the folder in the run folder that an option of :func:`read_run_config` names; empty if it names none."""
    name = tree.get(section, {}).get(key)
    return name if isinstance(name, str) and is_inner(name) else ""


def folder_named_in(file: Path, value: Any, place: str) -> Path | None:
    """Return the run folder that ``run_folder = value`` in ``file`` names; None in a copy under another name, which is
    of no run.

    Raises:
        ConfigError: the value is no path.
    """
    if not isinstance(value, str):
        raise ConfigError(f'{place}: {RUN_FOLDER} = {value!r}: must be a path relative to this file, such as "."')
    real = Path(os.path.realpath(file)) if file.is_symlink() else file
    return real.parent / value if real.name == CONFIG else None


def older_run_folder(file: Path, text: str) -> Path | None:
    """Return the folder of ``file`` if it is the ``config.toml`` of a run that an older titanlite made. Its ``text``
    names the run folder by the path that it had then. None if it is another file."""
    real = Path(os.path.realpath(file)) if file.is_symlink() else file
    is_older = real.name == CONFIG and text.startswith(_HEADER) and (real.parent / METRICS).is_file()
    return real.parent if is_older else None


def located(value: str, folder: Path) -> str:
    """Return a path of ``config.toml`` in ``folder`` as it is from here; a data set of the hub as it is."""
    return str(folder / value) if value and not value.startswith(("~", HUB)) else value


def mark_as_made_here(folder: Path) -> None:
    """Leave a mark in a run folder that this user makes. The mark names its own inode, so a copy, a download and an
    archive's content do not have it, and a folder that is moved on its file system does."""
    path = folder / _MADE_HERE
    path.unlink(missing_ok=True)
    with path.open("x") as file:
        file.write(f"{os.fstat(file.fileno()).st_ino}\n")


def was_made_here(folder: Path) -> bool:
    """Return whether this user has made the run folder, here; see :func:`mark_as_made_here`."""
    path = folder / _MADE_HERE
    try:
        status = path.lstat()
        return status.st_uid == os.getuid() and path.read_text() == f"{status.st_ino}\n"
    except (OSError, UnicodeDecodeError):
        return False
