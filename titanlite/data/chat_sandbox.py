"""Render chat templates. This file runs as a process of its own, which :mod:`titanlite.data.chat_template` starts; it
imports nothing of titanlite, so that it starts at once.

A chat template is a program by whoever made the tokenizer. Jinja's immutable sandbox keeps it from Python's insides,
but bounds neither time nor memory: a range has at most 100,000 numbers, and two of them, one within the other, never
end. ``'a' * 10**9``, ``|center(10**9)`` or a sort run in C, where no trace function and no signal handler of Python can
interrupt them; signals reach the main thread only, and the loader is another one. So a process renders, and the system
bounds it: a timer of processor time ends it, and a request for more memory than the limit fails. It has neither the
trainer's memory nor its files open. The sandbox alone keeps a template from the network and from the disk.

On stdin comes one JSON object a line: first the template, its variables and the limits, then conversations, each with
whether an answer to it is to begin. Each has one line on stdout as its answer.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Data must not depend on the day on which they are read. It is also the date that Llama 3's templates give without one.
_TODAY = datetime(2024, 7, 26)
_PLACE = "\ue000\uf8ff\ue000"  # characters for private use: a content that is to be told from all others

Message = dict[str, Any]
Span = tuple[int, int]


class Fault(Exception):
    """The conversation, or the template, cannot be used.

    Args:
        kind: the same for the same fault, whatever the conversation; "template" if no conversation can be rendered.
    """

    def __init__(self, problem: str, kind: str) -> None:
        super().__init__(problem)
        self.kind = kind


class Refused(jinja2.TemplateError):
    """The template itself refuses the conversation, with ``raise_exception``."""


class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
        spans: the begin and end, in characters, of what the assistant says.
        marked: the template itself marks it, with ``{% generation %}``.
    """

    text: str
    spans: list[Span]
    marked: bool


class _Generation(Extension):
    """The tag ``{% generation %} ... {% endgeneration %}`` of transformers: what the assistant says."""

    tags = {"generation"}  # noqa: RUF012  (jinja's)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.is_used = False
        self.written = 0  # characters, before the block
        self.blocks: list[tuple[int, str]] = []

    def parse(self, parser: Parser) -> nodes.Node:
        self.is_used = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_block"), [], [], body).set_lineno(line)

    def _block(self, caller: Macro) -> str:
        text = str(caller())
        self.blocks.append((self.written, text))
        return text


