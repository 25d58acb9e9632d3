"""The published tokenizers of Llama 3, Llama 2, Mistral 7B and Mistral Nemo give the ids of their own libraries.

The packages ``llama-models`` and ``mistral-common`` ship their files (the extra ``tokenizers``). What titanlite does
not read itself, SentencePiece models and tekken, is made a ``tokenizer.json`` first.
"""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from titanlite.data import Tokenizer, load_tokenizer

pytestmark = pytest.mark.long

Encode = Callable[[str], list[int]]
ALPHABETS = [
    "abcdefgh",
    " \t\n\r",
    "0123456789",
    "äöüßéñ",
    "日本語中文字",
    "ありがとう",
    "🙂👍🏽🇫🇷",
    "-_.,;:!?'\"()[]{}<>|",
    "\u200b\u00a0\ufeff",
]


@cache
def texts() -> list[str]:
    """Source code, and random strings of every mix of alphabets."""
    draw = random.Random(0)
    mixed = ["".join(draw.choice(draw.choice(ALPHABETS)) for _ in range(draw.randint(1, 60))) for _ in range(2000)]
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
    return [*mixed, *(file.read_text(encoding="utf-8", errors="replace")[:20_000] for file in files)]


def llama3(folder: Path) -> tuple[Tokenizer, Encode]:
    module = pytest.importorskip("llama_models.llama3.tokenizer")
    file = Path(module.__file__).parent / "tokenizer.model"
    theirs = module.Tokenizer(file)
    return load_tokenizer(str(file)), lambda text: theirs.encode(text, bos=False, eos=False)


def sentencepiece(name: str) -> Callable[[Path], tuple[Tokenizer, Encode]]:
    def make(folder: Path) -> tuple[Tokenizer, Encode]:
        library = pytest.importorskip("mistral_common.tokens.tokenizers.sentencepiece")
        file = Path(pytest.importorskip("mistral_common").__file__).parent / "data" / name
        theirs = library.SentencePieceTokenizer(file)
        as_published(theirs._model).save(str(folder / "tokenizer.json"))
        special = {"bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(special))
        return load_tokenizer(str(folder)), lambda text: theirs.encode(text, bos=False, eos=False)

    return make


def as_published(model: Any) -> tokenizers.Tokenizer:
    """The ``tokenizer.json`` of Mistral 7B v0.1 and Llama 2, from their SentencePiece model: merges in the order of the
    scores, bytes for characters without a token, and a mark for each space and for the beginning."""
    pieces = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    merges = []
    for piece, number in pieces.items():
        if model.is_byte(number) or model.is_control(number) or model.is_unknown(number):
            continue
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [(-model.get_score(number), pair) for pair in pairs if pair[0] in pieces and pair[1] in pieces]
    ordered = [pair for _, pair in sorted(merges, key=lambda merge: merge[0])]
    bpe = tokenizers.models.BPE(pieces, ordered, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    mark = tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = tokenizers.normalizers.Sequence(list(mark))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def tekken(folder: Path) -> tuple[Tokenizer, Encode]:
    library = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    convert = pytest.importorskip("transformers.integrations.mistral").convert_tekken_tokenizer
    file = Path(pytest.importorskip("mistral_common").__file__).parent / "data" / "tekken_240718.json"
    convert(str(file)).save_pretrained(folder)
    theirs = library.Tekkenizer.from_file(file)
    return load_tokenizer(str(folder)), lambda text: theirs.encode(text, bos=False, eos=False)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(llama3, id="Llama 3"),
        pytest.param(sentencepiece("tokenizer.model.v1"), id="Mistral 7B v0.1"),
        pytest.param(sentencepiece("mistral_instruct_tokenizer_240323.model.v3"), id="Mistral 7B v0.3"),
        pytest.param(tekken, id="Mistral Nemo"),
    ],
)
def test_ids_are_those_of_its_own_library(make: Any, tmp_path: Path) -> None:
    ours, theirs = make(tmp_path)
    different = [text for text in texts() if list(ours.encode(text)) != list(theirs(text))]
    assert different == []


def test_special_tokens_of_llama3_have_their_ids(tmp_path: Path) -> None:
    module = pytest.importorskip("llama_models.llama3.tokenizer")
    theirs = module.Tokenizer(Path(module.__file__).parent / "tokenizer.model")
    ours, _ = llama3(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (theirs.bos_id, theirs.eos_id, theirs.n_words)
    for text in ("<|begin_of_text|>a<|eot_id|>", "<|start_header_id|>user<|end_header_id|>\n\n1+1<|eot_id|>"):
        ids, _ = ours.encode_with_special(text)
        assert ids.tolist() == theirs.encode(text, bos=False, eos=False, allowed_special="all")
