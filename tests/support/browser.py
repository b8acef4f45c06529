"""A headless Chromium, driven through ChromeDriver's plain HTTP (W3C WebDriver), with the standard library alone."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
KEYS = {"Tab": "\ue004", "Enter": "\ue007", "ArrowLeft": "\ue012", "ArrowUp": "\ue013", "ArrowRight": "\ue014"}
KEYS |= {"ArrowDown": "\ue015", "Home": "\ue011", "End": "\ue010"}
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


_MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
NEEDS_BROWSER = [
    pytest.mark.browser,
    pytest.mark.skipif(
        bool(_MISSING),
        reason=f"not tried in a browser: there is no {_MISSING} here (Debian: apt install chromium chromium-driver)",
    ),
]
"""Marks of tests that need a browser."""


class Browser:
    """One window."""

    def __init__(self, address: str, session: str) -> None:
        self._base = f"{address}/session/{session}"

    def command(self, method: str, path: str, body: object = None) -> Any:
        return request(method, f"{self._base}{path}", body)

    def open(self, page: Path, *, width: int = 1280, height: int = 900) -> None:
        """Open a file in a window whose page area is that wide."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", metrics)
        self.command("POST", "/url", {"url": page.resolve().as_uri()})
        for _ in range(200):
            if self.run("return document.documentElement.dataset.ready === 'yes'"):
                return
            time.sleep(0.05)
        raise AssertionError(f"{page} was not drawn: {self.log()}")

    def devtools(self, name: str, parameters: dict[str, object]) -> Any:
        return self.command("POST", "/goog/cdp/execute", {"cmd": name, "params": parameters})

    def run(self, script: str, *arguments: object) -> Any:
        """Value of the body of a function."""
        return self.command("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def click(self, selector: str) -> None:
        found = self.command("POST", "/element", {"using": "css selector", "value": selector})[_ELEMENT]
        self.command("POST", f"/element/{found}/click", {})

    def press(self, *keys: str) -> None:
        """Press keys, one after the other, where the focus is."""
        actions = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self.command("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def log(self) -> list[str]:
        """Messages of the console since the last call."""
        return [entry["message"] for entry in self.command("POST", "/se/log", {"type": "browser"})]


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Start ChromeDriver and Chromium with an empty profile in ``folder``, and end both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    driver = subprocess.Popen(
        [shutil.which("chromedriver") or "chromedriver", f"--port={port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait(address, driver)
        options = {"binary": shutil.which("chromium"), "args": [*FLAGS, f"--user-data-dir={folder}"]}
        capabilities = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        session = request("POST", f"{address}/session", {"capabilities": {"alwaysMatch": capabilities}})["sessionId"]
        try:
            yield Browser(address, session)
        finally:
            request("DELETE", f"{address}/session/{session}")
    finally:
        driver.terminate()
        driver.wait(30)


def request(method: str, url: str, body: object = None) -> Any:
    data = json.dumps({} if body is None else body).encode() if method == "POST" else None
    sent = urllib.request.Request(url, data=data, method=method, headers={"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(sent, timeout=120) as answer:
            return json.loads(answer.read())["value"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(error.read().decode()[:500]) from error


def _wait(address: str, driver: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        assert driver.poll() is None, "chromedriver ended"
        with suppress(OSError):
            if request("GET", f"{address}/status")["ready"]:
                return
        time.sleep(0.1)
    raise AssertionError("chromedriver does not answer")


def assert_quiet(window: Browser) -> None:
    """No word on the console, no request, nothing wider than the window."""
    assert window.log() == []
    assert window.run("return performance.getEntriesByType('resource').map(entry => entry.name)") == []
    assert window.run("return document.documentElement.scrollWidth <= window.innerWidth")


def soonest_paint(window: Browser, page: Path, *, limit: float) -> float:
    """Milliseconds to the first paint: the least of up to 30 tries, as the rest is what else the machine does."""
    times = list[float]()
    while len(times) < 30 and min(times, default=limit) >= limit:
        window.open(page)
        times.append(_first_paint(window))
    return min(times)


def _first_paint(window: Browser) -> float:
    for _ in range(200):  # the browser says it a little later
        found = window.run("return performance.getEntriesByName('first-contentful-paint').map(e => e.startTime)")
        if found:
            return float(found[0])
        time.sleep(0.05)
    raise AssertionError("nothing was painted")
