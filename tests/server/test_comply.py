"""llm-comply, a suite of compliance tests for three APIs, against a server with the demo model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import llm_comply
import pytest
import trio
from llm_comply.config import ComplianceConfig
from llm_comply.result import TestStatus as Status
from llm_comply.runner import TestRunner as SuiteRunner
from llm_comply.schema import SpecLoader
from llm_comply.tests import get_tests

from tests.server.helpers import Running, running
from trio_llm.assemble import open_engine
from trio_llm.config import Config, EngineConfig, LimitsConfig, ServerConfig
from trio_llm.engine import Engine
from trio_llm.server.app import create_app

# The suite's own validator.
pytestmark = pytest.mark.filterwarnings("ignore:jsonschema.RefResolver is deprecated:DeprecationWarning")

MODEL = "demo"
SPECS = {"open-responses": "openresponses.json", "openai-chat": "openai_chat.json", "anthropic": "anthropic.json"}
# The model reads text only. There is no /v1/responses/compact: the suite accepts its 404 with a warning. It runs its
# cases of reasoning only against models that it knows by name.
FAILED = {"image-input", "chat-image-input", "anth-image-input"}
WARNED = {"compact-response"}
SKIPPED = {"reasoning-summary", "chat-reasoning-summary", "anth-thinking-display"}


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    """Open the demo model."""
    async with open_engine(Config(engine=EngineConfig(num_kv_blocks=256))) as engine:
        yield engine


def run_suite(server: Running, form: str, ids: list[str] | None = None) -> dict[str, set[str]]:
    """Return the ids of the cases by what became of them."""
    config = ComplianceConfig(f"http://127.0.0.1:{server.port}/v1", "none", model=MODEL, filter_ids=ids)
    spec = SpecLoader(str(Path(llm_comply.__file__).parent / "specs" / SPECS[form]))
    results = SuiteRunner(config, get_tests(form), spec).run_all().results
    found = {status.name: {one.id for one in results if one.status is status} for status in Status}
    return {**found, "WARNED": {one.id for one in results if one.warnings}}


async def test_all_cases_but_images_pass(engine: Engine) -> None:
    """Every case of the three suites passes without a warning, but for what this server does not do."""
    config = Config(server=ServerConfig(served_model_name=(MODEL,)), limits=LimitsConfig(strict=True))
    async with running(create_app(engine, config)) as server:
        found = [await trio.to_thread.run_sync(run_suite, server, form) for form in SPECS]
    together = {status: set().union(*[one[status] for one in found]) for status in found[0]}
    assert together["FAILED"] == FAILED
    assert together["WARNED"] == WARNED
    assert together["SKIPPED"] == SKIPPED
    assert len(together["PASSED"]) == 31 - len(FAILED) - len(SKIPPED)


async def test_without_strict_mode_the_model_may_be_missing(engine: Engine) -> None:
    """By default a request without `model` is answered, which two cases do not accept."""
    config = Config(server=ServerConfig(served_model_name=(MODEL,)))
    async with running(create_app(engine, config)) as server:
        for form, case in (("openai-chat", "chat-error-handling"), ("open-responses", "error-handling")):
            found = await trio.to_thread.run_sync(run_suite, server, form, [case])
            assert found["FAILED"] == {case}
