"""``titanlite generate --chat`` and ``--prompts`` against transformers: templates, greedy text, and every family."""

from __future__ import annotations

import io
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from tests.support import chats
from tests.support.docs import blocks_of, text_of
from tests.support.families import their_model
from tests.support.runs import ROOT, environment
from tests.unit.models.test_families import ours_of
from titanlite.commands import generate
from titanlite.config.data_sections import Data
from titanlite.data import load_tokenizer
from titanlite.data.encode_chat import ChatEncoder
from titanlite.data.records import Corrupt
from titanlite.errors import ConfigError
from titanlite.inference.answer import Answer
from titanlite.inference.chat import Chat
from titanlite.inference.generate import inference
from titanlite.inference.kv_cache import KVCache
from titanlite.inference.load import describe, tokenizer_of
from titanlite.inference.sampling import Sampling, TokenSampler

# A case of each family, with a template; windows are shorter than the conversation.
FAMILIES = {
    "llama, tied, llama3 scaling": "llama3",
    "mistral, window": "mistral",
    "qwen2, tied": "qwen2.5",
    "qwen3": "qwen3",
    "phi3, window, partial rotary": "phi4-mini",
}
ENDS = [2047, 2050]  # <|end_of_text|> and <|eot_id|>
TURNS = ["What is 2 + 2?", "And 3 + 3?", "Thanks, 世界!"]
NEW = 12
DOCUMENT = ROOT / "docs" / "generate-and-convert.md"
PAGE = blocks_of(DOCUMENT)


def write(path: Path, case: str, template: str | None, positions: int = 512, **config: Any) -> Path:
    """A folder of a small random model whose tokenizer has a chat template."""
    their_model(case, vocab_size=2054, max_position_embeddings=positions).save_pretrained(path)
    chats.folder(path, chats.byte_level(), None if template is None else chats.plain(template), **config)
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 2046, "eos_token_id": ENDS}))
    return path


QUICK = ("mistral, window", "qwen3")


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in FAMILIES],
)
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model"), request.param, chats.TEMPLATES[FAMILIES[request.param]])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("small"), "mistral, window", chats.QWEN25, positions=128)


class Theirs:
    """transformers' model and tokenizer of a folder."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        return list(ids)

    def after(self, ids: list[int], new: int = NEW, ends: list[int] = ENDS) -> str:
        given = torch.tensor([ids])
        mask = torch.ones_like(given)
        out = self.model.generate(
            given, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=ends, pad_token_id=0
        )
        told = out[0, len(ids) :].tolist()
        return self.tokenizer.decode(told[:-1] if told[-1] in ends else told)

    def conversation(self, turns: list[str], system: str | None = None) -> list[str]:
        messages = [] if system is None else [{"role": "system", "content": system}]
        answers = []
        for turn in turns:
            messages.append({"role": "user", "content": turn})
            answers.append(self.after(self.prompt(messages)))
            messages.append({"role": "assistant", "content": answers[-1]})
        return answers


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs generate with a text on stdin, greedy."""

    def run(folder: Path, *options: str, stdin: str | bytes = "") -> tuple[int, str, str]:
        content = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        capfd.readouterr()
        status = generate.main(["--checkpoint", str(folder), "--temperature=0", *options])
        return status, *capfd.readouterr()

    return run


def test_a_conversation_is_that_of_transformers(model_folder: Path, command: Command) -> None:
    theirs = Theirs(model_folder)
    expected = "".join(f"{answer}\n" for answer in theirs.conversation(TURNS))
    given = ("--chat", f"--max_new_tokens={NEW}")
    status, out, err = command(model_folder, *given, stdin="\n".join(TURNS))
    assert status == 0, err
    assert out == expected
    assert len({*expected}) > 10
    assert command(model_folder, *given, "--no-cache", stdin="\n".join(TURNS))[1] == expected


