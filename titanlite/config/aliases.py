"""Names that options had in torchtitan before or after their present ones.

An alias works wherever the present name does: in a TOML file, in its bases, on the command line. The present name is
the one that ``--help``, messages of checks and the run's config.toml use.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from titanlite.config.number_formats import NUMBER_FORMATS
from titanlite.config.options import Option
from titanlite.errors import ConfigError, shown

Options = dict[str, dict[str, Option]]
Values = dict[str, tuple[Any, str]]  # "section.key" -> (value, its origin)

ALIASES = {
    # until June 2025
    "training.batch_size": "training.local_batch_size",
    "checkpoint.model_weights_only": "checkpoint.last_save_model_weights_only",
    # from June 2025
    **{
        f"{entry.name}.moe_fqns_prototype": f"{entry.name}.moe_fqns"
        for entry in NUMBER_FORMATS
        if entry.from_torchtitan
    },
    # from July 2025
    "checkpoint.last_save_model_only": "checkpoint.last_save_model_weights_only",
    "checkpoint.initial_load_model_only": "checkpoint.initial_load_model_weights_only",
    "checkpoint.last_save_in_safetensors_format": "checkpoint.last_save_in_hf",
    "lr_scheduler.min_lr_factor": "lr_scheduler.lr_min",
    "validation.enabled": "validation.enable",
    "validation.freq": "validation.interval",
    # from August 2025 to February 2026
    "model.hf_assets_path": "model.tokenizer_path",
    "checkpoint.enable": "checkpoint.enable_checkpoint",
    "compile.enable": "training.compile",
    "memory_estimation.enable": "memory_estimation.enabled",
    "job.print_config": "job.print_args",
    "debug.seed": "training.seed",
    "debug.deterministic": "training.deterministic",
}
# The converters of number formats and their sections had longer names too, from October 2025.
CONVERTERS = {f"quantize.linear.{entry.name}": entry.name for entry in NUMBER_FORMATS if entry.from_torchtitan}


def with_aliases(options: Options) -> Options:
    """Return ``options`` together with the aliases, each an option of the type that its present name has. A name that
    ``options`` has already stays what it is."""
    result = {section: dict(keys) for section, keys in options.items()}
    of_formats = {f"{alias}.{key}": f"{name}.{key}" for alias, name in CONVERTERS.items() for key in options[name]}
    for alias, name in {**ALIASES, **of_formats}.items():
        section, key = alias.rsplit(".", 1)
        target = options[name.split(".")[0]][name.split(".")[1]]
        result.setdefault(section, {}).setdefault(key, replace(target, section=section, key=key, alias_of=name))
    return result


def present_names(values: Values, options: Options, notices: list[str]) -> Values:
    """Return the values of one file, or of the command line, under the present names of the options. Add a line to
    ``notices`` for each alias.

    Raises:
        ConfigError: two names of one option have different values.
    """
    result: Values = {}
    for alias, (value, origin) in values.items():
        section, key = alias.rsplit(".", 1)
        name = options[section][key].alias_of or alias
        if name in result and result[name][0] != value:
            other, place = result[name]
            raise ConfigError(
                f"contradicts {shown(other)} ({place}), as both are names of {name}; leave one of them out",
                key=alias,
                value=value,
                origin=origin,
            )
        if name != alias:
            notices.append(f"{alias} ({origin}) is called {name} here")
        if name not in result or name == alias:
            result[name] = value, origin
    if "model.converters" in result:
        converters, origin = result["model.converters"]
        for alias in filter(CONVERTERS.__contains__, converters):
            notices.append(f'the converter "{alias}" ({origin}) is called "{CONVERTERS[alias]}" here')
        result["model.converters"] = [CONVERTERS.get(name, name) for name in converters], origin
    return result
