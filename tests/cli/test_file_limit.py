"""How many files a serving process may open."""

from __future__ import annotations

import logging
import resource

import pytest

from trio_llm.cli.serve import raise_file_limit

INFINITY = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("limits", "becomes", "warns"),
    [
        ((1024, 65536), [(5000, 65536)], False),
        ((1024, INFINITY), [(5000, INFINITY)], False),
        ((1024, 4096), [(4096, 4096)], True),
        ((8192, 65536), [], False),
        ((INFINITY, INFINITY), [], False),
    ],
)
def test_the_soft_limit_follows_the_connections(limits, becomes, warns: bool, monkeypatch, caplog) -> None:
    """It is raised to what connections need, never lowered, never above the hard limit; too little is said."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: asked.append(pair))
    with caplog.at_level(logging.WARNING):
        raise_file_limit(5000)
    assert asked == becomes
    assert bool(caplog.records) == warns
