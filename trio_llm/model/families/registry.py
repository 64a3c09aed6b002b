"""The class for each architecture of config.json: one line per name, imported when needed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from trio_llm.errors import UnsupportedError

if TYPE_CHECKING:
    from trio_llm.model.families.llama import Llama

FAMILIES = {
    "LlamaForCausalLM": "trio_llm.model.families.llama:Llama",
    "Qwen2ForCausalLM": "trio_llm.model.families.qwen:Qwen2",
    "MistralForCausalLM": "trio_llm.model.families.mistral:Mistral",
    "MixtralForCausalLM": "trio_llm.model.families.mixtral:Mixtral",
    "Gemma4ForCausalLM": "trio_llm.model.families.gemma4:Gemma4",
    "Gemma4ForConditionalGeneration": "trio_llm.model.families.gemma4:Gemma4",
    "Qwen3ForCausalLM": "trio_llm.model.families.qwen:Qwen3",
    "Qwen3MoeForCausalLM": "trio_llm.model.families.qwen:Qwen3Moe",
}


def find_family(architecture: str) -> type[Llama]:
    """Return the class.

    Raises:
        UnsupportedError: Names the supported architectures.
    """
    if architecture not in FAMILIES:
        raise UnsupportedError(f"architecture {architecture!r} is not supported; {', '.join(FAMILIES)} are")
    module, name = FAMILIES[architecture].split(":")
    return getattr(importlib.import_module(module), name)
