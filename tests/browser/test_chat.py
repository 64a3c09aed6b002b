"""The chat of the page, used as people use it."""

from __future__ import annotations

import json
import re

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import CONTRAST, PATIENCE_MS, OpenPage, serve
from tests.server.scripted import KEY, call_text
from trio_llm.config import AuthConfig, Config
from trio_llm.params import SamplingParams

expect.set_options(timeout=PATIENCE_MS)

HOSTILE = """<script>window.hacked = 1</script>

<img src=x onerror="window.hacked = 1"> <svg onload="window.hacked = 1"></svg>

[a link](javascript:window.hacked=1) [data](data:text/html,<script>window.hacked=1</script>)
<a href="javascript:window.hacked = 1">raw</a> ![picture](https://pictures.example/x.png)

<iframe srcdoc="<script>parent.hacked = 1</script>"></iframe><style>body { display: none }</style>

| a | b |
|---|---|
| <b onmouseover=window.hacked=1>c</b> | `<i>` |

```html
<script>window.hacked = 1</script>
```
"""
LONG_LINE = "x" * 150
FOCUSED = "document.activeElement.labels?.[0]?.innerText ?? document.activeElement.innerText"


def ask(page: Page, text: str) -> None:
    """Type a message and send it."""
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answer(page: Page, number: int = 0) -> Locator:
    """Wait for an answer to be complete, and return its article."""
    article = page.locator("article.assistant").nth(number)
    expect(article.locator(".stats")).to_contain_text("generated")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    return article


def test_an_answer_streams_and_can_be_stopped(open_page: OpenPage) -> None:
    """Text appears as it is generated; Stop keeps it, ends the request in the engine, and allows the next."""
    with serve("one two three four five six", gated=True) as server, open_page(server.url) as page:
        ask(page, "Count.")
        for text, steps in (("one", 4), ("one two", 4)):
            server.call(server.worker.let, steps)
            expect(page.locator("article.assistant .content")).to_have_text(re.compile(rf"^{text}\b"))
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("article.assistant .stats")).to_contain_text("ended by: you")
        expect(page.locator("article.assistant .content")).to_contain_text("one two")
        server.call(server.worker.let, 1)  # The step that was under way.
        server.wait_idle()
        server.worker.open = True
        ask(page, "Again.")
        expect(answer(page, 1).locator(".content")).to_have_text("one two three four five six")
        assert "Count." in server.runner.prompts[1]


def test_counts_and_settings_are_those_of_the_request(open_page: OpenPage) -> None:
    """System prompt and sampling reach the model; token counts and rate are the server's."""
    with serve("hello") as server, open_page(server.url) as page:
        page.get_by_label("System prompt").fill("Be brief.")
        page.get_by_label("Temperature").fill("0.5")
        page.get_by_label("Max tokens").fill("3")
        ask(page, "Hi")
        done = answer(page)
        expect(done.locator(".content")).to_have_text("hel")
        expect(done.locator(".stats")).to_contain_text("3 generated")
        expect(done.locator(".stats")).to_contain_text("ended by: length")
        (prompt,) = server.runner.prompts
        assert "system\nBe brief." in prompt
        (plan,) = [plan for plan in server.runner.plans if plan.admitted]
        assert isinstance(plan.admitted[0].params, SamplingParams)
        assert plan.admitted[0].params.temperature == 0.5
        expect(done.locator(".stats")).to_contain_text(f"{plan.admitted[0].num_prompt_tokens} prompt tokens")


def test_conversations_stay_in_the_browser(open_page: OpenPage) -> None:
    """A second conversation is separate; both are there after the page is loaded again; one can be deleted."""
    with serve("fine") as server, open_page(server.url) as page:
        ask(page, "First question")
        answer(page)
        page.get_by_role("button", name="New conversation").click()
        ask(page, "Second question")
        answer(page)
        assert "First question" not in server.runner.prompts[1]
        page.reload()
        expect(page.locator("article.user .content")).to_have_text("Second question")
        page.get_by_role("button", name="First question", exact=True).click()
        expect(page.locator("article.user .content")).to_have_text("First question")
        page.get_by_role("button", name="Delete: First question").click()
        expect(page.locator("article.user .content")).to_have_text("Second question")
        page.reload()
        expect(page.get_by_role("button", name="First question", exact=True)).to_have_count(0)


