"""Finds code that stands twice: runs of statements with the same syntax tree, whatever their names and constants."""

from __future__ import annotations

import ast
import io
import tokenize
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

REPEATED = 6  # lines that two places may not share


def code_lines(source: str) -> set[int]:
    """The lines with a name or a keyword outside of comments and texts: what a message adds are no lines of code."""
    lines, in_text = set(), 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        in_text += (kind == "FSTRING_START") - (kind == "FSTRING_END")
        if kind == "NAME" and not in_text:
            lines.add(token.start[0])
    return lines


class Shape(ast.NodeTransformer):
    """Takes names, constants, annotations and docstrings out of a syntax tree."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns") and value is not None:
                setattr(node, field, None)
            elif isinstance(value, str):  # the name of something
                setattr(node, field, "")
            elif field == "body" and isinstance(value, list):
                node.body = [statement for statement in value if not is_text(statement)]  # type: ignore[attr-defined]
        return ast.Constant(0) if isinstance(node, (ast.Constant, ast.JoinedStr)) else node


def is_text(statement: ast.AST) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def is_table(statement: ast.AST, owner: ast.AST) -> bool:
    """Imports; constants and fields of a module or a class; a class of nothing but fields."""
    if isinstance(statement, ast.ClassDef):
        return all(is_table(inner, statement) for inner in statement.body)
    data = (ast.Assign, ast.AnnAssign) if isinstance(owner, (ast.Module, ast.ClassDef)) else ()
    return isinstance(statement, (ast.Import, ast.ImportFrom, *data))


class Run(NamedTuple):
    """Consecutive statements of one block."""

    module: str
    start: int
    end: int

    def within(self, other: Run) -> bool:
        return self.module == other.module and other.start <= self.start and self.end <= other.end

    def __str__(self) -> str:
        return f"{self.module}:{self.start}-{self.end}"


def runs_in(source: str, module: str) -> Iterator[tuple[tuple[str, ...], Run]]:
    """All runs of statements with enough lines, and their shapes."""
    lines, tree = code_lines(source), Shape().visit(ast.parse(source))
    for owner in [node for node in ast.walk(tree) if not is_table(node, tree)]:
        for block in (getattr(owner, field, None) for field in ("body", "orelse", "finalbody")):
            if not isinstance(block, list):
                continue
            shapes = [ast.dump(statement) for statement in block]
            tables = [is_table(statement, owner) for statement in block]
            for first in range(len(block)):
                for last in range(first, len(block)):
                    if tables[last]:
                        break
                    run = Run(module, block[first].lineno, block[last].end_lineno or 0)
                    if len(lines.intersection(range(run.start, run.end + 1))) >= REPEATED:
                        yield tuple(shapes[first : last + 1]), run


def repetitions(sources: Mapping[str, str]) -> list[str]:
    """The runs of the same shape, the longest ones, that do not overlap."""
    by_shape: defaultdict[tuple[str, ...], list[Run]] = defaultdict(list)
    for module, source in sources.items():
        for shape, run in runs_in(source, module):
            same = by_shape[shape]
            if not same or same[-1].module != module or same[-1].end < run.start:
                same.append(run)
    groups: list[list[Run]] = []
    for same in sorted(by_shape.values(), key=lambda runs: runs[0].start - runs[0].end):
        longer = [run for runs in groups for run in runs]
        if len(same) > 1 and not all(any(run.within(other) for other in longer) for run in same):
            groups.append(same)
    return [" ~ ".join(map(str, runs)) for runs in groups]
