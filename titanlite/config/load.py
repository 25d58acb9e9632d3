"""Read the command line and TOML files into one validated :class:`JobConfig`.

Precedence: command line > TOML file > its ``base = "other.toml"`` > defaults. Every message names the key, its
origin, the rule, and the nearest valid name. Nothing in this module imports torch, so that ``--help`` and errors appear
at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import tomli

from titanlite.config import packaged
from titanlite.config.aliases import Options, Values, present_names, with_aliases
from titanlite.config.options import Option, options_of, sections_of
from titanlite.config.run_config import CONFIG, RUN_FOLDER, folder_named_in, located, older_run_folder
from titanlite.config.schema import JobConfig
from titanlite.config.third_party import import_module, merge
from titanlite.config.unsupported import UNSUPPORTED
from titanlite.environment import CONFIG_FILE
from titanlite.errors import ConfigError
from titanlite.registry import nearest

_DUMP_FOLDER = "job.dump_folder"
_MOVED = "before the folder was moved"


def load_config(argv: Sequence[str], default_file: str | None = None) -> JobConfig:
    """Load the configuration of a command line.

    Args:
        argv: the arguments, without the program's name. ``--help`` prints and exits.
        default_file: the TOML file to use if the arguments name none.

    Raises:
        ConfigError: an unknown section or key, a wrong type or value, an unreadable file.
    """
    config_class = _config_class(argv, default_file)
    options = with_aliases(options_of(config_class))  # type: ignore[arg-type]
    notices: list[str] = []
    arguments = present_names(_read_arguments(options, argv), options, notices)
    file, origin = arguments.get("job.config_file", (default_file, CONFIG_FILE))
    values, run_config = _read_file(options, file, origin, notices) if file else ({}, None)
    values |= arguments
    folder, place = values.get(_DUMP_FOLDER, ("", ""))
    if folder is None:
        raise ConfigError(
            f'{place}: {RUN_FOLDER} = "." stands for the folder of {CONFIG}, and this is a copy under another name; '
            "give it a run folder: write [job] dump_folder in its place, or add --job.dump_folder"
        )
    if place.endswith(_MOVED):
        notices.append(f"the run goes on in {folder}, the folder of its {CONFIG} ({place})")
    built: dict[str, Any] = {}
    for section, cls in reversed(sections_of(config_class).items()):  # those in a section come before it
        keys = options_of(config_class)[section]  # type: ignore[arg-type]
        assigned = {key: values[opt.name][0] for key, opt in keys.items() if opt.name in values}
        inner = {name.rpartition(".")[2]: built.pop(name) for name in [*built] if name.rpartition(".")[0] == section}
        built[section] = cls(**assigned, **inner)
    config = config_class(**built)
    if file:
        config.job.config_file = file
    config.origins = {name: origin for name, (_, origin) in values.items()}
    config.notices = notices
    config.run_config = run_config
    return config


# ---- the TOML file and its bases


def _parse_toml(path: Path, named_by: str) -> tuple[dict[str, Any], str]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{named_by}: there is no file {path} (relative to {Path.cwd()}), "
            f"and none of this name comes with titanlite{_near_file(path)}; these do: {', '.join(packaged.names())}"
        ) from None
    except (OSError, ValueError) as e:
        raise ConfigError(f"{named_by}: {path} cannot be read: {e}") from None
    try:
        return tomli.loads(text), text
    except tomli.TOMLDecodeError as e:
        match = re.search(r"\(at (line \d+), column \d+\)$", str(e))
        line = match[1] if match else f"line {len(text.splitlines())}"  # the other case: "at end of document"
        raise ConfigError(f"{path}, {line}: not valid TOML: {e}") from None
    except (ValueError, RecursionError) as e:  # a number of thousands of digits, thousands of brackets
        raise ConfigError(f"{path}: no TOML of a configuration: {e}; correct the file") from None


def _near_file(path: Path) -> str:
    beside = [file.name for file in path.parent.glob("*.toml")] if path.parent.is_dir() else []
    return nearest(path.name, [*packaged.names(), *beside])


def _lines_of(text: str) -> dict[str, int]:
    """Return the line number of each ``[section]`` and ``section.key``, for messages."""
    lines: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\[?\s*([\w.\-\"']+)\s*\]", line):
            section = header[1].strip("\"'")
            lines.setdefault(section, number)
        elif key := re.match(r"\s*([\w.\-\"']+)\s*=", line):
            lines.setdefault(f"{section}.{key[1].strip(chr(34) + chr(39))}".lstrip("."), number)
    return lines


def _file_chain(file: str, origin: str, notices: list[str]) -> list[tuple[Path, dict[str, Any], str]]:
    """Read the file and its bases; the last base is the first in the list."""
    chain: list[tuple[Path, dict[str, Any], str]] = []
    named_by = f'job.config_file = "{file}" ({origin})'
    path = _resolve(Path(os.path.expanduser(file)), file, named_by, notices)
    while True:
        if any(os.path.realpath(path) == os.path.realpath(earlier) for earlier, _, _ in chain):
            circle = " -> ".join(str(p) for p, _, _ in [*chain, (path, {}, "")])
            raise ConfigError(f"{named_by}: the base files go in a circle: {circle}")
        tree, text = _parse_toml(path, named_by)
        chain.append((path, tree, text))
        base = tree.pop("base", None)
        if base is None:
            return chain[::-1]
        named_by = f"{path}, line {_lines_of(text).get('base', '?')}: base = {base!r}"
        if not isinstance(base, str):
            raise ConfigError(f"{named_by}: must be a string, the path of a TOML file relative to this one")
        path = _resolve(path.parent / base, base, named_by, notices)


def _resolve(path: Path, name: str, named_by: str, notices: list[str]) -> Path:
    """Return ``path``; if there is no such file, the one that comes with titanlite as ``name``, or as the last part of
    ``name``, if there is one."""
    known = packaged.find(name)
    if os.path.exists(path) and not (known and os.path.isdir(path)):  # a run folder may have the name of its file
        return path
    if known is None and path.suffix == ".toml" and (known := packaged.find(path.stem)):
        notices.append(f"{named_by}: there is no such file; {known}, which comes with titanlite, takes its place")
    return Path(known) if known else path


def _place(path: Path, lines: Mapping[str, int], name: str) -> str:
    return f"{path}, line {lines[name]}" if name in lines else str(path)


def _tables(options: Options, tree: dict[str, Any], outer: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the name and the content of each section; [a.b] is one of the name "a.b" if there is such a section."""
    for name, table in tree.items():
        section = f"{outer}{name}"
        inner = {}
        if isinstance(table, dict) and any(s.startswith(f"{section}.") for s in options):
            known = options.get(section)
            inner = {key: value for key, value in table.items() if known is None or f"{section}.{key}" in options}
            yield from _tables(options, inner, f"{section}.")
            if known is None:
                continue
            table = {key: value for key, value in table.items() if key not in inner}
        yield section, table