def test_prompts_of_a_file_are_answered_in_order_as_alone(model_folder: Path, command: Command, tmp_path: Path) -> None:
    theirs = Theirs(model_folder)
    texts = ["import os", "def f(x):\n    return", "", "世界"]
    conversations = [[{"role": "user", "content": turn}] for turn in TURNS]
    records = [{"prompt": text} for text in texts] + [{"messages": messages} for messages in conversations]
    (tmp_path / "p.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    given = ("--prompts", str(tmp_path / "p.jsonl"), "--json", f"--max_new_tokens={NEW}")
    status, out, err = command(model_folder, *given, "--batch_size=3")
    assert status == 0, err
    results = list(map(json.loads, out.splitlines()))
    ids = [[2046, *theirs.tokenizer.encode(text, add_special_tokens=False)] for text in texts]
    ids += [theirs.prompt(messages) for messages in conversations]
    assert [result["text"] for result in results] == [theirs.after(prompt) for prompt in ids]
    assert [result["prompt_tokens"] for result in results] == list(map(len, ids))
    assert [result["line"] for result in results] == list(range(1, 14, 2))
    for record, result in zip(records, results):
        assert record.items() <= result.items()
        assert result["ended"] in ("end", "length")
        assert result["tokens"] <= NEW
    assert "6 blank lines left out" in err
    assert command(model_folder, *given, "--batch_size=1")[1] == out


def test_a_file_of_lines(small: Path, command: Command, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfimport os\r\n\n  two\n")
    given = ("--prompts", str(tmp_path / "p.txt"), "--max_new_tokens=8")
    status, out, err = command(small, *given, "--json")
    assert status == 0, err
    results = list(map(json.loads, out.splitlines()))
    assert [(result["line"], result["prompt"]) for result in results] == [(1, "import os"), (3, "  two")]
    assert "1 blank line left out" in err
    text = command(small, *given)[1]
    assert text == "".join(f"{result['prompt']}{result['text']}\n\n" for result in results)
    alone = [command(small, "--prompt", result["prompt"], "--max_new_tokens=8")[1] for result in results]
    assert "\n".join(alone) + "\n" == text


def test_a_stop_string_ends_a_text_and_an_answer(small: Path, command: Command) -> None:
    whole = command(small, "--prompt", "import", "--max_new_tokens=20", "--json")[1]
    text = json.loads(whole)["text"]
    stop = text[7:11]
    given = ("--max_new_tokens=20", "--stop", "not there", "--stop", stop)
    result = json.loads(command(small, "--prompt", "import", *given, "--json")[1])
    assert (result["text"], result["ended"]) == (text[: text.index(stop)], "stop")
    assert command(small, "--prompt", "import", *given)[1] == f"import{result['text']}\n"
    answers = command(small, "--chat", "--max_new_tokens=20", stdin="a\n")[1]
    stop = answers[3:6]
    assert command(small, "--chat", *given[:-1], stop, stdin="a\n")[1] == answers[: answers.index(stop)] + "\n"


def test_the_prompts_of_the_documents(small: Path, command: Command, tmp_path: Path) -> None:
    (block,) = (block for block in PAGE if block.section == "Prompts from a file" and block.language == "text")
    (tmp_path / "questions.jsonl").write_text(block.code)
    (line,) = (b.code for b in PAGE if b.section == "Prompts from a file" and b.language == "bash")
    options = shlex.split(line)[4:]
    options[options.index("questions.jsonl")] = str(tmp_path / "questions.jsonl")
    status, out, err = command(small, *options)
    assert status == 0, err
    results = list(map(json.loads, out.splitlines()))
    assert [result["line"] for result in results] == [1, 2]
    named = re.findall(r"`(\w+)`", next(p for p in text_of(DOCUMENT).split("\n\n") if p.startswith("It is JSON lines")))
    assert {*results[0], *results[1]} == {*named} - {"end", "stop", "length"}


# ---- the conversation itself


def chat_of(folder: Path, notes: list[str] | None = None, new: int = 10, **options: Any) -> Iterator[Chat]:
    description = describe(folder)
    tokenizer = tokenizer_of(description).tokenizer
    _, model = ours_of(folder)
    decoder = TokenSampler(model, torch.device("cpu"), description.args.max_seq_len, tokenizer.vocab_size)

    def answer(limit: int) -> Answer:
        return Answer(limit, ENDS, tokenizer=tokenizer)

    with inference(model), KVCache(model, decoder.max_seq_len) as cache:
        say = (lambda text: None) if notes is None else notes.append
        encoder = ChatEncoder(tokenizer, Data())
        yield Chat(decoder, encoder, answer, Sampling(temperature=0), new, cache=cache, say=say, **options)


def said(chat: Chat, text: str) -> str:
    return "".join(chat.ask(text))


def test_only_what_is_new_is_computed(tmp_path: Path) -> None:
    """ChatML repeats the conversation; Qwen 3's template writes the last answer otherwise than earlier ones."""
    for name in ("qwen2.5", "qwen3"):
        folder = write(tmp_path / name, "mistral, window", chats.TEMPLATES[name])
        theirs = Theirs(folder)
        for chat in chat_of(folder):
            answers, computed, sizes = [], [], []
            for turn in TURNS:
                answers.append(said(chat, turn))
                computed.append(chat.computed)
                sizes.append(len(theirs.prompt(chat.messages[:-1])))
            assert computed[0] == sizes[0]
            assert computed[1] < sizes[1] - sizes[0] + 15
            assert all(0 < new < size for new, size in zip(computed[1:], sizes[1:]))
            assert [m["content"] for m in chat.messages if m["role"] == "assistant"] == answers


def test_a_full_context_drops_the_oldest_messages_and_says_so(small: Path) -> None:
    notes: list[str] = []
    theirs = Theirs(small)
    for chat in chat_of(small, notes, system="Be brief."):
        for turn in range(9):
            answer = said(chat, f"Question {turn}")
            assert chat.messages[0]["role"] == "system"
            assert chat.messages[1]["role"] == "user"
            assert answer == theirs.after(theirs.prompt(chat.messages[:-1]), 10)
        assert len(chat.messages) < 18
        assert notes
        full = r"\(the context of 128 tokens is full: the oldest [24] messages are dropped\)"
        assert all(re.fullmatch(full, note) for note in notes), notes
        before = list(chat.messages)
        with pytest.raises(ConfigError, match=r"makes a prompt of \d+ tokens, and the model has 128 positions"):
            said(chat, "word " * 200)
        assert chat.messages == before
        assert said(chat, "And now?")


def test_an_answer_that_fills_the_context(small: Path) -> None:
    for chat in chat_of(small, new=1000):
        answer = said(chat, "a")
        assert chat.ending == "(the answer ends here: the context of 128 tokens is full)"
        assert chat.messages[-1] == {"role": "assistant", "content": answer}
        said(chat, "b")
        assert [m["content"] for m in chat.messages if m["role"] == "user"] == ["b"]  # a and its answer were dropped


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(small: Path) -> None:
    theirs = Theirs(small)
    for chat in chat_of(small):
        whole = said(chat, "a")
    for chat in chat_of(small):
        pieces = chat.ask("a")
        begun = "".join(next(pieces) for _ in range(4))
        pieces.close()
        assert chat.ending == "(stopped)"
        assert whole.startswith(begun)
        assert chat.messages[-1]["content"].startswith(begun)
        assert said(chat, "b") == theirs.after(theirs.prompt(chat.messages[:-1]), 10)


def test_a_message_that_the_template_refuses_is_left_out(tmp_path: Path) -> None:
    refuses = "{% if 'bad' in messages[-1].content %}{{ raise_exception('no bad words') }}{% endif %}" + chats.QWEN25
    for chat in chat_of(write(tmp_path, "mistral, window", refuses)):
        first = said(chat, "good")
        with pytest.raises(Corrupt, match="the chat template refuses the conversation: no bad words"):
            said(chat, "bad")
        assert [m["content"] for m in chat.messages] == ["good", first]
        assert said(chat, "good")


@pytest.mark.parametrize("family", chats.TEMPLATES)
@pytest.mark.parametrize("backend", [chats.byte_level, chats.sentencepiece])
def test_prompts_are_those_of_apply_chat_template(family: str, backend: Any, tmp_path: Path) -> None:
    folder = chats.folder(tmp_path, backend(), chats.marked(chats.TEMPLATES[family]))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = ChatEncoder(load_tokenizer(str(folder)), Data())
    messages = [{"role": "user", "content": " Grüße, 世界 <|im_end|>\n"}]
    for more in ([], [{"role": "assistant", "content": " 6\n"}, {"role": "user", "content": "x"}]):
        messages += more
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert encoder.prompt({"messages": messages}) == ids


# ---- the command


def test_a_folder_without_a_template_gets_the_default_one_and_says_so(
    tmp_path: Path, command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path, "mistral, window", None)
    status, out, err = command(folder, "--chat", "--max_new_tokens=5", "--system", "Be brief.", stdin="hi\n")
    assert status == 0, err
    assert out
    assert "no chat template" in err + caplog.text


def test_blank_lines_and_the_end_of_an_answer_are_said(small: Path, command: Command) -> None:
    status, _, err = command(small, "--chat", "--max_new_tokens=3", stdin="\nhi\r\n  \nyou")
    assert status == 0, err
    assert err.count("(an empty message is left out)") == 2
    assert err.count("(the answer ends here, after 3 tokens; --max_new_tokens allows more)") == 2
    assert command(small, "--chat", stdin="")[:2] == (0, "")


@pytest.mark.parametrize(
    ("options", "stdin", "message"),
    [
        (["--chat"], "word " * 200, "the model has 128 positions, which leaves no room for an answer"),
        (["--chat"], b"\xff\n", "stdin: invalid UTF-8"),
        (["--chat", "--json"], "", "--json = true: has no effect with --chat"),
        (["--chat", "--stop", ""], "", '--stop = "": must have a character'),
        (["--chat", "--max_new_tokens=0"], "a", "max_new_tokens = 0: must be at least 1"),
        (["--prompt", "a", "--system", "b"], "", '--system = "b": has no effect without --chat'),
        (["--prompt", "a", "--batch_size=2"], "", "--batch_size = 2: has no effect without --prompts"),
        (["--prompt", "a\udcff"], "", "half of a surrogate pair"),
        (["--prompt", "word " * 200], "", "and the model has 128 positions, which leaves no room for more"),
        (["--prompts", "nowhere.txt"], "", '--prompts = "nowhere.txt": cannot be read (No such file'),
        (["--prompts", "."], "", "cannot be read"),
        (["--prompts", "empty.txt"], "", "has no prompts"),
        (["--prompts", "one.txt", "--batch_size=0"], "", "--batch_size = 0: must be at least 1"),
        (["--prompts", "long.jsonl"], "", "long.jsonl:2: the prompt has "),
        (["--prompts", "none.jsonl"], "", 'none.jsonl:1: must have either "prompt" or "messages" (it has: text)'),
        (["--prompts", "both.jsonl"], "", "both.jsonl:1: must have either"),
        (["--prompts", "number.jsonl"], "", 'number.jsonl:1: its "prompt" is no text (3)'),
        (["--prompts", "broken.jsonl"], "", "broken.jsonl:2: not JSON"),
        (["--prompts", "role.jsonl"], "", "role.jsonl:1: message 1 has no role"),
        (["--prompts", "list.jsonl"], "", 'list.jsonl:1: the field "messages" is no list of messages (str)\n'),
        (["--prompts", "half.jsonl"], "", "half.jsonl:1: the prompt has half of a surrogate pair"),
        (["--prompts", "bytes.txt"], "", "bytes.txt:1: invalid UTF-8"),
    ],
    ids=str,
)
def test_bad_input_is_one_message(
    small: Path,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    stdin: str | bytes,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "empty.txt": b"\n \n",
        "one.txt": b"a",
        "bytes.txt": b"\xff",
        "long.jsonl": b'{"prompt": "a"}\n{"prompt": "' + b"word " * 200 + b'"}',
        "none.jsonl": b'{"text": "a"}',
        "both.jsonl": b'{"prompt": "a", "messages": []}',
        "number.jsonl": b'{"prompt": 3}',
        "broken.jsonl": b'{"prompt": "a"}\n{"prompt"',
        "role.jsonl": b'{"messages": [{"content": "a"}]}',
        "list.jsonl": b'{"messages": "a"}',
        "half.jsonl": b'{"prompt": "\\ud800"}',
    }.items():
        Path(name).write_bytes(content)
    status, out, err = command(small, *options, stdin=stdin)
    assert (status, out) == (2, "")
    assert message in err + "\n"
    assert "Traceback" not in err


def test_a_template_that_raises_ends_a_pipe(tmp_path: Path, command: Command) -> None:
    folder = write(tmp_path, "mistral, window", chats.MISTRAL)
    given = ("--chat", "--max_new_tokens=2", "--system", "Be brief.")
    status, out, err = command(folder, *given, stdin="hi\n")
    assert (status, out) == (2, "")
    assert "the chat template refuses the conversation: " in err
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "system", "content": "a"}]}')
    status, out, err = command(folder, "--prompts", str(tmp_path / "p.jsonl"))
    assert (status, out) == (2, "")
    assert "p.jsonl:1: the chat template refuses the conversation: " in err
    chats.folder(folder, chats.byte_level(), "{% for %}")
    assert "is no Jinja template" in command(folder, "--chat", stdin="hi\n")[2]


