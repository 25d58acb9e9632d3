"""Which tokenizer belongs to weights, and that another one is refused."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from titanlite.checkpoint import Info, Weights, choose_tokenizer
from titanlite.data import Tokenizer, load_tokenizer
from titanlite.data.tokenizer import SHIPPED
from titanlite.errors import ConfigError


def other_tokenizer(folder: Path) -> Path:
    """One of the size of the shipped one, with other ids."""
    folder.mkdir()
    backend = tokenizers.Tokenizer.from_file(str(SHIPPED))
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.save(str(folder / "tokenizer.json"))
    shutil.copy(SHIPPED.parent / "tokenizer_config.json", folder)
    return folder


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return other_tokenizer(tmp_path / "other")


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """A copy of the shipped one."""
    (tmp_path / "shipped").mkdir()
    shutil.copy(SHIPPED, tmp_path / "shipped")
    shutil.copy(SHIPPED.parent / "tokenizer_config.json", tmp_path / "shipped")
    return tmp_path / "shipped"


def checkpoint(folder: Path, tokenizer: Tokenizer, *, source: str = "") -> Weights:
    folder.mkdir()
    for name, text in tokenizer.files().items():
        (folder / name).write_text(text)
    return Weights(folder, Info(1, {}, tokenizer_path=source, tokenizer=tokenizer.identity))


def same(one: Tokenizer, path: Path | str) -> bool:
    return one.identity["sha256"] == load_tokenizer(str(path)).identity["sha256"]


def refusal(function: Callable[[], object]) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        function()
    assert error.value.key == "model.tokenizer_path"
    return error.value


def test_new_weights(other: Path) -> None:
    chosen = choose_tokenizer("", None)
    assert same(chosen.tokenizer, SHIPPED)
    assert (chosen.source, chosen.reason) == ("", "shipped")
    chosen = choose_tokenizer(str(other), None)
    assert same(chosen.tokenizer, other)
    assert (chosen.source, chosen.reason) == (str(other / "tokenizer.json"), "model.tokenizer_path")


def test_it_follows_the_weights(other: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for weights in (Weights(other), checkpoint(tmp_path / "step-1", load_tokenizer(str(other)), source="/gone")):
        chosen = choose_tokenizer("", weights)
        assert same(chosen.tokenizer, other)
        assert str(weights.folder) in chosen.reason
    assert chosen.source == "/gone"  # of the original, not of the copy
    assert not caplog.records


def test_the_same_one_by_another_path(other: Path, shipped: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(other, copy)
    for weights in (Weights(other), checkpoint(tmp_path / "step-1", load_tokenizer(str(other)))):
        assert choose_tokenizer(str(copy), weights).tokenizer.path == str(copy / "tokenizer.json")


@pytest.mark.parametrize("kind", ["folder", "checkpoint"])
@pytest.mark.parametrize("resume", [False, True])
def test_another_one_is_refused(kind: str, resume: bool, other: Path, shipped: Path, tmp_path: Path) -> None:
    weights = Weights(other)
    if kind == "checkpoint":
        weights = checkpoint(tmp_path / "step-1", load_tokenizer(str(other)), source="/there/tokenizer.json")
    error = refusal(lambda: choose_tokenizer(str(shipped), weights, resume=resume))
    assert error.value == str(shipped / "tokenizer.json")
    identities = [load_tokenizer(str(path)).identity["sha256"][:12] for path in (shipped, other)]
    words = [*identities, str(weights.folder), "normalizer", "exclude_from_loading"]
    assert all(word in error.why for word in [*words, *(["/there/"] if kind == "checkpoint" else [])])
    chosen = choose_tokenizer(str(shipped), weights, replace=True)
    assert same(chosen.tokenizer, shipped)


def test_a_copy_that_is_not_that_of_the_checkpoint(other: Path, tmp_path: Path) -> None:
    """As when its sums are not verified."""
    weights = checkpoint(tmp_path / "step-1", load_tokenizer())
    shutil.copy(other / "tokenizer.json", weights.folder)
    error = refusal(lambda: choose_tokenizer("", weights))
    assert "is another tokenizer" in error.why
    (weights.folder / "tokenizer.json").unlink()
    assert same(choose_tokenizer("", weights).tokenizer, SHIPPED)
    assert error.origin == f"that of the weights in {weights.folder}"


def test_a_moved_run_has_its_copy(tmp_path: Path, other: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = checkpoint(tmp_path / "step-1", load_tokenizer(str(other)), source="/there/tokenizer.json")
    chosen = choose_tokenizer("gone/tokenizer.json", weights, resume=True)
    assert same(chosen.tokenizer, other)
    assert '"gone/tokenizer.json": there is no such file here; the copy in' in caplog.text
    assert "no such file" in refusal(lambda: choose_tokenizer("gone/tokenizer.json", weights)).why


def test_the_library_was_updated(tmp_path: Path, other: Path, shipped: Path) -> None:
    """Then a checksum of the same content may be another; the copy tells."""
    weights = checkpoint(tmp_path / "step-1", load_tokenizer())
    assert weights.info is not None
    weights.info.tokenizer |= {"tokenizers": "0.1", "sha256": "of another form"}
    assert same(choose_tokenizer("", weights).tokenizer, SHIPPED)
    assert same(choose_tokenizer(str(shipped), weights).tokenizer, SHIPPED)
    assert "is another tokenizer" in refusal(lambda: choose_tokenizer(str(other), weights)).why


def test_a_checkpoint_of_an_earlier_version(
    tmp_path: Path, other: Path, shipped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It has the path alone. Whoever made it does not choose a file here: the user names it. What cannot be checked is
    said."""
    caplog.set_level(logging.WARNING)
    old = tmp_path / "step-1"
    old.mkdir()
    weights = Weights(old, Info(1, {}))
    assert same(choose_tokenizer("", weights).tokenizer, SHIPPED)
    assert "cannot be checked" in caplog.text
    assert "is another tokenizer" in refusal(lambda: choose_tokenizer(str(other), weights)).why
    assert same(choose_tokenizer(str(shipped), weights).tokenizer, SHIPPED)
    weights = Weights(old, Info(1, {}, tokenizer_path=str(other / "tokenizer.json")))
    error = refusal(lambda: choose_tokenizer("", weights))
    assert error.value == str(other / "tokenizer.json")
    assert "has no copy of it; name it yourself" in error.why
    caplog.clear()
    assert same(choose_tokenizer(str(other), weights).tokenizer, other)
    assert "cannot be checked" in caplog.text
    gone = Weights(old, Info(1, {}, tokenizer_path="/gone/tokenizer.json"))
    error = refusal(lambda: choose_tokenizer("", gone))
    assert error.value == "/gone/tokenizer.json"
    assert str(old) in error.why
    caplog.clear()
    assert same(choose_tokenizer(str(other), gone).tokenizer, other)
    assert "cannot be checked" in caplog.text


def test_weights_without_a_tokenizer(tmp_path: Path, other: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = Weights(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 2048}')
    chosen = choose_tokenizer("", weights)  # it fits
    assert (chosen.tokenizer.path, chosen.reason) == (str(SHIPPED), "shipped")
    assert "has no tokenizer" in caplog.text
    (tmp_path / "config.json").write_text('{"vocab_size": 32000}')
    assert "no tokenizer; name the one that belongs to them" in refusal(lambda: choose_tokenizer("", weights)).why
    assert same(choose_tokenizer(str(other), weights).tokenizer, other)
    assert "cannot be checked" in caplog.text