def _read_file(options: Options, file: str, origin: str, notices: list[str]) -> tuple[Values, Path | None]:
    """Return the values of the file and its bases, and the one of these files that is a run folder's."""
    values: Values = {}
    run_config = None
    for path, tree, text in _file_chain(file, origin, notices):
        location = partial(_place, path, _lines_of(text))
        in_this_file: Values = {}
        folder = None
        if RUN_FOLDER in tree:
            place = location(RUN_FOLDER)
            folder, run_config = folder_named_in(path, tree.pop(RUN_FOLDER), place), path
            values[_DUMP_FOLDER] = (None if folder is None else str(folder), place)
        for section, table in _tables(options, tree):
            if not isinstance(table, dict):
                if section in options:
                    raise ConfigError(f"{location(section)}: {section} is a section: it must be written [{section}]")
                keys = [opt.name for known in options.values() for opt in _listed(known) if opt.key == section]
                hint = f'; "{section}" belongs to the section [{keys[0].split(".")[0]}]' if keys else ""
                raise ConfigError(f"{location(section)}: the key {section} stands outside of any section{hint}")
            if section not in options:
                raise ConfigError(f"{location(section)}: unknown section [{section}]{_near_section(options, section)}")
            for key, value in table.items():
                name = f"{section}.{key}"
                option = options[section].get(key) or _unknown(options, section, key, location(name))
                if name == "job.config_file":
                    raise ConfigError(
                        f'{location(name)}: a file builds on another with base = "other.toml", not with {name}'
                    )
                converted = option.convert(value, location(name))
                if folder is not None and option.is_path:
                    converted = located(converted, folder)
                in_this_file[name] = (converted, location(name))
        values.update(present_names(in_this_file, options, notices))
        if folder is None and (older := older_run_folder(path, text)) is not None:
            run_config = path
            named, place = values.get(_DUMP_FOLDER, ("", ""))
            if os.path.realpath(os.path.expanduser(named or "")) != os.path.realpath(older):
                values[_DUMP_FOLDER] = (str(older), f'{place}: "{named}" {_MOVED}')
    return values, run_config


