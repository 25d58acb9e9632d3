"""The rules of the house, read from the code itself: which room may import which, that no code stands twice, and that
no function is swapped on an instance."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.support.repetitions import repetitions

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "titanlite"

# From the roof down. A room imports from itself and from what stands below it; rooms of one floor do not know each
# other.
FLOORS = (
    ("commands",),
    ("train",),
    ("doctor",),
    ("plan", "compare"),
    ("training",),
    ("launch", "inference"),
    ("converters",),
    ("distributed",),
    ("checkpoint", "metrics"),
    ("data", "optim"),
    ("config",),
    ("float8", "models"),
    ("quant", "registry", "untrusted"),
    ("errors", "environment"),
)
# At the root lie these modules; everything else is in a room.
ROOT_MODULES = {"__init__", "train", "errors", "registry", "environment"}


def name_of(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, Path]:
    """The files of the package by module name; those of models/, which is a link there, once."""
    package = {name_of(path): path for path in PACKAGE.rglob("*.py") if "models" not in path.parts}
    models = {f"titanlite.{name_of(path)}": path for path in (REPOSITORY / "models").rglob("*.py")}
    return package | models


SOURCES = sources()


class Import(NamedTuple):
    module: str
    at_start: bool  # when the importing module is itself imported, not later inside a function


def walk(node: ast.AST, at_start: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, at_start
        for_types = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        later = for_types or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from walk(child, at_start and not later)


def imports_in(tree: ast.AST, module: str, is_package: bool, known: Iterable[str]) -> set[Import]:
    """What a module imports; ``from package import name`` is the module ``package.name`` where there is one."""
    imports = set()
    for node, at_start in walk(tree):
        if isinstance(node, ast.Import):
            imports |= {Import(alias.name, at_start) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            source = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                imports.add(Import(inner if inner in known else source, at_start))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            # A name made at run time counts as far as it is fixed: f"models.{name}.spec" is "models.".
            named = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if isinstance(named, ast.Constant):
                imports.add(Import(str(named.value).rstrip("."), at_start))
    return imports


@cache
def imports_of() -> dict[str, set[Import]]:
    """Those of each module."""
    return {
        name: imports_in(ast.parse(path.read_text()), name, path.name == "__init__.py", SOURCES)
        for name, path in SOURCES.items()
    }


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def titanlite(*rooms: str) -> tuple[str, ...]:
    return tuple(f"titanlite.{room}" for room in rooms)


def breaches(importers: Iterable[str], *forbidden: str) -> list[str]:
    return [
        f"{module} imports {imported.module}"
        for module in SOURCES
        if within(module, *importers)
        for imported in imports_of()[module]
        if within(imported.module, *forbidden)
    ]


def test_imports_are_read_as_python_reads_them() -> None:
    source = """
import a.b, c
from p import q, other
from . import sibling
from .. import uncle
from .near import name
if TYPE_CHECKING:
    import for_types
def f():
    from late import x
    importlib.import_module(f"models.{x}.spec")
"""
    imports = imports_in(ast.parse(source), "one.two.three", False, ["p.q", "one.two.sibling", "one.uncle"])
    start = {"a.b", "c", "p.q", "p", "one.two.sibling", "one.uncle", "one.two.near"}
    later = {"for_types", "late", "models"}
    assert imports == {Import(name, True) for name in start} | {Import(name, False) for name in later}


def test_every_module_lies_in_a_room() -> None:
    rooms = {room for floor in FLOORS for room in floor}
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT_MODULES
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders | ROOT_MODULES - {"__init__"} == rooms
    assert any(Import("titanlite.config", True) in imports for imports in imports_of().values())


@pytest.mark.parametrize("floor", range(len(FLOORS)), ids=[" ".join(floor) for floor in FLOORS])
def test_imports_point_down(floor: int) -> None:
    above = [room for rooms in FLOORS[:floor] for room in rooms]
    for room in FLOORS[floor]:
        beside = [other for other in FLOORS[floor] if other != room]
        assert breaches(titanlite(room), *titanlite(*above, *beside)) == []


def test_no_room_knows_a_family_by_name() -> None:
    families = [name for name in SOURCES if name.startswith("titanlite.models.") and name.endswith(".spec")]
    families = [name.removesuffix(".spec") for name in families if name != "titanlite.models.spec"]
    assert families
    others = [name for name in SOURCES if not within(name, *families)]
    assert [b for b in breaches(others, *families) if not within(b.split()[0], *families)] == []


@pytest.mark.parametrize(("room", "others"), [("quant", ()), ("float8", ("quant",))])
def test_number_formats_stand_alone(room: str, others: tuple[str, ...]) -> None:
    inside = [name for name in SOURCES if within(name, f"titanlite.{room}")]
    allowed = (*sys.stdlib_module_names, "torch", "triton", *titanlite(room, *others))
    assert [
        f"{name}: {i.module}" for name in inside for i in imports_of()[name] if not within(i.module, *allowed)
    ] == []


@pytest.mark.parametrize("number_format", ["float8", "int8", "mx"])
def test_one_converter_and_the_library_know_a_number_format(number_format: str) -> None:
    """A number format is its files in quant/, its converter, and the rules of its section, whose options and their help
    the schema has."""
    allowed = titanlite(
        *("converters", f"converters.{number_format}", f"converters.{number_format}_inference"),
        *(f"config.{number_format}_rules", "config.schema", "config.format_sections"),
        *("config.number_formats", "config.unsupported"),
    )
    code = {name: code_of(path) for name, path in SOURCES.items() if not within(name, *titanlite("quant", "float8"))}
    # The dtypes are those of torch and numpy.
    dtypes = re.compile(r"(torch|np)\.(float8_|u?int8)")
    named = {name for name, text in code.items() if number_format in dtypes.sub("", text).lower()}
    assert named - {*allowed} == set()


def code_of(path: Path) -> str:
    """The file without its docstrings, comments and longer texts, which are messages and help."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            node.value = ""
    return ast.unparse(tree)


