"""The page of ``titanlite compare --html``, and TensorBoard, in a real browser without a window."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from PIL import Image

from tests.support import browser as browsers
from tests.support.browser import Browser
from tests.support.forks import free_port
from tests.support.runs import TINY, environment, forked_run
from tests.support.synthetic_runs import loss_pairs, write_run
from titanlite.compare.comparison import compare
from titanlite.compare.page import write_page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browsers.PROGRAM is None, reason="there is no Chromium here: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsers.browser() as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs, one of which is called like a program."""
    folder = tmp_path_factory.mktemp("page")
    first, second, _ = loss_pairs(np.random.default_rng(0), 2, 3000, 0.8, 0.5)
    hostile = {"job": {"name": "</script><img src=http://x.org/ onerror=alert(1)>" + "long" * 30}}
    float8 = {"model": {"converters": ["float8"]}}
    validation = np.linspace(4, 3, 300)
    runs = [
        write_run(folder / "bf16", first[0], validation=validation),
        write_run(folder / "float8", second[0], float8, validation=validation + 0.01),
        write_run(folder / "hostile", second[1], hostile),
    ]
    (runs[1] / "sample.json").write_text(json.dumps({"prompt": "", "text": "import <os>\n" + "x" * 500}))
    write_page(compare(runs), folder / "page.html")
    return folder / "page.html"


def colors(browser: Browser, chart: str) -> int:
    """The number of colours of a chart, without the grays of its texts and lines."""
    data = browser.evaluate(f"document.getElementById('{chart}').toDataURL()").partition(",")[2]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA")).reshape(-1, 4).astype(int)
    vivid = pixels[(pixels[:, 3] == 255) & (np.ptp(pixels[:, :3], axis=1) > 90)]
    return len(np.unique(vivid, axis=0))


def test_the_page_of_one_run(tmp_path: Path, browser: Browser) -> None:
    """It has no empty card."""
    write_page(compare([write_run(tmp_path / "a", np.linspace(4, 3, 60))]), tmp_path / "page.html")
    browser.open((tmp_path / "page.html").as_uri(), 1280)
    shown = browser.evaluate(
        "[...document.querySelectorAll('.card h2')].filter(h => h.offsetParent).map(h => h.innerText).join()"
    )
    assert [title for title in ("Loss minus", "Validation", "Differences", "Options") if title in shown] == []
    assert "one run" in browser.evaluate("document.querySelector('.verdicts').innerText")
    assert colors(browser, "loss") >= 1


def test_the_frame_holds_the_curve_that_is_not_smoothed(tmp_path: Path, browser: Browser) -> None:
    """But a few losses far out do not press the rest flat."""
    noise = np.random.default_rng(0).standard_normal(600)
    quiet = 3 + 0.1 * noise
    spiked = quiet.copy()
    spiked[[200, 400]] = 3.9
    lows, highs = [], []
    for number, values in enumerate((quiet, spiked)):
        write_page(compare([write_run(tmp_path / f"{number}", values)]), tmp_path / "page.html")
        browser.open((tmp_path / "page.html").as_uri(), 1280)
        low, high = browser.evaluate("frame(curves(run => points(run, 'loss')), -Infinity, true).join()").split(",")
        lows.append(float(low))
        highs.append(float(high))
    assert lows[0] <= quiet.min() + 1e-5  # the page has seven digits
    assert highs[0] >= quiet.max() - 1e-5
    assert highs[0] == pytest.approx(highs[1], abs=0.35)
    assert highs[1] < 3.8


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page(width: int, page: Path, browser: Browser) -> None:
    """No error and no request, whatever is pressed; and nothing wider than the window."""
    browser.open(page.as_uri(), width)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    for chart in ("loss", "difference", "validation", "tps"):
        assert colors(browser, chart) >= 1, chart
    before = browser.evaluate("document.getElementById('loss').toDataURL()")
    for control, value in (("x", "tokens"), ("x", "hours"), ("smooth", "0"), ("smooth", "100")):
        element = f"document.getElementById('{control}')"
        browser.evaluate(f"{element}.value = '{value}'; {element}.dispatchEvent(new Event('input'))")
        after = browser.evaluate("document.getElementById('loss').toDataURL()")
        assert after != before, control
        before = after
    browser.evaluate("document.querySelectorAll('input[type=checkbox]').forEach(box => box.click())")
    assert colors(browser, "loss") == 0  # no run is shown
    browser.evaluate("document.querySelectorAll('input[type=checkbox]').forEach(box => box.click())")
    move = "new PointerEvent('pointermove', { clientX: 200, clientY: 20, bubbles: true })"
    browser.evaluate(f"document.getElementById('loss').dispatchEvent({move})")
    assert browser.evaluate("document.images.length") == 0
    assert "import <os>" in browser.evaluate("document.body.innerText")
    assert browser.errors() == []
    assert browser.hosts() == {""}  # the file itself


def test_errors_and_requests_would_be_noticed(tmp_path: Path, browser: Browser) -> None:
    page = tmp_path / "page.html"
    page.write_text("<script>console.error('bad'); nothing()</script><img src=http://titanlite.invalid/x.png>")
    browser.open(page.as_uri(), 400)
    assert len(browser.errors()) >= 2
    assert "titanlite.invalid" in browser.hosts()


def test_three_runs_in_one_folder_in_tensorboard(tmp_path: Path, browser: Browser) -> None:
    """They are called by what distinguishes them: options of the command line, and what was edited in the file."""
    config: dict[str, dict[str, object]] = {}
    for name, value in {**TINY, "job.dump_folder": str(tmp_path / "outputs")}.items():
        section, _, key = name.partition(".")
        config.setdefault(section, {})[key] = {"false": False}.get(str(value), value)
    del config["metrics"]["enable_tensorboard"]
    place = environment(CONFIG_FILE=str(tmp_path / "tiny.toml"))
    for options in ([], ["--model.converters=float8", "--float8.recipe_name=rowwise"], []):
        (tmp_path / "tiny.toml").write_text(tomli_w.dumps(config))
        config.setdefault("optimizer", {})["lr"] = 1e-3 if options else 8e-4
        run = forked_run(options, place, tmp_path, tmp_path / "outputs")
        assert run.status == 0, run.output
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path / "outputs"), "--port", str(port)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as server:
        try:
            assert server.stderr is not None
            for line in server.stderr:
                if b"http://" in line:
                    break
            browser.open(f"http://localhost:{port}/#timeseries", 1280)
            browser.wait_for("document.body.innerText.split('tb/').length >= 4")
            shown = browser.evaluate("document.body.innerText").split()
        finally:
            server.terminate()
    names = {name.split("tb/")[-1] for name in shown if "tb/" in name}
    assert names == {"tiny", "tiny-float8-rowwise", "tiny-lr=0.001"}
