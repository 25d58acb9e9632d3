"""Tokenizers: the shipped one, Hugging Face files, and Llama 3's format against tiktoken itself."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from titanlite.data import load_tokenizer
from titanlite.data.tiktoken import SPLIT_PATTERN, _byte_characters, special_tokens
from titanlite.data.tokenizer import SHIPPED
from titanlite.errors import ConfigError

SAMPLE = 'def f(x):\n    """It\'s naïve – 日本語 🙂."""\r\n\treturn x ** 12345  # <|end_of_text|>\n\n\n'


def test_shipped_tokenizer() -> None:
    tokenizer = load_tokenizer()
    assert tokenizer.vocab_size == 2048
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2046, 2047)
    assert Path(tokenizer.path) == SHIPPED
    assert tokenizer.decode([2046, 2047]) == "<|begin_of_text|><|end_of_text|>"
    assert len(tokenizer.encode("    return self.value\n")) < 10


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8")))
def test_text_survives_and_batches_agree(text: str) -> None:
    tokenizer = load_tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text])[0].tolist() == ids
    assert all(i < 2046 for i in ids)


def test_encode_batch_gives_int32_arrays() -> None:
    tokenizer = load_tokenizer()
    arrays = tokenizer.encode_batch(["a", SAMPLE, ""])
    assert [array.dtype for array in arrays] == [np.int32] * 3
    assert [array.tolist() for array in arrays] == [tokenizer.encode(text) for text in ("a", SAMPLE, "")]


def test_special_tokens_in_a_document_are_text() -> None:
    tokenizer = load_tokenizer()
    assert max(tokenizer.encode("<|begin_of_text|><|end_of_text|>")) < 2046


def test_file_or_folder(tmp_path: Path) -> None:
    shutil.copy(SHIPPED, tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(str(path)).encode(SAMPLE) == load_tokenizer().encode(SAMPLE)
        assert load_tokenizer(str(path)).path == str(tmp_path / "tokenizer.json")


def save_words(folder: Path, *words: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=words[0]))
    backend.save(str(folder / "tokenizer.json"))
    return backend


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>"), (1, 2)),
        (("<unk>", "<s>", "</s>"), (1, 2)),
        (("<pad>", "<eos>", "<bos>"), (2, 1)),
        (("a", "<|endoftext|>"), (1, 1)),
    ],
)
def test_well_known_document_tokens(tmp_path: Path, words: tuple[str, ...], expected: tuple[int, int]) -> None:
    save_words(tmp_path, *words)
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"bos_token": "B", "eos_token": "E"}, (2, 3)),
        ({"bos_token": {"content": "B", "lstrip": False}, "eos_token": {"content": "E"}}, (2, 3)),
        ({"bos_token": None, "eos_token": "E"}, (3, 3)),
        ({}, (0, 1)),
    ],
)
def test_document_tokens_from_the_config(tmp_path: Path, config: dict[str, object], expected: tuple[int, int]) -> None:
    save_words(tmp_path, "<s>", "</s>", "B", "E")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id) == expected


def test_one_separator_serves_as_both(tmp_path: Path) -> None:
    save_words(tmp_path, "a", "<|im_end|>")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": "<|im_end|>"}')
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 1)


def test_no_document_tokens(tmp_path: Path) -> None:
    save_words(tmp_path, "a", "b")
    with pytest.raises(ConfigError, match=r"no file names the tokens .*tokenizer_config\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "a", "eos_token": "gone"}')
    with pytest.raises(ConfigError, match=r"no token gone, which .*tokenizer_config\.json names"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r'tokenizer_config\.json": is not JSON'):
        load_tokenizer(str(tmp_path))


def test_published_settings_do_not_change_the_corpus(tmp_path: Path) -> None:
    """Truncation, padding and a post-processor that adds BOS are all found in published files."""
    backend = tokenizers.Tokenizer.from_file(str(SHIPPED))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    template = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 2046)])
    backend.post_processor = template
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.encode(SAMPLE) == load_tokenizer().encode(SAMPLE)
    assert tokenizer.encode_batch([SAMPLE])[0].tolist() == tokenizer.encode(SAMPLE)