def test_tools_and_schemas(open_page: OpenPage) -> None:
    """A call is shown, its result is asked for and sent; wrong JSON is an error beside the field; a schema holds."""
    with serve(call_text("get_weather", city="Paris")) as server, open_page(server.url) as page:
        page.get_by_label("Tools, as JSON").fill("[{]")
        ask(page, "Weather?")
        expect(page.get_by_role("alert")).to_contain_text("Tools: ")
        page.locator("[data-example=tools]").click()
        ask(page, "Weather?")
        expect(answer(page).locator(".call code")).to_have_text('get_weather({"city": "Paris"})')
        server.runner.say("It is sunny.")
        page.get_by_label("Result of get_weather").fill("22 degrees")
        page.keyboard.press("Enter")
        expect(answer(page, 1).locator(".content")).to_have_text("It is sunny.")
        assert "tool\n22 degrees" in server.runner.prompts[1]
        page.get_by_role("button", name="New conversation").click()
        page.get_by_label("Tools, as JSON").fill("")
        page.locator("[data-example=schema]").click()
        server.runner.say('{"name": "Ann", "age": 3, "city": "Paris"}')  # The schema has no city.
        ask(page, "Who?")
        shown = json.loads(answer(page).locator("xpath=div[@class='content']").inner_text())
        assert shown.keys() == {"name", "age"}


def test_view_as_code(open_page: OpenPage) -> None:
    """The request is shown as a curl command and as a Python program that compiles."""
    with serve("fine") as server, open_page(server.url) as page:
        page.get_by_label("Top k").fill("5")
        page.get_by_label("Message", exact=True).fill('It\'s "quoted"\nhere')
        page.get_by_role("button", name="View code").click()
        code = page.locator("#code")
        expect(code).to_contain_text(f"curl -N {server.url}v1/chat/completions")
        expect(code).to_contain_text("It'\\''s")
        page.get_by_role("button", name="Python").click()
        expect(code).to_contain_text('extra_body={"top_k": 5}')
        compile(code.inner_text(), "shown", "exec")


def test_hostile_output_stays_text(open_page: OpenPage) -> None:
    """Markup, handlers, links that run code and pictures of other hosts are shown as text and do nothing."""
    with serve(HOSTILE) as server, open_page(server.url) as page:
        ask(page, "Attack.")
        content = answer(page).locator(".content")
        expect(content).to_contain_text("<script>window.hacked = 1</script>")
        expect(content).to_contain_text('<img src=x onerror="window.hacked = 1">')
        expect(content).to_contain_text("![picture](https://pictures.example/x.png)")
        expect(content).to_contain_text("<b onmouseover=window.hacked=1>c</b>")
        kinds = set(content.locator("*").evaluate_all("all => all.map(one => one.tagName)"))
        assert kinds <= {"P", "A", "TABLE", "THEAD", "TBODY", "TR", "TH", "TD", "PRE", "CODE", "BUTTON"}
        assert content.locator("a").evaluate_all("all => all.map(one => one.getAttribute('href'))") == [None, None]
        attributes = content.locator("*").evaluate_all("all => all.flatMap(one => one.getAttributeNames())")
        assert not [name for name in attributes if name.startswith("on") or name in {"src", "style"}]
        page.reload()  # From the browser's store it is as hostile.
        expect(page.locator("article.assistant")).to_be_visible()
        assert page.evaluate("window.hacked") is None


