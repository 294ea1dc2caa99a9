"""A real browser without a window, spoken to in Chrome's DevTools protocol over two pipes: no
library is needed.

https://chromedevtools.github.io/devtools-protocol/ ; `--remote-debugging-pipe` reads from
descriptor 3, writes to 4.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60.0
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-extensions", "--disable-background-networking", "--remote-debugging-pipe",
)  # fmt: skip
Json = dict[str, Any]


def executable() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One window. Everything it loads, says on its console or is refused by the page's policy is
    kept."""

    def __init__(self, writer: int, reader: int) -> None:
        self._writer = writer
        self._reader = reader
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[Json] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Json:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        while (answer := self._next(PATIENCE)).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: Json = answer["result"]
        return result

    def _next(self, seconds: float) -> Json:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._reader], [], [], seconds)
            assert ready, "the browser says nothing any more"
            data = os.read(self._reader, 1 << 20)
            assert data, "the browser has ended"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        found: Json = json.loads(message)
        return found

    def wait(self, event: str) -> Json:
        """The next event of that kind, or one that came while another call was answered."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            for number, found in enumerate(self.events):
                if found.get("method") == event:
                    return self.events.pop(number)
            self.events.append(self._next(PATIENCE))
        raise AssertionError(f"no {event}")

    def forget(self) -> None:
        self.events.clear()

    def resize(self, width: int, height: int = 900, dark: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def open(self, url: str) -> None:
        self.forget()
        self.call("Page.navigate", url=url)
        self.wait("Page.loadEventFired")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression. The page's own policy does not hold for us."""
        found = self.call(
            "Runtime.evaluate",
            expression=expression,
            returnByValue=True,
            awaitPromise=True,
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str, text: str = "", shift: bool = False) -> None:
        codes = {"Tab": 9, "Enter": 13, " ": 32}
        about: Json = {
            "key": key,
            "code": key,
            "windowsVirtualKeyCode": codes.get(key, 0),
            "modifiers": 8 * shift,
        }
        self.call(
            "Input.dispatchKeyEvent",
            type="keyDown",
            **about,
            **({"text": text} if text else {}),
        )
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def choose_file(self, selector: str, path: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def screenshot(self, path: Path, whole: bool = True) -> None:
        found = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def names(self) -> list[tuple[str, str]]:
        """(role, name) of everything that a screen reader would tell."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        told = [node for node in nodes if not node.get("ignored")]
        return [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in told]


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """`folder`: for the profile, so that nothing of the user's is touched."""
    program = executable()
    assert program
    from_us, to_it = os.pipe()
    from_it, to_us = os.pipe()

    def descriptors() -> None:
        os.dup2(from_us, 13)
        os.dup2(to_us, 14)
        os.dup2(13, 3)
        os.dup2(14, 4)

    command = [program, *OPTIONS, f"--user-data-dir={folder}", "about:blank"]
    quiet: Json = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
    }
    process = subprocess.Popen(
        command,
        pass_fds=(3, 4, from_us, to_us),
        preexec_fn=descriptors,
        **quiet,
    )
    os.close(from_us)
    os.close(to_us)
    try:
        yield Browser(to_it, from_it)
    finally:
        os.close(to_it)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(from_it)
