"""`trio-llm generate`: answers without a server, on the same engine."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

import click

from trio_llm.cli.options import engine_settings_given
from trio_llm.cli.settings import Settings
from trio_llm.config import LimitsConfig
from trio_llm.llm import LLM
from trio_llm.model.checkpoint.hub import resolve_tokenizer
from trio_llm.offline import RequestOutput
from trio_llm.params import SamplingParams
from trio_llm.server.templates.chat_template import ChatTemplate
from trio_llm.tokenizer import Tokenizer


def run(
    settings: Settings,
    words: Sequence[str],
    *,
    file: TextIO | None,
    raw: bool,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    as_json: bool,
) -> None:
    """Answer the prompts given as words, else those of a file or stdin, one a line, and print the answers.

    Raises:
        click.UsageError: There is no prompt, there are words and a file, or the file is not UTF-8.
    """
    if words and file is not None:
        raise click.UsageError("Give the prompts as arguments or with --file, not both.")
    engine = settings.config.engine
    texts = list(words) or _lines(file or sys.stdin)
    if not texts:
        raise click.UsageError("There is no prompt: give one as an argument, with --file, or on stdin.")
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    tokenizer = Tokenizer.from_directory(resolve_tokenizer(engine))
    prompts = texts if raw or tokenizer.chat_template is None else _questions(tokenizer, texts, settings.config.limits)
    with LLM(**engine_settings_given(settings)) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=len(texts) > 1 and sys.stderr.isatty())
    for text, output in zip(texts, outputs, strict=True):
        click.echo(_as_json(text, output) if as_json else _as_text(text, output, alone=len(texts) == 1))


def _lines(file: TextIO) -> list[str]:
    """Return the lines that are not blank."""
    try:
        return [line.strip() for line in file if line.strip()]
    except UnicodeDecodeError as error:
        raise click.UsageError(f"The prompts in {file.name} are not UTF-8: {error.reason}.") from None


def _questions(tokenizer: Tokenizer, texts: Iterable[str], limits: LimitsConfig) -> list[dict[str, list[int]]]:
    """Put each text into the user's turn of the model's chat template."""
    assert tokenizer.chat_template is not None
    template = ChatTemplate(tokenizer.chat_template, tokenizer.named_special_tokens, limits)
    segments = (
        template.render(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            continue_final_message=False,
            variables={},
        )
        for text in texts
    )
    return [{"prompt_token_ids": tokenizer.encode_segments(segment)} for segment in segments]


def _as_text(text: str, output: RequestOutput, *, alone: bool) -> str:
    answer = output.outputs[0].text
    return answer if alone else f"> {text}\n{answer}\n"


def _as_json(text: str, output: RequestOutput) -> str:
    answer = output.outputs[0]
    return json.dumps(
        {
            "prompt": text,
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": len(answer.token_ids),
        },
        ensure_ascii=False,
    )