def test_vocab_size_is_the_id_space(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "far": 999}, unk_token="<s>"))
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).vocab_size == 1000


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8")))
def test_the_bytes_of_the_tokens_are_those_of_the_text(text: str) -> None:
    tokenizer = load_tokenizer()
    sizes = tokenizer.token_bytes
    assert sizes is not None
    assert sizes[tokenizer.encode(text)].sum() == len(text.encode())
    assert sizes.shape == (2048,)
    assert sizes.dtype == np.int32
    assert (sizes[[tokenizer.bos_id, tokenizer.eos_id]] == 0).all()


def test_the_bytes_of_added_tokens(tmp_path: Path) -> None:
    """Those that are found in the text stand for it, special ones for nothing; and the ids may have gaps."""
    backend = tokenizers.Tokenizer.from_file(str(SHIPPED))
    backend.add_tokens([tokenizers.AddedToken("\n\n\n日本", normalized=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    sizes = tokenizer.token_bytes
    assert sizes is not None
    text = "a\n\n\n日本語<|end_of_text|>"
    ids = tokenizer.encode(text)
    assert 2048 in ids
    assert sizes[2048] == 9
    assert sizes[ids].sum() == len(text.encode())


def test_tokens_that_are_not_made_of_bytes_have_no_size(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    with_space = tokenizers.Tokenizer.from_file(str(SHIPPED))
    with_space.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for backend in (words, with_space):
        backend.save(str(tmp_path / "tokenizer.json"))
        assert load_tokenizer(str(tmp_path)).token_bytes is None


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    message = r'model.tokenizer_path = "no/such": there is no such file .*relative to the current folder.*'
    with pytest.raises(ConfigError, match=message + r"titanlite tokenizer download --repo_id meta-llama/.*shipped"):
        load_tokenizer("no/such")
    with pytest.raises(ConfigError, match=r"the folder has no tokenizer\.json, tokenizer\.model or original/tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"version":')
    with pytest.raises(ConfigError, match=r"is not a Hugging Face tokenizer\.json"):
        load_tokenizer(str(tmp_path))


@pytest.fixture(scope="module")
def rank_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped vocabulary in tiktoken's format."""
    byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
    vocab = json.loads(SHIPPED.read_text(encoding="utf-8"))["model"]["vocab"]
    tokens = [bytes(byte_of[character] for character in name) for name in sorted(vocab, key=vocab.__getitem__)]
    file = tmp_path_factory.mktemp("llama") / "original" / "tokenizer.model"
    file.parent.mkdir()
    file.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return file


@pytest.fixture(scope="module")
def oracle(rank_file: Path) -> Callable[[str], list[int]]:
    tiktoken = pytest.importorskip("tiktoken")
    lines = [line.split() for line in rank_file.read_bytes().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    encoding = tiktoken.Encoding(name="llama", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    encode: Callable[[str], list[int]] = encoding.encode_ordinary
    return encode


def test_tiktoken_special_tokens(rank_file: Path) -> None:
    tokenizer = load_tokenizer(str(rank_file.parents[1]))
    assert tokenizer.path == str(rank_file)
    assert tokenizer.vocab_size == 2046 + 256
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2046, 2047)
    # The positions published for Llama 3, whose first special id is 128000.
    names = special_tokens()
    published = {128001: "<|end_of_text|>", 128006: "<|start_header_id|>", 128007: "<|end_header_id|>"}
    published |= {
        128008: "<|reserved_special_token_4|>",
        128009: "<|eot_id|>",
        128010: "<|reserved_special_token_5|>",
    }
    published |= {128002: "<|reserved_special_token_0|>", 128255: "<|reserved_special_token_250|>"}
    assert {128000 + names.index(name): name for name in published.values()} == published
    assert len(set(names)) == 256
    assert tokenizer.decode([2046 + 9]) == "<|eot_id|>"


def test_tiktoken_on_source_text(rank_file: Path, oracle: Callable[[str], list[int]]) -> None:
    tokenizer = load_tokenizer(str(rank_file))
    for text in (
        SAMPLE,
        Path(json.__file__).read_text(),
        Path(pytest.__file__).read_text(),
        "  \n\n   x " * 50,
    ):
        assert tokenizer.encode(text) == oracle(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(codec="utf-8")) | st.text("ab 'st\n\t1é"))
def test_tiktoken_on_any_text(rank_file: Path, oracle: Callable[[str], list[int]], text: str) -> None:
    assert load_tokenizer(str(rank_file)).encode(text) == oracle(text)


def test_the_bytes_of_tiktoken_s_tokens(rank_file: Path) -> None:
    tokenizer = load_tokenizer(str(rank_file))
    sizes = tokenizer.token_bytes
    assert sizes is not None
    assert (sizes[2046:] == 0).all()
    for line in rank_file.read_bytes().splitlines():
        token, rank = line.split()
        assert sizes[int(rank)] == len(base64.b64decode(token))
    for text in (SAMPLE, Path(json.__file__).read_text(), "<|eot_id|>"):
        assert sizes[tokenizer.encode(text)].sum() == len(text.encode())


def test_a_saved_tokenizer_is_the_same(tmp_path: Path, rank_file: Path) -> None:
    """Also in transformers, which puts BOS before a text, as training does."""
    transformers = pytest.importorskip("transformers")
    for name, path in {"shipped": "", "tiktoken": str(rank_file)}.items():
        tokenizer, folder = load_tokenizer(path), tmp_path / name
        folder.mkdir()
        tokenizer.save(folder)
        again, theirs = load_tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
        assert (again.bos_id, again.eos_id, again.vocab_size) == (2046, 2047, tokenizer.vocab_size)
        assert (theirs.bos_token_id, theirs.eos_token_id) == (2046, 2047)
        for text in (SAMPLE.replace("<|end_of_text|>", ""), Path(json.__file__).read_text()):
            ids = tokenizer.encode(text)
            assert again.encode(text) == ids
            assert theirs.encode(text) == [2046, *ids]
            assert theirs.decode(ids) == text
        assert tokenizer.encode(SAMPLE) == again.encode(SAMPLE)


def test_what_a_tokenizer_adds_to_a_text_is_kept(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(SHIPPED))
    template = processors.TemplateProcessing("$A <|end_of_text|>", special_tokens=[("<|end_of_text|>", 2047)])
    backend.post_processor = template
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "saved").mkdir()
    load_tokenizer(str(tmp_path)).save(tmp_path / "saved")
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    assert saved.encode("a").ids == backend.encode("a").ids
    assert saved.encode("a").ids[-1] == 2047


@pytest.mark.parametrize("template_in", ["config", "file"])
def test_a_copy_keeps_what_transformers_needs(template_in: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    load_tokenizer().save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"pad_token": "<|end_of_text|>", "model_max_length": 77, "chat_template": "{{ messages }}", "other": 1}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if template_in == "file":
        (tmp_path / "chat_template.jinja").write_text("{{ 'é' }}", encoding="utf-8")
    (tmp_path / "copy").mkdir()
    load_tokenizer(str(tmp_path)).save(tmp_path / "copy")
    for folder in (tmp_path, tmp_path / "copy"):
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert (theirs.pad_token_id, theirs.model_max_length) == (2047, 77)
        assert theirs.chat_template == ("{{ 'é' }}" if template_in == "file" else "{{ messages }}")


def test_sentencepiece_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03<s>\x15")
    with pytest.raises(ConfigError, match=r"this is a SentencePiece model .* use the same model's tokenizer.json"):
        load_tokenizer(str(tmp_path))


def test_damaged_tiktoken_files(tmp_path: Path, rank_file: Path) -> None:
    lines = rank_file.read_text().splitlines(keepends=True)
    file = tmp_path / "tokenizer.model"
    file.write_text("".join(lines[:5]) + "version https\n")
    with pytest.raises(ConfigError, match='line 6 is not "base64 rank"'):
        load_tokenizer(str(file))
    file.write_text("".join(lines[:100]))
    with pytest.raises(ConfigError, match=r"\(156 are missing\): the file is cut short"):
        load_tokenizer(str(file))
    file.write_text("".join(lines[:700] + lines[701:]))
    with pytest.raises(ConfigError, match="the ranks must be 0 to 2044"):
        load_tokenizer(str(file))
