"""Mutation testing: does any test fail when a statement of the product is deleted?

``python -m tests.mutants OUT.json`` chooses statements at random (the same for the same seed and sources), runs the
suite once with a probe before each of them to learn which tests come by, then deletes each in turn and runs those
tests. OUT.json gets the verdict on each; what survived is printed. It takes hours.

Only the mutation may count as the cause of a failure. Tests that fail with the probes are therefore left out, a test is
given several times as long as it took with them, and a mutant is killed by a hang only if that test hangs again.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parents[1]
FOLDERS = ("quant", "float8", "distributed", "checkpoint", "data")
SIMPLE = (
    ast.Assign,
    ast.AugAssign,
    ast.AnnAssign,
    ast.Expr,
    ast.Return,
    ast.Raise,
    ast.Delete,
    ast.Break,
    ast.Continue,
)
HANG = re.compile(r"Timeout|had not ended after")  # in the output of a test that may have hung
IMPORTS = "from __future__ import annotations"  # the line of each file after which it can import

PROBE = '''
import os

def reached(number):
    """Write down which test executes this statement. Files import it by name: torch.compile cannot trace __import__."""
    if number not in _seen:
        _seen.add(number)
        with open(os.path.join(os.environ["TITANLITE_PROBE"], str(os.getpid())), "a") as file:
            file.write(f"{number}\\t{os.environ.get('PYTEST_CURRENT_TEST', '')}\\n")

class _Seen(set):
    """Of the current test alone."""
    test = None
    def __contains__(self, number):
        test = os.environ.get("PYTEST_CURRENT_TEST", "")
        if test != self.test:
            self.clear()
            self.test = test
        return super().__contains__(number)

_seen = _Seen()
reached._dynamo_marked_constant = True  # torch.compile calls it while it traces, and leaves it out of the graph
'''

PLUGIN = """
import os

def pytest_runtest_logreport(report):
    if os.environ.get("PYTEST_XDIST_WORKER") or not hasattr(report, "node"):
        with open(os.environ["TITANLITE_DURATIONS"], "a") as file:
            file.write(f"{report.duration}\\t{report.outcome}\\t{report.nodeid}\\n")
"""


@dataclass
class Mutant:
    """A statement and what became of the suite without it.

    Attributes:
        line: its first, of ``file``.
        tests: those that execute it and pass with it, the quickest files first.
        dropped: how many execute it but failed in the run with probes.
        longest: the seconds that the slowest of ``tests`` took then.
        killed_by: the first that failed without it; "" if none did.
        finished: all of ``tests`` ran, or one failed; otherwise time was up, or one hung only the first time.
    """

    file: str
    function: str
    line: int
    last_line: int
    text: str
    tests: list[str] = field(default_factory=list)
    dropped: int = 0
    longest: float = 0.0
    killed_by: str = ""
    finished: bool = False
    seconds: float = 0.0


def statements(path: Path) -> Iterator[Mutant]:
    """All statements that could be deleted: simple ones in functions, but for docstrings, assertions, log messages, and
    Triton's kernels, whose lines run on no CPU."""
    tree = ast.parse(path.read_text())

    def visit(node: ast.AST, name: str) -> Iterator[Mutant]:
        for child in ast.iter_child_nodes(node):
            inside = name
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                if any("triton" in ast.unparse(decorator) for decorator in child.decorator_list):
                    continue
                inside = f"{name}.{child.name}".lstrip(".")
            elif isinstance(child, SIMPLE) and isinstance(node, (ast.FunctionDef, ast.If, ast.For, ast.With, ast.Try)):
                text = ast.unparse(child)
                is_text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
                if name and not is_text and not text.startswith("logger."):
                    assert child.end_lineno is not None
                    yield Mutant(str(path.relative_to(ROOT)), name, child.lineno, child.end_lineno, text)
            yield from visit(child, inside)

    yield from visit(tree, "")


def choose(count: int, seed: int) -> list[Mutant]:
    files = sorted(file for folder in FOLDERS for file in (ROOT / "titanlite" / folder).rglob("*.py"))
    every = [mutant for file in files for mutant in statements(file)]
    return sorted(random.Random(seed).sample(every, count), key=lambda mutant: (mutant.file, mutant.line))


def copy_tree(to: Path) -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        target = to / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)


