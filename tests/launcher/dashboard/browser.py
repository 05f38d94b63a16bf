"""Chromium without a window, driven over its DevTools protocol."""

import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WAIT_S = 30.0
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-port=0",
)  # fmt: skip


class Page:
    """One tab. What it logs and requests is kept, as far as it was told before the newest answer."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self.errors: list[str] = []
        """Console errors, uncaught exceptions, and what the browser logged as an error."""
        self.urls: list[str] = []
        """All that was requested."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, url: str) -> None:
        """Go to ``url``; does not wait for the page."""
        self._call("Page.navigate", url=url)

    def close(self) -> None:
        """Close the tab."""
        self._call("Page.close")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Return as soon as a JavaScript expression is true."""
        until = time.monotonic() + WAIT_S
        while not self.run(f"Boolean({expression})"):
            said = f"the page says {self.text('#notice')!r}, the console {self.errors}"
            assert time.monotonic() < until, f"never came true: {expression}; {said}"
            time.sleep(0.05)

    def text(self, selector: str) -> str:
        """What a reader sees of the first element that ``selector`` finds."""
        return str(self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def count(self, selector: str) -> int:
        """Elements that ``selector`` finds."""
        return int(self.run(f"document.querySelectorAll({json.dumps(selector)}).length"))

    def hover(self, selector: str) -> None:
        """Put the pointer on the middle of the first element that ``selector`` finds."""
        found = f"document.querySelector({json.dumps(selector)})"
        x, y = self.run(
            f"(({found}).scrollIntoView({{block: 'center'}}), (b => [b.x + b.width / 2, b.y + b.height / 2])"
            f"({found}.getBoundingClientRect()))"
        )
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def look(self, *, width: int, height: int, scheme: str = "light") -> None:
        """Set the size of the window and the preferred colour scheme."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        self._call("Emulation.setScrollbarsHidden", hidden=True)  # they would cover the edge of a picture
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Write a picture of the page, or of the window only."""
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = self._call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(picture["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._connection.send(json.dumps(message))
        while True:
            received = json.loads(self._connection.recv(timeout=WAIT_S))
            if received.get("id") == number:
                assert "error" not in received, f"{method}: {received['error']}"
                result: dict[str, Any] = received["result"]
                return result
            self._note(received)

    def _note(self, event: dict[str, Any]) -> None:
        values = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.urls.append(values["request"]["url"])
            case "Runtime.consoleAPICalled" if values["type"] in ("error", "assert"):
                self.errors.append(json.dumps(values["args"]))
            case "Runtime.exceptionThrown":
                self.errors.append(json.dumps(values["exceptionDetails"]))
            case "Log.entryAdded" if values["entry"]["level"] == "error":
                self.errors.append(f"{values['entry']['text']} {values['entry'].get('url', '')}")


@contextmanager
def browser(folder: Path) -> Iterator[str]:
    """A fresh Chromium that keeps its profile in ``folder``; gives the address of its DevTools."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *_FLAGS, f"--user-data-dir={folder}", "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            port, path = _address(folder / "DevToolsActivePort", process)
            yield f"ws://127.0.0.1:{port}{path}"
        finally:
            process.terminate()


@contextmanager
def new_page(address: str) -> Iterator[Page]:
    """A tab of the browser at ``address``."""
    with connect(address, max_size=None, proxy=None) as connection:
        page = Page(connection)
        page.look(width=1440, height=900)
        yield page
        page.close()


def _address(file: Path, process: subprocess.Popen[bytes]) -> tuple[str, str]:
    until = time.monotonic() + WAIT_S
    while True:
        lines = file.read_text().split() if file.is_file() else []
        if len(lines) == 2:
            return lines[0], lines[1]
        assert process.poll() is None, f"the browser ended with code {process.returncode}"
        assert time.monotonic() < until, "the browser did not start in time"
        time.sleep(0.05)
