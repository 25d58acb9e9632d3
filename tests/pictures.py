"""Make the pictures of docs/tutorial.md from real runs: ``python -m tests.pictures RUNS``.

RUNS has the runs of the tutorial, ``bf16`` and ``float8``, and another one. Chromium must be installed. One more run is
made here, on a terminal, to show it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.browser import Browser, browser
from tests.support.forks import free_port
from tests.support.runs import ROOT, environment, run_module
from tests.support.screen import Screen, run_on_terminal
from titanlite.compare.comparison import compare
from titanlite.compare.page import write_page

PICTURES = ROOT / "docs" / "pictures"
# Of a terminal; pyte calls yellow brown.
COLORS = {"green": "#4cc38a", "brown": "#e2b340", "red": "#ef6a5b", "cyan": "#48b5c9", "default": "#d8dde6"}


def main(runs: Path) -> None:
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name, browser() as chromium:
        folder = Path(name)
        terminal(folder, chromium)
        write_page(compare([runs / "bf16", runs / "float8"]), folder / "compare.html")
        for width, height in ((1280, 1250), (400, 1400)):
            chromium.open((folder / "compare.html").as_uri(), width)
            chromium.screenshot(PICTURES / f"compare-{width}.png", height)
        tensorboard(runs, chromium)


def terminal(folder: Path, chromium: Browser) -> None:
    """The screen in the middle of a run."""
    shown: list[str] = []

    def seen(screen: Screen) -> None:
        if any(line.startswith("step 110") for line in screen.visible()) and "tok/s" in screen.visible()[-1]:
            shown[:] = shown or [screen.html(COLORS)]

    options = ["--job.dump_folder=run", "--metrics.log_freq=10", "--training.seq_len=64", "--sample.enable=false"]
    options += ["--validation.enable", "--validation.interval=50", "--validation.steps=2"]
    place = environment(TERM="xterm-256color", CONFIG_FILE=str(ROOT / "train_configs" / "debug_model.toml"))
    status, _ = run_on_terminal(folder, place, 100, run_module, "titanlite.train", options, seen=seen)
    assert status == 0
    (text,) = shown
    page = folder / "terminal.html"
    style = (
        "background: #181c24; color: #d8dde6; font: 14px/1.35 'DejaVu Sans Mono', monospace; margin: 0; padding: 12px"
    )
    page.write_text(f'<meta charset="utf-8"><body style="margin: 0"><pre style="{style}">{text}</pre>')
    chromium.open(page.as_uri(), 880, 400)
    chromium.screenshot(PICTURES / "terminal.png")


def tensorboard(runs: Path, chromium: Browser) -> None:
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--port", str(port)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as server:
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
    main(Path(sys.argv[1]).absolute())
