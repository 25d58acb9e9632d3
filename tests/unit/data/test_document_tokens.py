"""Which tokens begin and end a document, against transformers, over the shapes that the folders of tokenizers have."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from titanlite.data import load_tokenizer
from titanlite.errors import ConfigError

WORDS = ("<unk>", "<s>", "</s>", "[BOS]", "[EOS]", "<|endoftext|>", "<bos>", "<eos>", "a", "b")
OLD = {"bos_token": "<s>", "eos_token": "</s>"}
NEW = {"bos_token": "[BOS]", "eos_token": "[EOS]"}


def entry(content: str, **more: Any) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, **more}


def folder_of(folder: Path, files: dict[str, Any], *, byte_level: bool = True) -> Path:
    """A tokenizer of WORDS, and other files: name without .json -> content."""
    folder.mkdir(exist_ok=True)
    vocab = {word: n for n, word in enumerate(WORDS)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if byte_level else None
    backend.decoder = decoders.ByteLevel() if byte_level else None
    backend.add_special_tokens(list(WORDS[:8]))
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def config(**values: Any) -> dict[str, Any]:
    return {"tokenizer_config": values}


SHAPES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "strings": config(**NEW),
    "words that are not special": config(bos_token="a", eos_token="b"),
    "entries": config(**{key: entry(token, __type="AddedToken") for key, token in NEW.items()}),
    "the map alone": {"special_tokens_map": NEW},
    "entries in the map": {"special_tokens_map": {key: entry(token) for key, token in NEW.items()}},
    "EOS, and BOS is null": config(bos_token=None, eos_token="<|endoftext|>"),
    "EOS alone": config(eos_token="[EOS]"),
    "BOS alone": config(bos_token="[BOS]"),
    "both null": config(bos_token=None, eos_token=None),
    "an empty name": config(bos_token="", eos_token="</s>"),
    "the map against the config": {**config(**OLD), "special_tokens_map": NEW},
    "half of the map against the config": {**config(**OLD), "special_tokens_map": {"eos_token": "[EOS]"}},
    "null in the map": {**config(**OLD), "special_tokens_map": {**NEW, "bos_token": None}},
    "null in the config": {**config(bos_token=None, eos_token=None), "special_tokens_map": NEW},
    "the map against a later config": {**config(**OLD, added_tokens_decoder={}), "special_tokens_map": NEW},
    "a list of added tokens": config(**NEW, added_tokens_decoder={"3": entry("[BOS]", special=True)}),
    "a token that is only listed": config(
        bos_token="<new>", eos_token="</s>", added_tokens_decoder={"10": entry("<new>", special=True)}
    ),
    "a token in added_tokens.json": {**config(bos_token="<new>", eos_token="</s>"), "added_tokens": {"<new>": 10}},
    "GPT-2's class": config(tokenizer_class="GPT2Tokenizer"),
    "GPT-2's class and EOS": config(tokenizer_class="GPT2TokenizerFast", eos_token="[EOS]"),
    "GPT-2's class and null": config(tokenizer_class="GPT2Tokenizer", bos_token=None, eos_token="[EOS]"),
    "Qwen's class": config(tokenizer_class="Qwen2Tokenizer"),
    "Gemma's class": config(tokenizer_class="GemmaTokenizer", eos_token="[EOS]"),
    "Llama's class": config(tokenizer_class="LlamaTokenizerFast", eos_token="[EOS]"),
    "no class of its own": config(tokenizer_class="PreTrainedTokenizerFast", eos_token="[EOS]"),
    "a model": {"config": {"model_type": "llama"}, **config(eos_token="[EOS]")},
    "ids of a model against names": {"config": {"model_type": "llama", "bos_token_id": 3, "eos_token_id": [4, 5]}}
    | config(**OLD),
    "other tokens": config(**NEW, pad_token="a", unk_token="<unk>", additional_special_tokens=["b"]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_tokens_are_those_of_transformers(shape: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where it has one of the two, that is both. Where it has none, the pair is well known, and a warning says so."""
    transformers = pytest.importorskip("transformers")
    folder = folder_of(tmp_path / "tokenizer", SHAPES[shape])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = [theirs.bos_token_id, theirs.eos_token_id]
    with caplog.at_level(logging.WARNING):
        ours = load_tokenizer(str(folder))
    guessed = [record for record in caplog.records if "known from other models" in record.getMessage()]
    assert bool(guessed) == (expected == [None, None])
    if guessed:
        assert [ours.bos_id, ours.eos_id] == [1, 2]
    else:
        bos, eos = expected
        assert [ours.bos_id, ours.eos_id] == [eos if bos is None else bos, bos if eos is None else eos]
    if "'s class" not in shape:  # which adds tokens, and has an <unk> of its own
        assert ours.vocab_size == len(theirs)
        assert ours.encode("ab<new>") == theirs.encode("ab<new>", add_special_tokens=False, split_special_tokens=True)


