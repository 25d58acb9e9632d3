"""Make the pictures of docs/tutorial.md: ``python -m tests.pictures``, on an idle machine, with Chromium installed.

The tutorial's commands are run as they are typed, in a clone of what is committed; the first one on a terminal, to show
it. The pictures are of these runs.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.browser import Browser, browser
from tests.support.docs import typed_on
from tests.support.forks import free_port
from tests.support.installs import User, user_of_clone
from tests.support.runs import ROOT
from tests.support.screen import Screen, run_on_terminal

PICTURES = ROOT / "docs" / "pictures"
# Of a terminal; pyte calls yellow brown.
COLORS = {"green": "#4cc38a", "brown": "#e2b340", "red": "#ef6a5b", "cyan": "#48b5c9", "default": "#d8dde6"}


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name, browser() as chromium:
        user = user_of_clone(Path(name), TERM="xterm-256color")
        first, *others = typed_on(ROOT / "docs" / "tutorial.md")
        terminal(first, user, chromium)
        for command in others:
            print(command, flush=True)
            user.types(command)
        page = user.folder / "runs" / "compare.html"
        for width, height in ((1280, 1250), (400, 1400)):
            chromium.open(page.as_uri(), width)
            chromium.screenshot(PICTURES / f"compare-{width}.png", height)
        tensorboard(user.folder / "runs", chromium)


def terminal(command: str, user: User, chromium: Browser) -> None:
    """Run ``command``, and show the screen in its middle."""
    shown: list[str] = []

    def seen(screen: Screen) -> None:
        if any(line.startswith("step 110") for line in screen.visible()) and "tok/s" in screen.visible()[-1]:
            shown[:] = shown or [screen.html(COLORS)]

    words = ["bash", "-c", command]
    status, screen = run_on_terminal(user.folder, user.env, 100, subprocess.check_call, words, seen=seen, timeout=1800)
    assert status == 0, "\n".join(screen.lines())
    (text,) = shown
    page = user.folder / "terminal.html"
    style = (
        "background: #181c24; color: #d8dde6; font: 14px/1.35 'DejaVu Sans Mono', monospace; margin: 0; padding: 12px"
    )
    page.write_text(f'<meta charset="utf-8"><body style="margin: 0"><pre style="{style}">{text}</pre>')
    chromium.open(page.as_uri(), 880, 400)
    chromium.screenshot(PICTURES / "terminal.png")


def tensorboard(runs: Path, chromium: Browser) -> None:
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as server:
        try:
            assert server.stderr is not None
            next(line for line in server.stderr if b"http://" in line)
            chromium.open(f"http://localhost:{port}/?tagFilter=global_avg_loss#timeseries", 1280)
            chromium.wait_for("document.querySelectorAll('card-view svg').length > 1")
            chromium.evaluate("new Promise(done => setTimeout(done, 3000))")  # until its lines are drawn
            chromium.screenshot(PICTURES / "tensorboard.png", 640)
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