def test_a_huge_answer_is_plain_text(open_page: OpenPage) -> None:
    """What is too long for Markdown is shown as it is."""
    with serve() as server, open_page(server.url) as page:
        script = "async text => (await import('/ui/markdown.js')).rendered(text).nodeName"
        kinds = [page.evaluate(script, text) for text in ("*a*" * 20_000, "*a*")]
        assert kinds == ["#text", "#document-fragment"]


def test_everything_works_by_keyboard(open_page: OpenPage) -> None:
    """Without a mouse: send, open a dialog and leave it, change a setting, begin a conversation, and see the focus."""
    with serve("fine") as server, open_page(server.url) as page:
        page.keyboard.type("Hello")
        page.keyboard.press("Enter")
        answer(page)

        def tab_to(name: str) -> None:
            for _ in range(60):
                page.keyboard.press("Tab")
                if page.evaluate(FOCUSED) == name:
                    break
            else:
                raise AssertionError(f"Tab does not lead to {name}")
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline == "solid", name

        tab_to("View code")
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_have_count(0)
        tab_to("Settings")
        page.keyboard.press("Space")
        expect(page.locator("#settings")).to_be_hidden()
        page.keyboard.press("Space")
        tab_to("Max tokens")
        page.keyboard.type("2")
        tab_to("New conversation")
        page.keyboard.press("Enter")
        page.keyboard.type("Hello")
        page.keyboard.press("Enter")
        expect(answer(page).locator(".content")).to_have_text("fi")


def test_a_narrow_screen_does_not_scroll_sideways(open_page: OpenPage) -> None:
    """At 360 pixels everything fits, a long line and a wide table too, and the drawers open over the conversation."""
    script = f"{LONG_LINE}\n\n| {' | '.join('abcdefgh')} |\n|{'---|' * 8}\n| {' | '.join(['wide cell'] * 8)} |\n"
    with serve(script) as server, open_page(server.url, viewport={"width": 360, "height": 640}) as page:
        ask(page, LONG_LINE)
        answer(page)
        for name in ("Conversations", "Settings"):
            expect(page.locator(f"#{name.lower()}")).to_be_hidden()
            page.get_by_role("button", name=name, exact=True).click()
            expect(page.locator(f"#{name.lower()}")).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
            page.get_by_role("button", name=name, exact=True).click()
        assert page.locator("#messages").evaluate("box => box.scrollWidth - box.clientWidth") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_readable(open_page: OpenPage, scheme: str) -> None:
    """The page follows the system's scheme, and text stands out from its ground as WCAG asks (4.5)."""
    with serve("fine, `code`") as server, open_page(server.url, color_scheme=scheme) as page:
        ask(page, "Hello")
        answer(page)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        dark = sum(map(int, re.findall(r"\d+", ground)[:3])) < 3 * 128
        assert dark == (scheme == "dark")
        found = page.evaluate(CONTRAST)
        assert len(found) > 10
        assert [entry for entry in found if entry[1] < 4.5] == []


def test_a_server_with_keys_asks_for_one(open_page: OpenPage) -> None:
    """The page opens without a key and asks for it; it is kept in this tab only and sent with every request."""
    config = Config(auth=AuthConfig(api_keys=(KEY,)))
    with serve("fine", config) as server, open_page(server.url, allowed="status of 401") as page:
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("The server needs a key.")
        page.get_by_label("Key", exact=True).fill("wrong")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("The server does not accept this key.")
        page.get_by_label("Key", exact=True).fill(KEY)
        page.get_by_role("button", name="Use").click()
        ask(page, "Hello")
        expect(answer(page).locator(".content")).to_have_text("fine")
        assert KEY not in json.dumps(page.evaluate("({...localStorage})"))
        page.get_by_role("button", name="View code").click()
        expect(page.locator("#code")).to_contain_text("Bearer $VLLM_API_KEY")
        assert KEY not in page.content()
        other = page.context.new_page()
        other.goto(server.url)
        expect(other.get_by_role("dialog")).to_contain_text("The server needs a key.")
