"""Sampling after drafts: every one of them is judged as if the ones before it were the output."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model_runner.test_sampler import CPU, EOS, Row, batches, make_logits, send
from trio_llm import grammar
from trio_llm.messages import Admission
from trio_llm.model.sampling.row_params import SamplingRows
from trio_llm.model.sampling.sampler import NOTHING_LEFT, Sampler
from trio_llm.params import SamplingParams

VOCAB = 300


def admitted(rows: list[Row], vocab_size: int) -> SamplingRows:
    """Return the state of sequences whose whole output is known."""
    state = SamplingRows(vocab_size, EOS, len(rows), send)
    for row, (params, prompt, output) in enumerate(rows):
        state.admit(row, Admission(row, prompt + output, len(prompt), params), params)
    return state


def sample(
    state: SamplingRows, logits: np.ndarray, positions: list[int], drafts: list[tuple[int, ...]] | None
) -> tuple[list[int], object]:
    """Sample from every row of the logits and return tokens and log-probabilities."""
    chosen = state.select(np.arange(len(positions)), np.array(positions, np.int64), drafts)
    sampled = Sampler(logits.shape[1], CPU).sample(torch.from_numpy(logits.astype(np.float32)), chosen)
    return sampled.token_ids.tolist(), sampled.logprobs()


@given(batches(), st.data())
@settings(max_examples=100)
def test_drafts_are_judged_one_after_the_other(batch: tuple[np.ndarray, list[Row]], data: st.DataObject) -> None:
    """Several positions at once give the tokens and log-probabilities of one at a time, and leave nothing behind."""
    rows = [(attrs.evolve(row[0], logprobs=2), *row[1:]) for row in batch[1]]
    vocab_size = batch[0].shape[1]
    cuts = [data.draw(st.integers(0, len(output))) for *_, output in rows]
    known = [(params, prompt, output[:cut]) for (params, prompt, output), cut in zip(rows, cuts, strict=True)]
    drafts = [output[cut:] for (*_, output), cut in zip(rows, cuts, strict=True)]
    logits = make_logits(7, sum(len(draft) + 1 for draft in drafts), vocab_size, grid=0.25)
    expected: list[tuple[int, object]] = []
    for row, ((params, prompt, output), draft) in enumerate(zip(known, drafts, strict=True)):
        for depth in range(len(draft) + 1):
            alone = admitted([*known[:row], (params, prompt, output + draft[:depth])], vocab_size)
            chosen = alone.select(np.array([row]), np.array([len(prompt + output) + depth], np.int64))
            one = torch.from_numpy(logits[len(expected)][None].astype(np.float32))
            sampled = Sampler(vocab_size, CPU).sample(one, chosen)
            expected.append((int(sampled.token_ids[0]), (sampled.logprobs() or [None])[0]))
    state = admitted(known, vocab_size)
    positions = [len(prompt + output) for _, prompt, output in known]
    for _ in range(2):
        token_ids, logprobs = sample(state, logits, positions, drafts)
        assert list(zip(token_ids, logprobs, strict=True)) == expected  # type: ignore[call-overload]


@pytest.fixture(name="digits", scope="module")
def _digits() -> grammar.Grammar:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([], trainer)
    compiler = grammar.GrammarCompiler(tokenizer.to_str(), vocab_size=VOCAB, eos_token_ids=[0])
    return compiler.compile(grammar.regex("12(34)*5", param="p"))


def test_a_grammar_goes_along_with_drafts_and_comes_back(digits: grammar.Grammar) -> None:
    """Each draft is judged where the ones before it lead; what is forbidden ends that; the state is as before."""
    params = SamplingParams(temperature=0, grammar=digits)
    one, two, three, four, five = range(1 + ord("1") - ord("!"), 1 + ord("6") - ord("!"))
    state = admitted([(params, (9,), (one,))], VOCAB)
    logits = np.zeros((5, VOCAB))
    for draft, choices in [
        ((two, three, four, five), [two, three, four, three, 0]),
        ((two, four, four, four), [two, three, NOTHING_LEFT, NOTHING_LEFT, NOTHING_LEFT]),
        ((two, five, 0, two), [two, three, 0, NOTHING_LEFT, NOTHING_LEFT]),
        ((two, three, four, three), [two, three, four, three, four]),
    ]:
        assert sample(state, logits.copy(), [2], [draft])[0] == choices
    state.set_tokens(0, 2, (two,))
    assert sample(state, logits[:1].copy(), [3], None)[0] == [three]
