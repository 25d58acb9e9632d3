"""A real browser without a window: Chromium, driven through pipes by its DevTools protocol."""

from __future__ import annotations

import base64
import io
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--no-first-run",
    "--hide-scrollbars",
)


class Browser:
    """One page at a time, and what it has asked for and complained about."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive = send, receive
        self._kept = b""
        self._number = 0
        self._session: str | None = None
        self._events: list[dict[str, Any]] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, url: str, width: int, height: int = 900) -> None:
        """Load a page in a window of that size; see :meth:`wait_for`."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self._events.clear()
        self._call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def evaluate(self, script: str) -> Any:
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, condition: str, timeout: float = 60) -> None:
        """Wait until the script ``condition`` is true."""
        end = time.monotonic() + timeout
        while not self.evaluate(f"!!({condition})"):
            assert time.monotonic() < end, f"never true: {condition}\n{self.errors()}"
            time.sleep(0.05)

    def errors(self) -> list[str]:
        """What the console of the page has: exceptions, errors and warnings, and what the browser itself reports."""
        messages = []
        for event in self._events:
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                messages.append(f"{params['exceptionDetails']}")
            elif event["method"] == "Log.entryAdded":
                messages.append(f"{params['entry']['level']}: {params['entry']['text']}")
            elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                messages.append(f"{params['type']}: {[arg.get('value') for arg in params['args']]}")
        return messages

    def hosts(self) -> set[str]:
        """The hosts that were asked for anything; "" for files and data in the page itself."""
        urls = [e["params"]["request"]["url"] for e in self._events if e["method"] == "Network.requestWillBeSent"]
        return {urlparse(url).netloc for url in urls}

    def screenshot(self, file: Path, height: int | None = None) -> None:
        """Write a PNG of at most 128 colours, of the first ``height`` pixels of the page; None: of all."""
        from PIL import Image

        width, whole = self.evaluate("[innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": min(height or whole, whole), "scale": 1}
        data = self._call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)["data"]
        image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        image.quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)

    def _call(self, method: str, **params: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._send, data) :]
        while (answer := self._next()).get("id") != self._number:
            if "method" in answer:
                self._events.append(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._kept:
            assert select.select([self._receive], [], [], 120)[0], "the browser does not answer"
            data = os.read(self._receive, 1 << 20)
            assert data, "the browser has ended"
            self._kept += data
        message, _, self._kept = self._kept.partition(b"\0")
        return json.loads(message)


@contextmanager
def browser() -> Iterator[Browser]:
    """Start Chromium with an empty profile, and end it."""
    assert PROGRAM is not None
    to_read, to_send = os.pipe()
    to_receive, to_write = os.pipe()
    with tempfile.TemporaryDirectory(prefix="titanlite-browser-") as profile:
        # The protocol's pipes are 3 and 4.
        command = ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "bash", PROGRAM, *_FLAGS]
        process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": profile},
        )
        os.close(to_read)
        os.close(to_write)
        try:
            yield Browser(to_send, to_receive)
        finally:
            os.close(to_send)
            os.close(to_receive)
            process.terminate()
            process.wait(30)
