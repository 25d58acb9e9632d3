"""The text of new tokens: whole characters while they come, and stop strings over the borders of tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.chats import byte_level, folder, sentencepiece
from titanlite.data import Tokenizer, load_tokenizer
from titanlite.errors import ConfigError
from titanlite.inference.answer import Answer, check_stop

BACKENDS = {"byte-level": byte_level(), "sentencepiece": sentencepiece()}
TEXTS = ["Grüße, 世界 👩‍🚀 \n\n def f(x):\n    return x", "  two\n", "a</s>b", "\n"]


@pytest.fixture(scope="module", params=BACKENDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(str(folder(tmp_path_factory.mktemp("tokenizer"), BACKENDS[request.param], None)))


def pieces(answer: Answer, ids: Sequence[int]) -> list[str]:
    given = []
    for token in ids:
        answer.add(token)
        given.append(answer.certain())
        if answer.ended:
            break
    return given


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_together_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    given = pieces(Answer(len(ids), tokenizer=tokenizer), ids)
    assert "".join(given) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in given)
    assert len([piece for piece in given if piece]) > 1 or len(ids) < 4


@pytest.mark.parametrize("seed", range(10))
def test_whatever_the_tokens_the_pieces_are_the_text(tokenizer: Tokenizer, seed: int) -> None:
    """Random tokens have bytes that are no characters, which a decoder takes together with their neighbours."""
    rng = random.Random(seed)
    some = rng.sample(sorted(tokenizer.byte_tokens) or range(256), 20) + rng.sample(range(300, 700), 6)
    ids = rng.choices(some, k=60)
    before = tokenizer.encode("a text before")
    for earlier in ([], before):
        answer = Answer(len(ids), tokenizer=tokenizer, before=earlier)
        assert "".join(pieces(answer, ids)) == answer.text
        assert tokenizer.decode(earlier) + answer.text == tokenizer.decode([*earlier, *ids])


@pytest.mark.parametrize("stop", ["\n\n", " def", "(x", "界 ", "世界 👩‍🚀 \n", "return x", "f(x):\n    re", "ß"])
def test_stop_strings_are_found_over_the_borders_of_tokens(tokenizer: Tokenizer, stop: str) -> None:
    ids = tokenizer.encode(TEXTS[0])
    answer = Answer(1000, tokenizer=tokenizer, stop=["never", stop])
    given = pieces(answer, ids)
    assert answer.ended == "stop"
    assert "".join(given) == answer.text == TEXTS[0][: TEXTS[0].index(stop)]


def expected(text: str, stop: Sequence[str]) -> str:
    """The text before the stop string that is complete first, found character by character."""
    for end in range(len(text) + 1):
        for begin in range(end):
            if text[begin:end] in stop:
                return text[:begin]
    return text


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["a", "ab", "b", "ba", "aab", "c"]), max_size=12), st.lists(st.text("ab", min_size=1)))
def test_the_first_complete_stop_string_counts(parts: list[str], stop: list[str]) -> None:
    tokenizer = SHIPPED
    ids = [i for part in parts for i in tokenizer.encode(part)]
    answer = Answer(1000, tokenizer=tokenizer, stop=stop)
    given = "".join(pieces(answer, ids))
    assert answer.text == expected("".join(parts), stop)
    assert given == answer.text or (not answer.ended and answer.text.startswith(given))
    held = answer.text[len(given) :]
    assert not held or any(s.startswith(held) for s in stop)


SHIPPED = load_tokenizer()


def test_what_was_held_back_comes_when_the_answer_ends() -> None:
    ids = SHIPPED.encode("a STO")
    by_end, by_length = (Answer(n, {SHIPPED.eos_id}, tokenizer=SHIPPED, stop=["STOP"]) for n in (9, len(ids)))
    assert "".join(pieces(by_end, ids)) == "a "
    by_end.add(SHIPPED.eos_id)
    assert (by_end.certain(), by_end.ended, by_end.text) == ("STO", "end", "a STO")
    assert "".join(pieces(by_length, ids)) == "a STO"
    assert by_length.ended == "length"


def test_a_stop_string_in_the_prompt_stops_nothing() -> None:
    ids = SHIPPED.encode("in\nout")
    answer = Answer(100, tokenizer=SHIPPED, stop=["\n", "no"], before=SHIPPED.encode("a\nn"))
    assert "".join(pieces(answer, [*SHIPPED.encode("o"), *ids])) == "oin"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ConfigError, match="must have a character"):
        check_stop(["a", ""])


def test_bytes_of_a_character_wait_for_its_end(tokenizer: Tokenizer) -> None:
    if not tokenizer.byte_tokens:
        pytest.skip("its characters are no tokens of bytes")
    ids = [i for i in tokenizer.encode("é👩") if i in tokenizer.byte_tokens]
    answer = Answer(100, tokenizer=tokenizer)
    assert pieces(answer, ids) == [""] * 6
    answer.ended = "end"
    assert answer.certain() == "é👩"


def test_a_copy_of_a_tokenizer_keeps_its_end_tokens(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", BACKENDS["byte-level"], None)
    (source / "generation_config.json").write_text('{"eos_token_id": [7, 8], "temperature": 0.6}')
    (tmp_path / "copy").mkdir()
    load_tokenizer(str(source)).save(tmp_path / "copy")
    assert load_tokenizer(str(tmp_path / "copy")).generation == {"eos_token_id": [7, 8], "temperature": 0.6}