# ---- the command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"the command line: {message}")


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=6, width=110)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(value) or "(empty)"
    return {None: "unset", "": "(empty)"}.get(value, str(value))


def _parser(options: Options) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="titanlite",
        usage="./run_train.sh [--section.key=value ...]   or: titanlite train [FILE] [--section.key=value ...]",
        description="Pre-train a language model. Every option is also a key of the TOML file that CONFIG_FILE or "
        "--job.config_file names; the command line wins. Lists are separated by commas. A boolean option is "
        'switched on by its name and off by "=false" or --section.no-key.',
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("-h", "--help", action="help", help="Show this text and exit.")
    for section, keys in options.items():
        group = parser.add_argument_group(f"[{section}]")
        for opt in keys.values():
            kind = "{true,false}" if opt.base is bool else opt.base.__name__
            meta = "{" + ",".join(opt.choices) + "}" if opt.choices and opt.base is not list else kind
            rule = f" Must be {opt.rule.text}." if opt.rule else ""
            text = f"{opt.help}{rule} Default: {_shown(opt.default)}.".replace("%", "%%")
            if opt not in _listed(keys):
                text = argparse.SUPPRESS
            if opt.base is bool:
                group.add_argument(f"--{opt.name}", dest=opt.name, nargs="?", const="true", metavar=meta, help=text)
                group.add_argument(
                    f"--{section}.no-{opt.key}",
                    dest=opt.name,
                    action="store_const",
                    const="false",
                    help=argparse.SUPPRESS,
                )
            else:
                group.add_argument(f"--{opt.name}", dest=opt.name, metavar=meta, help=text)
    return parser


def _read_arguments(options: Options, argv: Sequence[str]) -> Values:
    namespace = _parser(options).parse_args([_checked(options, arg) for arg in argv])
    by_name = {opt.name: opt for opt in _all(options)}
    values: Values = {}
    for name, text in vars(namespace).items():
        origin = f"the argument --{name}"
        values[name] = (by_name[name].parse(text, origin), origin)
    return values


def _underscored(arg: str) -> str:
    """Return the argument with its name in the schema's spelling: seq-len becomes seq_len."""
    name, equals, value = arg.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else arg


def _checked(options: Options, arg: str) -> str:
    """Return the argument in the parser's spelling.

    An unknown argument is refused here with the nearest name, because argparse would only print the whole usage.
    """
    if not arg.startswith("--") or arg == "--help":
        return arg
    name, equals, value = _underscored(arg)[2:].partition("=")
    section, _, key = name.rpartition(".") if name.rpartition(".")[0] in options else name.partition(".")
    if section not in options:
        flat = "" if key else f"; options are written --section.key, for example --{_find_key(options, name)}"
        raise ConfigError(f"the argument {arg}: unknown section [{section}]{_near_section(options, section)}{flat}")
    if key not in options[section]:
        bare = key.removeprefix("no_")
        if bare == key or bare not in options[section] or options[section][bare].base is not bool:
            _unknown(options, section, key, f"the argument {arg}")
        key = f"no-{bare}"
    return f"--{section}.{key}{equals}{value}"


