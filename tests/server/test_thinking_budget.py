"""thinking_token_budget: thinking ends when its budget is spent, and the answer comes behind it as it should."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.server.helpers import ask
from tests.server.joined import streamed, whole
from tests.server.stub import StubRunner, open_stub, stub_tokenizer
from trio_llm.config import Config
from trio_llm.params import Grammar
from trio_llm.server.app import create_app
from trio_llm.server.constraints.thinking_budget import ThinkingBudget

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
POSSIBLE, BEGUN = "{# </think> #}" + TURNS, TURNS + "<think>{# </think> #}"
MARKERS = ("<think>", "</think>")
OPEN, CLOSE = 7, 9
VOCABULARY = 40


def may_come(matcher: Any) -> list[int]:
    """Return the tokens that a matcher lets come next."""
    mask = np.zeros(2, np.int32)
    assert matcher.fill(mask.ctypes.data, mask.nbytes) is None
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCABULARY]).tolist()


def budget(tokens: int, *, begun: bool, inner: Grammar | None = None) -> Any:
    """Return the matcher of a budget."""
    return ThinkingBudget(tokens, OPEN, CLOSE, begun, inner).matcher()


def test_the_budget_counts_what_is_thought() -> None:
    """After so many tokens of thinking only its end may come, and after that everything."""
    for begun in (True, False):
        matcher = budget(2, begun=begun)
        assert matcher.consume([] if begun else [OPEN]) == (not begun)
        for _ in range(2):
            assert len(may_come(matcher)) == VOCABULARY
            matcher.consume([1])
        assert may_come(matcher) == [CLOSE]
        matcher.consume([CLOSE, 1, 2, OPEN, 3, 4, 5])
        assert len(may_come(matcher)) == VOCABULARY


def test_what_was_not_thought_costs_nothing() -> None:
    """Thinking that ends by itself, and an answer without any, meet no end; nor does a <think> later on."""
    for output in ([OPEN, 1, CLOSE, 1, 1, 1], [1, OPEN, 1, 1, 1]):
        matcher = budget(2, begun=False)
        matcher.consume(output)
        assert len(may_come(matcher)) == VOCABULARY


def test_it_can_go_back() -> None:
    """After a rollback the budget is what it was."""
    matcher = budget(3, begun=True)
    matcher.consume([1, 1, 1])
    assert may_come(matcher) == [CLOSE]
    matcher.rollback(2)
    assert len(may_come(matcher)) == VOCABULARY
    matcher.consume([1, 1])
    matcher.consume([CLOSE])
    matcher.rollback(1)
    matcher.rollback(0)
    assert may_come(matcher) == [CLOSE]


class EndOnlyLater:
    """A grammar in which only 3 and 4 may come until a 4 came: a character of several tokens, say."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def matcher(self) -> Any:
        return self

    def fill(self, address: int, num_bytes: int, /) -> str | None:
        allowed = 0xFF_FF_FF_FF if 4 in self.seen else 0b11000
        ctypes.memset(address, 0, num_bytes)
        ctypes.c_uint32.from_address(address).value = allowed
        return None

    def consume(self, token_ids: Sequence[int], /) -> int:
        self.seen += token_ids
        return len(token_ids)

    def rollback(self, num_tokens: int, /) -> None:
        del self.seen[len(self.seen) - num_tokens :]


def test_the_end_waits_until_it_fits() -> None:
    """Where what is round it does not let the end come yet, the budget waits instead of leaving nothing."""
    matcher = budget(1, begun=True, inner=EndOnlyLater())
    matcher.consume([3])
    assert may_come(matcher) == [3, 4]
    matcher.consume([4])
    assert may_come(matcher) == [CLOSE]


@pytest.mark.parametrize(("template", "thought"), [(BEGUN, ""), (POSSIBLE, "<think>")])
async def test_thinking_is_cut_off_over_http(template: str, thought: str) -> None:
    """Whole and streamed, alone and before a form: so many tokens of reasoning, then the answer."""
    tokenizer = stub_tokenizer(template, *MARKERS)
    reply = thought + "abcdefghij" + "klm"
    for fields, content in (({}, None), ({"structured_outputs": {"choice": ["yes"]}}, "yes")):
        body = {"messages": [{"role": "user", "content": "hi"}], "thinking_token_budget": 5, "max_tokens": 30, **fields}
        runner = StubRunner(reply=reply, tokenizer=tokenizer)
        async with open_stub(runner, tokenizer) as engine:
            app = create_app(engine, Config())
            answer = await ask(app, "POST", "/v1/chat/completions", body)
            assert answer.status == 200, answer.body
            (said,) = whole(answer.json())
            assert streamed((await ask(app, "POST", "/v1/chat/completions", {**body, "stream": True})).events()) == [
                said
            ]
        assert said.reasoning == "abcde"
        assert said.content == content or (content is None and said.content)


async def test_a_budget_that_cannot_be_kept_is_refused() -> None:
    """A model that does not think, or whose thinking ends with no single token, has no budget."""
    body = {"messages": [{"role": "user", "content": "hi"}], "thinking_token_budget": 5, "max_tokens": 3}
    for tokenizer, status in (
        (stub_tokenizer(), 400),
        (stub_tokenizer(POSSIBLE), 400),
        (stub_tokenizer(POSSIBLE, *MARKERS), 200),
    ):
        async with open_stub(StubRunner(tokenizer=tokenizer), tokenizer) as engine:
            answer = await ask(create_app(engine, Config()), "POST", "/v1/chat/completions", body)
        assert answer.status == status, answer.body
        assert status == 200 or answer.json()["error"]["param"] == "thinking_token_budget"
