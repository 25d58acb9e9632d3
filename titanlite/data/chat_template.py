"""The chat template of a tokenizer, rendered by another process (:mod:`titanlite.data.chat_sandbox`)."""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from titanlite.data.records import Corrupt
from titanlite.data.tokenizer import Tokenizer
from titanlite.data.tokenizer_files import damaged
from titanlite.errors import TrainingError

logger = logging.getLogger(__name__)

# ChatML with the tokenizer's own EOS after each turn. Its marks are plain text where the tokenizer has no such tokens.
DEFAULT = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

SECONDS = 30.0  # of processor time for a conversation
MEMORY = 1 << 30  # bytes of the process that renders
MOST_TEXT = 1 << 23  # characters of a conversation; a million tokens have about 4,000,000

_PROGRAM = Path(__file__).with_name("chat_sandbox.py")
# Modules are looked for where this process looks for them; -I and -c alone would leave out some places, or add some.
_START = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[1]); runpy.run_path(sys.argv[2], run_name='__main__')"
)


class ChatTemplate:
    """A chat template. It runs in a process of its own, as it is somebody else's program.

    Args:
        tokenizer: has the template, or gets :data:`DEFAULT`, and a notice.
        seconds: the processor time that a conversation may take.

    Attributes:
        digest: the sha256 of the template.

    Raises:
        ConfigError: what the tokenizer's files give as a template is none.
    """

    def __init__(self, tokenizer: Tokenizer, *, seconds: float = SECONDS) -> None:
        source = template_of(tokenizer)
        self.digest = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        self._file, self._seconds = tokenizer.path, seconds
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _START, json.dumps([str(path) for path in sys.path]), str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the trainer, which first finishes its step
        )
        weakref.finalize(self, _stop, self._process)
        limits = {"seconds": seconds, "memory": MEMORY, "most": MOST_TEXT}
        try:
            named, marks = tokenizer.named_tokens(), sorted(tokenizer.special_tokens)
            self._ask({"template": source, "variables": named, "marks": marks, **limits})
        except Corrupt as fault:
            raise damaged(self._file, f"{fault}; {_INSTEAD}") from None

    def render(self, messages: Sequence[dict[str, Any]]) -> tuple[str, list[tuple[int, int]], bool]:
        """Return the text of a conversation, and where the assistant speaks.

        Args:
            messages: each with ``role`` and ``content``; plain values.

        Returns:
            The text; the (begin, end) in characters of what the assistant says; True if the template itself marks it
            with ``{% generation %}``, False if it was found by rendering beginnings of the conversation.

        Raises:
            Corrupt: the template refuses the conversation, or fails on it.
            ConfigError: the template does what none may, takes too long or too much memory. This is no fault of a
                record: whether one is left out must not depend on the speed of a machine.
        """
        answer = self._ask({"messages": list(messages), "prompt": False})
        return answer["text"], [(begin, end) for begin, end in answer["spans"]], answer["marked"]

    def prompt(self, messages: Sequence[dict[str, Any]]) -> str:
        """Return the text of a conversation and of the beginning of an answer to it (``add_generation_prompt``).

        Raises:
            Corrupt, ConfigError: see :meth:`render`.
        """
        text: str = self._ask({"messages": list(messages), "prompt": True})["text"]
        return text

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        to, of = self._process.stdin, self._process.stdout
        assert to is not None
        assert of is not None
        with self._lock:
            try:
                to.write(json.dumps(request).encode() + b"\n")
                to.flush()
                line = of.readline()
            except OSError:  # it has ended
                line = b""
        if not line.endswith(b"\n"):
            self._raise_ended()
        answer: dict[str, Any] = json.loads(line)
        if "problem" not in answer:
            return answer
        if answer["kind"] == "template":
            raise damaged(self._file, f"{answer['problem']}; {_INSTEAD}")
        raise Corrupt(answer["problem"], answer["kind"])

    def _raise_ended(self) -> None:
        status = self._process.wait()
        if status == -signal.SIGPROF:
            problem = f"the chat template takes more than {self._seconds:g} s of processor time for a conversation"
            raise damaged(self._file, f"{problem}; {_INSTEAD}")
        if status < 0 and status != -signal.SIGKILL:
            name = signal.Signals(-status).name
            raise damaged(self._file, f"the process that renders the chat template crashed ({name}); {_INSTEAD}")
        raise TrainingError(
            f"the process that renders the chat template ended (status {status}); is jinja2 installed, and is there "
            "memory left?"
        )


_INSTEAD = "use another template, in chat_template.jinja beside the tokenizer, or delete the entry for a default one"


def template_of(tokenizer: Tokenizer) -> str:
    """Return the chat template of the tokenizer's files, of several the one named "default"; :data:`DEFAULT`, with a
    notice, if they have none.

    Raises:
        ConfigError: the entry is something else.
    """
    entry = tokenizer.chat_template
    if entry is None:
        logger.warning(
            "%s: its folder has no chat template; messages are written as ChatML, "
            "<|im_start|>role, the content and %s, with the marks as plain text where they are no tokens",
            tokenizer.path, tokenizer.named_tokens()["eos_token"],
        )  # fmt: skip
        return DEFAULT
    if isinstance(entry, list):
        try:
            named = {str(template["name"]): template["template"] for template in entry}
        except (TypeError, KeyError):
            named = {}
        if "default" not in named:
            names = ", ".join(named)[:200] or "none with a name"
            raise damaged(tokenizer.path, f'of its chat templates none is named "default" (there are: {names})')
        entry = named["default"]
    if not isinstance(entry, str):
        raise damaged(tokenizer.path, f"its chat_template is no text but a {type(entry).__name__}; {_INSTEAD}")
    return entry


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process, which ends at the end of its input."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(OSError):  # something was left to write, and it has ended
                stream.close()
    process.kill()
    process.wait()
