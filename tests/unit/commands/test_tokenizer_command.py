"""``titanlite tokenizer``."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from titanlite.commands import tokenizer as command
from titanlite.data import load_tokenizer


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    words = [f"{a}{b}{c}" for a in ("un", "re", "pre") for b in ("do", "make", "turn") for c in ("ing", "ed", "able")]
    for number in range(5):
        text = " ".join(f"{word}{w}" for word in words for w in ("", "er", "ly", "ness")) + f" {number} naïve\n"
        (tmp_path / f"{number}.txt").write_text(text * (number + 1), encoding="utf-8")
    return tmp_path


def train(corpus: Path, output: Path, vocab_size: int) -> int:
    arguments = [
        "train",
        "--source",
        "text",
        "--path",
        str(corpus),
        "--vocab-size",
        str(vocab_size),
        "--output",
        str(output),
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
