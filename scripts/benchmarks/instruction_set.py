"""An instruction set made of the source of Python's standard library: the part of the library that a function is from.

    python scripts/benchmarks/instruction_set.py FOLDER

writes questions to train on (train.jsonl) and held-out ones (held_out.jsonl, choices.jsonl) into the folder.

A question is the source of a function, and a comment that asks for the part. The answer is the part's name: the package
or module at the top, such as ``asyncio``. Each part has the same number of questions, so that every answer is equally
likely. The same Python and seed give the same set.

- The split is by function. A function of which the library has a copy (the same syntax tree, at any depth of any file)
  is left out, and so is one whose source contains the name of its part.
- The text for pre-training is the library without the source of the held-out functions.
- That text has the training questions too, each with the answer of a random one. They teach the form of question and
  answer, and which answers there are, and nothing about which answer is right: what fine-tuning gains is that relation.
- A choice is a held-out question with four endings: its answer, and three other parts. Each label is equally frequent.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titanlite.data import build_source

QUESTION = "\n# part of the library:"
ENDINGS = 4
# Characters of a function's source: long enough to tell something, and short enough for many in a sequence.
SHORTEST, LONGEST = 60, 220
_Definition = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Function:
    """A function of the library: lines ``first`` to ``last``, from 1, of ``file``; decorators are part of it."""

    part: str
    file: Path
    first: int
    last: int
    source: str

    @property
    def question(self) -> str:
        return self.source + QUESTION

    @property
    def answer(self) -> str:
        return f" {self.part}"


@dataclass(frozen=True)
class InstructionSet:
    """Functions to train on and held-out ones, the same number of each part, and all files of the library."""

    parts: tuple[str, ...]
    train: tuple[Function, ...]
    held_out: tuple[Function, ...]
    files: tuple[Path, ...]


def make(parts: int, train: int, held_out: int, seed: int = 0) -> InstructionSet:
    """Return ``train`` and ``held_out`` functions of each of the ``parts`` parts of the library that have the most.

    Raises:
        ValueError: the library has not as many.
    """
    files = tuple(build_source("pystdlib", path=None, text_field="text", on_corrupt="stop", seed=0).files)
    of_part: dict[str, list[Function]] = {}
    for function in _functions(files):
        of_part.setdefault(function.part, []).append(function)
    chosen = sorted(of_part, key=lambda part: (-len(of_part[part]), part))[:parts]
    if len(chosen) < parts or len(of_part[chosen[-1]]) < train + held_out:
        raise ValueError(f"the library has no {parts} parts with {train + held_out} functions each")
    trained: list[Function] = []
    held: list[Function] = []
    for part in chosen:
        functions = random.Random(f"{seed} {part}").sample(of_part[part], train + held_out)
        trained += functions[:train]
        held += functions[train:]
    return InstructionSet(tuple(sorted(chosen)), tuple(trained), tuple(held), files)


def _functions(files: Sequence[Path]) -> Iterator[Function]:
    """Yield the functions that can be questions: those at the top of a file, and methods of classes there."""
    trees = {}
    for file in files:
        text = file.read_text(encoding="utf-8")
        try:
            trees[file] = text.split("\n"), ast.parse(text)
        except SyntaxError:  # a template, or a test of the parser
            continue
    copies = Counter(
        ast.unparse(node) for _, tree in trees.values() for node in ast.walk(tree) if isinstance(node, _Definition)
    )
    root = _root(files)
    for file, (lines, tree) in trees.items():
        part = file.relative_to(root).parts[0].removesuffix(".py")
        named = re.compile(rf"(?i)\b_*{re.escape(part.strip('_'))}")
        bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
        for node in (node for body in bodies for node in body if isinstance(node, _Definition)):
            first, last = min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.end_lineno or 0
            source = textwrap.dedent("\n".join(lines[first - 1 : last]))
            is_fit = SHORTEST <= len(source) <= LONGEST and source.isascii() and not named.search(source)
            if is_fit and copies[ast.unparse(node)] == 1:
                yield Function(part, file, first, last, source)


def _root(files: Sequence[Path]) -> Path:
    """The folder of the library: of ``abc.py``, which every Python has."""
    return min((file.parent for file in files if file.name == "abc.py"), key=lambda folder: len(folder.parts))


def pretraining_texts(made: InstructionSet, forms: int, seed: int = 0) -> Iterator[str]:
    """Yield the text of each document: the files, and ``forms`` times over the questions of training with shuffled
    answers."""
    held: dict[Path, set[int]] = {}
    for function in made.held_out:
        held.setdefault(function.file, set()).update(range(function.first, function.last + 1))
    for file in made.files:
        lines = file.read_text(encoding="utf-8").split("\n")
        yield "\n".join(line for number, line in enumerate(lines, 1) if number not in held.get(file, ()))
    for form in range(forms):
        for record in shuffled(made.train, f"form {form}, {seed}"):
            yield record["prompt"] + record["answer"]


def records(functions: Sequence[Function]) -> list[dict[str, Any]]:
    """The lines of a file for training.dataset = "instruct"."""
    return [{"prompt": function.question, "answer": function.answer} for function in functions]


def shuffled(functions: Sequence[Function], seed: str) -> list[dict[str, Any]]:
    """The same, where each question has the answer of a random one."""
    answers = [function.answer for function in functions]
    random.Random(seed).shuffle(answers)
    return [{"prompt": function.question, "answer": answer} for function, answer in zip(functions, answers)]


def choices(made: InstructionSet, seed: int = 0) -> list[dict[str, Any]]:
    """The lines of a file for ``titanlite evaluate --tasks``: of each held-out function."""
    chance = random.Random(f"choices, {seed}")
    labels = [number % ENDINGS for number in range(len(made.held_out))]
    chance.shuffle(labels)
    lines = []
    for function, label in zip(made.held_out, labels):
        endings = chance.sample([part for part in made.parts if part != function.part], ENDINGS - 1)
        endings.insert(label, function.part)
        lines.append({"context": function.question, "endings": endings, "label": label})
    return lines


def write(made: InstructionSet, folder: Path, forms: int, seeds: int) -> None:
    """Write the text for pre-training (``pretrain.jsonl``), those with shuffled answers for each seed from 1
    (``shuffled-1.jsonl``, ...), and what :func:`write_questions` writes."""
    write_questions(made, folder)
    _write_lines(folder / "pretrain.jsonl", [{"text": text} for text in pretraining_texts(made, forms)])
    for seed in range(1, seeds + 1):
        _write_lines(folder / f"shuffled-{seed}.jsonl", shuffled(made.train, f"control {seed}"))


def write_questions(made: InstructionSet, folder: Path) -> None:
    """Write the instructions (``train.jsonl``, ``held_out.jsonl``) and the choices (``choices.jsonl``)."""
    _write_lines(folder / "train.jsonl", records(made.train))
    _write_lines(folder / "held_out.jsonl", records(made.held_out))
    _write_lines(folder / "choices.jsonl", choices(made))


def _write_lines(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to put the files; it is made if it is not there")
    parser.add_argument("--parts", type=int, default=5, help="parts of the library: the answers that there are")
    parser.add_argument("--train", type=int, default=120, help="questions of each part to train on")
    parser.add_argument("--held-out", type=int, default=40, help="held-out questions of each part")
    args = parser.parse_args()
    try:
        made = make(args.parts, args.train, args.held_out)
    except ValueError as e:
        parser.error(f"{e}; ask for fewer")
    args.folder.mkdir(parents=True, exist_ok=True)
    write_questions(made, args.folder)
    print(f"{args.folder}: {len(made.train)} questions to train on, {len(made.held_out)} held out, about", end=" ")
    print(", ".join(made.parts))


if __name__ == "__main__":
    main()
