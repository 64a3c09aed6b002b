"""A stub that says what a test has written for it, behind a template that knows tools and thinking."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs

from tests.server.helpers import Running, running
from tests.server.stub import EOS, TOKENIZER, StubRunner, open_stub, stub_tokenizer
from trio_llm.config import AuthConfig, Config, ServerConfig
from trio_llm.messages import StepPlan, StepResult
from trio_llm.server.app import create_app

KEY = "sk-0123456789abcdef"
MODEL = "stub-model"
# Writes down all that it is given, so that tests can read in the prompt what the model was told.
TEMPLATE = """{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"""
PLAIN_TEMPLATE = (
    TEMPLATE.split("{% endif %}", 1)[1]
    .replace("<think>", "<t>")
    .replace("</think>", "</t>")
    .replace("enable_thinking", "brief")
)


def call_text(name: str, **arguments: object) -> str:
    """Spell a tool call as Hermes models do."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class ScriptedRunner(StubRunner):
    """Answers every prompt with the script of the moment; `prompts` are the texts it was given."""

    def __init__(self, script: str, max_model_len: int = 2048) -> None:
        super().__init__(max_model_len=max_model_len)
        self.info = attrs.evolve(self.info, num_kv_blocks=max(129, max_model_len // 16 + 1))
        self.prompts: list[str] = []
        self.say(script)

    def say(self, script: str) -> None:
        """Answer so from now on."""
        self._reply = [*TOKENIZER.encode(script), EOS]

    def step(self, plan: StepPlan) -> StepResult:
        for admission in plan.admitted:
            self.prompts.append(TOKENIZER.decode(admission.token_ids, skip_special_tokens=False))
        return super().step(plan)


@asynccontextmanager
async def serving(runner: StubRunner, template: str = TEMPLATE) -> AsyncIterator[Running]:
    """Serve a stub behind a key."""
    config = Config(auth=AuthConfig(api_keys=(KEY,)), server=ServerConfig(served_model_name=(MODEL,)))
    async with open_stub(runner, stub_tokenizer(template)) as engine:
        async with running(create_app(engine, config)) as server:
            yield server
