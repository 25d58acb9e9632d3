"""The reader of pickles reads as Python's own, whole files and damaged ones, and holds its bounds."""

from __future__ import annotations

import io
import pickle
import random
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from titanlite.errors import ConfigError
from titanlite.untrusted.pickles import Record, read_pickle
from titanlite.untrusted.rows import Kept

KINDS = {"torch.Size"}


class Made:
    """An object as Python's own reader makes it."""

    args: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *args: Any) -> Made:
        made = super().__new__(cls)
        made.args = args
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


class OwnReader(pickle._Unpickler):  # type: ignore[name-defined]
    dispatch: ClassVar = {**pickle._Unpickler.dispatch, pickle.FRAME[0]: lambda self: self.read(8)}  # as the one in C

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in KINDS:
            raise pickle.UnpicklingError(name)
        return Made

    def persistent_load(self, pid: Any) -> Any:
        return pid


def random_value(draw: random.Random, shared: list[Any], depth: int = 5) -> Any:
    if shared and draw.random() < 0.2:
        return draw.choice(shared)
    count = draw.choice((0, 1, 2, 3, 4, 9))
    kind = draw.randrange(9 if depth else 5)
    if kind == 0:
        return draw.choice((None, True, False))
    if kind == 1:
        return draw.choice((0, -1, 255, 256, 65_535, 65_536, 1 << 31, -(1 << 31), draw.getrandbits(200)))
    if kind == 2:
        value: Any = "h\x94j\x94ü\n"[:count] * draw.choice((1, 1, 60))
    elif kind < 5:
        value = torch.Size(draw.randrange(1 << 20) for _ in range(count))
    else:
        values = [random_value(draw, shared, depth - 1) for _ in range(count)]
        value = (tuple(values), values, {f"key {i}": v for i, v in enumerate(values)}, [values])[kind - 5]
    shared.append(value)
    return value


def same(value: Any, of_python: Any, seen: set[tuple[int, int]]) -> bool:
    """Return whether two values are equal, objects of other classes by their parts; they may hold themselves."""
    if (id(value), id(of_python)) in seen:
        return True
    seen.add((id(value), id(of_python)))
    if isinstance(value, type):
        return isinstance(of_python, type)
    if isinstance(value, Record):
        return isinstance(of_python, Made) and same((value.args, value.state), (of_python.args, of_python.state), seen)
    if type(value) is not type(of_python):
        return False
    if isinstance(value, dict):
        value, of_python = [*value.items()], [*of_python.items()]
    if isinstance(value, (list, tuple)):
        return len(value) == len(of_python) and all(same(a, b, seen) for a, b in zip(value, of_python))
    return value == of_python


def damaged(data: bytes, draw: random.Random) -> bytes:
    at, end, other = (draw.randrange(len(data)) for _ in range(3))
    part = data[other : other + draw.randrange(1, 9)]
    return draw.choice(
        (
            data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :],
            data[:at] + part + data[at:],
            data[:at] + part + data[at + len(part) :],
            data[: min(at, end)] + data[max(at, end) :],
            data[:at] + b".",
        )
    )


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_values_are_those_of_pythons_own_reader(protocol: int) -> None:
    draw, read = random.Random(protocol), 0
    for i in range(60):
        shared: list[Any] = []
        value = [random_value(draw, shared) for _ in range(draw.choice((1, 3, 200 if i % 10 == 0 else 5)))]
        data = pickle.dumps(value, protocol=protocol)
        assert same(read_pickle(data, KINDS, Path()), OwnReader(io.BytesIO(data)).load(), set())
        for _ in range(40 if len(data) < 2000 else 5):
            changed = damaged(data, draw)
            try:
                value = read_pickle(changed, KINDS, Path())
            except ConfigError:
                continue
            read += 1
            assert same(value, OwnReader(io.BytesIO(changed)).load(), set()), changed
    assert read > 100


# ---- rows


class Box:
    def __init__(self, offsets: torch.Size, sizes: torch.Size) -> None:
        self.offsets, self.sizes = offsets, sizes


class Place:
    def __init__(self, name: str, index: int | None, offset: Any, **more: Any) -> None:
        self.name, self.index, self.offset = name, index, offset
        self.__dict__ |= more


ROWS = {f"{__name__}.Box": ("offsets", "sizes"), f"{__name__}.Place": ("name", "index", "offset", "more")}
STATES = {kind: Kept(fields, lambda *values: [*values, None, None, None][:4], True) for kind, fields in ROWS.items()}


