"""Chats: ids and masks against transformers, what a template may do, and every fault of a conversation."""

from __future__ import annotations

import gc
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.chats import LLAMA3, MISTRAL, QWEN25, TEMPLATES, byte_level, folder, marked, plain, sentencepiece
from titanlite.config.data_sections import Data
from titanlite.data import load_tokenizer
from titanlite.data.chat_template import template_of
from titanlite.data.encode_chat import ChatEncoder
from titanlite.data.records import Corrupt
from titanlite.errors import ConfigError, TrainingError

SINGLE = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]
CHATS = {
    "one turn": SINGLE,
    "two turns": [*SINGLE, {"role": "user", "content": "And 3 + 3?"}, {"role": "assistant", "content": "6\n\n"}],
    "the user last": [*SINGLE, {"role": "user", "content": "Thanks!"}],
    "blanks and lines": [
        {"role": "user", "content": "  def f(x):\n\treturn x \n"},
        {"role": "assistant", "content": "\n\n    return  x\n"},
    ],
    "many bytes": [{"role": "user", "content": "Grüße, 世界 👩‍🚀"}, {"role": "assistant", "content": "👋🏽 你好é"}],
    "special tokens in the text": [
        {"role": "user", "content": "say <|im_end|> and </s>"},
        {"role": "assistant", "content": "<|im_end|> or <|eot_id|> or </s> it is"},
    ],
    "an empty answer": [{"role": "user", "content": "Say nothing."}, {"role": "assistant", "content": ""}],
}
SYSTEM = {"role": "system", "content": "Be  brief."}
BACKENDS = {"byte-level": byte_level(), "sentencepiece": sentencepiece()}


def encoder_of(path: Path, template: object = None, backend: str = "byte-level", **more: Any) -> ChatEncoder:
    return ChatEncoder(load_tokenizer(str(folder(path, BACKENDS[backend], template))), Data(), **more)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", TEMPLATES)
def test_ids_and_masks_are_those_of_transformers(family: str, backend: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    template = TEMPLATES[family]
    theirs = transformers.AutoTokenizer.from_pretrained(folder(tmp_path, BACKENDS[backend], marked(template)))
    both = {way: encoder_of(tmp_path / way.__name__, way(template), backend) for way in (plain, marked)}
    for messages in [*CHATS.values(), *([[SYSTEM, *chat] for chat in CHATS.values()] if family != "mistral" else [])]:
        expected = theirs.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        for way, encoder in both.items():
            example = encoder.encode({"messages": messages})
            assert example.tokens.tolist() == expected["input_ids"], way
            assert example.scored.astype(int).tolist() == expected["assistant_masks"], way
            assert (example.tokens.dtype, example.scored.dtype) == (np.int32, np.bool_)


def test_the_date_is_always_the_same(tmp_path: Path) -> None:
    source = "{{ strftime_now('%d %b %Y') if strftime_now is defined else 'none' }}" + marked(QWEN25)
    encoder = encoder_of(tmp_path, source)
    assert load_tokenizer(str(tmp_path)).decode(encoder.encode({"messages": SINGLE}).tokens).startswith("26 Jul 2024")


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "It is 4."}]},
        {"messages": [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in SINGLE]},
        {"messages": [{**message, "name": None, "tool_calls": None} for message in SINGLE]},
        {"messages": SINGLE, "conversations": None, "tools": [{"name": "f"}]},
        {"messages": None, "conversations": SINGLE},
        {"messages": tuple(SINGLE)},
        {"messages": [SINGLE[0], {**SINGLE[1], "tool_calls": [{"function": {"name": "f"}}]}]},
    ],
    ids=["ShareGPT", "parts", "columns of parquet", "tools", "the other column", "a tuple", "calls of tools"],
)
def test_spellings_of_a_conversation(record: dict[str, Any], tmp_path: Path) -> None:
    encoder = encoder_of(tmp_path, plain(QWEN25))
    for mine, expected in zip(encoder.encode(record), encoder.encode({"messages": SINGLE})):
        assert mine.tolist() == expected.tolist()


def test_calls_of_tools_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = encoder_of(tmp_path, plain(QWEN25))
    for _ in range(3):
        encoder.encode({"messages": [SINGLE[0], {**SINGLE[1], "tool_calls": [{"name": "f"}]}]})
    assert len([m for m in caplog.messages if "tools" in m]) == 1