def test_nothing_imports_torchao_at_run_time() -> None:
    assert breaches(["titanlite"], "torchao") == []


def test_layers_know_torch_and_each_other() -> None:
    inside = [name for name in SOURCES if within(name, "titanlite.models.layers")]
    allowed = (*sys.stdlib_module_names, "torch", "titanlite.models.layers")
    assert [
        f"{name}: {i.module}" for name in inside for i in imports_of()[name] if not within(i.module, *allowed)
    ] == []
    assert breaches(inside, "torch.distributed") == []


def test_the_configuration_is_read_without_torch() -> None:
    light = titanlite("commands", "config", "errors", "registry", "environment", "launch")
    slow = ("torch", "numpy", "datasets", "tokenizers", "tensorboard", *titanlite("data", "distributed", "metrics"))
    at_start = [
        f"{name} imports {i.module}"
        for name in SOURCES
        if within(name, *light)
        for i in imports_of()[name]
        if i.at_start and within(i.module, *slow)
    ]
    assert at_start == []


def test_no_import_cycles() -> None:
    """No circle, and none that is hidden in a function or behind TYPE_CHECKING."""

    def parents(module: str) -> set[str]:
        parts = module.split(".")
        return {".".join(parts[:i]) for i in range(1, len(parts) + 1)}

    graph: dict[str, set[str]] = {}
    for name, imports in imports_of().items():
        loaded = set().union(*(parents(i.module) for i in imports)) & SOURCES.keys()
        # A package is loaded before what is in it, and may import that: not a cycle by itself.
        graph[name] = loaded - parents(name)
    TopologicalSorter(graph).prepare()


