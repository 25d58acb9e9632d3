"""The documents, cut into what tests look at: fenced blocks, prose and tables."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path
from typing import NamedTuple

from tests.support.forks import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


class Block(NamedTuple):
    """A fenced block; ``line`` is that of its first line of code."""

    page: Path
    section: str
    language: str
    line: int
    code: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def blocks_of(page: Path) -> list[Block]:
    blocks: list[Block] = []
    section, language, lines = "", None, list[str]()
    for number, line in enumerate(text_of(page).splitlines(), 1):
        if line.lstrip().startswith("```"):  # with blanks before it: in a list
            if language is not None:
                code = textwrap.dedent("\n".join(lines) + "\n")
                blocks.append(Block(page, section, language, number - len(lines), code))
            language, lines = (line.strip()[3:], []) if language is None else (None, [])
        elif language is not None:
            lines.append(line)
        elif line.startswith("#"):
            section = line.lstrip("# ")
    assert language is None, f"{page}: a block does not end"
    return blocks


def typed_in(block: Block) -> list[str]:
    """The command lines of a block, without what a comment alone takes."""
    return [line for line in block.code.replace("\\\n", " ").splitlines() if shlex.split(line, comments=True)]


def typed_on(page: Path) -> list[str]:
    """The command lines of a page."""
    return [line for block in blocks_of(page) if block.language == "bash" for line in typed_in(block)]


def run_example(code: str) -> None:
    """Run a program in this process, as ``python FILE`` does."""
    exec(compile(code, "<example>", "exec", dont_inherit=True), {"__name__": "__main__"})


def anchors_of(page: Path) -> set[str]:
    """What a link can point to, as GitHub names headings."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def tables_in(prose: str) -> list[list[dict[str, str]]]:
    """The rows of every table, each by the names of the columns."""
    tables = []
    for table in re.findall(r"(?:^\|.*\|\n)+", prose, flags=re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        tables.append([dict(zip(head, row, strict=True)) for row in rows])
    return tables
