"""Fixtures: the demo on loopback with the embedded model, and a headless Chromium of the system."""

import shutil

import pytest
from demo_server import Server


pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium; `make browser-test` installs it", allow_module_level=True)


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
