"""Chromium without a window, spoken to through a pair of pipes (DevTools protocol): needs no package."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

#: Seconds until a browser that does not answer is given up; a busy machine takes long to start one.
PATIENCE = 120


def chromium() -> str | None:
    """Path of an installed Chromium or Chrome, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def unloaded(browser: Browser) -> list[str]:
    """What stands for the images of the open page that could not be shown, or that have not been asked for."""
    script = """Promise.all([...document.images].map(image => { image.loading = 'eager';
        return image.decode().then(() => '', () => image.alt || image.src.slice(0, 40)); }))"""
    return [name for name in browser.evaluate(script) if name]


def cut_off(browser: Browser, width: int) -> list[str]:
    """Elements of the open page, opened at this width, that reach beyond its sides and lie in no box that scrolls."""
    script = """(width => [...document.body.querySelectorAll('*')].filter(element => {
        const box = element.getBoundingClientRect();
        if (box.width === 0 || (box.left >= -1 && box.right <= width + 1)) return false;
        for (let above = element; above; above = above.parentElement)
            if (['auto', 'scroll'].includes(getComputedStyle(above).overflowX)) return false;
        return true;
    }).map(element => element.tagName + ' ' + element.textContent.slice(0, 60)))"""
    return list(browser.evaluate(f"{script}({width})"))


class Browser:
    """One browser process with one page at a time.

    The protocol is JSON, each message ended by a zero byte, on the file descriptors 3 (to the browser) and 4 (from it).
    """

    def __init__(self, executable: str, folder: Path) -> None:
        read, self._out = os.pipe()
        self._in, write = os.pipe()
        # A shell puts the pipes in place; their own numbers must not be 3 or 4.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read, write)]
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--no-first-run",
        ]
        options += [
            "--disable-background-networking",
            "--disable-component-update",
            "--remote-debugging-pipe",
            f"--user-data-dir={folder}",
        ]
        start = f'exec "$0" "$@" 3<&{ends[0]} 4>&{ends[1]}'
        self._log = open(folder.with_suffix(".log"), "wb")  # noqa: SIM115
        self.process = subprocess.Popen(
            ["bash", "-c", start, executable, *options], pass_fds=ends, stdout=self._log, stderr=self._log
        )
        for end in (read, write, *ends):
            os.close(end)
        self._buffer, self._number, self.events = b"", 0, list[dict[str, Any]]()
        self.session: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.wait(30)
        os.close(self._in)
        os.close(self._out)
        self._log.close()

    def _message(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"the browser did not answer; {self._log.name} may say why")
            part = os.read(self._in, 2**20)
            if not part:
                raise ConnectionError(f"the browser ended; {self._log.name} may say why")
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(text)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Result of a command to the page (to the browser, before there is one); keeps events that come meanwhile."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | (
            {"sessionId": self.session} if self.session else {}
        )
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self._message(deadline)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def wait(self, found: Callable[[dict[str, Any]], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not any(map(found, self.events)):
            self.events.append(self._message(deadline))

    def open(self, path: Path, width: int, height: int = 900) -> None:
        """Load a file in a new page of this width in CSS pixels, and wait until all of it is there."""
        self.session, self.events = None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait(lambda event: event.get("method") == "Page.loadEventFired" and event.get("sessionId") == self.session)

    def evaluate(self, script: str) -> Any:
        """Value of a JavaScript expression, which may be a promise."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(
                answer["exceptionDetails"].get("exception", {}).get("description", answer["exceptionDetails"]["text"])
            )
        return answer["result"].get("value")

    def errors(self) -> list[str]:
        """What the console shows in red."""
        found = []
        for event in self.events:
            content = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(content["exceptionDetails"]["text"])
            elif event.get("method") == "Runtime.consoleAPICalled" and content["type"] in ("error", "assert"):
                found.append(" ".join(str(part.get("value", part.get("description"))) for part in content["args"]))
            elif event.get("method") == "Log.entryAdded" and content["entry"]["level"] == "error":
                found.append(content["entry"]["text"])
        return found

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        path.write_bytes(
            base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"])
        )