class Template:
    """A chat template.

    Args:
        variables: what every rendering gets besides the messages, such as ``eos_token``.
        marks: the special tokens; a turn does not end within one.
        most: the characters that a rendering has at most.

    Raises:
        Fault: it is no template.
    """

    def __init__(self, source: str, variables: dict[str, str], marks: Sequence[str], most: int) -> None:
        # The options are those of transformers, for which templates are written.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _TODAY.strftime}
        self._variables = {**variables, "tools": None, "documents": None}
        self._marks, self._most = marks, most
        with _faults():
            self._template = environment.from_string(source)
        (self._generation,) = (e for e in environment.extensions.values() if isinstance(e, _Generation))

    def conversation(self, messages: Sequence[Message]) -> Rendered:
        """Return the text of ``messages``, and where the assistant speaks.

        Without ``{% generation %}``, a turn is what the text up to it has more than the text before it, which ends in
        the beginning of an answer (``add_generation_prompt``).

        Raises:
            Fault: the template refuses or fails, or a turn is not to be found.
        """
        text, spans = self._render(messages)
        if self._generation.is_used:
            return Rendered(text, spans, True)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                place = f" on what comes before message {i + 1}, the assistant's,"
                before, _ = self._render(messages[:i], prompt=True, place=place)
                until = self._render(messages[: i + 1])[0] if i + 1 < len(messages) else text
                begin = self._begin(messages, i, before, text)
                spans.append((begin, self._end(message["content"], before, until, text, i + 1)))
        return Rendered(text, spans, False)

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text of ``messages`` and of an answer's beginning.

        Raises:
            Fault: the template refuses or fails.
        """
        return self._render(messages, prompt=True)[0]

    def _begin(self, messages: Sequence[Message], i: int, before: str, text: str) -> int:
        """Return the begin of the turn of ``messages[i]`` in ``text``, given the text ``before`` it.

        Some templates write a message otherwise where it is the last one (Mistral Nemo's puts the system's message into
        the last one of the user). There, the turn begins after what follows the content of that message in both texts.
        """
        if text.startswith(before):
            return len(before)
        if i and _PLACE not in text:
            marked = [*messages[: i - 1], {**messages[i - 1], "content": _PLACE}, *messages[i:]]
            head = self._render(marked[:i], prompt=True)[0].partition(_PLACE)[2]
            rest = self._render(marked)[0].partition(_PLACE)[2]
            if head and rest.startswith(head) and text.endswith(rest):
                return len(text) - len(rest) + len(head)
        raise _not_told(before, text, "the messages before it, and an answer's beginning", i + 1)

    def _end(self, content: str, before: str, until: str, text: str, number: int) -> int:
        """Return the end of a turn in ``text``, given the texts ``before`` it and ``until`` it.

        Some templates write an end of all after the last message (Phi 3, Phi-4-mini), or write a last answer otherwise
        than an earlier one (Qwen 3). There, the turn ends with what follows its content in both texts.
        """
        if text.startswith(until):
            return len(until)
        begin, content = len(before), content.strip()
        a, b = until.find(content, begin), text.find(content, begin)
        heads = until[begin:a], text[begin:b]
        both = text.startswith(before) and until.startswith(before)
        if not (content and both and min(a, b) >= 0 and heads[1] in (heads[0], "")):
            raise _not_told(until, text, "the messages up to it", number)
        rests = until[a + len(content) :], text[b + len(content) :]
        return b + len(content) + self._outside_marks(_common(*rests), rests)

    def _outside_marks(self, end: int, texts: Sequence[str]) -> int:
        """Return the last place up to ``end`` that is within no special token of ``texts``, which are equal so far."""
        for mark in self._marks:
            for begin in range(max(0, end - len(mark) + 1), end):
                if any(text.startswith(mark, begin) for text in texts):
                    return self._outside_marks(begin, texts)
        return end

    def _render(self, messages: Sequence[Message], *, prompt: bool = False, place: str = "") -> tuple[str, list[Span]]:
        tag = self._generation
        tag.written, tag.blocks = 0, []
        parts = []
        with _faults(place):
            # The messages are shared between renderings: the sandbox lets a template change none of them.
            for part in self._template.generate(self._variables, messages=messages, add_generation_prompt=prompt):
                parts.append(part)
                tag.written += len(part)
                if tag.written > self._most:
                    raise Fault(f"the chat template makes a text of more than {self._most:,} characters", "size")
        text = "".join(parts)
        spans = [(begin, begin + len(block)) for begin, block in tag.blocks]
        if any(text[begin:end] != block for (begin, end), (_, block) in zip(spans, tag.blocks)):
            raise Fault(
                "the chat template has a {% generation %} block within a macro, a filter or a set block, where its "
                "place in the text is not known; move the block out of it",
                "template",
            )
        return text, spans


def _common(one: str, other: str) -> int:
    """Return the number of characters that both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _not_told(beginning: str, text: str, which: str, number: int) -> Fault:
    at = _common(beginning, text)
    part = slice(max(0, at - 20), at + 40)
    return Fault(
        f"where message {number}, the assistant's, is in the text cannot be told: the chat template writes {which} as "
        f"...{beginning[part]!r}..., and in the whole conversation ...{text[part]!r}...; mark what the assistant says "
        "in the template with {% generation %} and {% endgeneration %}",
        "turn",
    )


def _refuse(message: object) -> NoReturn:
    raise Refused(str(message))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as transformers writes it: jinja's own would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@contextmanager
def _faults(place: str = "") -> Iterator[None]:
    """Turn what a template raises into :class:`Fault`."""
    try:
        yield
    except Fault:
        raise
    except Refused as error:
        raise Fault(f"the chat template refuses the conversation{place}: {_short(error)}", "refused") from None
    except jinja2.TemplateSyntaxError as error:
        raise Fault(
            f"the chat template is no Jinja template: {_short(error)} (line {error.lineno})", "template"
        ) from None
    except jinja2.exceptions.SecurityError as error:
        raise Fault(f"the chat template does what no template may: {_short(error)}", "template") from None
    except MemoryError:
        raise Fault("the chat template wants more memory than it may have", "template") from None
    except Exception as error:  # the template is a program, which can raise anything
        raise Fault(f"the chat template fails{place} ({type(error).__name__}: {_short(error)})", "fails") from None


def _short(error: Exception) -> str:
    text = str(error)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _serve() -> None:
    first = json.loads(sys.stdin.buffer.readline())
    for kind, limit in ((resource.RLIMIT_AS, first["memory"]), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        with suppress(ValueError, OSError):  # a lower limit is there already, or the system has none of this kind
            resource.setrlimit(kind, (limit, limit))
    template: Template | None = None
    line: dict[str, Any] | None = first
    while line is not None:
        # Its signal, SIGPROF, ends the process: Python has no handler for it.
        signal.setitimer(signal.ITIMER_PROF, first["seconds"])
        try:
            if template is None:
                template = Template(first["template"], first["variables"], first["marks"], first["most"])
                answer: dict[str, Any] = {}
            elif line["prompt"]:
                answer = {"text": template.prompt(line["messages"])}
            else:
                answer = template.conversation(line["messages"])._asdict()
        except Fault as fault:
            answer = {"problem": str(fault), "kind": fault.kind}
        try:
            content = json.dumps(answer).encode()
        except MemoryError:
            content = json.dumps({"problem": "the text is too large for the memory limit", "kind": "template"}).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(content + b"\n")
        sys.stdout.buffer.flush()
        text = sys.stdin.buffer.readline()
        line = json.loads(text) if text else None


if __name__ == "__main__":
    _serve()