# ---- names of sections and keys


def _all(options: Options) -> list[Option]:
    return [opt for keys in options.values() for opt in keys.values()]


def _listed(keys: Mapping[str, Option]) -> list[Option]:
    """Return the options of a section that users should know: no aliases, and none that would be refused."""
    return [opt for opt in keys.values() if not opt.alias_of and opt.name not in UNSUPPORTED]


def _near_section(options: Options, section: str) -> str:
    sections = [name for name, keys in options.items() if _listed(keys)]
    return f"{nearest(section, sections)}; the sections are {', '.join(sections)}"


def _find_key(options: Options, key: str) -> str:
    matches = [opt.name for keys in options.values() for opt in _listed(keys) if opt.key == key]
    return matches[0] if matches else "training.steps"


def near_key(key: str, keys: Iterable[str], elsewhere: Sequence[str]) -> str:
    """Return a hint for an unknown key of a section: the first that there is of its ``keys`` with nearly the same
    letters, its keys with all words of the unknown one, the same key in other sections, its keys with some of the
    words, and the nearest one."""
    words = {other: set(other.split("_")) for other in (*keys, key)}
    alike = difflib.get_close_matches(key, list(keys), n=1, cutoff=0.8)
    alike = alike or sorted((other for other in keys if words[key] < words[other]), key=len)[:2]
    alike = alike or [*elsewhere][:2] or [other for other in keys if words[other] < words[key]]
    names = [f'"{name}"' for name in alike]
    return f" (did you mean {' or '.join(names)}?)" if names else nearest(key, keys)


def _unknown(options: Options, section: str, key: str, origin: str) -> NoReturn:
    elsewhere = [opt.name for keys in options.values() for opt in _listed(keys) if opt.key == key]
    known = [opt.key for opt in _listed(options[section])]
    hint = near_key(key, known, elsewhere)
    raise ConfigError(f"{origin}: unknown key {section}.{key}{hint}; [{section}] has {', '.join(known)}")


# ---- keys added by third-party code


def _config_class(argv: Sequence[str], default_file: str | None) -> type[JobConfig]:
    """Return JobConfig, extended by the module that ``experimental.custom_args_module`` names.

    The module's name is needed before the options are known, so the arguments and files are first read only for it.
    """
    name = "experimental.custom_args_module"
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--job.config_file", dest="file")
    parser.add_argument(f"--{name}", dest="module")
    known, _ = parser.parse_known_args([_underscored(arg) for arg in argv])
    run_config = None
    module_origin = f"the argument --{name}"
    file, origin = (default_file, CONFIG_FILE) if known.file is None else (known.file, "the argument --job.config_file")
    if known.module is None and file:
        for path, tree, text in _file_chain(file, origin, []):
            section = tree.get("experimental")
            if isinstance(section, Mapping) and isinstance(section.get("custom_args_module"), str):
                known.module = section["custom_args_module"]
                module_origin = _place(path, _lines_of(text), name)
                run_config = path if RUN_FOLDER in tree or older_run_folder(path, text) else None
    if not known.module:
        return JobConfig
    custom = getattr(import_module(known.module, name, module_origin, run_config), "JobConfig", None)
    if not (isinstance(custom, type) and dataclasses.is_dataclass(custom)):
        raise ConfigError(
            "the module must define a dataclass JobConfig whose fields are sections (dataclasses with defaults)",
            key=name,
            value=known.module,
            origin=module_origin,
        )
    try:
        config_class = merge(custom)
        ours = options_of(JobConfig)
        for section, keys in options_of(config_class).items():  # type: ignore[arg-type]
            for key, option in keys.items():
                if option != ours.get(section, {}).get(key) and not (option.optional and option.default is None):
                    option.convert(option.default, f"the default in {known.module}")
    except (TypeError, NameError) as e:
        raise ConfigError(f"its options cannot be read: {e}", key=name, value=known.module, origin=module_origin) from e
    return config_class