def pytest(tree: Path, *arguments: str, timeout: float | None = None, **variables: str) -> tuple[int | None, str]:
    """The exit status and the output of pytest in a copy of the repository; no status if ``timeout`` seconds passed."""
    paths = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **variables}
    given = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    with subprocess.Popen(
        given, cwd=tree, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it then ends what its tests started
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            return None, ""
        return process.returncode, output


def find_tests(mutants: Sequence[Mutant], select: str, processes: int) -> None:
    """Fill in which tests execute each mutant's statement."""
    with tempfile.TemporaryDirectory(prefix="titanlite-mutants-") as scratch:
        tree, probes, durations = Path(scratch, "tree"), Path(scratch, "probes"), Path(scratch, "durations")
        copy_tree(tree)
        probes.mkdir()
        (tree / "probe.py").write_text(PROBE)
        (tree / "reporter.py").write_text(PLUGIN)
        by_file: defaultdict[str, list[tuple[int, Mutant]]] = defaultdict(list)
        for number, mutant in enumerate(mutants):
            by_file[mutant.file].append((number, mutant))
        for name, those in by_file.items():
            lines = (tree / name).read_text().splitlines(keepends=True)
            lines[lines.index(f"{IMPORTS}\n")] = f"{IMPORTS}; from probe import reached as _reached\n"
            for number, mutant in those:
                line = lines[mutant.line - 1]
                indent = line[: len(line) - len(line.lstrip())]
                lines[mutant.line - 1] = f"{indent}_reached({number})\n{line}"
            (tree / name).write_text("".join(lines))
        arguments = ["-p", "reporter", "-m", select, "-n", str(processes), "--dist", "loadfile"]
        status, output = pytest(tree, *arguments, TITANLITE_PROBE=str(probes), TITANLITE_DURATIONS=str(durations))
        print(output[-1500:] if status else "the suite passes with probes", flush=True)
        seconds: defaultdict[str, float] = defaultdict(float)
        failed: set[str] = set()
        for line in durations.read_text().splitlines():
            duration, outcome, test = line.split("\t")
            seconds[test] += float(duration)
            failed.update([test] if outcome == "failed" else [])
        reached: defaultdict[int, set[str]] = defaultdict(set)
        for file in probes.iterdir():
            for line in file.read_text().splitlines():
                number_, test = line.split("\t")
                reached[int(number_)].add(test)
    in_file: defaultdict[str, list[str]] = defaultdict(list)
    for test in seconds:
        in_file[test.partition("::")[0]].append(test)
    for number, mutant in enumerate(mutants):
        tests: set[str] = set()
        for test in reached[number]:
            name, _, phase = test.rpartition(" ")
            # What a fixture does, all tests of its file may look at.
            tests.update(in_file[name.partition("::")[0]] if phase == "(setup)" else [name])
        tests &= seconds.keys()  # what an import executes, no test does
        of_files: defaultdict[str, float] = defaultdict(float)
        for test in tests:
            of_files[test.partition("::")[0]] += seconds[test]
        passed = tests - failed
        mutant.tests = sorted(passed, key=lambda test: (of_files[test.partition("::")[0]], test))
        mutant.dropped = len(tests & failed)
        mutant.longest = max((seconds[test] for test in passed), default=0)
    print(f"{len(failed)} tests failed with probes and are left out", flush=True)


def try_out(mutant: Mutant, tree: Path, timeout: float) -> None:
    """Run the mutant's tests without its statement, in a copy of the repository, up to the first that fails."""
    file, start = tree / mutant.file, time.monotonic()
    whole = file.read_text()
    lines = whole.splitlines(keepends=True)
    first = lines[mutant.line - 1]
    indent = first[: len(first) - len(first.lstrip())]
    lines[mutant.line - 1 : mutant.last_line] = [f"{indent}pass\n"] + ["\n"] * (mutant.last_line - mutant.line)
    file.write_text("".join(lines))
    listed = tree / "tests.txt"
    listed.write_text("\n".join(mutant.tests))
    arguments = ["-x", "--no-header", f"--timeout={max(120, 5 * mutant.longest):.0f}"]
    try:
        status, output = pytest(tree, *arguments, f"@{listed}", timeout=timeout)
        failed = re.search(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - .*)?$", output, re.MULTILINE)
        if status and failed and HANG.search(output):
            status = pytest(tree, *arguments, failed[1], timeout=timeout)[0] or None
    finally:
        file.write_text(whole)
    mutant.finished = status is not None
    if status:
        mutant.killed_by = failed[0] if failed else f"status {status}: {output[-300:]}"
    mutant.seconds = round(time.monotonic() - start, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--select", default="not (long or gpu or alone)", help="pytest's -m")
    parser.add_argument("--survivors-of", type=Path, help="try only the mutants that survived in this earlier OUT")
    parser.add_argument("--minutes", type=float, default=60, help="no more on any mutant; default: 60")
    args = parser.parse_args()
    mutants = choose(args.count, args.seed)
    if args.survivors_of is not None:
        before = {(m["file"], m["line"]) for m in json.loads(args.survivors_of.read_text()) if not m["killed_by"]}
        mutants = [mutant for mutant in mutants if (mutant.file, mutant.line) in before]
    processes = os.cpu_count() or 1
    find_tests(mutants, args.select, processes)
    args.out.write_text(json.dumps([asdict(m) for m in mutants], indent=1))
    trees: SimpleQueue[Path] = SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="titanlite-mutants-") as scratch, ThreadPoolExecutor(processes) as pool:
        for number in range(processes):
            copy_tree(Path(scratch, str(number)))
            trees.put(Path(scratch, str(number)))

        def run(mutant: Mutant) -> None:
            if mutant.tests:
                tree = trees.get()
                try_out(mutant, tree, 60 * args.minutes)
                trees.put(tree)
            verdict = mutant.killed_by or ("SURVIVED" if mutant.finished or not mutant.tests else "NOT FINISHED")
            print(f"{mutant.file}:{mutant.line} {mutant.text!r}: {verdict}", flush=True)
            args.out.write_text(json.dumps([asdict(m) for m in mutants], indent=1))

        list(pool.map(run, mutants))
    survivors = [mutant for mutant in mutants if not mutant.killed_by]
    print(f"{len(survivors)} of {len(mutants)} survived")
    for mutant in survivors:
        tests = f"{len(mutant.tests)} tests{'' if mutant.finished or not mutant.tests else ', not all run'}"
        print(f"    {mutant.file}:{mutant.line} in {mutant.function}: {mutant.text}  ({tests})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
