"""The floors of the house: which module may import which, read from the code's own imports."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[2]


def name_of(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path for top in ("titanlite", "models") for path in (REPOSITORY / top).rglob("*.py")}

GROUND = (
    *("errors", "registry", "environment", "float8", "config", "data"),
    *("optim", "checkpoint", "metrics", "memory_snapshot", "profiling", "run_folder", "stacks", "stop_request"),
)
MIDDLE = ("converters", "distributed", "model_spec", "generation", "sample")
TOP = ("build", "load_model", "start", "validation", "estimate", "out_of_memory", "memory_advice", "train", "launch")


class Import(NamedTuple):
    module: str
    at_start: bool  # when the importing module is itself imported, not later inside a function


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def walk(node: ast.AST, at_start: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        if not is_for_types(child):
            yield child, at_start
            later = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from walk(child, at_start and not later)


def imports_in(tree: ast.AST, module: str, is_package: bool, known: Iterable[str]) -> set[Import]:
    """What a module imports; ``from package import name`` is the module ``package.name`` where there is one."""
    found = set()
    for node, at_start in walk(tree):
        if isinstance(node, ast.Import):
            found |= {Import(alias.name, at_start) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            source = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.add(Import(inner if inner in known else source, at_start))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            # A name made at run time counts as far as it is fixed: f"models.{name}.spec" is "models.".
            named = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if isinstance(named, ast.Constant):
                found.add(Import(str(named.value).rstrip("."), at_start))
    return found


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
    import unseen
def f():
    from late import x
    importlib.import_module(f"models.{x}.spec")
"""
    found = imports_in(ast.parse(source), "one.two.three", False, ["p.q", "one.two.sibling", "one.uncle"])
    start = {"a.b", "c", "p.q", "p", "one.two.sibling", "one.uncle", "one.two.near"}
    assert found == {Import(name, True) for name in start} | {Import("late", False), Import("models", False)}


def test_the_rooms_that_the_floors_name_are_there() -> None:
    assert [room for room in titanlite(*GROUND, *MIDDLE, *TOP) if room not in SOURCES] == []
    assert any(Import("titanlite.config", True) in imports for imports in IMPORTS.values())


def test_every_module_stands_on_a_floor() -> None:
    floors = (*titanlite("command_line", *GROUND, *MIDDLE, *TOP), "models")
    assert [name for name in SOURCES if name != "titanlite" and not within(name, *floors)] == []


def test_the_ground_floor_imports_nothing_above_it() -> None:
    above = (*titanlite("command_line", *MIDDLE, *TOP), "models")
    assert breaches(titanlite(*GROUND), *above) == []


def test_the_middle_floor_imports_nothing_above_it() -> None:
    above = titanlite("command_line", *TOP)
    assert breaches(titanlite(*MIDDLE), *above) == []
    assert breaches(titanlite("converters", "distributed"), "models") == []


def test_only_model_spec_knows_of_models_and_none_by_name() -> None:
    assert {line.split()[0] for line in breaches(["titanlite"], "models")} == {"titanlite.model_spec"}
    families = [name for name in SOURCES if name.startswith("models.") and name.count(".") == 1]
    assert families
    assert breaches(["titanlite"], *families) == []


def test_float8_stands_alone() -> None:
    inside = [name for name in SOURCES if within(name, "titanlite.float8")]
    allowed = (*sys.stdlib_module_names, "torch", "triton", "titanlite.float8")
    assert [f"{name}: {i.module}" for name in inside for i in IMPORTS[name] if not within(i.module, *allowed)] == []


def test_nothing_imports_torchao_at_run_time() -> None:
    assert breaches(["titanlite", "models"], "torchao") == []


@pytest.mark.parametrize("name", [n for n in SOURCES if n.startswith("models.") and n.endswith(".model")])
def test_a_model_file_knows_torch_alone(name: str) -> None:
    outside = {i.module.split(".")[0] for i in IMPORTS[name]} - sys.stdlib_module_names
    assert outside == {"torch"}
    assert breaches([name], "torch.distributed") == []


def test_the_configuration_is_read_without_torch() -> None:
    light = titanlite("config", "errors", "registry", "environment", "command_line", "launch")
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
