"""Takes the screenshots of docs/page.md: the demo model under a small load, in Chromium without a window.

    python -m tools.page_screenshots

Needs `pip install playwright` and a Chromium of the machine. Look at the pictures before you commit them.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
SETTINGS = ["--kv-blocks", "113", "--max-batch-size", "10", "--spec-method", "ngram", "--host", "127.0.0.1"]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
STORIES = ("Once upon a time there was a king with three daughters. ", "The little owl asked the fox for the way. ")
DESK, PHONE = {"width": 1280, "height": 1010}, {"width": 360, "height": 720}
# The curves show a minute.
LOAD_S = 70.0


@contextmanager
def serving(records: str) -> Iterator[str]:
    """Serve the demo model; yield its URL."""
    command = [sys.executable, "-m", "trio_llm", "serve", "--port", "0", "--record", records, *SETTINGS]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # noqa: S603
    assert server.stdout is not None
    try:
        url = next(line.split("In a browser: ")[1].split("/. ")[0] for line in server.stdout if "In a browser" in line)
        yield f"{url}/"
    finally:
        server.terminate()
        server.wait()


def keep_busy(url: str, until_s: float, seed: int) -> None:
    """Ask for completions until `until_s`, with pauses, so that there are waves."""
    rng = random.Random(seed)
    while time.monotonic() < until_s:
        prompt = rng.choice(STORIES) * rng.randint(1, 14) + str(rng.randint(1, 9))
        body = json.dumps({"prompt": prompt, "max_tokens": rng.randint(40, 260), "ignore_eos": True}).encode()
        request = urllib.request.Request(f"{url}v1/completions", body, {"Content-Type": "application/json"})  # noqa: S310
        with urllib.request.urlopen(request) as answer:  # noqa: S310 - our own server
            answer.read()
        time.sleep(rng.random() * 2)


def show_chat(page: Any) -> None:
    """Hold a conversation."""
    page.get_by_role("button", name="What is the capital of Japan?").click()
    page.locator("article.assistant .stats", has_text="tokens/s").wait_for()
    for text in ("Tell me a story about an owl.", "What is 2 plus 3?"):
        page.locator("#text").fill(text)
        page.keyboard.press("Enter")
        page.locator("article.assistant").last.get_by_role("button", name="Again").wait_for()
    page.locator("#text").blur()


def main() -> None:
    """Serve, load, and take the pictures."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as records, serving(records) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        looks: dict[str, tuple[Any, Any]] = {
            "page-chat": ("light", {"width": 1280, "height": 720}),
            "page-chat-phone": ("dark", PHONE),
            "page-engine": ("light", DESK),
            "page-engine-dark": ("dark", DESK),
            "page-engine-phone": ("light", PHONE),
        }
        pages: dict[str, Any] = {}
        for name, (scheme, size) in looks.items():
            pages[name] = browser.new_page(color_scheme=scheme, viewport=size)
            pages[name].goto(f"{url}#engine" if "engine" in name else url)
            if "chat" in name:
                show_chat(pages[name])
        until_s = time.monotonic() + LOAD_S
        clients = [threading.Thread(target=keep_busy, args=(url, until_s, seed)) for seed in range(14)]
        for client in clients:
            client.start()
        time.sleep(LOAD_S - 6)
        for name, page in pages.items():
            page.screenshot(path=DOCS / f"{name}.png")
        for client in clients:
            client.join()
        browser.close()


if __name__ == "__main__":
    main()
