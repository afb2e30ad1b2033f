"""Fixtures: the demo on loopback with the embedded model, and a headless Chromium of the system."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest


pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium; `make browser-test` installs it", allow_module_level=True)

START_S = 120


class Server:
    """`flextok demo` in its own process."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"
        self.log = folder / "log.txt"
        environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder / "images"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "flextok_hf.cli", "demo", "--port", str(port), "--device", "cpu"]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
        deadline = time.monotonic() + START_S
        while not self.answers():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.url, timeout=5) as response:
                return response.status == 200
        except OSError:
            return False

    def memory_mb(self) -> float:
        """Return the resident memory of the server."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise AssertionError("the server is gone")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("demo"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def browser():
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server):
    """A function that opens the demo in a new browser profile; no request may go to another host."""
    contexts, foreign, errors = [], [], []

    def open_page(width=1100, height=900):
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        local = (server.url, "data:", "blob:")
        page.on("request", lambda request: None if request.url.startswith(local) else foreign.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        page.get_by_role("heading", name="FlexTok").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not foreign, "the page sent a request to another host"
    assert not errors, "a script on the page failed"
    assert server.process.poll() is None
    assert "Traceback" not in server.log.read_text(), server.log.read_text()
