"""The live view of the page: it moves with the engine, by mouse and keyboard, on every screen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import CONTRAST, PATIENCE_MS, OpenPage, Served, serve
from trio_llm.params import SamplingParams, Submission

expect.set_options(timeout=PATIENCE_MS)
SCRIPT = "Once upon a time there was a king who had a daughter."

# Whether a curve has a dot or a line: its axes are grey, and at the edges of its text only a little coloured.
DRAWN = """selector => {
  const canvas = document.querySelector(selector);
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(canvas, 0, 0);
  const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
  return data.some((red, at) => at % 4 === 0 && data[at + 3] === 255 && Math.abs(red - data[at + 1]) > 60);
}"""


def submit(server: Served, count: int, tokens: int = 200) -> None:
    """Submit requests with the same prompt, which nobody reads."""

    def begin() -> None:
        for _ in range(count):
            prompt = server.engine.tokenizer.encode("The same beginning of all prompts. " * 2)
            server.engine.open_stream(Submission(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True)))

    server.call(begin)


def pixels(page: Page, name: str) -> str:
    """Return what a canvas shows."""
    return page.evaluate("name => document.getElementById(name).toDataURL()", name)


def test_the_view_moves_with_the_engine(open_page: OpenPage) -> None:
    """Requests appear with their phases, blocks take their colours, steps are drawn, and all ends when they end."""
    with serve(SCRIPT, gated=True, max_batch_size=2) as server, open_page(server.url) as page:
        page.get_by_role("link", name="Engine").click()
        expect(page.locator("#live-state")).to_have_text("Live")
        expect(page.locator("#requests-note")).to_have_text("No request runs.")
        empty = pixels(page, "pool")
        submit(server, 1)
        server.call(server.worker.let, 4)
        expect(page.locator("#figure-running")).to_have_text("1")
        submit(server, 2)
        server.call(server.worker.let, 4)
        expect(page.locator("#figure-running")).to_have_text("2")
        expect(page.locator("#figure-waiting")).to_have_text("1")
        phases = page.locator("#request-rows .phase")
        expect(phases).to_have_text(["decode", "decode", "waiting"])
        full, steps = pixels(page, "pool"), pixels(page, "timeline")
        assert full != empty
        expect(page.locator("#figure-hits")).to_have_text(re.compile(r"[1-9]\d\.\d %"))
        expect(page.locator("#figure-used")).not_to_have_text("0.0 %")
        server.call(server.worker.let, 10)
        expect(page.locator("#request-rows tr").nth(0).locator("td").nth(4)).to_have_text(re.compile(r"^1\d$"))
        assert pixels(page, "timeline") != steps
        expect(page.locator("#curve-rates canvas")).to_be_visible()
        server.worker.open = True
        server.call(server.worker.let, 1)
        expect(page.locator("#requests-note")).to_have_text("No request runs.")


def test_the_time_to_the_first_token_of_one_request_is_seen(open_page: OpenPage) -> None:
    """A single value is drawn, although no line can be."""
    with serve(SCRIPT) as server, open_page(server.url) as page:
        page.get_by_role("link", name="Engine").click()
        expect(page.locator("#live-state")).to_have_text("Live")
        submit(server, 1, tokens=2)
        page.wait_for_function(DRAWN, arg="#curve-first-token canvas", timeout=PATIENCE_MS)


def test_nobody_is_served_who_does_not_look(open_page: OpenPage) -> None:
    """The engine is watched while its view is in sight, and not while the chat is."""
    with serve(SCRIPT) as server, open_page(server.url) as page:
        page.get_by_role("link", name="Engine").click()
        expect(page.locator("#live-state")).to_have_text("Live")
        assert server.engine.live.num_watchers == 1
        with page.expect_event("requestfailed"):
            page.get_by_role("link", name="Chat").click()
        server.call(lambda: None)
        for _ in range(1000):
            if not server.call(lambda: server.engine.live.num_watchers):
                break
        else:
            raise AssertionError("it is still watched")


def test_blocks_and_steps_by_mouse_and_keyboard(open_page: OpenPage) -> None:
    """Pointing at a block tells its request and references; pointing at a step tells what it computed."""
    with serve(SCRIPT, gated=True) as server, open_page(server.url) as page:
        page.goto(f"{server.url}#engine")
        page.reload()
        submit(server, 1)
        server.call(server.worker.let, 4)
        expect(page.locator("#request-rows .phase")).to_have_text(["decode"])
        submit(server, 1)
        server.call(server.worker.let, 4)
        expect(page.locator("#request-rows .phase")).to_have_text(["decode", "decode"])
        page.locator("#pool").hover(position={"x": 5, "y": 5})
        expect(page.locator("#pool-text")).to_have_text(re.compile(r"Block 1: shared, request \d, 2 references"))
        page.locator("#pool").focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        expect(page.locator("#pool-text")).to_contain_text("Block 3: ")
        page.locator("#timeline").focus()
        page.keyboard.press("ArrowLeft")
        expect(page.locator("#timeline-text")).to_have_text(re.compile(r"Step \d+: \d sequences, .*ms in the model"))
        expect(page.locator("#record")).to_be_hidden()
        expect(page.locator("#no-record")).to_contain_text("--record DIR")
        server.worker.open = True
        server.call(server.worker.let, 1)


def test_recording_from_the_page(open_page: OpenPage, tmp_path: Path) -> None:
    """The button stops the record and starts another file."""
    with serve(SCRIPT, record=str(tmp_path)) as server, open_page(f"{server.url}") as page:
        page.get_by_role("link", name="Engine").click()
        button = page.locator("#record")
        expect(button).to_have_text("Recording: stop")
        button.click()
        expect(button).to_have_text("Record")
        assert server.engine.recording is False
        button.click()
        expect(button).to_have_text("Recording: stop")
        assert server.engine.recording is True


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_in_light_and_dark(open_page: OpenPage, scheme: str) -> None:
    """At 360 pixels nothing scrolls sideways, and all text can be read."""
    options = {"viewport": {"width": 360, "height": 640}, "color_scheme": scheme}
    with serve(SCRIPT, gated=True, max_batch_size=2) as server, open_page(server.url, **options) as page:
        page.get_by_role("link", name="Engine").click()
        submit(server, 5)
        server.call(server.worker.let, 4)
        expect(page.locator("#request-rows tr")).to_have_count(5)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.locator("#engine").evaluate("box => box.scrollWidth - box.clientWidth") == 0
        found = page.evaluate(CONTRAST)
        assert len(found) > 20
        assert [entry for entry in found if entry[1] < 4.5] == []
        server.worker.open = True
        server.call(server.worker.let, 1)


def test_figures_fit_their_boxes(open_page: OpenPage) -> None:
    """At no width does the name of a figure reach into the next box."""
    with serve(SCRIPT) as server, open_page(server.url) as page:
        page.get_by_role("link", name="Engine").click()
        for width in range(360, 1301, 47):
            page.set_viewport_size({"width": width, "height": 640})
            boxes = page.locator(".figures div")
            assert boxes.evaluate_all("all => all.filter(one => one.scrollWidth > one.clientWidth).length") == 0, width
