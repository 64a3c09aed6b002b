"""The page in a real browser: Debian's Chromium without a window, and a server with a scripted model beside it."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import attrs
import pytest
import trio
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.server.helpers import running
from tests.server.scripted import TEMPLATE, ScriptedRunner
from tests.server.stub import GatedWorker, open_stub, stub_tokenizer
from trio_llm.config import Config
from trio_llm.engine import Engine
from trio_llm.server.app import create_app

T = TypeVar("T")
CHROMIUM = shutil.which("chromium")
# Nothing but the server under test is asked for anything.
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync""".split()
# How long to wait for the page. Not a measure of anything: the machine may be busy.
PATIENCE_MS = 60_000
# Returns texts that are in sight, each with its contrast to its ground as WCAG computes it.
CONTRAST = """() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((one) => one / 255)
    .map((one) => (one <= .03928 ? one / 12.92 : ((one + .055) / 1.055) ** 2.4))
    .reduce((sum, one, at) => sum + one * [.2126, .7152, .0722][at], 0);
  const ground = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = channels(getComputedStyle(at).backgroundColor);
      if (color.length < 4 || color[3] === 1) return color;
    }
  };
  const texts = "h1, h2, h3, p, a, button, label, dt, dd, th, td, .muted, .content, .stats, .phase";
  return [...document.querySelectorAll(texts)]
    .filter((node) => node.checkVisibility() && node.innerText.trim())
    .map((node) => {
      const [one, other] = [light(channels(getComputedStyle(node).color)), light(ground(node))].sort((a, b) => b - a);
      return [node.innerText.slice(0, 30), (one + .05) / (other + .05)];
    });
}"""


# Per file, not per session: until it stops, Playwright keeps an asyncio loop running in this thread, and asyncio.run of
# other tests fails in it.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start Chromium, with a fresh profile."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS) as started:
            yield started


@attrs.define
class Served:
    """A server in a thread of its own."""

    url: str
    engine: Engine
    runner: ScriptedRunner
    worker: GatedWorker
    token: trio.lowlevel.TrioToken

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function in the server's loop."""
        return trio.from_thread.run_sync(function, *args, trio_token=self.token)

    def wait_idle(self) -> None:
        """Wait until every request has ended in the engine."""
        trio.from_thread.run(self.engine.wait_idle, trio_token=self.token)


@contextmanager
def serve(script: str = "", config: Config | None = None, *, gated: bool = False, **settings: Any) -> Iterator[Served]:
    """Serve a model that answers with `script`; a gated one makes only the steps that the test lets it."""
    runner, worker = ScriptedRunner(script), GatedWorker()
    worker.open = not gated
    started: queue.SimpleQueue[Served | BaseException] = queue.SimpleQueue()
    stop = trio.Event()

    async def main() -> None:
        async with open_stub(runner, stub_tokenizer(TEMPLATE), worker=worker, **settings) as engine:
            async with running(create_app(engine, config or Config())) as server:
                url = f"http://127.0.0.1:{server.port}/"
                started.put(Served(url, engine, runner, worker, trio.lowlevel.current_trio_token()))
                await stop.wait()

    def run() -> None:
        try:
            trio.run(main)
        except BaseException as error:  # noqa: BLE001 - the test must not wait for ever
            started.put(error)

    thread = threading.Thread(target=run)
    thread.start()
    served = started.get()
    if isinstance(served, BaseException):
        raise served
    try:
        yield served
    finally:
        served.call(stop.set)
        thread.join()


OpenPage = Callable[..., AbstractContextManager[Page]]


@pytest.fixture
def open_page(browser: Browser) -> OpenPage:
    """Return a function that opens a page of its own profile. The page must leave nothing in the console."""

    @contextmanager
    def opened(url: str, *, allowed: str | None = None, **options: Any) -> Iterator[Page]:
        context: BrowserContext = browser.new_context(**options)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        foreign: list[str] = []
        page.on("request", lambda request: foreign.append(request.url) if not request.url.startswith(url) else None)
        page.goto(url)
        yield page
        context.close()
        assert [text for text in complaints if allowed is None or allowed not in text] == []
        assert foreign == []

    return opened