def test_end_tokens_that_are_no_ids(tmp_path: Path, command: Command) -> None:
    folder = write(tmp_path, "mistral, window", chats.QWEN25)
    for content in ('{"eos_token_id": "</s>"}', '{"eos_token_id": [2, null]}'):
        (folder / "generation_config.json").write_text(content)
        status, _, err = command(folder, "--prompt", "a")
        assert status == 2
        assert "eos_token_id must be an id or a list of ids" in err


@pytest.mark.slow
def test_a_terminal(tmp_path: Path) -> None:
    """Ctrl-C stops an answer, and does not end the session; Ctrl-D does."""
    import pty

    terminal, inner = pty.openpty()
    folder = write(tmp_path, "mistral, window", chats.QWEN25, positions=2048)
    argv = ["--checkpoint", str(folder), "--chat", "--no-cache", "--temperature=0", "--max_new_tokens=1900"]
    process = subprocess.Popen(
        [sys.executable, "-m", "titanlite.commands", "generate", *argv],
        stdin=inner, stdout=inner, stderr=inner, env=environment(OMP_NUM_THREADS="1"), start_new_session=True,
    )  # fmt: skip
    os.close(inner)
    shown = ""

    def is_shown(text: str, seconds: float) -> bool:
        nonlocal shown
        deadline = time.monotonic() + seconds
        while text not in shown:
            if not select.select([terminal], [], [], max(deadline - time.monotonic(), 0))[0]:
                return False
            shown += os.read(terminal, 4096).decode(errors="replace")
        shown = shown.partition(text)[2]
        return True

    def wait_for(text: str, then: bytes = b"") -> None:
        assert is_shown(text, 100), shown
        os.write(terminal, then)

    try:
        wait_for("> ", b"word\n")
        wait_for("word\r\n")
        shown += os.read(terminal, 1).decode(errors="replace")  # the answer has begun
        process.send_signal(signal.SIGINT)
        wait_for("(stopped)")
        wait_for("> ")
        # Python's input() writes its prompt, then waits. A signal between the two is noticed at the next key or signal.
        for _ in range(20):
            process.send_signal(signal.SIGINT)
            if is_shown("(Ctrl-D ends)", 5):
                break
        else:
            raise AssertionError(shown)
        wait_for("> ", b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(terminal)