class OwnReaderOfRows(OwnReader):
    def find_class(self, module: str, name: str) -> Any:
        kind = f"{module}.{name}"
        return type("Row", (MadeRow,), {"fields": ROWS[kind]}) if kind in ROWS else super().find_class(module, name)


class MadeRow(Made):
    fields: tuple[str, ...]

    def __setstate__(self, state: Any) -> None:
        values = map(state.get, self.fields) if isinstance(state, dict) else [None] * 4
        self.state = [*values, None, None, None][:4]


def random_rows(draw: random.Random) -> Any:
    names = ["model.é"[: draw.randrange(6, 8)], "model.w", "", "n" * draw.choice((100, 300))]
    dims = draw.choice((1, 2, 3, 5))

    def size() -> torch.Size:
        return torch.Size(draw.choice((0, 3, 400, 70_000, 1 << 33, 1 << 60)) for _ in range(dims))

    boxes = [Box(size(), size()) for _ in range(draw.randrange(80))]
    places: dict[Any, Any] = {}
    for i in range(draw.randrange(80)):
        offset = draw.choice(boxes).offsets if boxes and draw.random() < 0.1 else size()
        more = {"more": True} if draw.random() < 0.05 else {}
        index = draw.choice((None, i, -1, 1 << 40))
        places[Place(draw.choice(names), index, offset, **more)] = Place(
            "".join([*draw.choice(names)]), 0, 5_000_000_000
        )
    return boxes, places, draw.sample(boxes, draw.choice((0, len(boxes) // 20)))


def test_rows_are_those_of_pythons_own_reader() -> None:
    read = 0
    for seed in range(60):
        draw = random.Random(seed)
        data = pickle.dumps(random_rows(draw), protocol=draw.choice((2, 4, 4, 5)))
        kinds = {*KINDS, *ROWS}
        assert same(read_pickle(data, kinds, Path(), states=STATES), OwnReaderOfRows(io.BytesIO(data)).load(), set())
        for _ in range(30):
            changed = damaged(data, draw)
            try:
                value = read_pickle(changed, kinds, Path(), states=STATES)
            except ConfigError:
                continue
            read += 1
            assert same(value, OwnReaderOfRows(io.BytesIO(changed)).load(), set()), changed
    assert read > 100


@pytest.mark.parametrize(
    "data",
    [
        b"]\x94q\x05.",  # MEMOIZE and BINPUT: the number of the one depends on those of the other
        b"]\x94j\x05\x00\x00\x00.",  # an object that was not numbered
        b"]h\x00.",
        b"ctorch\nSize\n]R.",  # arguments that are no tuple
        b"ctorch\nSize\n]\x81.",
        b"]]\x81.",  # an object of no class
        b"]]R.",
        b"]}b.",  # a state of no object
        b"ctorch\nSize\n}b.",
        b"K\x01(.",  # below a mark
        b"e.",
        b"}(N",
        b"}(X\x01\x00\x00\x00au.",  # a key without a value
        b"](K\x01u.",
        b"}(K\x01e.",
        b"}K\x01K\x01s.",
        b"]\x80\x06.",
        b"ctorch",
        b"NN\x93.",
        b"\x8a\xff.",
        b"F1.5\n.",
    ],
)
def test_what_no_writer_makes(data: bytes) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_pickle(b"\x80\x04" + data, KINDS, Path())


@pytest.mark.parametrize(
    "data",
    [
        b"]" * 1_000_000 + b"a" * 999_999,
        b")" + b"\x85" * 1_000_000,
        b"ctorch\nSize\nq\0" * 100_000 + b")" + b"R\x85" * 99_999,
    ],
)
def test_deep_values_are_let_go_of(data: bytes) -> None:
    value = read_pickle(b"\x80\x04" + data + b".", KINDS, Path())
    assert isinstance(value, (list, tuple))
    del value


def test_objects_are_kept_where_they_are_asked_for_again() -> None:
    """Only those are: bytes of a text may look as if they asked for more."""
    texts = [f"{i} j\x05\x01\x00\x00" for i in range(1000)]
    again = [texts[i] for i in (0, 255, 256, 257, 999)]
    for protocol in (2, 4):
        assert read_pickle(pickle.dumps((texts, again), protocol), KINDS, Path()) == (texts, again)
