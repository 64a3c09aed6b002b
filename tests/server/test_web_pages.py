"""Web pages that no setting allows are served nothing, on any route: other origins, and names rebound to us."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.server.helpers import ask
from tests.server.stub import StubRunner, open_stub
from trio_llm.config import AuthConfig, Config, ServerConfig
from trio_llm.engine import Engine
from trio_llm.server.app import create_app

LOCAL, REMOTE = ("127.0.0.1", 1), ("203.0.113.9", 1)
KEY = "a-key-of-the-operators"
FORM = {
    "content-type": "multipart/form-data; boundary=X",
    "host": "localhost:8000",
}
UPLOAD = (
    b'--X\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--X\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n{}\r\n--X--\r\n'
)


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    """An engine without a model."""
    async with open_stub(StubRunner()) as engine:
        yield engine


@pytest.mark.parametrize(
    ("headers", "served"),
    [
        ({}, True),
        ({"origin": "http://localhost:8000"}, True),
        ({"origin": "https://allowed.example"}, True),
        ({"origin": "https://evil.example"}, False),
        ({"origin": "http://localhost:3000"}, False),
        ({"origin": "null"}, False),
        ({"origin": ""}, False),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "same-site"}, False),
        ({"sec-fetch-site": "same-origin"}, True),
        ({"origin": "https://evil.example", "x-api-key": KEY}, True),
    ],
)
async def test_uploads_of_other_pages_are_refused(engine: Engine, headers: dict[str, str], served: bool) -> None:
    """A form with a file goes out without a preflight; without a key it is taken from our own page only."""
    auth = AuthConfig(api_keys=(KEY,)) if "x-api-key" in headers else AuthConfig()
    server = ServerConfig(allowed_origins=("https://allowed.example",))
    app = create_app(engine, Config(server=server, auth=auth))
    answer = await ask(app, "POST", "/v1/files", UPLOAD, headers={**FORM, **headers})
    assert (answer.status != 403) == served, answer.body
    if not served:
        assert "--allowed-origins" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("host", "client", "served"),
    [
        ("localhost:8000", LOCAL, True),
        ("127.0.0.1:8000", LOCAL, True),
        ("[::1]:8000", LOCAL, True),
        ("192.168.1.5:8000", LOCAL, True),
        ("gpu-box:8000", LOCAL, True),
        ("gpu-box.local", LOCAL, True),
        ("llm.example.com", LOCAL, True),
        ("LLM.Example.com.:8000", LOCAL, True),
        ("evil.example", LOCAL, False),
        ("evil.example:8000", LOCAL, False),
        ("127.0.0.1.evil.example", LOCAL, False),
        ("localhost.evil.example:8000", LOCAL, False),
        ("evil.example", ("::1", 1), False),
        ("evil.example", REMOTE, True),
    ],
)
async def test_names_rebound_to_this_machine_are_refused(
    engine: Engine, host: str, client: tuple[str, int], served: bool
) -> None:
    """A public name for this machine that nobody configured is a page's that rebound it, on every kind of route."""
    app = create_app(engine, Config(server=ServerConfig(allowed_hosts=("llm.example.com",))), shutdown=lambda: None)
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/files"), ("GET", "/metrics"), ("GET", "/nowhere")):
        answer = await ask(app, method, path, headers={"host": host, "origin": f"http://{host}"}, client=client)
        assert (answer.status != 403) == served, (path, answer.body)
    assert (await ask(app, "GET", "/health", headers={"host": host}, client=client)).status == 200


async def test_hosts_need_no_name_with_keys(engine: Engine) -> None:
    """A page has no key: who has one may call the server by any name."""
    app = create_app(engine, Config(auth=AuthConfig(api_keys=(KEY,))))
    answer = await ask(app, "GET", "/v1/models", headers={"host": "api.example", "x-api-key": KEY})
    assert answer.status == 200
