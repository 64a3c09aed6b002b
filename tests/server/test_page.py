"""The files of the page: what is served, to whom, and under which policy. tests/browser uses the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.server.helpers import ask
from tests.server.stub import open_stub
from trio_llm.config import AuthConfig, Config, ServerConfig
from trio_llm.server.app import create_app
from trio_llm.server.ui import page

FILES = Path(page.__file__).with_name("files")
OWN = sorted(path for path in FILES.glob("*.*") if path.suffix in {".js", ".css", ".html"})
KEYED = Config(auth=AuthConfig(api_keys=("sk-0123456789abcdef",)))


@pytest.mark.parametrize("config", [Config(), KEYED], ids=["open", "with a key"])
async def test_the_page_loads_from_this_server_only(config: Config) -> None:
    """Every file that the page names is served, without a key and under the same policy; licences are not served."""
    async with open_stub() as engine:
        app = create_app(engine, config)
        index = await ask(app, "GET", "/")
        named = re.findall(r'(?:href|src)="([^"#][^"]*)"', index.body.decode())
        named += [
            f"ui/{(path.parent / link).relative_to(FILES).as_posix()}"
            for path in OWN
            for link in re.findall(r'from "\./([^"]+)"', path.read_text(encoding="utf-8"))
        ]
        assert "ui/main.js" in named and "ui/vendor/marked.esm.js" in named
        for name in named:
            answer = await ask(app, "GET", f"/{name}")
            assert answer.status == 200, name
            assert answer.headers["content-security-policy"] == index.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"
        for name in ("vendor/LICENSE-marked", "vendor/README.md", "../page.py", "..%2fpage.py", "nope.js", ""):
            assert (await ask(app, "GET", f"/ui/{name}")).status in {401, 404}, name


async def test_the_policy_allows_nothing_inline_and_nothing_from_elsewhere() -> None:
    """Scripts, styles and connections are this server's; a text becomes markup through DOMPurify only."""
    async with open_stub() as engine:
        policy = (await ask(create_app(engine, Config()), "GET", "/")).headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'" in policy
    assert "require-trusted-types-for 'script'; trusted-types dompurify" in policy
    assert "unsafe" not in policy and "http" not in policy and "data:" not in policy
    assert "style=" not in (FILES / "index.html").read_text(encoding="utf-8")


async def test_a_file_that_the_browser_has_is_not_sent_again() -> None:
    """The browser asks each time, and gets 304 for a file that has not changed."""
    async with open_stub() as engine:
        app = create_app(engine, Config())
        first = await ask(app, "GET", "/ui/main.js")
        assert first.headers["cache-control"] == "no-cache"
        again = await ask(app, "GET", "/ui/main.js", headers={"if-none-match": first.headers["etag"]})
        other = await ask(app, "GET", "/ui/main.js", headers={"if-none-match": '"other"'})
    assert (again.status, again.body) == (304, b"")
    assert (other.status, other.body) == (200, first.body)


async def test_no_ui_serves_nothing_of_it() -> None:
    """With --no-ui, the page and its files are paths like any other that does not exist."""
    async with open_stub() as engine:
        app = create_app(engine, Config(server=ServerConfig(ui=False)))
        for path in ("/", "/ui/main.js", "/ui/vendor/marked.esm.js"):
            assert (await ask(app, "GET", path)).status == 404, path


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_its_files_stay_small(path: Path) -> None:
    """A file of the page has at most 400 lines, and makes no markup from text by itself."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text)


def test_every_vendored_file_has_a_licence_and_a_version() -> None:
    """The table beside them names each file with its package, version and licence."""
    folder = FILES / "vendor"
    table = (folder / "README.md").read_text(encoding="utf-8")
    for path in folder.iterdir():
        if path.name != "README.md":
            assert f"`{path.name}`" in table, path.name
    assert len(re.findall(r"\d+\.\d+\.\d+ \|", table)) == 3
