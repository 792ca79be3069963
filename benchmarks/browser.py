"""Headless Chromium through its debugging pipe: open a page at a size and in a colour scheme, ask it, picture it."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PLAIN = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run")
FLAGS = (*_PLAIN, "--remote-debugging-pipe")


def find_chromium() -> str | None:
    """The browser's path, or None."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for path in map(shutil.which, names) if path), None)


@dataclass(frozen=True)
class View:
    """How a page is looked at."""

    width: int = 1000
    height: int = 800
    dark: bool = False


@dataclass
class Page:
    """An open page. `problems` are console errors and exceptions; `requests` are the addresses that were asked for."""

    browser: Browser
    session: str
    view: View
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def open(self, url: str) -> None:
        """Load the page and wait until it is there."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        size = {"width": self.view.width, "height": self.view.height, "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", **size, mobile=self.view.width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if self.view.dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self.browser.wait(self, "Page.loadEventFired")

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"].get("value")

    def picture(self, path: Path, height: float | None = None, scale: float = 1.0) -> None:
        """Write a PNG of the page's upper part as high as `height` says, else of all of it."""
        whole = float(self.ask("document.documentElement.scrollHeight"))
        clip = {"x": 0, "y": 0, "width": self.view.width, "height": height or whole, "scale": scale}
        made = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(made["data"]))

    def call(self, method: str, **params: Any) -> Any:
        return self.browser.call(method, self, **params)

    def note(self, message: dict[str, Any]) -> None:
        """Keep what a message tells of errors and requests."""
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])


class Browser:
    """A running Chromium."""

    def __init__(self, process: subprocess.Popen[bytes], write: int, read: int) -> None:
        self._process, self._write, self._read = process, write, read
        self._left, self._number = b"", 0

    def page(self, url: str, view: View) -> Page:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, view)
        page.open(url)
        return page

    def call(self, method: str, page: Page | None = None, **params: Any) -> Any:
        """The answer to one command; RuntimeError where the browser refuses it."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": page.session} if page else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(page)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def wait(self, page: Page, event: str) -> None:
        while self._next(page).get("method") != event:
            pass

    def close(self) -> None:
        self.call("Browser.close")
        self._process.wait(30)
        os.close(self._write)
        os.close(self._read)

    def _next(self, page: Page | None) -> dict[str, Any]:
        while b"\0" not in self._left:
            part = os.read(self._read, 2**20)
            if not part:
                raise RuntimeError("the browser is gone")
            self._left += part
        line, _, self._left = self._left.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if page is not None and message.get("sessionId") == page.session:
            page.note(message)
        return message


@contextmanager
def browser(executable: str) -> Iterator[Browser]:
    """Start Chromium with a profile of its own, which goes with it."""
    ours_read, theirs_write = os.pipe()
    theirs_read, ours_write = os.pipe()
    given = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_read, theirs_write)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [executable, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        start = f'exec "$@" 3<&{given[0]} 4>&{given[1]}'  # where the browser looks for its pipe
        process = subprocess.Popen(
            ["bash", "-c", start, "chromium", *command],
            pass_fds=given,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (theirs_read, theirs_write, *given):
            os.close(fd)
        running = Browser(process, ours_write, ours_read)
        try:
            yield running
        finally:
            running.close()
