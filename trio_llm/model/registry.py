"""Which class serves which architecture of config.json: one line per name, imported when asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from trio_llm.errors import UnsupportedError

if TYPE_CHECKING:
    from trio_llm.model.llama import Llama

FAMILIES = {
    "LlamaForCausalLM": "trio_llm.model.llama:Llama",
    "Qwen2ForCausalLM": "trio_llm.model.qwen:Qwen2",
    "MistralForCausalLM": "trio_llm.model.mistral:Mistral",
    "MixtralForCausalLM": "trio_llm.model.mixtral:Mixtral",
    "Gemma4ForCausalLM": "trio_llm.model.gemma4:Gemma4",
    "Gemma4ForConditionalGeneration": "trio_llm.model.gemma4:Gemma4",
    "Qwen3ForCausalLM": "trio_llm.model.qwen:Qwen3",
}


def find_family(architecture: str) -> type[Llama]:
    """Return the class.

    Raises:
        UnsupportedError: Names what is supported.
    """
    if architecture not in FAMILIES:
        raise UnsupportedError(f"architecture {architecture!r} is not supported; {', '.join(FAMILIES)} are")
    module, name = FAMILIES[architecture].split(":")
    return getattr(importlib.import_module(module), name)
