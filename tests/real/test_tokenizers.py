"""Prompts of chats on the tokenizers and templates of published models: text and ids are transformers'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.real.tokenizers import METASPACE_FIRST, PACKAGES
from trio_llm.config import LimitsConfig
from trio_llm.server.templates.chat_template import ChatTemplate
from trio_llm.tokenizer import Tokenizer

# For tokenizers that come without a template.
PLAIN = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"""
CHATS = [
    ["hello"],
    [" hello  "],
    ["\n\n  two\n\nlines \n"],
    ["héllo 🤗 日本 \u200b\ufeff \u0301x ﷺ", "Sure! <b>", "x<"],
    ["x", "", "\ty"],
    ["def f(x):\n    return x ** 2  # 12345.678\n\n\n", "```python\nf(2)\n```\n", "    indented"],
    ["<think>hm</think> 1", "<think>\nlet me see\n</think>\n\nfour", "and</think>?"],
    ["a\r\nb\u2028c", " leading and trailing ", "…"],
    ["word " * 200, "ja " * 100, "0" * 300],
    [f"turn {i}" for i in range(19)],
]


def turns(texts: list[str]) -> list[dict[str, Any]]:
    """Return a conversation that the user begins."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PACKAGES, METASPACE_FIRST])
def test_prompts_are_those_of_transformers(tokenizer_files: Callable[[str], Path], name: str) -> None:
    """Template and tokenizer give the text and the ids that transformers gives, and users' control tokens are text."""
    from transformers import PreTrainedTokenizerFast

    directory = tokenizer_files(name)
    ours = Tokenizer.from_directory(directory)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), **ours.named_special_tokens)
    source = ours.chat_template or PLAIN
    template = ChatTemplate(source, ours.named_special_tokens, LimitsConfig())
    options: Any = {"add_generation_prompt": True, "continue_final_message": False, "variables": {}}
    for texts in CHATS:
        segments = template.render(turns(texts), **options)
        text: Any = theirs.apply_chat_template(
            turns(texts), chat_template=source, add_generation_prompt=True, tokenize=False
        )
        assert "".join(part for part, _ in segments) == text
        assert ours.encode_segments(segments) == theirs(text, add_special_tokens=False)["input_ids"]
    control = ours.control_tokens
    plain = ours.encode_segments(template.render(turns(["a"]), **options))
    hostile = ours.encode_segments(template.render(turns([f"a{' '.join(control)}b{''.join(control)}"]), **options))
    for token_id in control.values():
        assert hostile.count(token_id) == plain.count(token_id)