def test_no_two_test_files_share_a_name() -> None:
    """pytest imports a test file by its bare name, and refuses the second of a name only when both are collected."""
    names = [path.name for path in (REPOSITORY / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


# ---- no code stands twice

PRODUCT = SOURCES | {name_of(path): path for path in (REPOSITORY / "scripts").rglob("*.py")}


def test_repeated_code_is_noticed() -> None:
    copied = """
def first(a: int) -> int:
    "A docstring."
    for x in a:
        if x.b:
            y = x.c(1, "text")
        else:
            y = x.d
    return y
"""
    renamed = copied.replace("first", "second").replace("x", "z").replace('"text"', '"another"').replace("int", "str")
    assert repetitions({"one": copied, "two": renamed}) == ["one:2-9 ~ two:2-9"]
    assert repetitions({"one": copied + renamed}) == ["one:2-9 ~ one:11-18"]
    assert repetitions({"one": copied, "two": renamed.replace("y =", "y +=")}) == []
    refusal = "def f():\n    if a:\n        refuse(\n            'key',\n" + 6 * "            'text'\n" + "        )\n"
    table = "class A:\n" + "".join(f"    field_{i}: int = {i}\n" for i in range(8))
    assert repetitions({"one": refusal + table, "two": refusal + table}) == []


def test_no_code_is_repeated() -> None:
    assert repetitions({name: path.read_text() for name, path in SOURCES.items()}) == []


def test_one_loop_over_microbatches() -> None:
    """Benchmarks of titanlite run its own step. Two of them compare it with another loop: a bare one, torchtitan's. A
    third compiles a block alone, a fourth the loss alone, a fifth counts the memory of the loss alone. The doctor times
    layers of 8 numbers."""
    benchmarks = ("loops", "peer_torchtitan", "absent_gpu.block", "absent_gpu.loss", "memory_estimates")
    others = {"titanlite.doctor.cpu_time", *(f"scripts.benchmarks.{name}" for name in benchmarks)}
    calls = {
        name
        for name, path in PRODUCT.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "backward"
    }
    assert calls == {"titanlite.training.step", *others}


# ---- no function is swapped on an instance


def test_no_product_code_imports_mock() -> None:
    imports = {
        name: imports_in(ast.parse(path.read_text()), name, path.name == "__init__.py", PRODUCT)
        for name, path in PRODUCT.items()
    }
    mocks = ("mock", "unittest", "pytest")
    assert [
        f"{name}: {i.module}"
        for name, module_imports in imports.items()
        for i in module_imports
        if within(i.module, *mocks)
    ] == []


MODULE_METHODS = {name for name, _ in inspect.getmembers(torch.nn.Module, inspect.isfunction)}


class Members:
    """The methods of a class, with those that it inherits from ``classes`` and from torch's Module, and its data:
    properties, fields, and what it assigns to ``self`` under other names."""

    def __init__(self, cls: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> None:
        self.methods: set[str] = set()
        self.data = {name for owner, name, _ in assigned(cls) if owner == "self"}
        for base in (ast.unparse(base).split(".")[-1] for base in cls.bases):
            if base in classes and classes[base] is not cls:
                self.methods |= Members(classes[base], classes).methods
            elif base == "Module":
                self.methods |= MODULE_METHODS
        for node in cls.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                is_property = any(
                    "property" in ast.unparse(d) or "setter" in ast.unparse(d) for d in node.decorator_list
                )
                (self.data if is_property else self.methods).add(node.name)
            elif isinstance(node, ast.AnnAssign):
                self.data.add(ast.unparse(node.target))
        self.data -= self.methods


def assigned(tree: ast.AST) -> Iterator[tuple[str, str, int]]:
    """(owner, name, line) of assignments to attributes, by ``=`` and by ``setattr`` with a constant name."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for part in target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]:
                    if isinstance(part, ast.Attribute):
                        yield ast.unparse(part.value), part.attr, node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            owner, name = node.args[:2]
            if isinstance(name, ast.Constant):
                yield ast.unparse(owner), name.value, node.lineno


def swapped_methods(sources: Mapping[str, str]) -> list[str]:
    """Where a method of a class of ours, or of torch's Module, is assigned. ``self`` is of the class that it is in; for
    other owners, a name that any class has as data counts as data."""
    trees = {module: ast.parse(source) for module, source in sources.items()}
    classes = [(m, c) for m, tree in trees.items() for c in ast.walk(tree) if isinstance(c, ast.ClassDef)]
    by_name = {cls.name: cls for _, cls in classes}
    swaps, methods, data = set(), set(MODULE_METHODS), set[str]()
    for module, cls in classes:
        its = Members(cls, by_name)
        methods, data = methods | its.methods, data | its.data
        self_places = (place for place in assigned(cls) if place[0] == "self" and place[1] in its.methods)
        swaps |= {f"{module}:{line}: self.{name}" for _, name, line in self_places}
    for module, tree in trees.items():
        others = (place for place in assigned(tree) if place[0] != "self" and place[1] in methods - data)
        swaps |= {f"{module}:{line}: {owner}.{name}" for owner, name, line in others}
    return sorted(swaps)


def test_swapped_methods_are_noticed() -> None:
    source = """
class A(nn.Module):
    def step(self): ...
    @property
    def size(self): ...
    def __init__(self, other):
        self.forward, self.kept = other, 1
        self.step = other.step
        self.slot = self.size = 1
class B:
    kind: str
    def slot(self): ...
    def run(self): ...
class C(B):
    def keep(self):
        self.run = self.keep
def f(a, b):
    a.forward = b.run
    setattr(b, "run", a)
    b.slot = b.kind = b.unknown = a
"""
    expected = ["m:16: self.run", "m:18: a.forward", "m:19: b.run", "m:7: self.forward", "m:8: self.step"]
    assert swapped_methods({"m": source}) == expected


def test_no_method_is_swapped() -> None:
    """``plan/memory.py``, which replaces two functions of torch's classes to see them being called, says why. The
    benchmark on a GPU that is not there has to take the place of the device."""
    sources = {name: path.read_text() for name, path in PRODUCT.items() if ".absent_gpu." not in name}
    assert swapped_methods(sources) == []
