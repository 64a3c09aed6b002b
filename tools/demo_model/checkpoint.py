"""Write and read the demo checkpoints: weights, tokenizer and the small JSON files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.demo_model.corpus_grammar import END_OF_TEXT, IM_END, IM_START
from tools.demo_model.network import Network, Shape

# Words with the space before them, numbers of up to three digits without one, so that 7 is one token everywhere.
_PIECES = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer; the first ids are the end of text and the chat marks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(text, special=True) for text in (END_OF_TEXT, IM_START, IM_END)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(directory: Path, network: Network, tokenizer: Tokenizer) -> None:
    """Write all files of a checkpoint; what is already there is replaced."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(directory / "tokenizer.json"))
    template = (Path(__file__).parent / "chat_template.jinja").read_text()
    written: dict[str, dict[str, object]] = {
        "config.json": network.shape.config(),
        "generation_config.json": {"eos_token_id": [2, 0], "pad_token_id": 0, "do_sample": False, "temperature": 0.0},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": IM_END,
            "pad_token": END_OF_TEXT,
            "additional_special_tokens": [IM_START, IM_END],
            "add_bos_token": False,
            "model_max_length": network.shape.max_position_embeddings,
            "chat_template": template,
        },
    }
    for name, content in written.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")


def load(directory: Path) -> tuple[Network, Tokenizer]:
    """Read a checkpoint back in bfloat16."""
    network = Network(Shape.of(json.loads((directory / "config.json").read_text())))
    network.to(torch.bfloat16).load_state_dict(load_file(directory / "model.safetensors"))
    return network.eval(), Tokenizer.from_file(str(directory / "tokenizer.json"))
