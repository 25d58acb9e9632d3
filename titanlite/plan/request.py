"""The arguments of a plan: amounts of tokens, layouts written to a file."""

from __future__ import annotations

import re
from pathlib import Path

from titanlite.config import JobConfig, dump_toml
from titanlite.errors import ConfigError
from titanlite.plan.devices import find_device
from titanlite.plan.layouts import Layout, Plan, fixed_plan, make_plan
from titanlite.plan.refusals import check_by_building, check_units, planned_model

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def plan_for(config: JobConfig, device: str, devices: int, *, fixed: bool, top: int) -> Plan:
    """Return the plan of a configuration: of all layouts, or of the configured one.

    Raises:
        ConfigError: there is no such device or model; the trainer would refuse the configured layout; the device
            emulates a number format.
    """
    check_numbers(devices)
    model, target = planned_model(config), find_device(device)
    check_units(config, model.args, target)
    if not fixed:
        return make_plan(config, model, target, devices, top)
    plan = fixed_plan(config, model, target, devices)
    check_by_building(plan.layouts[0].apply(config), devices)
    return plan


def check_numbers(devices: int, top: int | None = None, price: float | None = None) -> None:
    """Raise :class:`ConfigError` for less than one device or layout to show, and for a price below 0."""
    for key, value in (("--devices", devices), ("--top", top)):
        if value is not None and value < 1:
            raise ConfigError("must be at least 1", key=key, value=value)
    if price is not None and not price >= 0:
        raise ConfigError("must be 0 or more", key="--price", value=price)


def tokens_in(text: str) -> float:
    """Return the number of tokens that a text such as "2T", "300B" or "5e9" means.

    Raises:
        ConfigError: it is no such text.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([KMBT]?)", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise ConfigError("must be a number of tokens such as 2T, 300B or 5e9", key="--tokens", value=text)
    return float(match[1]) * _UNITS[match[2].upper()]


def tokens_of(config: JobConfig, plan: Plan, given: str | None) -> float:
    """Return the tokens to train on: those asked for, else those of the configured steps in the first layout."""
    if given is not None:
        return tokens_in(given)
    return float(config.training.steps * plan.layouts[0].work.tokens_per_step) if plan.layouts else 0.0


def chosen(plan: Plan, number: int) -> Layout:
    """Return layout ``number``, from 1.

    Raises:
        ConfigError: there is none.
    """
    if not 1 <= number <= len(plan.layouts):
        raise ConfigError(f"there are {len(plan.layouts)} layouts here", key="--explain", value=number)
    return plan.layouts[number - 1]


def write(config: JobConfig, layout: Layout, file: Path) -> None:
    """Write the configuration with the options of a layout, as a TOML file for the trainer.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        file.write_text(dump_toml(layout.apply(config)), encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"cannot be written ({e.strerror})", key="--write", value=str(file)) from e
