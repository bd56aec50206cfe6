"""Headless Chromium over its debugging pipe: what a page asks for, what its console says, and how it looks.

Messages are JSON objects that end in a zero byte, on descriptors 3 (to the browser) and 4 (from it). No name resolves,
so that whatever asks for a network fails; requests of the browser itself are not those of the page.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAME = next((name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), None)
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)  # fmt: skip
_SECONDS = 60.0


class Tab:
    """One page of a browser.

    Attributes:
        requests: URLs that the page asked for.
        console: what its console shows: messages, errors, violations of its policy.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.requests: list[str] = []
        self.console: list[str] = []
        self._to, self._from = to_browser, from_browser
        self._left, self._count, self._session = b"", 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def open(self, path: Path, *, width: int = 1200, dark: bool = False) -> None:
        """Loads a file and waits until it is there with all its pictures."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(found["data"])

    def pdf(self) -> bytes:
        """The page as it prints."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=False)["data"])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._from], [], [], _SECONDS)
            part = os.read(self._from, 1 << 20) if ready else b""
            assert part, "the browser does not answer"
            self._left += part
        text, _, self._left = self._left.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        what, given = message.get("method"), message.get("params", {})
        if what == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])
        elif what == "Log.entryAdded":
            self.console.append(given["entry"]["text"])
        elif what == "Runtime.consoleAPICalled":
            self.console.append(str(given["args"]))
        elif what == "Runtime.exceptionThrown":
            self.console.append(str(given["exceptionDetails"]))
        return message


@contextmanager
def browser(profile: Path) -> Iterator[Tab]:
    """A browser with a profile of its own, and one tab."""
    assert NAME is not None
    pipes = [os.pipe(), os.pipe()]
    # Above 10, so that neither is overwritten by the two numbers that the browser expects.
    child_in, child_out = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (pipes[0][0], pipes[1][1]))

    def place() -> None:
        os.dup2(child_in, 3)
        os.dup2(child_out, 4)

    arguments = [NAME, *_FLAGS, f"--user-data-dir={profile}"]
    with (profile.parent / "chromium.log").open("w") as log:
        process = subprocess.Popen(
            arguments,
            preexec_fn=place,  # noqa: PLW1509  # two calls of dup2, which take no lock
            close_fds=False,  # Python's own close by themselves
            stdout=log,
            stderr=log,
        )
    for fd in (child_in, child_out, pipes[0][0], pipes[1][1]):
        os.close(fd)
    try:
        yield Tab(pipes[0][1], pipes[1][0])
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(pipes[0][1])
        os.close(pipes[1][0])
