"""Types with a condition on their values, for the fields of the schema."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Annotated, Any


@dataclass(frozen=True)
class Rule:
    """A condition on the values of an option, part of its type. ``text`` completes the sentence "must be ...".
    ``keywords`` are the same condition in JSON schema, as far as that can say it."""

    text: str
    holds: Callable[[Any], bool]
    keywords: Mapping[str, Any] = field(default_factory=dict, hash=False)


_LARGEST = sys.float_info.max  # infinity is more


Positive = Annotated[int, Rule("at least 1", lambda v: v >= 1, {"minimum": 1})]
NotNegative = Annotated[int, Rule("0 or more", lambda v: v >= 0, {"minimum": 0})]
PositiveOrAuto = Annotated[
    int, Rule("at least 1, or -1 to infer it", lambda v: v >= 1 or v == -1, {"minimum": -1, "not": {"const": 0}})
]
Size = Annotated[int, Rule("from 1 to 16777216", lambda v: 1 <= v <= 1 << 24, {"minimum": 1, "maximum": 1 << 24})]
Layers = Annotated[int, Rule("from 1 to 10000", lambda v: 1 <= v <= 10_000, {"minimum": 1, "maximum": 10_000})]
Share = Annotated[
    float, Rule("more than 0, and at most 1", lambda v: 0 < v <= 1, {"exclusiveMinimum": 0, "maximum": 1})
]
Percentage = Annotated[
    float, Rule("more than 0 and below 100", lambda v: 0 < v < 100, {"exclusiveMinimum": 0, "exclusiveMaximum": 100})
]
Fraction = Annotated[float, Rule("between 0 and 1", lambda v: 0 <= v <= 1, {"minimum": 0, "maximum": 1})]
Beta = Annotated[float, Rule("at least 0 and below 1", lambda v: 0 <= v < 1, {"minimum": 0, "exclusiveMaximum": 1})]
NotNegativeFloat = Annotated[
    float, Rule("0 or more, and finite", lambda v: 0 <= v < math.inf, {"minimum": 0, "maximum": _LARGEST})
]
PositiveFloat = Annotated[
    float, Rule("more than 0, and finite", lambda v: 0 < v < math.inf, {"exclusiveMinimum": 0, "maximum": _LARGEST})
]
Limit = Annotated[float, Rule("more than 0; inf is no limit", lambda v: v > 0, {"exclusiveMinimum": 0})]
Scale = Annotated[
    float, Rule("from 1e-30 to 1e30, for float32", lambda v: 1e-30 <= v <= 1e30, {"minimum": 1e-30, "maximum": 1e30})
]
Seconds = Annotated[int, Rule("from 1 to 1000000000", lambda v: 1 <= v <= 10**9, {"minimum": 1, "maximum": 10**9})]
Int32 = Annotated[
    int, Rule("from 0 to 2147483647", lambda v: 0 <= v < 1 << 31, {"minimum": 0, "maximum": (1 << 31) - 1})
]


def is_inner(value: str) -> bool:
    path = PurePath(value)
    return value.strip() != "" and path.parts != () and not path.is_absolute() and ".." not in path.parts


def _can_be_looked_up(value: str) -> bool:
    path = os.path.expanduser(value)
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        pass
    except OSError:
        return False
    return not path.startswith("~")


# A relative path is relative to the current folder; in config.toml of a run folder, to that folder.
PATH = Rule(
    "a path that can be looked up: at most 255 bytes between two slashes, a ~ that names a user, links that end, "
    "folders that may be searched",
    _can_be_looked_up,
)
AnyPath = Annotated[str, PATH]
InnerFolder = Annotated[
    str,
    Rule(
        "the relative path of a folder inside the run folder",
        is_inner,
        {"pattern": r"^(?!/)(?!(.*/)?\.\.(/|$))(?!(\./*)*\.?$)(?!\s*$)"},
    ),
]


def _is_name(value: str) -> bool:
    plain = value.isprintable() and value.strip() == value and "/" not in value and "\\" not in value
    return plain and 0 < len(value.encode()) <= 200 and not value.startswith(".")


Name = Annotated[
    str,
    Rule(
        "a name of at most 200 bytes, without slashes, that does not begin with a dot",
        _is_name,
        {"minLength": 1, "maxLength": 200, "pattern": r"^[^.\s/\\]([^/\\]*[^\s/\\])?$"},
    ),
]


def _is_ac_option(value: str) -> bool:
    return value == "op" or (value.isdecimal() and int(value) >= 1)


CheckpointOption = Annotated[
    str, Rule('"op", or a whole number from 1 as a string', _is_ac_option, {"pattern": "^(op|0*[1-9][0-9]*)$"})
]
LoadStep = Annotated[int, Rule("0 or more, or -1 for the latest", lambda v: v >= -1, {"minimum": -1})]
PositiveOrAll = Annotated[
    int,
    Rule(
        "at least 1; -1 (all) only if nothing is validated",
        lambda v: v >= 1 or v == -1,
        {"minimum": -1, "not": {"const": 0}},
    ),
]
