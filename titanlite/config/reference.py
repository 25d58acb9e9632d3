"""The reference of all options as Markdown, from the schema that loads them."""

from __future__ import annotations

from titanlite.config.options import Option, options_of
from titanlite.config.schema import JobConfig
from titanlite.config.unsupported import UNSUPPORTED
from titanlite.errors import shown

_HEAD = """# Options

Every option, by section of the TOML file; on the command line, `--SECTION.KEY=VALUE`. This page is generated from
the schema (`titanlite config --reference`), which also gives `./run_train.sh --help` and the [JSON
schema](configuration.md#in-an-editor). Older names of options, and keys that are accepted with their default alone,
are in [coming from torchtitan](torchtitan.md).
"""


def option_reference(config_class: type = JobConfig) -> str:
    """Return a page with a table for each section: key, values, default, meaning."""
    parts = [_HEAD]
    for section, options in options_of(config_class).items():  # type: ignore[arg-type]
        rows = [_row(option) for option in options.values() if option.name not in UNSUPPORTED]
        if rows:
            head = f"## {section}\n\n| key | values | default | meaning |\n|---|---|---|---|\n"
            parts.append(head + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _row(option: Option) -> str:
    values = ("a path" if option.is_path else option.expected()) + (", or unset" if option.optional else "")
    default = "" if option.default in (None, "") else f"`{shown(option.default)}`"
    cells = (f"`{option.key}`", values, default, " ".join(option.help.split()))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
