"""``titanlite tokenizer``."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from titanlite.commands import tokenizer as command
from titanlite.data import load_tokenizer
from titanlite.data.tokenizer import SHIPPED


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    words = [f"{a}{b}{c}" for a in ("un", "re", "pre") for b in ("do", "make", "turn") for c in ("ing", "ed", "able")]
    for number in range(5):
        text = " ".join(f"{word}{w}" for word in words for w in ("", "er", "ly", "ness")) + f" {number} naïve\n"
        (tmp_path / f"{number}.txt").write_text(text * (number + 1), encoding="utf-8")
    return tmp_path


def train(corpus: Path, output: Path, vocab_size: int, *options: str, source: str = "text") -> int:
    arguments = [
        "train",
        "--source",
        source,
        "--path",
        str(corpus),
        "--vocab-size",
        str(vocab_size),
        "--output",
        str(output),
        *options,
    ]
    return int(command.main(arguments))


def test_training_is_deterministic(corpus: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / "out" / f"{n}.json" for n in range(3)]
    assert [train(corpus, output, 384) for output in outputs] == [0, 0, 0]
    assert len({output.read_bytes() for output in outputs}) == 1
    tokenizer = load_tokenizer(str(outputs[0]))
    assert tokenizer.vocab_size == 384
    assert (tokenizer.bos_id, tokenizer.eos_id) == (382, 383)
    text = "premaking naïve 日本"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" unmaking")) < 5


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [
        (2000, "--vocab-size 2000: must be a multiple of 128"),
        (256, "--vocab-size 256: must be .* at least 384"),
        (8192, r"--vocab-size 8192: the corpus gives only \d+ different tokens; use more text"),
    ],
)
def test_vocabulary_sizes_that_cannot_be(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], vocab_size: int, message: str
) -> None:
    assert train(corpus, tmp_path / "out.json", vocab_size) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert_matches(message, error)
    assert not (tmp_path / "out.json").exists()


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text


def test_missing_corpus_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "gone", tmp_path / "out.json", 384) == 2
    assert "there is no such file or folder" in capsys.readouterr().err


class Hub:
    """The part of the hub's client that the script calls, with the files of one repository."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: list[str]) -> None:
        import huggingface_hub

        self.files = files
        self.error: Exception | None = None
        self.downloaded: list[tuple[str, str | None]] = []
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self._download)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: self._info())

    def _info(self) -> Any:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.files])

    def _download(self, repo_id: str, *, filename: str, local_dir: str, token: str | None) -> str:
        if self.error:
            raise self.error
        self.downloaded.append((filename, token))
        return f"{local_dir}/{filename}"


def test_downloads_what_the_repository_has(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "unused")
    hub = Hub(monkeypatch, ["config.json", "tokenizer.json", "tokenizer_config.json", "original/tokenizer.model"])
    assert command.main(["download", "--repo_id", "a/b", "--hf_token=secret", "--local_dir", "here"]) == 0
    names = ["tokenizer.json", "tokenizer_config.json", "original/tokenizer.model"]
    assert hub.downloaded == [(name, "secret") for name in names]
    assert capsys.readouterr().out.splitlines() == [
        *(f"here/{name}" for name in names),
        'use it with: --model.tokenizer_path="here"',
    ]
    hub.files, hub.downloaded = ["tokenizer.model"], []
    assert command.main(["download", "--repo_id", "a/b", "--tokenizer_path", ""]) == 0
    assert hub.downloaded == [("tokenizer.model", "unused")]


