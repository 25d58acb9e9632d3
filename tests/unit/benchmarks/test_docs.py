"""The documents are right: their commands parse, their examples run, and the files, options and tests in them exist."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import shlex
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.support.docs import PAGES, Block, anchors_of, blocks_of, prose_of, run_example, text_of, typed_in
from tests.support.forks import on_ranks
from tests.support.runs import ROOT, environment
from titanlite.commands.__main__ import SUBCOMMANDS
from titanlite.config import check_config, load_config, packaged
from titanlite.config.aliases import ALIASES
from titanlite.config.schema import JobConfig

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
DEFAULT = str(ROOT / "train_configs" / "debug_model.toml")
VARIABLES = {"NGPU", "CONFIG_FILE", "COMM_MODE", "NNODES", "RDZV_ENDPOINT", "LOG_RANK"}
# Written by commands that are shown, so not there; and what a changelog says of the past.
WRITTEN = {"docs/benchmarks/loss_curves.json"}
PRESENT = [page for page in PAGES if page.name != "CHANGELOG.md"]


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


def in_language(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


TAKE_OPTIONS = ("doctor", "plan")  # subcommands that take options of the trainer beside their own


class Command(NamedTuple):
    place: str
    env: dict[str, str]
    words: list[str]


def commands() -> list[Command]:
    bash_commands = []
    for block in in_language("bash"):
        for line in typed_in(block):
            words = shlex.split(line, comments=True)
            program = next(i for i, word in enumerate(words) if not re.match(r"\w+=", word))
            env = dict(word.split("=", 1) for word in words[:program])
            bash_commands.append(Command(block.place, env, words[program:]))
    return bash_commands


def trains(argv: list[str], env: dict[str, str]) -> None:
    """Check a command line of the trainer as the launcher does, on a machine of any size."""
    if argv == ["--help"]:
        with pytest.raises(SystemExit, match=r"^0$"):
            load_config(argv, DEFAULT)
        return
    file = env.get("CONFIG_FILE", DEFAULT)
    config = load_config(argv, file if (ROOT / file).exists() else DEFAULT)  # or one of the reader's own
    config.model.tokenizer_path = ""  # published tokenizers are not here
    estimate = env.get("COMM_MODE") == "fake" or config.memory_estimation.enabled
    check_config(config, int(env.get("NNODES", 1)) * int(env.get("NGPU", 1)), train=not estimate)


@pytest.mark.parametrize("command", commands(), ids=lambda c: f"{c.place} {' '.join(c.words)}")
def test_commands_are_understood(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert set(command.env) <= VARIABLES
    program, *argv = command.words
    if program == "./run_train.sh":
        trains(argv, command.env)
    elif program in ("titanlite", ".venv/bin/titanlite", "torchrun"):
        if program == "torchrun":
            module = argv.index("-m") + 1
            assert importlib.util.find_spec(argv[module]) is not None
            options = dict(word.lstrip("-").split("=") for word in argv[: module - 1])
            machines = {"NNODES": options.get("nnodes", "1"), "NGPU": options["nproc-per-node"]}
            command = command._replace(env=machines)
            argv = argv[module + 1 :] if argv[module] == "titanlite.commands" else ["train", *argv[module + 1 :]]
        name, *rest = argv
        assert name in SUBCOMMANDS
        if name == "train":
            named = [word for word in rest if not word.startswith("-")]
            files = {"CONFIG_FILE": packaged.find(named[0]) or named[0]} if named else {}
            trains(rest[len(named) :], command.env | files)
        else:
            parser = importlib.import_module(f"titanlite.commands.{name}").parser()
            _, options = parser.parse_known_args(rest)
            if name in TAKE_OPTIONS:
                trains(options, command.env)
            else:
                assert options == []
    elif program == "echo":  # it writes a file
        text, arrow, file = argv
        (tmp_path / file).write_text(text)
        assert arrow == ">"
        trains([], {"CONFIG_FILE": str(tmp_path / file)})
    else:
        script = next(word for word in command.words if word.startswith(("scripts/", "./scripts/")))
        assert program in (script, "sbatch", ".venv/bin/python")
        assert (ROOT / script).is_file()


def test_there_are_commands_and_examples() -> None:
    """So that no change of the pages' form leaves the tests with nothing to look at."""
    assert len(commands()) > 60
    assert len(in_language("python")) >= 20
    assert {block.language for block in BLOCKS} == {"python", "bash", "toml", "text"}


