from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.model_runner import reference
from trio_llm.model.sampling.counter_rng import add_gumbel, row_keys, token_hashes, uniform

# Chi-square limits for 99 degrees of freedom, 1 in 1,000 on either side. Source: any table of the distribution.
LOW, HIGH = 60.0, 148.2


def grid(seeds: np.ndarray, positions: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return uniform numbers [rows, vocab_size]."""
    keys = torch.from_numpy(row_keys(seeds.astype(np.uint64), positions.astype(np.int64)))
    return uniform(keys, token_hashes(vocab_size)).numpy()


def chi_square(u: np.ndarray) -> float:
    """Return the statistic of 100 equal bins."""
    observed = np.histogram(u, bins=100, range=(0, 1))[0]
    expected = u.size / 100
    return float(((observed - expected) ** 2 / expected).sum())


def test_the_integers_are_those_of_the_reference() -> None:
    """The vectorised hash equals the one written in Python integers, for extreme seeds and positions too."""
    for seed in (0, 1, -1, 2**63 - 1, -(2**63)):
        for position in (0, 1, 2**40):
            keys = torch.from_numpy(row_keys(np.array([seed % 2**64], np.uint64), np.array([position])))
            noisy = add_gumbel(torch.zeros(1, 50), keys, token_hashes(50))[0]
            expected = [-np.log(reference.exponential(seed, position, token)) for token in range(50)]
            assert noisy.numpy() == pytest.approx(expected, rel=1e-4, abs=1e-4)


SPREAD = {
    "tokens": (np.zeros(1), np.zeros(1), 200_000),
    "positions": (np.zeros(200_000), np.arange(200_000), 1),
    "seeds": (np.arange(200_000), np.zeros(200_000), 1),
}


@pytest.mark.parametrize("axis", SPREAD)
def test_numbers_are_uniform_along_every_axis(axis: str) -> None:
    """Neighbouring tokens, positions or seeds give evenly spread numbers, in the rare small ones too."""
    u = grid(*SPREAD[axis])
    assert LOW < chi_square(u) < HIGH
    small = u[u < 0.01] * 100
    assert chi_square(small) < HIGH


@pytest.mark.parametrize("shift", [(0, 1, 0), (1, 0, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1 << 32, 0, 0)])
def test_numbers_of_neighbours_are_independent(shift: tuple[int, int, int]) -> None:
    """The pair (this, neighbour in seed, position or token) fills the unit square evenly."""
    seeds, positions = (a.ravel() for a in np.meshgrid(np.arange(20), np.arange(20)))
    here = grid(seeds, positions, 501)[:, :500]
    there = grid(seeds + shift[0], positions + shift[1], 501)[:, shift[2] :][:, :500]
    pairs = np.floor(here * 10) + np.floor(there * 10) / 10
    assert LOW < chi_square(pairs / 10 + 0.005) < HIGH
    # The winners of a race are small numbers: neighbours must not both win more often than by chance.
    both = ((here < 0.02) & (there < 0.02)).sum()
    assert abs(both - here.size * 0.0004) < 4 * np.sqrt(here.size * 0.0004)