def test_repository_without_a_tokenizer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Hub(monkeypatch, ["README.md"])
    assert command.main(["download", "--repo_id", "a/b"]) == 2
    assert "a/b has neither tokenizer.json nor original/tokenizer.model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "status", "message"),
    [
        ("GatedRepoError", 403, "a/b is gated: ask for access .* then pass --hf_token=..."),
        (
            "RepositoryNotFoundError",
            404,
            "a/b: there is no such repository, or it is private; check --repo_id",
        ),
        ("HfHubHTTPError", 500, r"the hub cannot be reached or refuses \(HfHubHTTPError: it said no\)"),
    ],
)
def test_errors_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, status: int, message: str
) -> None:
    import huggingface_hub.errors

    error_type = getattr(huggingface_hub.errors, kind)
    hub = Hub(monkeypatch, ["tokenizer.json"])
    hub.error = error_type(
        "it said no\nand more", response=SimpleNamespace(status_code=status, headers={}, request=None)
    )
    assert command.main(["download", "--repo_id", "a/b"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert_matches(message, error)


def test_offline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The real failure: the hub's client is told that there is no network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    begin = time.monotonic()
    assert command.main(["download", "--repo_id", "meta-llama/Llama-3.1-8B"]) == 2
    assert time.monotonic() - begin < 5
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert_matches(r"the hub cannot be reached or refuses \(\w+: .+\); check the network, or train without", error)


def test_a_folder_or_a_file(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(corpus, tmp_path / "made" / "here", 384) == 0
    assert train(corpus, tmp_path / "one.json", 384) == 0
    assert sorted(path.name for path in (tmp_path / "made" / "here").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    folder, file = load_tokenizer(str(tmp_path / "made" / "here")), load_tokenizer(str(tmp_path / "one.json"))
    assert folder.identity == file.identity
    assert (folder.bos_id, folder.eos_id) == (382, 383)
    assert "384 tokens, from" in capsys.readouterr().out


@pytest.mark.parametrize("output", ["one.json", "folder"])
def test_nothing_is_replaced_without_force(
    corpus: Path, tmp_path: Path, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / output
    assert train(corpus, place, 384) == 0
    file = place if place.is_file() else place / "tokenizer_config.json"
    file.write_text("of somebody")
    assert train(corpus, place, 384) == 2
    assert "--force" in capsys.readouterr().err
    assert file.read_text() == "of somebody"
    assert train(corpus, place, 384, "--force") == 0
    assert load_tokenizer(str(place)).vocab_size == 384


def test_an_output_is_required(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = SHIPPED.read_bytes()
    with pytest.raises(SystemExit) as end:
        command.main(["train", "--source", "text", "--path", str(corpus), "--vocab-size", "384"])
    assert end.value.code == 2
    assert "--output" in capsys.readouterr().err
    assert train(corpus, SHIPPED, 384) == 2  # its place is like any other
    assert SHIPPED.read_bytes() == before


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("0.txt", "is a file"),
        ("0.txt/x", "is no folder that can be written"),
        ("0.txt/x.json", "is no folder that can be written"),
        ("/proc/tokenizer", "--output"),  # root is told so only when it tries
    ],
)
def test_places_that_cannot_be_written(
    corpus: Path, place: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(corpus, corpus / place, 384) == 2
    assert words in capsys.readouterr().err


def test_every_source_of_training(corpus: Path, tmp_path: Path) -> None:
    """One text in three formats gives one tokenizer; and a source of one's own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [file.read_text(encoding="utf-8") for file in sorted(corpus.glob("*.txt"))]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    pq.write_table(pa.table({"body": texts}), tmp_path / "rows.parquet")
    (tmp_path / "source_of_mine.py").write_text(
        "from titanlite.data import SOURCES\nSOURCES.add('mine', SOURCES.get('text'))\n"
    )
    sources = {
        "text": corpus,
        "json": tmp_path / "lines.jsonl",
        "parquet": tmp_path / "rows.parquet",
        "mine": corpus,
    }
    identities = set()
    for name, path in sources.items():
        options = ["--text_field", "body", *(["--custom_import", "source_of_mine"] if name == "mine" else [])]
        sys.path.insert(0, str(tmp_path))
        try:
            assert train(path, tmp_path / name, 384, *options, source=name) == 0
        finally:
            sys.path.remove(str(tmp_path))
        identities.add(load_tokenizer(str(tmp_path / name)).identity["sha256"])
    assert len(identities) == 1


def test_the_source_s_options_have_the_command_s_names(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(corpus, tmp_path / "x", 384, source="nothing") == 2
    assert '--source = "nothing"' in capsys.readouterr().err
    assert train(tmp_path / "gone", tmp_path / "x", 384) == 2
    error = capsys.readouterr().err
    assert "--path" in error
    assert "training." not in error
    assert not (tmp_path / "x").exists()


def test_what_is_left_out_of_a_large_corpus_is_said(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = sum(file.stat().st_size for file in corpus.glob("*.txt"))
    assert train(corpus, tmp_path / "all", 384, "--max-bytes", str(size)) == 0
    assert "left out" not in capsys.readouterr().out
    assert train(corpus, tmp_path / "part", 384, "--max-bytes", str(size - 1)) == 0
    assert "which was left out" in capsys.readouterr().out


def test_a_download_replaces_nothing_without_force(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub(monkeypatch, ["tokenizer.json", "special_tokens_map.json", "added_tokens.json"])
    (tmp_path / "special_tokens_map.json").write_text("{}")
    arguments = ["download", "--repo_id", "a/b", "--local_dir", str(tmp_path)]
    assert command.main(arguments) == 2
    assert f"{tmp_path}/special_tokens_map.json: there already" in capsys.readouterr().err
    assert hub.downloaded == []
    assert command.main([*arguments, "--force"]) == 0
    assert [name for name, _ in hub.downloaded] == ["tokenizer.json", "special_tokens_map.json", "added_tokens.json"]