def test_an_option_that_does_not_exist_would_be_noticed() -> None:
    with pytest.raises(Exception, match=r"float8\.recipe"):
        trains(["--model.converters=float8", "--float8.recipe=rowwise"], {})


@pytest.mark.parametrize("block", in_language("toml"), ids=lambda block: block.place)
def test_toml_loads(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text(block.code.replace('base = "', f'base = "{ROOT}/'))
    config = load_config([], str(file))
    config.model.tokenizer_path = ""
    check_config(config, 8)


@pytest.mark.parametrize("page", PRESENT, ids=relative)
def test_options_that_are_named_exist(page: Path) -> None:
    config = JobConfig()
    named = re.findall(r"`(?:--)?(\w+)\.(?:no-)?(\w+)(?:[= ][^`]*)?`", prose_of(page))
    files = ("jsonl", "json", "toml", "py", "md", "safetensors")
    options = [(section, key) for section, key in named if hasattr(config, section) and key not in files]
    unknown = [f"{s}.{k}" for s, k in options if not hasattr(getattr(config, s), k)]
    assert [name for name in unknown if name not in ALIASES] == []


@pytest.mark.parametrize("page", PRESENT, ids=relative)
def test_what_is_named_exists(page: Path) -> None:
    """Files and tests."""
    files = set(re.findall(r"`((?:tests|titanlite|scripts|train_configs|docs|models)/[\w/.-]+)`", prose_of(page)))
    assert [name for name in sorted(files - WRITTEN) if not (ROOT / name).exists()] == []
    tests = set(re.findall(r"`(test_\w+)`", prose_of(page)))
    assert sorted(tests - defined_tests()) == []


@functools.cache
def defined_tests() -> set[str]:
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    return {name for source in sources for name in re.findall(r"^def (test_\w+)", source, flags=re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_arrive(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        assert not anchor or anchor in anchors_of(path), target


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    readme = text_of(ROOT / "README.md")
    assert len(readme.splitlines()) <= 150
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", readme))
    assert linked == {relative(page) for page in (ROOT / "docs").glob("*.md")}
    index = text_of(ROOT / "docs" / "internals" / "README.md")
    pages = {page.name for page in (ROOT / "docs" / "internals").glob("*.md")} - {"README.md"}
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", index)) == pages


# ---- Python


def programs() -> dict[tuple[Path, str], list[Block]]:
    """The blocks of a section are one program."""
    sections: defaultdict[tuple[Path, str], list[Block]] = defaultdict(list)
    for block in in_language("python"):
        sections[block.page, block.section].append(block)
    return sections


@pytest.mark.long
@pytest.mark.parametrize("blocks", programs().values(), ids=lambda blocks: f"{relative(blocks[0].page)} {blocks[0][1]}")
def test_examples_run(
    blocks: list[Block],
    world_of_one: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As a user would run them; each prints what its comments say it prints."""
    monkeypatch.chdir(tmp_path)
    # Generating code takes the compiler longer than all else here, and is tested elsewhere.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        source = "\n" * (block.line - 1) + block.code  # so that a traceback shows the line of the page
        exec(compile(source, block.page, "exec", dont_inherit=True), names)
    promised = re.findall(r"^print\(.*\)  # (.*)$", "".join(block.code for block in blocks), flags=re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == promised


@pytest.mark.long
@pytest.mark.parametrize("section", ["FSDP2 with float8 all-gather", "Tensor parallelism"])
def test_examples_for_torchrun_run_on_two_processes(section: str, tmp_path: Path) -> None:
    code = "".join(block.code for block in programs()[ROOT / "docs" / "library.md", section])
    assert 'os.environ["WORLD_SIZE"]' in code
    on_ranks(2, tmp_path / "ranks", environment(), run_example, code)
