"""The floors of the house, read from the code's own imports: which room may import which."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "titanlite"

# From the roof down. A room imports from itself and from what stands below it; rooms of one floor do not know each
# other.
FLOORS = (
    ("commands",),
    ("train",),
    ("plan",),
    ("training",),
    ("launch", "inference"),
    ("converters",),
    ("distributed",),
    ("checkpoint", "metrics"),
    ("data", "optim"),
    ("config",),
    ("float8", "models"),
    ("quant", "registry"),
    ("errors", "environment"),
)
# At the root lie these modules; everything else is in a room.
ROOT_MODULES = {"__init__", "train", "errors", "registry", "environment"}


def name_of(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, Path]:
    """The files of the package by module name; those of models/, which is a link there, once."""
    own = {name_of(path): path for path in PACKAGE.rglob("*.py") if "models" not in path.parts}
    models = {f"titanlite.{name_of(path)}": path for path in (REPOSITORY / "models").rglob("*.py")}
    return own | models


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


IMPORTS = {
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
        for imported in IMPORTS[module]
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
    found = imports_in(ast.parse(source), "one.two.three", False, ["p.q", "one.two.sibling", "one.uncle"])
    start = {"a.b", "c", "p.q", "p", "one.two.sibling", "one.uncle", "one.two.near"}
    later = {"for_types", "late", "models"}
    assert found == {Import(name, True) for name in start} | {Import(name, False) for name in later}


def test_every_module_lies_in_a_room() -> None:
    rooms = {room for floor in FLOORS for room in floor}
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT_MODULES
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders | ROOT_MODULES - {"__init__"} == rooms
    assert any(Import("titanlite.config", True) in imports for imports in IMPORTS.values())


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
    assert [f"{name}: {i.module}" for name in inside for i in IMPORTS[name] if not within(i.module, *allowed)] == []


def test_one_converter_and_the_library_know_float8() -> None:
    """A number format is its files in quant/, its converter, and the rules of its section, whose options and their help
    the schema has."""
    allowed = titanlite(
        *("converters", "converters.float8", "converters.float8_inference"),
        *("config.float8_rules", "config.schema", "config.number_formats"),
    )
    code = {name: code_of(path) for name, path in SOURCES.items() if not within(name, *titanlite("quant", "float8"))}
    # The dtypes are torch's.
    named = {name for name, text in code.items() if "float8" in text.replace("torch.float8_", "").lower()}
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
    assert [f"{name}: {i.module}" for name in inside for i in IMPORTS[name] if not within(i.module, *allowed)] == []
    assert breaches(inside, "torch.distributed") == []


def test_the_configuration_is_read_without_torch() -> None:
    light = titanlite("commands", "config", "errors", "registry", "environment", "launch")
    slow = ("torch", "numpy", "datasets", "tokenizers", "tensorboard", *titanlite("data", "distributed", "metrics"))
    at_start = [
        f"{name} imports {i.module}"
        for name in SOURCES
        if within(name, *light)
        for i in IMPORTS[name]
        if i.at_start and within(i.module, *slow)
    ]
    assert at_start == []


def test_no_import_cycles() -> None:
    def parents(module: str) -> set[str]:
        parts = module.split(".")
        return {".".join(parts[:i]) for i in range(1, len(parts) + 1)}

    graph: dict[str, set[str]] = {}
    for name, imports in IMPORTS.items():
        loaded = set().union(*(parents(i.module) for i in imports if i.at_start)) & SOURCES.keys()
        # A package is loaded before what is in it, and may import that: not a cycle by itself.
        graph[name] = loaded - parents(name)
    TopologicalSorter(graph).prepare()


def test_no_two_test_files_share_a_name() -> None:
    """pytest imports a test file by its bare name, and refuses the second of a name only when both are collected."""
    names = [path.name for path in (REPOSITORY / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
