"""A conversation in the terminal, or with one message on each line of a pipe."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from functools import partial
from typing import TextIO

from titanlite.config.data_sections import Data
from titanlite.data.encode_chat import ChatEncoder
from titanlite.data.records import Corrupt, decode_text
from titanlite.errors import ConfigError
from titanlite.inference.answer import Answer, check_stop
from titanlite.inference.chat import Chat
from titanlite.inference.generate import check_positions, inference
from titanlite.inference.kv_cache import KVCache
from titanlite.inference.sampling import Sampling
from titanlite.inference.text import opened_writer


def chat(
    checkpoint: str,
    out: TextIO,
    max_new_tokens: int | None,
    sampling: Sampling,
    dtype: str = "float32",
    tokenizer_path: str | None = None,
    *,
    system: str | None = None,
    stop: Sequence[str] = (),
    quantize: str | None = None,
    calibration: str | None = None,
    cached: bool = True,
) -> None:
    """Answer the lines of stdin, one after the other, until its end. In a terminal, Ctrl-C stops an answer.

    Args:
        out: where the answers go. Everything else goes to stderr.
        system: the first message of the conversation, of the role "system"; None: there is none.
        checkpoint, max_new_tokens, dtype, tokenizer_path, stop, quantize, calibration, cached: see
            :func:`titanlite.inference.text.continue_texts`.

    Raises:
        ConfigError: the model cannot be loaded; or stdin is no terminal, and a message cannot be answered.
        TrainingError: the logits are not finite.
    """
    check_stop(stop)
    with opened_writer(checkpoint, dtype, tokenizer_path, quantize=quantize, calibration=calibration) as writer:
        decoder, tokenizer, ends, process = writer
        if process.world_size > 1:
            raise ConfigError(f"--chat: runs on one process, and there are {process.world_size}; start one")
        check_positions(decoder.model)
        model, positions, interactive = decoder.model, decoder.max_seq_len, sys.stdin.isatty()
        if interactive:
            with suppress(ImportError):
                import readline  # noqa: F401  (the arrow keys then work in input())
            say(f"{checkpoint}: {positions:,} positions. Ctrl-C stops an answer, Ctrl-D ends.")
        answer = partial(Answer, end_ids=ends, tokenizer=tokenizer, stop=stop)
        with inference(model), KVCache(model, positions) if cached else nullcontext() as cache:
            conversation = Chat(
                decoder,
                ChatEncoder(tokenizer, Data()),
                answer,
                sampling,
                max_new_tokens,
                system=system,
                cache=cache,
                say=say,
            )
            converse(conversation, _lines(interactive), out, interactive)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def converse(conversation: Chat, lines: Iterator[str], out: TextIO, interactive: bool) -> None:
    """Answer ``lines``; see :func:`chat`."""
    shown = _without_controls if out.isatty() else str
    for line in lines:
        if not line.strip():
            say("(an empty message is left out)")
            continue
        try:
            with _interruptible() as is_stopped, closing(conversation.ask(line)) as pieces:
                for piece in pieces:
                    out.write(shown(piece))
                    out.flush()
                    if is_stopped():
                        break
        except (Corrupt, ConfigError) as fault:
            if not interactive:
                raise (fault if isinstance(fault, ConfigError) else ConfigError(str(fault))) from None
            say(f"{fault}; the message is left out")
            continue
        out.write("\n")
        out.flush()
        if conversation.ending:
            say(conversation.ending)


def _lines(interactive: bool) -> Iterator[str]:
    """Yield the lines of stdin.

    Raises:
        ConfigError: one is not UTF-8.
    """
    while True:
        try:
            if interactive:
                line = input("> ")
            else:
                content = sys.stdin.buffer.readline()
                if not content:
                    return
                line = decode_text(content).rstrip("\r\n")
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("\n(Ctrl-D ends)")
            continue
        except Corrupt as fault:
            raise ConfigError(f"stdin: {fault}") from None
        yield line


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C was pressed meanwhile. Pressed twice, it ends the program."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield pressed.is_set
        return

    def press(number: int, frame: object) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _without_controls(text: str) -> str:
    """Return ``text`` for a terminal: characters that would move the cursor, or write to the clipboard, are escaped."""
    return "".join(c if c in "\n\t" or not (c < " " or "\x7f" <= c <= "\x9f") else repr(c)[1:-1] for c in text)