def test_a_default_template_ends_turns_with_eos_and_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = encoder_of(tmp_path)
    assert len([m for m in caplog.messages if "no chat template" in m]) == 1
    tokenizer = load_tokenizer(str(tmp_path))
    tokens, scored = encoder.encode({"messages": [*SINGLE, *SINGLE]})
    assert tokens[0] == tokenizer.bos_id
    assert tokenizer.decode(tokens[scored]) == "It is 4.<|end_of_text|>It is 4.<|end_of_text|>"
    assert (tokens == tokenizer.eos_id).sum() == 4
    assert (tokens == tokenizer.bos_id).sum() == 1


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "{{ 1 / 0 }}"}, {"name": "default", "template": plain(QWEN25)}]
    expected = encoder_of(tmp_path / "one", plain(QWEN25))
    encoder = encoder_of(tmp_path / "several", several)
    assert encoder.identity == expected.identity
    assert encoder.identity != encoder_of(tmp_path / "other", plain(LLAMA3)).identity
    (tmp_path / "several" / "chat_template.jinja").write_text(plain(LLAMA3))
    assert template_of(load_tokenizer(str(tmp_path / "several"))) == plain(LLAMA3)


def test_a_template_without_bos_gets_none_from_a_copy_either(tmp_path: Path) -> None:
    """A tokenizer that names EOS alone, as Qwen's: a template that writes BOS writes nothing there."""
    source = folder(tmp_path / "qwen", BACKENDS["byte-level"], "{{ bos_token }}" + plain(QWEN25), bos_token=None)
    tokenizer = load_tokenizer(str(source))
    assert tokenizer.bos_id == tokenizer.eos_id
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy")
    copy = load_tokenizer(str(tmp_path / "copy"))
    assert (copy.bos_id, copy.identity) == (tokenizer.bos_id, tokenizer.identity)
    encoders = [ChatEncoder(each, Data()) for each in (tokenizer, copy)]
    assert encoders[0].identity == encoders[1].identity
    for encoder in encoders:
        assert encoder.encode({"messages": SINGLE}).tokens[0] != tokenizer.bos_id


# ---- faults of a conversation

