"""A headless Chromium for tests of pages, driven through chromedriver's own protocol (W3C WebDriver: JSON over HTTP)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
KEYS = {"tab": "\ue004", "enter": "\ue007", "escape": "\ue00c", "control": "\ue009", "shift": "\ue008", "space": " "}
#: The programs, and the packages of Debian that bring them.
PROGRAMS = {"chromium": "chromium", "chromedriver": "chromium-driver"}

_absent = [name for name in PROGRAMS if shutil.which(name) is None]
needs_browser = pytest.mark.skipif(
    bool(_absent),
    reason=f"needs {' and '.join(_absent)}: apt-get install {' '.join(PROGRAMS[name] for name in _absent)}",
)


class Browser:
    """One page."""

    def __init__(self, port: int):
        self._base = f"http://127.0.0.1:{port}"
        arguments = ["--headless=new", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]
        arguments += "--no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run".split()
        arguments.append("--disable-background-networking")
        options = {"binary": shutil.which("chromium"), "args": arguments}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._base += f"/session/{session['sessionId']}"

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._base + path, content, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["value"]

    def open(self, url: str) -> None:
        """Loads a page."""
        self._call("POST", "/url", {"url": url})

    def run(self, script: str, *args: Any) -> Any:
        """Runs JavaScript, the body of a function, and returns its result."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(args)})

    def text(self, element_id: str) -> str:
        """Returns an element's text, as far as it is shown."""
        return self.run(
            "const e = document.getElementById(arguments[0]); return !e || e.hidden ? '' : e.textContent", element_id
        )

    def set(self, element_id: str, value: str) -> None:
        """Types into a field, in place of what it has."""
        element = self._call("POST", "/element", {"using": "css selector", "value": f"#{element_id}"})[ELEMENT]
        self._call("POST", f"/element/{element}/clear", {})
        self._call("POST", f"/element/{element}/value", {"text": value})

    def click(self, element_id: str) -> None:
        """Clicks where a user would."""
        element = self._call("POST", "/element", {"using": "css selector", "value": f"#{element_id}"})[ELEMENT]
        self._call("POST", f"/element/{element}/click", {})

    def press(self, *keys: str) -> None:
        """Presses keys (names of KEYS, or single characters) together, then lets go of all."""
        codes = [KEYS.get(key, key) for key in keys]
        actions = [{"type": "keyDown", "value": c} for c in codes]
        actions += [{"type": "keyUp", "value": c} for c in reversed(codes)]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def focused(self) -> str:
        """Returns the id of the element that has the keyboard, or its tag."""
        return self.run("const e = document.activeElement; return e.id || e.tagName")

    def resize(self, width: int, height: int) -> None:
        """Gives the page so many pixels, as a phone would where it is narrow."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics})

    def complaints(self) -> list[str]:
        """Returns what the browser has logged since the last call: script errors, refused loads, failed requests."""
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        """Waits until a condition holds; AssertionError if it does not in time."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.run("return document.body.innerText")
            time.sleep(0.02)

    def close(self) -> None:
        """Ends the browser."""
        self._call("DELETE", "")


@contextmanager
def browser() -> Iterator[Browser]:
    """Starts a browser and ends it."""
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert driver.stdout is not None
        port = next(
            int(m[1]) for line in driver.stdout if (m := re.search(r"started successfully on port (\d+)", line))
        )
        page = Browser(port)
        try:
            yield page
        finally:
            with suppress(OSError):
                page.close()
    finally:
        driver.terminate()
        driver.wait(20)
