"""A headless Chromium, driven through chromedriver's HTTP interface (W3C WebDriver) with nothing but urllib."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

KEYS = {"ArrowRight": "\ue014", "ArrowLeft": "\ue012", "Escape": "\ue00c", "Tab": "\ue004"}


class Browser:
    """One window. Everything waits for the page's script, which draws at once, so no test needs to sleep."""

    def __init__(self) -> None:
        paths = shutil.which("chromium"), shutil.which("chromedriver")
        if not all(paths):
            pytest.skip("needs Debian's chromium and chromium-driver")
        self.driver = subprocess.Popen([paths[1], "--port=0"], stdout=-1, stderr=subprocess.STDOUT, text=True)
        ports = (re.search(r"started successfully on port (\d+)", line) for line in self.driver.stdout)
        self.base = f"http://127.0.0.1:{next(filter(None, ports))[1]}"
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        flags = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,1000", *sandbox]
        capabilities = {
            "goog:chromeOptions": {"binary": paths[0], "args": flags},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        try:
            session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        except Exception:
            self.driver.kill()
            raise
        self.base += f"/session/{session['sessionId']}"

    def _call(self, method: str, path: str, body: dict | None = None):
        data = json.dumps(body or {}).encode() if method == "POST" else None
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.base + path, data=data, method=method, headers=headers)
        try:
            with self.opener.open(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from error

    def open(self, page: Path, address: str = "") -> None:
        self._call("POST", "/url", {"url": "about:blank"})  # the same file with another #address would not load anew
        self._call("POST", "/url", {"url": page.resolve().as_uri() + address})

    def run(self, script: str, *args):
        """Return what a function body returns in the page; it gets `args` as `arguments`."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(args)})

    def texts(self, selector: str) -> list[str]:
        return self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText.trim())", selector)

    def text(self, selector: str) -> str:
        (text,) = self.texts(selector)
        return text

    def _find(self, selector: str) -> str:
        element = self._call("POST", "/element", {"using": "css selector", "value": selector})
        return f"/element/{next(iter(element.values()))}"

    def click(self, selector: str) -> None:
        self._call("POST", f"{self._find(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        """Replace what an input holds, with real key strokes; ChromeDriver has none for emoji, which are pasted."""
        self.click(selector)
        self.run("arguments[0].select?.()", self._call("GET", "/element/active"))
        if max(text, default="") > "\uffff":
            self.run("document.execCommand('insertText', false, arguments[0])", text)
        else:
            self._call("POST", f"{self._find(selector)}/value", {"text": text or "\ue017"})

    def choose(self, selector: str, value: str) -> None:
        self.click(f'{selector} option[value="{value}"]')

    def press(self, *keys: str) -> None:
        strokes = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def back(self) -> None:
        before = self.run("return location.hash")
        self._call("POST", "/back")
        deadline = time.monotonic() + 10
        while self.run("return location.hash") == before:
            assert time.monotonic() < deadline, "the browser did not go back"
            time.sleep(0.02)

    def becomes(self, script: str, value) -> bool:
        """Tell whether a function body returns this value within seconds: key strokes may outlast `press`."""
        deadline = time.monotonic() + 10
        while (result := self.run(script)) != value and time.monotonic() < deadline:
            time.sleep(0.02)
        return result == value

    def emulate(self, **features: str) -> None:
        """Media features such as prefers_color_scheme="dark"."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self._call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": {"features": named}})

    def resize(self, width: int, height: int) -> None:
        self._call("POST", "/window/rect", {"width": width, "height": height})

    def console(self) -> list[str]:
        """Messages of the console, errors and refused loads among them, since the last call."""
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Every address the browser asked for since the last call."""
        entries = self._call("POST", "/se/log", {"type": "performance"})
        events = [json.loads(entry["message"])["message"] for entry in entries]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def close(self) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait(timeout=20)