USER, ASSISTANT = SINGLE
FAULTS: dict[str, tuple[Any, str, str]] = {
    "no field": ({"text": "a"}, plain(QWEN25), r'no field "messages" .*text.*data\.messages_field'),
    "null": ({"messages": None}, plain(QWEN25), r"no list of messages \(null\); data\.messages_field"),
    "text": ({"messages": "hi"}, plain(QWEN25), r"no list of messages \(str\)"),
    "no message": ({"messages": []}, plain(QWEN25), "no message"),
    "no object": ({"messages": ["hi"]}, plain(QWEN25), "message 1 is no object"),
    "no role": ({"messages": [USER, {"content": "a"}]}, plain(QWEN25), "message 2 has no role"),
    "a role of another type": ({"messages": [{"role": 1, "content": "a"}]}, plain(QWEN25), "message 1 has no role"),
    "no content": ({"messages": [USER, {"role": "assistant"}]}, plain(QWEN25), "message 2 has no content"),
    "a number": ({"messages": [{"role": "user", "content": 3}]}, plain(QWEN25), r"message 1 has no content.*\(int\)"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]},
        plain(QWEN25), r"parts that are no text \(image, text\)",
    ),
    "a call alone": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]},
        plain(QWEN25), "message 2 only calls a tool",
    ),
    "a speaker": ({"conversations": [{"from": "bing", "value": "a"}]}, plain(QWEN25), "message 1 is from 'bing'"),
    "no assistant": ({"messages": [USER]}, plain(QWEN25), r"nothing to learn.*roles are: user\)"),
    "no assistant in a marked one": ({"messages": [USER]}, marked(QWEN25), "nothing to learn"),
    "another name": (
        {"messages": [USER, {"role": "Assistant", "content": "a"}]}, plain(QWEN25), "nothing to learn.*user, Assistant",
    ),
    "half a character": ({"messages": [USER, {**ASSISTANT, "content": "\ud800"}]}, plain(QWEN25), "surrogate pair"),
    "a value of another kind": ({"messages": [USER, {**ASSISTANT, "x": b""}]}, plain(QWEN25), "no text or number"),
    "roles out of order": (
        {"messages": [USER, USER, ASSISTANT]}, plain(MISTRAL), "refuses the conversation: .*must alternate",
    ),
    "an unknown role": (
        {"messages": [USER, {"role": "judge", "content": "a"}, USER, ASSISTANT]}, plain(MISTRAL), "Only user and",
    ),
    "a template that fails": ({"messages": SINGLE}, "{{ 1 / 0 }}", "fails .ZeroDivisionError"),
    "the beginning fails": (
        {"messages": [ASSISTANT]}, plain(QWEN25), "fails on what comes before message 1, the assistant's",
    ),
    "turns that change": (
        {"messages": [*SINGLE, *SINGLE]},
        "{% for m in messages %}{{ m.content if loop.last else m.content | upper }}{% endfor %}",
        r"where message 2, the assistant's, .*'What is 2 .*'WHAT IS 2.*\{% generation %\}",
    ),
    "too long": ({"messages": [USER, {**ASSISTANT, "content": "a" * 9_000_000}]}, plain(QWEN25), "more than 8,388,608"),
    "too long for a request": ({"messages": [{**USER, "content": "é" * 12_000_000}]}, plain(QWEN25), "more than 8,388"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_conversation_that_cannot_be_used(fault: str, tmp_path: Path) -> None:
    record, template, words = FAULTS[fault]
    encoder = encoder_of(tmp_path, template)
    with pytest.raises(Corrupt) as error:
        encoder.encode(record)
    assert re.search(words, str(error.value), re.DOTALL), str(error.value)
    assert len(str(error.value)) < 600
    if template in (plain(QWEN25), marked(QWEN25)):
        assert encoder.encode({"messages": SINGLE}).scored.any()  # the next record is read


# ---- templates by anybody

HOSTILE = {
    "loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "a long text": "{{ 'a' * 10**10 }}",
    "a wide field": "{{ '%1000000000d' | format(1) }}{{ 'a' | center(10**9) }}",
    "a power": "{{ (10**8)**(10**8) }}",
    "a table": "{{ [1] | batch(10**9, 0) | list }}",
    "a pattern": "{% for i in range(99999) %}{{ ('a ' * 1000000) | wordwrap(2) | length }}{% endfor %}",
    "Python's insides": "{{ ''.__class__.__mro__ }}",
    "the globals": "{{ raise_exception.__globals__.json }}",
    "the insides by a name": "{{ messages | map(attribute='__class__') | list }}{{ ''['__class__'].x }}",
    "a change of the messages": "{{ messages.append(1) }}",
    "no end": "{% for m in messages %}",
    "too many brackets": "{{ " + "(" * 5000,
    "a macro around a mark": "{% set x %}a{% generation %}b{% endgeneration %}{% endset %}{{ x }}",
}


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_stops_the_run(template: str, tmp_path: Path) -> None:
    """It is a fault of the tokenizer, not of a record, which could be left out: some of it depends on the machine."""
    with pytest.raises(ConfigError) as error:
        encoder_of(tmp_path, HOSTILE[template], seconds=0.3).encode({"messages": SINGLE})
    assert (error.value.key, error.value.value) == ("model.tokenizer_path", str(tmp_path / "tokenizer.json"))
    assert "template" in error.value.why
    assert len(error.value.why) < 600


@pytest.mark.parametrize(
    "template",
    ["{% for i in range(10**9) %}{% endfor %}", "{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
     "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}"],
    ids=["a range", "much text", "recursion", "a file", "a module"],
)  # fmt: skip
def test_what_the_sandbox_itself_bounds(template: str, tmp_path: Path) -> None:
    with pytest.raises(Corrupt, match="chat template"):
        encoder_of(tmp_path, template).encode({"messages": SINGLE})


@pytest.mark.parametrize("entry", [7, {"default": "a"}, [], [{"name": "tool_use", "template": "a"}], ["a"],
                                   [{"name": "default", "template": None}]])  # fmt: skip
def test_an_entry_that_is_no_template(entry: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="template") as error:
        encoder_of(tmp_path, entry)
    assert error.value.key == "model.tokenizer_path"


def test_the_process_ends_with_its_encoder_and_serves_threads(tmp_path: Path) -> None:
    encoder = encoder_of(tmp_path, plain(QWEN25))
    process = encoder._template._process
    expected = encoder.encode({"messages": SINGLE}).tokens.tolist()
    seen: list[bool] = []

    def read(encoder: ChatEncoder = encoder) -> None:
        seen.extend(encoder.encode({"messages": SINGLE}).tokens.tolist() == expected for _ in range(50))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 200
    assert process.poll() is None
    del encoder, read, threads, thread
    gc.collect()
    assert process.poll() is not None


def test_a_process_that_somebody_kills_is_a_failure_of_the_run(tmp_path: Path) -> None:
    encoder = encoder_of(tmp_path, plain(QWEN25))
    encoder._template._process.kill()
    for _ in range(2):
        with pytest.raises(TrainingError, match="renders the chat template ended"):
            encoder.encode({"messages": SINGLE})


def test_the_process_ends_with_a_killed_trainer(tmp_path: Path) -> None:
    """In the middle of a template that does not end, too: then its timer ends it."""
    template = "{% if messages | length > 1 %}" + HOSTILE["loops"] + "{% endif %}"
    read, write = os.pipe()
    trainer = os.fork()
    if not trainer:
        encoder = encoder_of(tmp_path, template, seconds=0.3)
        os.write(write, b"%d\n" % encoder._template._process.pid)
        encoder.encode({"messages": SINGLE})
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        pid = int(stream.readline())
    time.sleep(0.2)
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    end = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and _state(pid) != "Z":
        assert time.monotonic() < end
        time.sleep(0.02)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
