"""Documents are packed and weighed as the trainer promises, and a few steps make a checkpoint that loads."""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path
from random import Random

import pytest
import torch

from tools.demo_model.checkpoint import load, save, train_tokenizer
from tools.demo_model.corpus_grammar import IM_END, corpus, messages_of, render
from tools.demo_model.network import Network, Shape
from tools.demo_model.train import (
    ANSWER_WEIGHT,
    LONG_WEIGHT,
    PROMPT_WEIGHT,
    Document,
    batches,
    make_optimizers,
    read_corpus,
    weigh,
    weighted_loss,
    windows,
)

TINY = Shape(
    vocab_size=320, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8
)


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer with hardly any merges."""
    return train_tokenizer(corpus(50, seed=1), TINY.vocab_size)


def test_answers_weigh_more_than_prompts(tokenizer) -> None:
    """Exactly the answer and the mark that ends it have full weight."""
    token_ids = tokenizer.encode(render(messages_of([("Add 1 and 2.", "1 + 2 = 3.")]))).ids
    weights = weigh(token_ids, tokenizer.encode("assistant").ids[0])
    heavy = [token_id for token_id, weight in zip(token_ids, weights, strict=True) if weight == ANSWER_WEIGHT]
    assert tokenizer.decode(heavy, skip_special_tokens=False) == "1 + 2 = 3." + IM_END
    assert set(weights) == {ANSWER_WEIGHT, PROMPT_WEIGHT}


def test_long_free_text_weighs_less(tokenizer) -> None:
    """A long text without chat marks is learned, with less weight per token than a short answer."""
    assert set(weigh([5] * 100, assistant=7)) == {LONG_WEIGHT}
    assert set(weigh([5] * 10, assistant=7)) == {ANSWER_WEIGHT}


def test_windows_begin_with_a_document() -> None:
    """Each window is full, begins where a document begins, and the documents in it follow each other whole."""
    documents = [Document([number] + [50] * number + [0], [1.0] * (number + 2)) for number in range(1, 8)]
    for window in islice(windows(documents, 12, Random(0)), 40):
        assert len(window.token_ids) == len(window.weights) == 13
        at = 0
        while at < 13:
            number = window.token_ids[at]
            assert window.token_ids[at : at + number + 2] == [number, *[50] * number, 0][: 13 - at]
            at += number + 2


def test_a_cut_document_begins_the_next_window() -> None:
    """The end of a document that was cut is not lost: the next window begins with the same document."""
    documents = [Document([number] + [50] * 6 + [0], [1.0] * 8) for number in range(1, 8)]
    packed = list(islice(windows(documents, 11, Random(0)), 20))
    for window, following in pairwise(packed):
        assert window.token_ids[8] == following.token_ids[0]


def test_a_few_steps_lower_the_loss(tokenizer, tmp_path: Path) -> None:
    """Training learns, and what is saved loads again with the same logits up to bfloat16."""
    torch.manual_seed(0)
    network = Network(TINY)
    optimizers = make_optimizers(network)
    losses: list[float] = []
    for token_ids, weights in islice(batches(read_corpus(tokenizer, 60, seed=2), 64, Random(0)), 12):
        loss = weighted_loss(network, token_ids, weights)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert 0 < losses[-1] < losses[0] - 0.3
    save(tmp_path, network, tokenizer)
    loaded, read_tokenizer = load(tmp_path)
    assert read_tokenizer.encode("What is 1 + 2?").ids == tokenizer.encode("What is 1 + 2?").ids
    prompt = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(loaded(prompt).float(), network(prompt), atol=0.05, rtol=0.05)
