"""Drive a headless Chromium through a pipe, by the Chrome DevTools Protocol: needs no package."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

EXECUTABLE = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_OPTIONS = [
    "--headless=new",
    "--no-sandbox",
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--force-prefers-reduced-motion",
    "--remote-debugging-pipe",
]
# Seconds to wait for an answer of the browser, or for a condition in a page.
_PATIENCE = 60


class Chromium:
    """A browser without a window; closes at the end of its context."""

    def __enter__(self) -> "Chromium":
        """Start the browser; it reads from file 3 and writes to file 4."""
        self._folder = tempfile.mkdtemp()
        theirs, self._requests = os.pipe()
        self._answers, ours = os.pipe()
        command = f'exec "$0" "$@" 3<&{theirs} 4>&{ours}'
        profile = f"--user-data-dir={self._folder}"
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", command, str(EXECUTABLE), *_OPTIONS, profile, "about:blank"],
            pass_fds=(theirs, ours),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(ours)
        self._buffer, self._number, self._pages = b"", 0, {}
        return self

    def __exit__(self, *_: object) -> None:
        """Close the browser and remove its profile."""
        self._send("Browser.close", {}, None)
        self._process.wait(_PATIENCE)
        os.close(self._requests)
        os.close(self._answers)
        shutil.rmtree(self._folder, ignore_errors=True)

    def open(self, path: Path, width: int = 1440, scheme: str = "light") -> "Tab":
        """Show a file in a new tab of a width, for readers who prefer a light or a dark page."""
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})
        page = Tab(self, target, attached["sessionId"])
        self._pages[page.session] = page
        page.show(path, width, scheme)
        return page

    def close(self, page: "Tab") -> None:
        """Close a tab."""
        self.call("Target.closeTarget", {"targetId": page.target})
        del self._pages[page.session]

    def call(self, method: str, parameters: dict[str, Any], session: str | None = None) -> Any:
        """Return the answer to a command."""
        number = self._send(method, parameters, session)
        while True:
            message = self._receive(_PATIENCE)
            assert message is not None, f"no answer to {method}"
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]

    def listen(self, seconds: float) -> None:
        """Pass events to their tabs for some time."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._receive(left)

    def _send(self, method: str, parameters: dict[str, Any], session: str | None) -> int:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        content = json.dumps(message).encode() + b"\0"
        while content:
            content = content[os.write(self._requests, content) :]
        return self._number

    def _receive(self, seconds: float) -> dict[str, Any] | None:
        """Return the next message; events go to their tabs on the way."""
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            readable, _, _ = select.select([self._answers], [], [], max(0, end - time.monotonic()))
            if not readable:
                return None
            content = os.read(self._answers, 1 << 16)
            assert content, "the browser has ended"
            self._buffer += content
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if message.get("sessionId") in self._pages and "method" in message:
            self._pages[message["sessionId"]].notice(message["method"], message["params"])
        return message


class Tab:
    """A page that is shown, and everything that it complains of or tries to load.

    Attributes:
        complaints: Warnings, errors, dialogs, and addresses outside the file.
    """

    def __init__(self, browser: Chromium, target: str, session: str) -> None:
        self.browser, self.target, self.session = browser, target, session
        self.complaints: list[str] = []
        self.address = ""

    def show(self, path: Path, width: int, scheme: str) -> None:
        """Load a file, and wait until its ranking is there."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self.resize(width, 900)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._call("Emulation.setEmulatedMedia", features=[feature])
        self.address = path.as_uri()
        self._call("Page.navigate", url=self.address)
        self.wait("document.querySelector('#ranking tbody tr') !== null")

    def notice(self, event: str, details: dict[str, Any]) -> None:
        """Keep what a quiet page would not do."""
        if event == "Runtime.consoleAPICalled" and details["type"] in ("warning", "error"):
            self.complaints.append(str(details["args"]))
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(str(details["exceptionDetails"]))
        elif event == "Log.entryAdded" and details["entry"]["level"] in ("warning", "error"):
            self.complaints.append(details["entry"]["text"])
        elif event == "Page.javascriptDialogOpening":
            self.complaints.append(details["message"])
        elif event == "Network.requestWillBeSent":
            url = details["request"]["url"]
            if url != self.address and not url.startswith(("data:", "blob:", "about:")):
                self.complaints.append(url)

    def evaluate(self, script: str) -> Any:
        """Return the value of an expression; a promise is awaited."""
        result = self._call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + _PATIENCE
        while not self.evaluate(condition):
            assert time.monotonic() < end, f"not true in time: {condition}"
            self.browser.listen(0.02)

    def text(self, selector: str) -> str:
        """Return the text of an element."""
        return str(self.evaluate(f"{_one(selector)}.textContent"))

    def texts(self, selector: str) -> list[str]:
        """Return the texts of all elements that match."""
        every = f"[...document.querySelectorAll({json.dumps(selector)})]"
        return list(self.evaluate(f"{every}.map(node => node.textContent)"))

    def click(self, selector: str) -> None:
        """Press and release the mouse in the middle of an element."""
        element = _one(selector)
        self.evaluate(f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        middle = "(box => [box.x + box.width / 2, box.y + box.height / 2])"
        x, y = self.evaluate(f"{middle}({element}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            event = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1}
            self._call("Input.dispatchMouseEvent", **event)

    def write(self, selector: str, text: str) -> None:
        """Type a text into a field."""
        self.evaluate(f"{_one(selector)}.focus()")
        self._call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Press and release a key in the focused element."""
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a list."""
        chosen = f"node.value = {json.dumps(value)}; node.dispatchEvent(new Event('change'))"
        self.evaluate(f"(node => {{ {chosen} }})({_one(selector)})")

    def download(self, selector: str, folder: Path) -> Path:
        """Click a button, and return the file that it saves."""
        parameters = {"behavior": "allow", "downloadPath": str(folder)}
        self.browser.call("Browser.setDownloadBehavior", parameters)
        self.click(selector)
        end = time.monotonic() + _PATIENCE
        while not (files := [file for file in folder.glob("*.csv") if file.stat().st_size]):
            assert time.monotonic() < end, "nothing was saved"
            self.browser.listen(0.05)
        return files[0]

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        """Set the size of the window, and the pixels of a picture per pixel of the window."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        self._call("Emulation.setScrollbarsHidden", hidden=True)

    def picture(self, path: Path) -> None:
        """Save a screenshot of what is in view."""
        content = self._call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(content))

    def _call(self, method: str, **parameters: Any) -> Any:
        return self.browser.call(method, parameters, self.session)


def _one(selector: str) -> str:
    return f"document.querySelector({json.dumps(selector)})"