def test_llamas_class_names_a_pair_for_sentencepiece(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers builds that class from another form of vocabulary, so this test has the right value itself."""
    files = config(tokenizer_class="LlamaTokenizerFast", eos_token="[EOS]")
    tokenizer = load_tokenizer(str(folder_of(tmp_path, files, byte_level=False)))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 4)
    assert not caplog.records


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ({"bos_token_id": 3, "eos_token_id": 4}, (3, 4)),
        ({"bos_token_id": 3, "eos_token_id": [4, 5]}, (3, 4)),
        ({"bos_token_id": None, "eos_token_id": [5]}, (5, 5)),
        ({"bos_token_id": [], "eos_token_id": []}, (1, 2)),
        ({"bos_token_id": "3", "eos_token_id": -1}, (1, 2)),
        ({"bos_token_id": 400, "eos_token_id": 10**30}, (1, 2)),
    ],
)
def test_the_ids_of_the_model_where_nothing_is_named(
    ids: dict[str, Any], expected: tuple[int, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(str(folder_of(tmp_path, {"config": ids})))
    assert (tokenizer.bos_id, tokenizer.eos_id) == expected
    (warning,) = caplog.records
    assert ("config.json" in warning.getMessage().rpartition("taken are")[2]) == (expected != (1, 2))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ("the map against the config", ["special_tokens_map.json names [BOS] as bos_token", "<s>"]),
        ("ids of a model against names", ["config.json: its eos_token_id is [4, 5]", "</s> (2)"]),
    ],
)
def test_files_that_contradict_each_other_are_named(
    shape: str, words: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_tokenizer(str(folder_of(tmp_path, SHAPES[shape])))
    assert all(word in caplog.text for word in words)


@pytest.mark.parametrize(
    ("files", "place", "words"),
    [
        (config(bos_token="<gone>", eos_token="</s>"), "tokenizer.json", ["<gone>", "tokenizer_config.json names"]),
        ({"special_tokens_map": {"eos_token": "<gone>"}}, "tokenizer.json", ["special_tokens_map.json names"]),
        (config(bos_token=3, eos_token="</s>"), "tokenizer_config.json", ["bos_token must be", "3"]),
        (config(bos_token=["[BOS]"]), "tokenizer_config.json", ["bos_token must be"]),
        (config(bos_token={"content": 3}), "tokenizer_config.json", ["bos_token must be"]),
        (config(added_tokens_decoder={"80": entry("<new>")}), "tokenizer_config.json", ["id 80", "room at 10"]),
        (config(added_tokens_decoder=[1]), "tokenizer_config.json", ["added tokens is damaged"]),
        (config(added_tokens_decoder={"x": {}}), "tokenizer_config.json", ["added tokens is damaged"]),
        (config(added_tokens_decoder={"10": {"content": 3}}), "tokenizer_config.json", ["added tokens is damaged"]),
        ({"added_tokens": {"<new>": 80}}, "added_tokens.json", ["id 80", "room at 10"]),
        ({"added_tokens": {"<new>": [1]}}, "added_tokens.json", ["added tokens is damaged"]),
        ({"special_tokens_map": ["[BOS]"]}, "special_tokens_map.json", ["no JSON object"]),
        ({"tokenizer_config": "{"}, "tokenizer_config.json", ["is not JSON"]),
        ({"tokenizer_config": ""}, "tokenizer_config.json", ["is not JSON"]),
        ({"tokenizer_config": "null"}, "tokenizer_config.json", ["no JSON object"]),
        ({"tokenizer_config": "[" * 100_000}, "tokenizer_config.json", ["is not JSON"]),
        ({"tokenizer_config": '{"bos_token": ' + "9" * 10_000 + "}"}, "tokenizer_config.json", ["is not JSON"]),
        ({"tokenizer_config": "\ufeff{}"}, "tokenizer_config.json", ["is not JSON"]),
        ({"tokenizer_config": '{"a": "' + "x" * 10_000_000 + '"}'}, "tokenizer_config.json", ["10,000,000 bytes"]),
    ],
)
def test_damaged_files_are_refused_by_name(files: dict[str, Any], place: str, words: list[str], tmp_path: Path) -> None:
    folder_of(tmp_path, files)
    with pytest.raises(ConfigError) as error:
        load_tokenizer(str(tmp_path))
    assert (error.value.key, error.value.value) == ("model.tokenizer_path", str(tmp_path / place))
    assert all(word in error.value.why for word in words), error.value.why


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_a_folder_in_place_of_a_file(name: str, tmp_path: Path) -> None:
    folder_of(tmp_path, {})
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match="no regular file"):
        load_tokenizer(str(tmp_path))
